"""Published claims about gradient inversion that take minutes to check: one command each, with the tolerance it is held to.

    python benchmarks/claims.py batches          more images, more iterations; one image at a time or all at once (Zhu et al. 2019)
    python benchmarks/claims.py gaps             cosine minds no scale, squared differences do (initialization study)
    python benchmarks/claims.py batchnorm        BatchNorm in training mode against eval mode (initialization study)
    python benchmarks/claims.py statistics       what a client in training mode sends back of its batch, for GradInversion
    python benchmarks/claims.py initializations  weight families times activations (initialization study)
    python benchmarks/claims.py stages           an untrained network and a trained one (Zhu et al.: at any time)
    python benchmarks/claims.py layers           gap and error fall together (Zhu et al. 2019)
    python benchmarks/claims.py fedavg           five local steps, imitated or taken for one gradient (Dimitrov et al. 2022)
    python benchmarks/claims.py gaps-compared    squared, cosine, Gaussian gap in DLG's setting
    python benchmarks/claims.py precode          PRECODE's MLP: its own attack, and exact inversion (Scheliga et al. 2022)
    python benchmarks/claims.py precode-cnn      PRECODE on a LeNet against attackers who know more and more
    python benchmarks/claims.py resnet           DLG on a ResNet with sigmoids and without strides (Zhu et al. 2019)
    python benchmarks/claims.py many-networks    one image, many random networks, 40 % of the gradient dropped (Opt_ML)
    python benchmarks/claims.py gan              DLG beside the GAN it was compared with, in colour and in grey (Zhu et al. 2019)
    python benchmarks/claims.py batch-sizes      PSNR of 1 to 16 images on the McMahan CNN (initialization study)
    python benchmarks/claims.py rounds           noise on 1, 4 and 16 updates of the same image, by who knows of it
    python benchmarks/claims.py undoing          MixUp, InstaHide, ATS by exact inversion, undone
    python benchmarks/claims.py mixup            mixtures, undone by their soft labels
    python benchmarks/claims.py instahide        mixtures with pixels reflected at random, undone (Carlini et al. 2021)
    python benchmarks/claims.py ats              transformed images, their policy run backwards
    python benchmarks/claims.py budget           thefts by who knows the defense, and after twice as many evaluations
    python benchmarks/claims.py resolution       16, 32 and 64 pixels a side for as many evaluations (Zhu et al. 2019)

Images are of CIFAR-10 under $FEDSIM_DATA, or embedded ones with --data synthetic; --side resizes them. One thread.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

import attacks
from attacks import Adam, CosineGap, GaussianGap, GradientMatching, SquaredGap, Stop, metrics
from defenses import ATS, GaussianNoise, InstaHide, MixUp, StochasticQuantization, TopK, UniformQuantization
from experiments.pictures import agreement
from fedsim.client import chance_seeded
from fedsim.data import Dataset, Images, load
from fedsim.models import Init, Kaiming, Precode, Uniform, Xavier, lenet, mcmahan_cnn, mlp, precode_mlp, resnet20
from fedsim.observation import Attack, Knowledge, Observation, Reconstruction
from fedsim.seeding import generator, seed_of
from fedsim.training import evaluate, local_update, split
from fedsim.wire import pack, unpack

Truth = tuple[Tensor, Tensor]
BAR = -10 * math.log10(metrics.BARS["MSE < 0.03"].level)  # dB


def victims(
    data: Dataset,
    build: Callable[[torch.Generator], nn.Module],
    count: int,
    images: int = 1,
    batch: int | None = None,
    epochs: int = 1,
    lr: float = 1.0,
) -> tuple[nn.Module, list[Observation], list[Truth], Knowledge]:
    """`count` clients with `images` random images and a random network each, and the updates they send; what models draw too."""
    seen, truth = [], []
    batch = batch or images
    for i in range(count):
        model = build(generator(0, "network", i))
        params, buffers = split(model)
        index = torch.randint(len(data.train.labels), (images,), generator=generator(0, "images", i))
        x, y = data.train.batch(index)
        orders = [torch.randperm(images, generator=generator(0, "order", i, epoch)) for epoch in range(epochs)]
        batches = [(x[part], y[part]) for order in orders for part in order.split(batch)]
        with chance_seeded(model, x, seed_of(0, "dropout", i)):
            trained = local_update(model, params, buffers, batches, lr=lr)
        seen.append(Observation(params, pack(trained.update), images, client=i, buffers=buffers, sent_buffers=trained.buffers))
        truth.append((x, y))
    known = Knowledge(data.image_shape, 10, batch_size=batch, lr=lr, local_steps=len(batches), labels=[y for _, y in truth])
    return model, seen, truth, known


def lenets(data: Dataset, **settings: Any) -> Callable[[torch.Generator], nn.Module]:
    """DLG's LeNet for images of `data`, as `victims` draws it."""
    return lambda rng: lenet(data.image_shape, 10, rng=rng, **settings)


