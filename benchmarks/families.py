"""What the attacks that are no plain search recover, on random victims: one command for each family.

    python benchmarks/families.py exact       analytic inversion, R-GAP, SPEAR: batches up to where they stop
    python benchmarks/families.py labels      labels of batches of 2 to 16, read off the update
    python benchmarks/families.py priors      a generative prior, searches among pixels, the GAN; no defense, noise, top-k
    python benchmarks/families.py text        words: matching, told or not; the bag; the span check; how a sentence appears

Images are of CIFAR-10 under $FEDSIM_DATA, or embedded ones with --data synthetic. One thread.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

import attacks
from attacks import metrics
from attacks.text import iteration_table
from defenses import GaussianNoise, NoDefense, StochasticQuantization, TopK
from fedsim.data import Corpus, Dataset, load
from fedsim.data.text import filled
from fedsim.defense import Defense
from fedsim.models import Xavier, bert_tiny, lenet, mlp_2nn, precode_mlp
from fedsim.observation import Attack, Knowledge, Observation, Reconstruction
from fedsim.seeding import generator
from fedsim.training import Batch, local_update, split
from fedsim.wire import pack

Build = Callable[[torch.Generator], nn.Module]


def victims(
    data: Dataset | Corpus, build: Build, count: int, size: int, defense: Defense = NoDefense()
) -> tuple[nn.Module, list[Observation], list[Batch]]:
    """`count` clients with a random network and a random batch of `size` each, and what they send."""
    seen, truth = [], []
    for i in range(count):
        model = build(generator(0, "network", i))
        params, buffers = split(model)
        index = torch.randperm(len(data.train.labels), generator=generator(0, "victims", i))[:size]
        truth.append(data.train.batch(index))
        update = local_update(model, params, buffers, truth[-1:], lr=1.0).update
        packets, _ = defense(pack(update), defense.init(update), generator(i, "defense"))
        seen.append(Observation(params, packets, size, client=i, buffers=buffers))
    return model, seen, truth


def timed(attack: Attack, seen: Sequence[Observation], known: Knowledge, model: nn.Module) -> tuple[list[Reconstruction], float]:
    """What the attack makes of the victims, and seconds for each."""
    began = time.perf_counter()
    found = attack(seen, known, model, generator(0, "attack"))
    return found, (time.perf_counter() - began) / len(seen)


def errors(
    found: Sequence[Reconstruction], truth: Sequence[Batch], score: Callable[[Tensor, Tensor], Tensor] = metrics.mse
) -> Tensor:
    """(N,) a metric of all images, each batch matched to the truth."""
    scores = []
    for one, (x, _) in zip(found, truth, strict=True):
        i, j = metrics.match(one.images, x)
        scores.append(score(one.images[i], x[j]))
    return torch.cat(scores)


def exact(data: Dataset, count: int) -> None:
    """Share of images with MSE < 1e-8."""
    shape, known = data.image_shape, Knowledge(data.image_shape, data.num_classes)
    statistics = {"mean": data.mean, "std": data.std}
    mlp, wide = (lambda rng: mlp_2nn(shape, 10, rng=rng, **statistics)), (lambda rng: precode_mlp(shape, 10, rng=rng, **statistics))
    sigmoid, leaky = (lambda rng: lenet(shape, 10, rng=rng)), (lambda rng: lenet(shape, 10, activation="leaky_relu", rng=rng))
    cells: list[tuple[str, Attack, str, Build, int]] = [
        *(("analytic", attacks.Analytic(), "mlp_2nn", mlp, size) for size in (1, 2, 4, 8)),
        ("rgap", attacks.RGAP(), "lenet, sigmoid", sigmoid, 1),
        ("rgap", attacks.RGAP(), "lenet, leaky ReLU", leaky, 1),
        *(("spear", attacks.SPEAR(), "mlp_2nn", mlp, size) for size in (4, 8, 16, 18)),
        ("spear", attacks.SPEAR(), "precode_mlp", wide, 16),
    ]
    for name, attack, network, build, size in cells:
        model, seen, truth = victims(data, build, count, size)
        found, seconds = timed(attack, seen, known, model)
        scores = errors(found, truth)
        labels = sum(metrics.label_accuracy(one.labels, y) for one, (_, y) in zip(found, truth, strict=True)) / count
        exact_ones, converged = int((scores < 1e-8).sum()), sum(one.converged for one in found)
        median = -10 * scores.median().log10()
        print(
            f"  {name:9s} {network:18s} batch {size:2d}: {exact_ones}/{len(scores)} exact, worst MSE {scores.max():.1e},"
            f" median {median:.0f} dB, labels {labels:.0%}, converged {converged}/{count}, {seconds:.1f} s each",
            flush=True,
        )


def labels(data: Dataset, count: int) -> None:
    """Share of labels read off the update of an untrained network, repetitions counted, and of whole batches."""
    for network, build in (("lenet", lenet), ("mlp_2nn", mlp_2nn)):
        for size in (1, 2, 4, 8, 16):
            _, seen, truth = victims(data, lambda rng, build=build: build(data.image_shape, 10, rng=rng), count, size)  # type: ignore[misc]
            right = [
                metrics.label_accuracy(attacks.analytic_labels(one.update, 10, size), y)
                for one, (_, y) in zip(seen, truth, strict=True)
            ]
            whole = sum(share == 1 for share in right)
            print(f"  {network:8s} batch {size:2d}: labels {sum(right) / count:.1%}, whole batches {whole}/{count}")


def priors(data: Dataset, count: int) -> None:
    """Median PSNR and SSIM on a SiLU LeNet, images of one."""
    known = Knowledge(data.image_shape, data.num_classes, public=data.test)
    build = partial(lenet, data.image_shape, 10, activation="silu", mean=data.mean, std=data.std, init=Xavier("uniform", 1.5))
    for defense in (NoDefense(), GaussianNoise(relative=0.3), GaussianNoise(relative=1.0), TopK(0.1), StochasticQuantization(4)):
        model, seen, truth = victims(data, lambda rng: build(rng=rng), count, 1, defense)
        print(f"  {defense}", flush=True)
        for name, attack in {
            "gias": attacks.gias(),
            "cosine_lbfgs": attacks.cosine_lbfgs(evaluations=600),
            "cosine_lbfgs tv=0.1": attacks.cosine_lbfgs(evaluations=600, tv=0.1),
            "gan": attacks.gan(),
        }.items():
            found, seconds = timed(attack, seen, known, model)
            decibels, ssim = errors(found, truth, metrics.psnr_db), errors(found, truth, metrics.ssim)
            print(f"    {name:20s} {decibels.median():5.1f} dB   SSIM {ssim.median():.2f}   {seconds:.1f} s each", flush=True)
    images = torch.cat([x for x, _ in truth])
    for name, of in metrics.baselines(images, data.mean_image).items():
        print(f"  {name:22s} {of['psnr_db'].median():5.1f} dB   SSIM {of['ssim'].median():.2f}")


def text(data: Corpus, count: int) -> None:
    """Share of words in their places, mean over sentences."""
    known = Knowledge(data.image_shape, data.num_classes)
    build = partial(bert_tiny, data.image_shape, data.num_classes)

    def show(name: str, attack: Attack, size: int = 1, told: bool = False, width: int = 64) -> None:
        model, seen, truth = victims(data, lambda rng: build(width=width, rng=rng), count, size)
        if told:
            attack_known = replace(known, labels=[y for _, y in truth])
        found, seconds = timed(attack, seen, attack_known if told else known, model)
        right, words = [], []
        for one, (x, y) in zip(found, truth, strict=True):
            ours, true = filled(one.images, one.labels), filled(x, y)
            i, j = metrics.match_sentences(ours, true)
            right.append(metrics.token_accuracy(ours[i], true[j]))
            words.append(metrics.tokens_found(ours, true))
        places, found_words = torch.cat(right), torch.cat(words)
        exact = f"exact {int((places == 1).sum())}/{len(places)}"
        print(
            f"  {name:28s} batch {size}: in place {places.mean():.2f} (least {places.min():.2f}), {exact},"
            f" words found {found_words.mean():.2f}, {seconds:.1f} s each",
            flush=True,
        )

    show("bag of tokens", attacks.BagOfTokens(), 3)
    for size, width in ((1, 64), (2, 64), (3, 64), (4, 128)):
        show(f"dager, width {width}", attacks.dager(), size, width=width)
    for gap in ("cosine", "squared"):
        show(f"dlg_text {gap}, told", attacks.dlg_text(gap, told=True), told=True)
    show("tag, told", attacks.tag(told=True), told=True)
    show("dlg_text cosine, not told", attacks.dlg_text(restarts=2))
    model, seen, truth = victims(data, lambda rng: build(rng=rng), 1, 1)
    recorded = replace(attacks.dlg_text(told=True), moments=(0, 10, 20, 30, 100, 200, 400, 600))
    (found,) = recorded(seen, replace(known, labels=[truth[0][1]]), model, generator(0, "attack"))
    assert found.trace is not None
    print(iteration_table(found.trace, data.vocabulary, filled(*truth[0])[0]))


FAMILIES: dict[str, tuple[Callable[..., None], int]] = {
    "exact": (exact, 3),
    "labels": (labels, 100),
    "priors": (priors, 8),
    "text": (text, 6),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=list(FAMILIES))
    parser.add_argument("--data", default="cifar10", help="dataset; text has its own")
    parser.add_argument("--victims", type=int, help="how many networks, with examples of their own")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    family, count = FAMILIES[arguments.family]
    data = load("text" if arguments.family == "text" else arguments.data)
    print(f"{(family.__doc__ or '').splitlines()[0]} {data.name}, {arguments.victims or count} victims")
    family(data, arguments.victims or count)


if __name__ == "__main__":
    main()
