"""Attacks per second: fedsim's engine beside one attack at a time, on the same images, networks and starts.

    python benchmarks/searches.py dlg                 original DLG (torch.optim.LBFGS, 300 outer steps) beside attacks.dlg
    python benchmarks/searches.py steps               one step of an attack on three networks: ms, share of matmul peak
    python benchmarks/searches.py twice               a large network's gradient of a gradient: PyTorch's own way beside ours
    python benchmarks/searches.py threads             the same for one image, by one thread and by all, alone and beside others
    python benchmarks/searches.py precision           the same on a GPU under PyTorch's switches for rounding and order
    python benchmarks/searches.py breaching --peer PYTHON
                                                      Inverting Gradients of `breaching`, installed elsewhere, beside ours

Images are of CIFAR-10 under $FEDSIM_DATA, or embedded ones with --data synthetic. One thread for everybody, unless there is a GPU.
"""

import argparse
import itertools
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

import attacks
from attacks import CosineGap, GradientMatching, metrics
from attacks.factored import gradients_of
from attacks.memory import keep_freed
from fedsim.data import Dataset, load
from fedsim.models import lenet, mcmahan_cnn, resnet18
from fedsim.observation import Knowledge, Observation
from fedsim.run import on_device
from fedsim.seeding import generator
from fedsim.setup import device_of
from fedsim.training import batch_loss, local_update, split
from fedsim.wire import pack

PEER = Path(__file__).parent / "peer_breaching.py"
MODELS = {"lenet": lenet, "mcmahan_cnn": mcmahan_cnn, "resnet18": resnet18}


@dataclass
class Victims:
    """Random images, each with a random network of its own, and the gradients that leak."""

    model: nn.Module
    seen: list[Observation]
    images: Tensor
    labels: Tensor
    known: Knowledge


def victims(data: Dataset, count: int, name: str = "lenet", heads: int = 10, device: str = "cpu") -> Victims:
    """`count` victims of the network called `name` with `heads` outputs, in eval mode."""
    index = torch.randint(len(data.train.labels), (count,), generator=generator(0, "victims"))
    images, labels = (t.to(device) for t in data.train.batch(index))
    seen = []
    for i in range(count):
        model = MODELS[name](data.image_shape, heads, rng=generator(0, "network", i)).to(device).eval()
        params, buffers = split(model)
        update = local_update(model, params, buffers, [(images[i : i + 1], labels[i : i + 1])], lr=1.0).update
        seen.append(on_device(Observation(params, pack(update), 1, client=i, buffers=buffers), torch.device(device)))
    return Victims(model, seen, images, labels, Knowledge(data.image_shape, heads, lr=1.0, local_steps=1))


@dataclass
class Outcome:
    """One attack: its seconds, those until MSE < 0.03 first held (inf if never), the final MSE and label, evaluations."""

    seconds: float
    until: float
    mse: float
    label_right: bool
    evaluations: int
    loss: float


def original_dlg(victims: Victims, i: int, start: Tensor, steps: int) -> Outcome:
    """Zhu et al. 2019 as published: L-BFGS of torch with its defaults, no line search, the sum of squared differences."""
    one, pixels = victims.seen[i], victims.images[i].numel()
    params = {name: t.clone().requires_grad_() for name, t in one.params.items()}
    target = list(one.update.values())
    image = start[:pixels].reshape(1, *victims.images.shape[1:]).clone().requires_grad_()
    logits = start[pixels:].reshape(1, -1).clone().requires_grad_()
    optimizer = torch.optim.LBFGS([image, logits])
    closures, loss = 0, torch.tensor(torch.inf)

    def closure() -> Tensor:
        nonlocal closures
        closures += 1
        optimizer.zero_grad()
        output = functional_call(victims.model, params, (image,))
        task = -(logits.softmax(-1) * output.log_softmax(-1)).sum(-1).mean()
        gradients = torch.autograd.grad(task, list(params.values()), create_graph=True)
        gap = torch.stack([(g - t).square().sum() for g, t in zip(gradients, target, strict=True)]).sum()
        gap.backward(inputs=[image, logits])
        return gap

    began, until, error = time.perf_counter(), float("inf"), float("inf")
    for _ in range(steps):
        loss = optimizer.step(closure).detach()
        error = metrics.mse(image.detach().nan_to_num(), victims.images[i : i + 1]).item()
        if error < 0.03 and until == float("inf"):
            until = time.perf_counter() - began
    seconds = time.perf_counter() - began
    return Outcome(seconds, until, error, bool(logits.argmax() == victims.labels[i]), closures, float(loss))