def psnr(found: Sequence[Reconstruction], truth: Sequence[Truth]) -> Tensor:
    """(N,) decibels of all images, each batch matched to the truth."""
    scores = []
    for one, (x, _) in zip(found, truth, strict=True):
        i, j = metrics.match(one.images, x)
        scores.append(metrics.psnr_db(one.images[i], x[j]))
    return torch.cat(scores)


def verdict(claim: str, holds: bool) -> None:
    """The line that says whether a check passed."""
    print(f"  {'holds' if holds else 'DOES NOT HOLD'}: {claim}")


def run(attack: GradientMatching, model: nn.Module, seen: Sequence[Observation], known: Knowledge) -> list[Reconstruction]:
    """The attack with one seed for all claims."""
    return attack(seen, known, model, generator(0, "claim"))


def _evaluations_to(one: Reconstruction, x: Tensor, bar: Callable[[Tensor, Tensor], bool]) -> float:
    """When the trace of a reconstruction first passes a bar, its batch matched to the truth; inf if it never does."""
    assert one.trace is not None
    moments = zip(one.trace.evaluations, one.trace.images, strict=True)
    return next((float(e) for e, made in moments if bar(made[metrics.align(made, x)], x)), math.inf)


def batches(data: Dataset, count: int) -> None:
    """Evaluations until a batch's mean PSNR first reaches 20 dB. With a little total variation, without which two are too many."""
    medians: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {}
    updates: tuple[Literal["joint", "round_robin"], ...] = ("joint", "round_robin")
    for update in updates:
        for images in (1, 2, 4, 8):
            model, seen, truth, known = victims(data, lenets(data), count, images)
            attack = attacks.idlg(evaluations=1000 + 750 * images, tv=1e-3, update=update, record=50)
            found = run(replace(attack, labels="given"), model, seen, known)
            needed = [
                _evaluations_to(one, x, lambda made, true: float(metrics.psnr_db(made, true).mean()) > 20)
                for one, (x, _) in zip(found, truth, strict=True)
            ]
            scores = psnr(found, truth)
            medians.setdefault(update, []).append(sorted(needed)[len(needed) // 2])
            rates.setdefault(update, []).append(float((scores > 20).float().mean()))
            print(
                f"  {update:12s} batch {images}: median evaluations to 20 dB {medians[update][-1]:6.0f}, images above 20 dB"
                f" {int((scores > 20).sum())}/{len(scores)}, median {scores.median():.1f} dB",
                flush=True,
            )
    joint = medians["joint"]
    verdict("iterations increase with the batch", all(a < b for a, b in pairwise(joint)))
    verdict(f"8 images take 3 to 30 times the iterations of one: {joint[3] / joint[0]:.1f}", 3 <= joint[3] / joint[0] <= 30)
    verdict("one image at a time succeeds at least as often as all at once", sum(rates["round_robin"]) >= sum(rates["joint"]))


def _study(init: Init, activation: str, data: Dataset) -> Callable[[torch.Generator], nn.Module]:
    return lambda rng: mcmahan_cnn(data.image_shape, 10, norm="batch", activation=activation, init=init, rng=rng).eval()


def gaps(data: Dataset, count: int) -> None:
    """The study's attack with both gaps, and with gradients a hundred times as large."""
    model, seen, truth, known = victims(data, _study(Kaiming(), "relu", data), count)
    cosine = attacks.cosine_adam(told=True)
    squared = replace(cosine, gap=SquaredGap())
    # The study's sum of squares is not divided by a unit: a gradient that is small stays small beside Adam's epsilon.
    large = [replace(one, packets=pack({n: 100 * t for n, t in one.update.items()})) for one in seen]
    scores = {
        "cosine": psnr(run(cosine, model, seen, known), truth).mean(),
        "cosine, 100 times the gradient": psnr(run(cosine, model, large, known), truth).mean(),
        "squared": psnr(run(squared, model, seen, known), truth).mean(),
        "squared, 100 times the gradient": psnr(run(squared, model, large, known), truth).mean(),
    }
    for name, value in scores.items():
        print(f"  {name:32s} {value:5.1f} dB")
    a, b, c, d = scores.values()
    verdict("cosine is blind to the scale (0.5 dB)", abs(a - b) < 0.5)
    verdict("squared is not", abs(c - d) > 0.5)
    verdict("cosine is better by 4 dB in this setting", a >= c + 4)


def batchnorm(data: Dataset, count: int) -> None:
    """The study's attack on a network in eval mode, and in training mode."""
    losses, scores = {}, {}
    build = _study(Kaiming(), "relu", data)
    for mode in ("eval", "train"):
        model, seen, truth, known = victims(data, lambda rng, mode=mode: build(rng).train(mode == "train"), count)  # type: ignore[misc]
        found = run(attacks.cosine_adam(told=True, skip_zero=True), model, seen, known)
        losses[mode] = torch.tensor([one.loss for one in found]).mean()
        scores[mode] = psnr(found, truth).mean()
        zeros = torch.stack([torch.cat([t.flatten() for t in one.update.values()]).eq(0).float().mean() for one in seen]).mean()
        print(f"  {mode:5s} final cosine loss {losses[mode]:.4f}   {scores[mode]:5.1f} dB   zero gradients {zeros:.1%}")
    verdict("eval mode ends with at most a third of the loss", bool(losses["eval"] <= losses["train"] / 3))
    verdict("eval mode leaks 3 dB more", bool(scores["eval"] >= scores["train"] + 3))


def statistics(data: Dataset, count: int) -> None:
    """GradInversion of 4 images from a network in training mode: by the broadcast statistics, and by those of the batch."""
    gains = []
    model, seen, truth, known = victims(
        data,
        lambda rng: mcmahan_cnn(data.image_shape, 10, norm="batch", mean=data.mean, std=data.std, rng=rng).train(),
        count,
        images=4,
    )
    attack = attacks.gradinversion(restarts=1, iterations=250, consistency=0)
    for defense in (None, GaussianNoise(relative=1.0)):
        sent = seen
        if defense:
            sent = [replace(one, packets=defense(one.packets, {}, generator(0, "noise", one.client))[0]) for one in seen]
        broadcast, own = (
            psnr(run(attack, model, some, known), truth) for some in ([replace(one, sent_buffers={}) for one in sent], sent)
        )
        gains.append(float((own - broadcast).mean()))
        print(f"  {defense or 'no defense'}: {broadcast.mean():.1f} dB, {own.mean():.1f} dB", flush=True)
    verdict(f"what the client sends back gains 3 dB: {gains[0]:+.1f}", gains[0] >= 3)
    verdict(f"past noise as well, which leaves it as it is: {gains[1]:+.1f}", gains[1] >= 3)


def initializations(data: Dataset, count: int) -> None:
    """Mean PSNR at batch 1 of four families, each with uniform and normal weights."""
    means: dict[str, list[float]] = {}
    for activation in ("relu", "sigmoid"):
        for name, family in (("Xavier", Xavier), ("Kaiming", Kaiming)):
            for distribution in ("uniform", "normal"):
                model, seen, truth, known = victims(data, _study(family(distribution), activation, data), count)
                scores = psnr(run(attacks.cosine_adam(told=True, skip_zero=True), model, seen, known), truth)
                means.setdefault(f"{name}-{activation}", []).append(float(scores.mean()))
                print(
                    f"  {name:8s} {activation:8s} {distribution:8s} {scores.mean():5.1f} dB (sd {scores.std():.1f}, n={count})",
                    flush=True,
                )
    mean = {name: sum(values) / len(values) for name, values in means.items()}
    verdict("Xavier-ReLU below Kaiming-ReLU by 4 dB", mean["Kaiming-relu"] - mean["Xavier-relu"] >= 4)
    relu, sigmoid = (
        max(mean[f"{f}-relu"] for f in ("Xavier", "Kaiming")),
        min(mean[f"{f}-sigmoid"] for f in ("Xavier", "Kaiming")),
    )
    verdict("both ReLU below both sigmoid", relu < sigmoid)
    verdict(
        f"Kaiming-sigmoid below Xavier-sigmoid ({mean['Kaiming-sigmoid']:.1f}, {mean['Xavier-sigmoid']:.1f} dB)",
        mean["Kaiming-sigmoid"] < mean["Xavier-sigmoid"],
    )
    verdict("uniform or normal: less than 2 dB apart in each family", all(abs(a - b) < 2 for a, b in means.values()))


def stages(data: Dataset, count: int) -> None:
    """DLG's LeNet at its initialization, and after training on 10,000 images: the same victims, by a gap that minds no scale."""
    scores = []
    model = lenet(data.image_shape, 10, rng=generator(0, "network", 0))
    params, buffers = split(model)
    victim = torch.randint(len(data.train.labels), (count,), generator=generator(0, "images", 0))
    done = 0
    for epochs in (0, 1, 10):
        for epoch in range(done, epochs):
            order = torch.randperm(10_000, generator=generator(0, "epoch", epoch))
            trained = local_update(model, params, buffers, (data.train.batch(part) for part in order.split(20)), lr=0.05)
            params = {name: t - trained.update[name] for name, t in params.items()}
        done = epochs
        seen, truth = [], []
        for i in victim:
            x, y = data.train.batch(i[None])
            seen.append(Observation(params, pack(local_update(model, params, buffers, [(x, y)], lr=1.0).update), 1, client=int(i)))
            truth.append((x, y))
        known = Knowledge(data.image_shape, 10, lr=1.0, local_steps=1)
        found = run(attacks.cosine_lbfgs(restarts=2), model, seen, known)
        decibels = psnr(found, truth)
        labels = sum(int(one.labels[0] == y[0]) for one, (_, y) in zip(found, truth, strict=True))
        scores.append(float(decibels.mean()))
        accuracy, _ = evaluate(model, params, buffers, data.test.batches(500))
        print(
            f"  after {epochs:2d} epochs ({accuracy:.1%} test accuracy): {decibels.mean():.1f} dB, labels {labels}/{count}",
            flush=True,
        )
    verdict("every stage leaks 12 dB or more", min(scores) >= 12)
    verdict("every stage within 4 dB of the initialization", max(abs(s - scores[0]) for s in scores) <= 4)


def layers(data: Dataset, count: int) -> None:
    """Rank correlation of what is minimised and the image's error, over the run, where the search converged."""
    model, seen, truth, known = victims(data, lenets(data), count)
    found = run(attacks.idlg(evaluations=2500, record=25), model, seen, known)
    ranks = [agreement(one.trace, x) for one, (x, _) in zip(found, truth, strict=True) if one.converged and one.trace is not None]
    print(f"  Spearman of loss and MSE on {len(ranks)} converged of {count}: {', '.join(f'{r:.3f}' for r in ranks)}")
    verdict("above 0.9 on every converged search", bool(ranks) and min(ranks) > 0.9)


def fedavg(data: Dataset, count: int) -> None:
    """Five local steps, the attack that imitates them beside the one that takes the update for one gradient."""
    for title, settings in {
        "1 image, 5 epochs, lr 0.1": {"images": 1, "epochs": 5, "lr": 0.1},
        "4 images as one batch, 5 epochs, lr 0.1": {"images": 4, "epochs": 5, "lr": 0.1},
        "5 images, batches of 1, 1 epoch, lr 0.02": {"images": 5, "batch": 1, "lr": 0.02},
    }.items():
        build = lenets(data, activation="silu", init=Xavier())
        model, seen, truth, known = victims(data, build, count, **settings)
        attack = attacks.fedavg()
        scores = {
            name: psnr(run(replace(attack, imitate=on), model, seen, known), truth)
            for name, on in (("imitated", True), ("one gradient", False))
        }
        for name, of in scores.items():
            print(
                f"  LeNet (SiLU), {title}: {name:12s} mean {of.mean():5.1f} dB, above 20 dB {int((of > 20).sum())}/{len(of)}",
                flush=True,
            )
        gain = float(scores["imitated"].mean() - scores["one gradient"].mean())
        verdict(f"imitating five local steps gains 3 dB: {gain:+.1f}", gain >= 3)


def gaps_compared(data: Dataset, count: int) -> None:
    """Success of DLG's search under each gap."""
    model, seen, truth, known = victims(data, lenets(data), count)
    for gap in (SquaredGap(), CosineGap(), GaussianGap()):
        attack = replace(attacks.idlg(evaluations=1500), gap=gap, stop=Stop(threshold=1e-7))
        found = run(attack, model, seen, known)
        decibels = psnr(found, truth)
        print(
            f"  {gap!r:28s} above 20 dB {int((decibels > 20).sum())}/{count}, median {decibels.median():.1f} dB,"
            f" {sum(one.evaluations for one in found) / count:.0f} evaluations",
            flush=True,
        )


def ssims(found: Sequence[Reconstruction], truth: Sequence[Truth]) -> Tensor:
    """(N,) structural similarity of victims of one image."""
    return torch.cat([metrics.ssim(one.images, x) for one, (x, _) in zip(found, truth, strict=True)])


def precode(data: Dataset, count: int) -> None:
    """SSIM on PRECODE's MLP without and with its bottleneck; exact inversion of all victims, the search on 4 of them."""
    search = attacks.precode_naive(iterations=100, rate=0.1, told=True)  # for the paper's 7,000 at 0.01, which need an hour
    naive = {}
    for name, bottleneck in (("without", None), ("with", Precode())):
        build = lambda rng, inside=bottleneck: precode_mlp(  # noqa: E731
            data.image_shape, 10, bottleneck=inside, mean=data.mean, std=data.std, rng=rng
        )
        model, seen, truth, known = victims(data, build, 4)
        naive[name] = ssims(run(search, model, seen, known), truth)
        print(
            f"  {name:8s} PRECODE, search: mean SSIM {naive[name].mean():.3f},"
            f" SSIM >= 0.6 on {int((naive[name] >= 0.6).sum())}/{len(naive[name])}",
            flush=True,
        )
    model, seen, truth, known = victims(data, build, count)
    exact = attacks.Analytic()(seen, replace(known, labels=None), model, generator(0, "claim"))
    errors = torch.cat([metrics.mse(one.images, x) for one, (x, _) in zip(exact, truth, strict=True)])
    labels = sum(int(one.labels[0] == y[0]) for one, (_, y) in zip(exact, truth, strict=True))
    similar = int((ssims(exact, truth) >= 0.6).sum())
    print(f"  with     PRECODE, analytic: SSIM >= 0.6 on {similar}/{count}, worst MSE {errors.max():.1e}, labels {labels}/{count}")
    verdict(
        "the search steals all without PRECODE (SSIM above 0.95) and none with it (below 0.1)",
        bool(naive["without"].mean() > 0.95 and naive["with"].mean() < 0.1),
    )
    verdict("PRECODE reduces the success of attacks to 0 %", similar == 0)
    verdict(
        "dividing by the bias's gradient steals every image (MSE below 1e-10) and label",
        bool((errors < 1e-10).all() and labels == count),
    )


def precode_cnn(data: Dataset, count: int) -> None:
    """PSNR and SSIM on a LeNet (SiLU) behind PRECODE, by attackers who are told the labels and know more and more."""
    scores = {}
    adam = Adam(600, rate=0.1, signed=True)
    build = lambda rng, inside=None: lenet(  # noqa: E731
        data.image_shape, 10, activation="silu", init=Xavier(gain=1.5), bottleneck=inside, mean=data.mean, std=data.std, rng=rng
    )
    for name, attack, inside in (
        ("no PRECODE, Adam", attacks.precode_naive(tv=1e-3, told=True), None),
        ("no PRECODE, L-BFGS", attacks.precode_aware(evaluations=600, told=True), None),
        ("PRECODE, naive", attacks.precode_naive(tv=1e-3, told=True), Precode()),
        ("PRECODE, ignore", attacks.precode_ignore(told=True), Precode()),
        ("PRECODE, joint", attacks.precode_aware(evaluations=600, told=True), Precode()),
    ):
        model, seen, truth, known = victims(data, lambda rng, inside=inside: build(rng, inside), count)  # type: ignore[misc]
        search = replace(attack, optimizer=adam) if isinstance(attack.optimizer, Adam) else attack
        found = run(search, model, seen, known)
        scores[name], similar = psnr(found, truth).mean(), ssims(found, truth)
        print(
            f"  {name:20s} {scores[name]:5.1f} dB, mean SSIM {similar.mean():.3f}, SSIM >= 0.6 on"
            f" {int((similar >= 0.6).sum())}/{count}, converged {sum(one.converged for one in found)}/{count}",
            flush=True,
        )
    naive, ignore, joint = (scores[f"PRECODE, {name}"] for name in ("naive", "ignore", "joint"))
    verdict(f"ignoring the gradients behind the draw gains 3 dB: {ignore - naive:+.1f}", bool(ignore >= naive + 3))
    verdict(f"looking for the draw gains 3 dB: {joint - naive:+.1f}", bool(joint >= naive + 3))


def resnet(data: Dataset, count: int) -> None:
    """DLG on a ResNet-20 with sigmoids, without strides and norms, weights U(-0.5, 0.5); the gap counts every layer the same."""
    build = lambda rng: resnet20(  # noqa: E731
        data.image_shape, 10, norm="none", activation="sigmoid", strides=False, init=Uniform(), rng=rng
    )
    model, seen, truth, known = victims(data, build, count)
    for gap in (SquaredGap(), GaussianGap()):
        found = run(replace(attacks.idlg(evaluations=300), gap=gap, stop=Stop()), model, seen, known)
        errors = torch.cat([metrics.mse(one.images, x) for one, (x, _) in zip(found, truth, strict=True)])
        passed = int((errors < 0.03).sum())
        print(
            f"  {gap!r:14s} {data.image_shape[1]} pixels a side: MSE < 0.03 on {passed}/{count}, median {errors.median():.4f},"
            f" {sum(one.evaluations for one in found) / count:.0f} evaluations",
            flush=True,
        )
        verdict("MSE < 0.03 on half of the images", 2 * passed >= count)


def plain_dlg(model: nn.Module, target: Mapping[str, Tensor], x: Tensor, rng: torch.Generator) -> tuple[float, Tensor]:
    """Final gap and image of DLG's script: 100 steps of torch's L-BFGS with its defaults, from noise in the shape of `x`."""
    weights = dict(model.named_parameters())
    image = torch.randn(x.shape, generator=rng).requires_grad_()
    logits = torch.randn(1, 100, generator=rng).requires_grad_()
    optimizer = torch.optim.LBFGS([image, logits])

    def closure() -> Tensor:
        optimizer.zero_grad()
        task = nn.functional.cross_entropy(model(image), logits.softmax(-1))
        made = torch.autograd.grad(task, list(weights.values()), create_graph=True)
        gap = torch.stack([(g - target[name]).square().sum() for name, g in zip(weights, made, strict=True)]).sum()
        gap.backward(inputs=[image, logits])
        return gap

    gaps = [float(optimizer.step(closure).detach()) for _ in range(100)]
    return gaps[-1], image.detach().nan_to_num().clamp(0, 1)


def many_networks(data: Dataset, count: int) -> None:
    """DLG's own loop (torch's L-BFGS, 100 outer steps) on what top-k leaves of one image's gradient, by random networks."""
    x, y = data.train.batch(torch.tensor([25]))
    losses, errors = [], []
    for i in range(count):
        model = lenet(data.image_shape, 100, convs=4, rng=generator(0, "network", i))
        update = local_update(model, *split(model), [(x, y)], lr=1.0).update
        packets, _ = TopK(0.6)(pack(update), {}, generator(0, "defense"))
        final, image = plain_dlg(model, unpack(packets), x, generator(0, "start", i))
        losses.append(final)
        errors.append(metrics.mse(image, x).item())
    loss, error = torch.tensor(losses), torch.tensor(errors)
    print(f"  final gap: mean {loss.mean():.2f}, median {loss.median():.2f}, from {loss.min():.2f} to {loss.max():.2f}")
    print(f"  MSE: median {error.median():.3f}, from {error.min():.3f} to {error.max():.3f}")
    verdict("median final gap 2 to 5 (published 2.9568)", bool(2 <= loss.median() <= 5))
    verdict("median MSE above 0.1", bool(error.median() > 0.1))


def resolution(data: Dataset, count: int) -> None:
    """DLG with the label read off, on the same images at three sizes; then with four times the evaluations."""
    scores: dict[int, list[float]] = {}
    for evaluations in (250, 1000):
        for side in (16, 32, 64):
            small = load(data.name, train_size=1000, test_size=10, side=side)
            model, seen, truth, known = victims(small, lenets(small), count)
            found = run(attacks.idlg(evaluations=evaluations), model, seen, known)
            scores.setdefault(evaluations, []).append(float(psnr(found, truth).mean()))
            print(f"  {evaluations:5d} evaluations, {side} pixels a side: {scores[evaluations][-1]:5.1f} dB", flush=True)
    few, many = scores.values()
    verdict("PSNR does not rise with the resolution", few[0] >= few[1] >= few[2])
    verdict(f"64 pixels a side are 3 dB below 32: {few[2] - few[1]:+.1f}", few[2] <= few[1] - 3)
    verdict(
        f"with four times the evaluations half of that is left: {many[2] - many[1]:+.1f}",
        many[1] - many[2] <= (few[1] - few[2]) / 2,
    )


def gan(data: Dataset, count: int) -> None:
    """DLG's images and the GAN's from the same updates of DLG's LeNet; what the GAN draws of a trained network; labels given."""
    grey = load("synthetic", train_size=10_000, test_size=1000)
    for one in (data, replace(grey, name="synthetic, in grey", train=_grey(grey.train), test=_grey(grey.test))):
        model, seen, truth, known = victims(one, lenets(one), count)
        images, labels = (torch.cat(parts) for parts in zip(*truth, strict=True))
        stolen = run(replace(attacks.idlg(evaluations=2000, record=25), labels="given"), model, seen, known)
        drawn = attacks.gan(told=True)(seen, known, model, generator(0, "claim"))
        dlg, theirs = (metrics.mse(torch.cat([r.images for r in made]), images) for made in (stolen, drawn))
        needed = [
            _evaluations_to(r, x, lambda a, b: float(metrics.mse(a, b)) < 0.03) for r, (x, _) in zip(stolen, truth, strict=True)
        ]
        guesses = metrics.baselines(images, one.mean_image)
        scores = {"DLG": dlg, "GAN": theirs, **{name: guess["mse"] for name, guess in guesses.items()}}
        print(f"  {one.name}: DLG below MSE 0.03 after {sorted(needed)[count // 2]:.0f} evaluations, median")
        print("    median MSE, and images below 0.03: ", end="")
        print(", ".join(f"{name} {e.median():.3f} {int((e < 0.03).sum())}/{count}" for name, e in scores.items()), flush=True)
        verdict("DLG's median MSE is below 0.03, and a fifth of the GAN's", bool(dlg.median() < min(0.03, theirs.median() / 5)))
        verdict("DLG is below 0.03 for half of single attempts", bool((dlg < 0.03).float().mean() >= 0.5))
        verdict(f"the GAN's median MSE is above 0.2: {theirs.median():.2f}", bool(theirs.median() > 0.2))

        statistics = {"mean": one.mean, "std": one.std}
        model, observed, _, _ = victims(one, lenets(one, **statistics), count)
        drawn = attacks.gan(told=True)(observed, known, model, generator(0, "claim"))
        theirs = metrics.mse(torch.cat([r.images for r in drawn]), images)
        print(f"    of networks that normalise pixels, as a federation's do, the GAN's median MSE is {theirs.median():.3f}")

        model = lenet(
            one.image_shape, 10, activation="silu", init=Xavier("uniform", 1.5), rng=generator(0, "network"), **statistics
        )
        params, buffers = split(model)
        order = torch.randperm(10_000, generator=generator(0, "epoch"))
        trained = local_update(model, params, buffers, (one.train.batch(part) for part in order.split(20)), lr=0.05)
        params = {name: t - trained.update[name] for name, t in params.items()}
        accuracy, _ = evaluate(model, params, buffers, one.test.batches(500))
        seen = [replace(s, params=params, buffers=buffers) for s in seen]
        drawn = attacks.gan(told=True)(seen, known, model, generator(0, "claim"))
        means = torch.stack([one.train.pixels[one.train.labels == label].float().mean(0) / 255 for label in labels])
        likeness = [float(metrics.ssim(torch.cat([r.images for r in drawn]), x).mean()) for x in (means, images)]
        print(f"    of a network of {accuracy:.0%} accuracy the GAN draws images of SSIM", end=" ")
        print(f"{likeness[0]:.3f} to the class's mean, {likeness[1]:.3f} to the client's", flush=True)
        verdict("the GAN shows the class rather than the image", likeness[0] > likeness[1])


def batch_sizes(data: Dataset, count: int) -> None:
    """PSNR after the study's 500 iterations of Adam on the cosine, the McMahan CNN, two weight families, labels given."""
    scores: dict[str, list[float]] = {}
    for family, init in (("Kaiming", Kaiming("normal")), ("Xavier", Xavier("normal"))):
        for images in (1, 2, 4, 8, 16):
            model, seen, truth, known = victims(data, _study(init, "relu", data), count, images)
            found = run(attacks.cosine_adam(told=True), model, seen, known)
            scores.setdefault(family, []).append(float(psnr(found, truth).mean()))
            print(f"  {family:8s} batch {images:2d}: {scores[family][-1]:5.1f} dB", flush=True)
    for family, means in scores.items():
        verdict(f"{family}: PSNR falls with the batch", all(a > b for a, b in pairwise(means)))
    first, *_, last = (abs(a - b) for a, b in zip(*scores.values(), strict=True))
    verdict(f"the families are {first:.1f} dB apart at 1 image and {last:.1f} at 16: nearer", last < first)


def rounds(data: Dataset, count: int) -> None:
    """Gaussian noise of variance 1e-2 on DLG's LeNet, one image a client in all rounds, whose updates are held together."""
    means = []
    for number in (1, 4, 16):
        model, first, truth, known = victims(data, lenets(data), count)
        defense = GaussianNoise(variance=1e-2)
        seen = []
        for one, batch in zip(first, truth, strict=True):
            params, previous = one.params, None
            for round in range(1, number + 1):
                update = local_update(model, params, one.buffers, [batch], lr=1.0).update
                packets, _ = defense(pack(update), {}, generator(0, "noise", one.client, round))
                previous = replace(one, params=params, packets=packets, round=round, previous=previous, followed=True)
                params = {name: t - 0.001 * packets[name].dense() for name, t in params.items()}
            seen.append(cast(Observation, previous))
        attack = attacks.adapted(attacks.idlg(evaluations=1000), model, defense)
        assert attack is not None
        told = replace(known, defense=defense, public=data.test, same_images=True, labels=None)
        decibels = psnr(attack(seen, told, model, generator(0, "claim")), truth)
        means.append(float(decibels.mean()))
        above = int((decibels > 20).sum())
        print(f"  {number:2d} rounds: mean {means[-1]:.1f} dB, {above}/{count} above 20 dB", flush=True)
    verdict(f"sixteen rounds show more than one: {means[2] - means[0]:+.1f} dB", means[0] < means[1] < means[2])


def _undone(
    defense: MixUp | InstaHide | ATS,
    data: Dataset,
    count: int,
    images: int,
    number: int = 1,
    build: Callable[[torch.Generator], nn.Module] | None = None,
    attack: Attack = attacks.idlg(evaluations=600, tv=1e-3),
) -> tuple[Tensor, Tensor]:
    """Prints, and returns of who does not know of what was done to the images and of who does, the decibels of all images.

    number  updates of the same images, by one network
    """
    build = build or lenets(data)
    model, first, truth, known = victims(data, build, count, images)
    seen, trained = [], []
    for one, (x, y) in zip(first, truth, strict=True):
        previous = None
        for round in range(1, number + 1):
            mixed = defense.batch(x, y, 10, generator(0, "mixture", one.client, round))
            update = local_update(model, one.params, one.buffers, [mixed], lr=1.0).update
            previous = replace(one, packets=pack(update), round=round, previous=previous, followed=True)
        seen.append(cast(Observation, previous))
        trained.append(mixed)
    known = replace(known, labels=None, public=data.test, same_images=True)
    naive = attack([replace(one, previous=None) for one in seen], known, model, generator(0, "claim"))
    knowing = attacks.adapted(attack, model, defense)
    assert isinstance(knowing, attacks.Undone | attacks.Unmixed)
    search = knowing.attack
    if isinstance(search, attacks.Rehearsed):
        search = replace(search, rehearsals=4, evaluations=300)
    told, made = replace(known, defense=defense), []

    def matching(*arguments: Any, **named: Any) -> list[Reconstruction]:
        made.extend(search(*arguments, **named))
        return made

    found = replace(knowing, attack=matching)(seen, told, model, generator(0, "claim"))
    last = made[number - 1 :: number]
    # MixUp's permutation may leave an image as it is, and exact inversion finds it to the last bit.
    found_as, before, after = (psnr(*pair).clamp(max=60) for pair in ((last, trained), (naive, truth), (found, truth)))
    stolen = [int((scores > BAR).sum()) for scores in (before, after)]
    print(
        f"  {defense}, {images} images, {number} updates: naive {before.mean():.1f} dB, {stolen[0]}/{len(before)} stolen;"
        f" found as trained on at {found_as.mean():.1f} dB; undone {after.mean():.1f} dB, {stolen[1]}/{len(after)} stolen",
        flush=True,
    )
    return before, after


def undoing(data: Dataset, count: int) -> None:
    """The same by exact inversion through a layer of 1,024 ReLUs, from 1 to 4 updates of the same images; PSNR up to 60 dB."""
    for defense, images, number in (
        (MixUp(), 2, 1),
        (MixUp(), 4, 1),
        *((InstaHide(k=2, largest=0.9), 2, number) for number in (1, 2, 4)),
        (InstaHide(), 4, 1),
        (ATS(), 2, 1),
    ):
        _undone(
            defense, data, count, images, number, lambda rng: mlp(data.image_shape, 10, hidden=(1024,), rng=rng), attacks.Analytic()
        )


def mixup(data: Dataset, count: int) -> None:
    """PSNR of a batch's images behind MixUp, by who does not know of it and who undoes it; stolen is an MSE below 0.03."""
    two, four = _undone(MixUp(), data, count, 2), _undone(MixUp(), data, count // 2, 4)
    verdict(f"undoing it gains 3 dB from 2 images: {(two[1] - two[0]).mean():+.1f}", bool((two[1] - two[0]).mean() >= 3))
    verdict(f"and from 4: {(four[1] - four[0]).mean():+.1f}", bool((four[1] - four[0]).mean() >= 3))


def instahide(data: Dataset, count: int) -> None:
    """The same behind InstaHide with k=2, from one update and from two of the same images."""
    defense = InstaHide(k=2, largest=0.9)
    one, twice = _undone(defense, data, count, 2), _undone(defense, data, count // 2, 2, 2)
    verdict(f"undoing it gains 3 dB from one update: {(one[1] - one[0]).mean():+.1f}", bool((one[1] - one[0]).mean() >= 3))
    verdict(f"and from two: {(twice[1] - twice[0]).mean():+.1f}", bool((twice[1] - twice[0]).mean() >= 3))


def ats(data: Dataset, count: int) -> None:
    """The same behind ATS with its hybrid policy, whose transforms are run backwards: one image each."""
    before, after = _undone(ATS(), data, count, 1)
    verdict(f"undoing it gains 3 dB: {(after - before).mean():+.1f}", bool((after - before).mean() >= 3))


def budget(data: Dataset, count: int) -> None:
    """Thefts (MSE < 0.03) by who knows the defense after 1,000 evaluations, the study's budget, and after 2,000."""
    noise = [GaussianNoise(variance=variance) for variance in (1e-4, 1e-3, 1e-2, 1e-1)]
    kept = [TopK(ratio) for ratio in (0.7, 0.5, 0.3, 0.1)]
    levels = [UniformQuantization(16), StochasticQuantization(40), StochasticQuantization(16)]
    changes = []
    for defense in (*noise, *kept, *levels):
        model, first, truth, known = victims(data, lenets(data), count)
        sent = [defense(one.packets, {}, generator(0, "defense", one.client))[0] for one in first]  # type: ignore[operator]
        seen = [replace(one, packets=packets, followed=True) for one, packets in zip(first, sent, strict=True)]
        attack = attacks.adapted(attacks.idlg(evaluations=2000, record=999), model, defense)
        assert attack is not None
        found = attack(seen, replace(known, defense=defense, public=data.test), model, generator(0, "claim"))
        stolen = []
        for when in (1000, 2000):
            made = [_image_at(one, when) for one in found]
            stolen.append(sum(float(metrics.mse(x, y)) < 0.03 for x, (y, _) in zip(made, truth, strict=True)))
        changes.append((stolen[1] - stolen[0]) / count)
        print(f"  {defense}: {stolen[0]}/{count}, then {stolen[1]}/{count} ({found[0].attack})", flush=True)
    mean = sum(map(abs, changes)) / len(changes)
    verdict(f"twice the budget changes the rate of a defense by less than 5 points on average: {mean:.1%}", mean < 0.05)


def _image_at(one: Reconstruction, evaluations: int) -> Tensor:
    """What there was of a reconstruction after so many evaluations, or where it ended before."""
    assert one.trace is not None
    return one.trace.images[int((one.trace.evaluations <= evaluations).nonzero().max())]


def _grey(images: Images) -> Images:
    """The same in one channel, 28 pixels a side."""
    return Images(images.pixels.float().mean(1, keepdim=True)[..., 2:30, 2:30].round().to(torch.uint8), images.labels)


CLAIMS: dict[str, tuple[Callable[[Dataset, int], None], int]] = {
    "batches": (batches, 8),
    "gaps": (gaps, 3),
    "batchnorm": (batchnorm, 3),
    "statistics": (statistics, 3),
    "initializations": (initializations, 9),
    "stages": (stages, 8),
    "layers": (layers, 8),
    "fedavg": (fedavg, 4),
    "gaps-compared": (gaps_compared, 16),
    "precode": (precode, 20),
    "precode-cnn": (precode_cnn, 6),
    "resnet": (resnet, 8),
    "many-networks": (many_networks, 10),
    "gan": (gan, 16),
    "batch-sizes": (batch_sizes, 4),
    "rounds": (rounds, 8),
    "undoing": (undoing, 8),
    "mixup": (mixup, 8),
    "instahide": (instahide, 8),
    "ats": (ats, 8),
    "budget": (budget, 16),
    "resolution": (resolution, 6),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", choices=list(CLAIMS))
    parser.add_argument("--data", default="cifar10", help="dataset")
    parser.add_argument("--victims", type=int, help="how many networks, with images of their own")
    parser.add_argument("--side", type=int, help="pixels a side of the images")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    claim, count = CLAIMS[arguments.claim]
    data = load(arguments.data, side=arguments.side)
    print(f"{(claim.__doc__ or '').splitlines()[0]} {data.name}, {arguments.victims or count} victims")
    claim(data, arguments.victims or count)


if __name__ == "__main__":
    main()