def batched_dlg(victims: Victims, attack: GradientMatching) -> tuple[list[Outcome], float]:
    """The same by fedsim, all victims as one program; and its seconds. A second, recorded run tells when MSE < 0.03 first held."""
    began = time.perf_counter()
    found = attack(victims.seen, victims.known, victims.model, generator(0, "attack"))
    seconds = time.perf_counter() - began
    traced = replace(attack, record=20)(victims.seen, victims.known, victims.model, generator(0, "attack"))
    outcomes = []
    total = sum(one.evaluations for one in found)
    for i, (one, other) in enumerate(zip(found, traced, strict=True)):
        error = metrics.mse(one.images, victims.images[i : i + 1]).item()
        assert other.trace is not None
        errors = metrics.mse(other.trace.images[:, 0], victims.images[i].expand_as(other.trace.images[:, 0]))
        first = (errors < 0.03).nonzero()
        until = float(other.trace.evaluations[first[0, 0]]) / total * seconds if len(first) else float("inf")
        right = bool(one.labels[0] == victims.labels[i])
        outcomes.append(Outcome(seconds * one.evaluations / total, until, error, right, one.evaluations, one.loss))
    return outcomes, seconds


def rate(successes: int, n: int) -> str:
    """k/n = p %, with its 95 % interval."""
    low, high = metrics.wilson(successes, n)
    return f"{successes}/{n} = {successes / n:.0%} [{low:.0%}, {high:.0%}]"


def show(name: str, outcomes: Sequence[Outcome], seconds: float) -> None:
    """One line of the DLG table."""
    n = len(outcomes)
    reached = sorted(one.until for one in outcomes if one.until < float("inf"))
    median = f"{reached[len(reached) // 2]:.2f} s" if reached else "never"
    right = rate(sum(one.mse < 0.03 for one in outcomes), n)
    labels = sum(one.label_right for one in outcomes)
    print(
        f"  {name:28s} {n / seconds:8.3f} attacks/s   {seconds / n:7.2f} s each   MSE < 0.03: {right:26s} after {median:9s}"
        f"   labels {labels}/{n}   {sum(one.evaluations for one in outcomes) / n:6.0f} evaluations"
        f" of {1000 * seconds / sum(one.evaluations for one in outcomes):.2f} ms",
        flush=True,
    )


def dlg(data: Dataset, arguments: argparse.Namespace) -> None:
    """Original DLG one at a time, beside attacks.dlg on the same victims and starts."""
    for heads in arguments.heads:
        v = victims(data, arguments.victims, heads=heads, device=arguments.device)
        attack = attacks.dlg()
        print(f"DLG on LeNet (sigmoid), {heads}-way head, {data.name}, {arguments.device}")
        if arguments.one_by_one:
            # The starts that the engine draws itself, see GradientMatching.__call__.
            seed = int(torch.randint(2**62, (), generator=generator(0, "attack")))
            plan = attacks.problems.Plan.of(v.seen[0], v.known, False)
            outcomes = []
            for i in range(min(arguments.one_by_one, len(v.seen))):
                start = attack._starts(plan, v.known, generator(seed, "start", 1, i, 0), None)[0].to(arguments.device)
                outcomes.append(original_dlg(v, i, start, arguments.steps))
            alone = sum(one.seconds for one in outcomes) / len(outcomes)
            show("one at a time", outcomes, sum(one.seconds for one in outcomes))
        cores = len(os.sched_getaffinity(0))
        for restarts, workers in ((1, 1), (1, cores), (3, cores)):
            ours, seconds = batched_dlg(v, replace(attack, restarts=restarts, workers=workers))
            how = f"best of {restarts}" if restarts > 1 else "one start"
            show(f"fedsim, {how}, {workers} core{'s' * (workers > 1)}", ours, seconds)
            diverged = sum(not one.loss < float("inf") for one in ours)
            print(f"    diverged: {diverged}/{len(ours)}", end="")
            print(f"; {alone * len(ours) / seconds:.1f} times the attacks per second" if arguments.one_by_one else "")


def matmul_peak(device: str) -> float:
    """Floating point operations per second of a large float32 matrix product."""
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device)
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def counted(attack: GradientMatching, v: Victims, evaluations: int) -> int:
    """Floating point operations of the matrix products and convolutions of an attack on one victim."""
    with FlopCounterMode(display=False) as counter:
        brief = replace(attack, optimizer=replace(attack.optimizer, evaluations=evaluations))
        brief(v.seen[:1], v.known, v.model, generator(0, "flops"))
    return counter.get_total_flops()


def steps(data: Dataset, arguments: argparse.Namespace) -> None:
    """Milliseconds of one step of an attack per victim: forward, backward, the gap's gradient, and the optimizer."""
    peak = matmul_peak(arguments.device)
    print(
        f"matmul peak {peak / 1e9:.0f} GFLOP/s on {arguments.device}, one thread"
        if arguments.device == "cpu"
        else f"{peak / 1e12:.0f} TFLOP/s"
    )
    print(f"  {'network':14s} {'attack':20s} {'victims':>8s} {'ms a step and victim':>22s} {'share of peak':>14s} {'MiB each':>9s}")
    for name in arguments.models:
        for label, attack in {
            "dlg (L-BFGS)": attacks.dlg(evaluations=arguments.evaluations),
            "inverting_gradients": attacks.inverting_gradients(iterations=arguments.evaluations),
        }.items():
            for count in arguments.counts:
                v = victims(data, count, name, device=arguments.device)
                attack = replace(attack, stop=attacks.Stop(), workers=1)
                flops = counted(attack, v, 3) - counted(attack, v, 2)
                if arguments.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                began = time.perf_counter()
                found = attack(v.seen, v.known, v.model, generator(0, "steps"))
                seconds = time.perf_counter() - began
                each = seconds / sum(one.evaluations for one in found)
                memory = f"{torch.cuda.max_memory_allocated() / count / 2**20:9.1f}" if arguments.device == "cuda" else f"{'':9s}"
                print(f"  {name:14s} {label:20s} {count:8d} {1000 * each:22.3f} {flops / each / peak:14.1%} {memory}", flush=True)


def plainly(loss: Callable[[Mapping[str, Tensor]], Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients that PyTorch differentiates again by its own means, in the place of `gradients_of`."""
    leaves = {name: t.detach().requires_grad_() for name, t in params.items()}
    return dict(zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True), strict=True))


def slope(v: Victims, gradients: Callable[..., dict[str, Any]]) -> Tensor:
    """The gradient, at noise in the place of all images, of its cosine gap to the first victim's update."""
    one = v.seen[0]
    images = torch.rand(v.images.shape, generator=generator(0, "twice")).to(v.images.device).requires_grad_()
    found = gradients(lambda leaves: batch_loss(v.model, leaves, one.buffers, images, v.labels), one.params)
    candidate = {name: t[None] if isinstance(t, Tensor) else t for name, t in found.items()}
    gap = CosineGap()(candidate, {name: t[None] for name, t in one.update.items()})
    return torch.autograd.grad(gap.sum(), images)[0]


WAYS = {"PyTorch": (plainly, False), "ours": (gradients_of, False), "memory kept": (gradients_of, True)}


def timed(data: Dataset, name: str, count: int, device: str, way: str, evaluations: int) -> tuple[float, list[float]]:
    """Median milliseconds of `slope` that way, and what it is; for a process of its own, where nothing has been freed yet."""
    torch.set_num_threads(1)
    v = victims(data, count, name, device=device)
    gradients, kept = WAYS[way]
    if kept:
        keep_freed()
    found, times = slope(v, gradients), []
    for _ in range(evaluations):
        began = time.perf_counter()
        float(slope(v, gradients).sum())
        times.append(time.perf_counter() - began)
    return 1000 * sorted(times)[len(times) // 2], found.flatten().tolist()


def twice(data: Dataset, arguments: argparse.Namespace) -> None:
    """Milliseconds of one gradient by a batch of images: by PyTorch's second derivatives, by ours, and by ours with memory kept."""
    print(f"one gradient of the cosine gap by the images, {data.name}, {arguments.device}, median of {arguments.evaluations}, ms")
    print(f"  {'network':14s} {'images':>6s}{''.join(f'{way:>14s}' for way in WAYS)}   times as fast   they differ by")
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for name in arguments.models:
            for count in arguments.counts:
                given = data, name, count, arguments.device
                (first, theirs), (second, ours), (third, _) = (
                    pool.submit(timed, *given, way, arguments.evaluations).result() for way in WAYS
                )
                off = math.dist(ours, theirs) / math.hypot(*theirs)
                print(
                    f"  {name:14s} {count:6d}{first:14.1f}{second:14.1f}{third:14.1f}   {first / third:13.2f}   {off:14.0e}",
                    flush=True,
                )


def threads(data: Dataset, arguments: argparse.Namespace) -> None:
    """Milliseconds of one gradient by an image, with one thread and with one a core, alone and beside a busy process a core."""
    many = os.cpu_count() or 1
    print(f"one gradient of the cosine gap by an image, {data.name}, CPU, median of {arguments.evaluations}, ms")
    print(f"  {'network':14s} {'beside':>8s} {'1 thread':>12s} {f'{many} threads':>12s}   times as fast by one")
    for name in arguments.models:
        v = victims(data, 1, name)
        for beside in ("nobody", "others"):
            command = [sys.executable, "-c", f"import os\nwhile os.getppid() == {os.getpid()}: pass"]
            others = [subprocess.Popen(command, start_new_session=True) for _ in range(many if beside == "others" else 0)]
            spent = []
            try:
                for count in (1, many):
                    torch.set_num_threads(count)
                    times = []
                    for _ in range(arguments.evaluations + 1):  # the first warms up
                        began = time.perf_counter()
                        float(slope(v, gradients_of).sum())
                        times.append(1000 * (time.perf_counter() - began))
                    spent.append(sorted(times[1:])[arguments.evaluations // 2])
            finally:
                for other in others:
                    other.kill()
                    other.wait()
                torch.set_num_threads(1)
            print(f"  {name:14s} {beside:>8s} {spent[0]:12.1f} {spent[1]:12.1f}   {spent[1] / spent[0]:20.2f}", flush=True)


def precision(data: Dataset, arguments: argparse.Namespace) -> None:
    """What a ResNet's gradient by 16 images costs under PyTorch's switches, and its distance from that under fedsim's."""
    v = victims(data, 16, "resnet18", device=arguments.device)
    expected = slope(v, gradients_of).double()
    print(f"one gradient of the cosine gap by 16 images, {data.name}, {arguments.device}, mean of {arguments.evaluations}")
    for deterministic, searched, tf32 in itertools.product((True, False), (False, True), (False, True)):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = searched, tf32
        off = float((slope(v, gradients_of).double() - expected).norm() / expected.norm())
        times = []
        for gradients in (gradients_of, plainly):
            for _ in range(3):
                float(slope(v, gradients).sum())
            began = time.perf_counter()
            for _ in range(arguments.evaluations):
                float(slope(v, gradients).sum())
            times.append(1000 * (time.perf_counter() - began) / arguments.evaluations)
        print(
            f"  deterministic {deterministic!s:5}   algorithms timed first {searched!s:5}   TF32 {tf32!s:5}"
            f"   ours {times[0]:6.1f} ms   PyTorch {times[1]:6.1f} ms   differs by {off:.1e}",
            flush=True,
        )


def breaching(data: Dataset, arguments: argparse.Namespace) -> None:
    """Inverting Gradients with the same settings: `breaching` one victim at a time, ours all at once, labels given."""
    count, iterations = arguments.victims, arguments.evaluations
    for name in arguments.models:
        v = victims(data, count, name)
        with tempfile.TemporaryDirectory() as folder:
            for i, one in enumerate(v.seen):
                save_file(
                    {f"param.{n}": t.contiguous() for n, t in one.params.items()}
                    | {f"gradient.{n}": t.contiguous() for n, t in one.update.items()}
                    | {"label": v.labels[i : i + 1], "shape": torch.tensor(v.images.shape[1:])},
                    Path(folder) / f"{i}.safetensors",
                )
            subprocess.run([arguments.peer, "-W", "ignore", str(PEER), name, folder, str(iterations)], check=True)
            theirs = [load_file(Path(folder) / f"found-{i}.safetensors") for i in range(count)]
        attack = replace(attacks.inverting_gradients(iterations=iterations, told=True), stop=attacks.Stop(), workers=1)
        known = replace(v.known, labels=list(v.labels.split(1)))
        began = time.perf_counter()
        ours = attack(v.seen, known, v.model, generator(0, "breaching"))
        seconds = time.perf_counter() - began
        print(f"Inverting Gradients, {iterations} iterations, {name}, {count} victims of {data.name}, one thread")
        for who, images, spent in (
            ("breaching", torch.cat([one["image"] for one in theirs]), sum(float(one["seconds"]) for one in theirs)),
            ("fedsim", torch.cat([one.images for one in ours]), seconds),
        ):
            psnr = metrics.psnr_db(images, v.images)
            right = rate(int((metrics.mse(images, v.images) < 0.03).sum()), count)
            print(
                f"  {who:10s} {count * iterations / spent:8.0f} iterations/s   median {psnr.median():5.1f} dB   MSE < 0.03: {right}"
            )


WHAT = {"dlg": dlg, "steps": steps, "twice": twice, "threads": threads, "precision": precision, "breaching": breaching}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(WHAT))
    parser.add_argument("--data", default="cifar10", help="dataset")
    parser.add_argument("--victims", type=int, default=64)
    parser.add_argument("--heads", type=int, nargs="+", default=[10], help="outputs of the network, dlg only: 10 100")
    parser.add_argument("--one-by-one", type=int, default=8, help="victims of the loop; half a minute each")
    parser.add_argument("--steps", type=int, default=300, help="outer steps of the loop")
    parser.add_argument("--evaluations", type=int, default=20, help="all but dlg: how many")
    parser.add_argument("--models", nargs="+", default=["lenet", "mcmahan_cnn", "resnet18"], choices=list(MODELS))
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8, 48], help="victims at a time; of twice, images of a batch")
    parser.add_argument("--peer", help="breaching: the Python of an environment that has it")
    arguments = parser.parse_args()
    arguments.device = device_of("auto").type
    torch.set_num_threads(1)
    if arguments.what == "breaching" and not arguments.peer:
        parser.error("breaching needs --peer PYTHON: make an environment, pip install breaching safetensors there, name its python")
    data = load(arguments.data)
    WHAT[arguments.what](data, arguments)


if __name__ == "__main__":
    main()
