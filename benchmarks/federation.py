"""What a round of federated learning costs, and how long it takes to begin, against a bare torch loop and against Flower on Ray.

    python benchmarks/federation.py --quick
    python benchmarks/federation.py --case mcmahan-fedsgd --rounds 9

Up to six ways do the same work on the same synthetic images from the same seed:

    bare torch          clients one after the other in a plain loop: autograd, torch.optim.SGD, a weighted mean of weights
    inline, 1 worker    fedsim in one process, clients one after the other
    inline, N workers   the same with a thread for each core
    vectorized          the same with all clients as one program, in chunks shared among the threads
    Ray                 the same two apps on Flower's Ray simulation, a worker process for each core
    pfl-research        Apple's simulator in one process (`peer_pfl.py`), clients one after the other

They hold the same model, take the same batches in the same order, and compute on one thread for each worker; there is no
defense, no eavesdropper, and a test set of one image. Each has a process of its own. It is started alone, up to the end of its
first round; then they take turns, one round each, so that whatever else runs on the machine slows all of them alike. After the
first round their weights must agree to 1e-5, after a local epoch to 1e-4, or nothing is printed for the case.

    start      seconds from asking for the run to the end of round 1, less the median round: building the data and the apps,
               and for Ray its import and its worker processes. All that is imported before is torch, Flower and fedsim.
    s/round    median over rounds 2, 3, …, and the fastest of them
    cpu        seconds of computing in a round, median: what s/round would be for one worker on a machine with nothing else to do.
               Not known of Ray, which computes elsewhere
    x bare     median over the turns of the ratio to bare torch in the same turn
    x Ray      how many times faster than Ray, likewise

The first row is what the machine cannot be faster than on one core: the multiplications and additions in the matrix products and
convolutions of a round, at the rate of one core on a product of two matrices of 1024 x 1024, measured just before.
`--profile` shows in place of all that which functions one worker in one process spends a round in.
"""

import argparse
import datetime
import importlib.util
import logging
import multiprocessing
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from fedsim.quiet import quiet

quiet()  # before Flower is imported

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from fedsim import federation  # noqa: E402
from fedsim.cores import one_thread  # noqa: E402
from fedsim.engines.inline import Inline  # noqa: E402
from fedsim.federation import Checkpoint, Engine, Evaluation, Round  # noqa: E402
from fedsim.setup import Config, Setup, setup_of  # noqa: E402

SEED = 0
CORES = os.cpu_count() or 1
BARE, ONE, ALL, TOGETHER, RAY = "bare torch", "inline, 1 worker", f"inline, {CORES} workers", "vectorized", "Ray"
PFL = "pfl-research"
TOLERANCE, IN_AN_EPOCH = 1e-5, 1e-4  # rounding in another order grows with the steps
IMAGES = 500  # of each client in a local epoch
QUICK_IMAGES = 100

Weights = dict[str, Tensor]
# Told of each round: its seconds, and the weights it ended with. Returns when it is time for the next.
Report = Callable[[float, Weights], None]


@dataclass(frozen=True)
class Case:
    """One kind of work: `epoch` is a local epoch of FedAvg, otherwise clients send the gradient of one batch."""

    title: str
    model: str
    clients: int
    batch_size: int
    epoch: bool

    def config(self, quick: bool) -> Config:
        """The configuration of a run, in which all clients take part in every round."""
        size = {"clients": self.clients, "per_round": self.clients, "batch_size": self.batch_size}
        images = (QUICK_IMAGES if quick else IMAGES) if self.epoch else max(50, self.batch_size)
        return {
            "seed": SEED,
            "device": "cpu",
            "data": {"name": "synthetic", "train_size": images * self.clients, "test_size": 1, "progress": False},
            "partition": {"_target_": "fedsim.data.IID"},
            "model": {"_target_": f"fedsim.models.{self.model}"},
            "federation": {"_target_": f"fedsim.protocols.{'FedAvg' if self.epoch else 'FedSGD'}", "lr": 0.05, **size},
            "strategy": {"_target_": "flwr.serverapp.strategy.FedAvg"},
            "defense": {"_target_": "defenses.NoDefense"},
        }


CASES = {
    "mcmahan-fedsgd": Case("McMahan CNN, FedSGD, batch 32", "mcmahan_cnn", 10, 32, epoch=False),
    "mcmahan-fedsgd-1": Case("McMahan CNN, FedSGD, batch 1", "mcmahan_cnn", 10, 1, epoch=False),
    "mcmahan-fedavg": Case("McMahan CNN, one local epoch, batch 50", "mcmahan_cnn", 10, 50, epoch=True),
    "lenet-fedsgd": Case("LeNet, FedSGD, batch 1", "lenet", 100, 1, epoch=False),
    "lenet-fedavg": Case("LeNet, one local epoch, batch 50", "lenet", 10, 50, epoch=True),
}


def bare(config: Config, rounds: int, report: Report) -> None:
    """Federated averaging as a loop over plain torch; one step of SGD by each client is FedSGD."""
    one_thread()
    setup = setup_of(config)
    model = setup.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=setup.protocol.lr)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for round in range(1, rounds + 1):
        began = time.perf_counter()
        weights = _bare_round(setup, model, optimizer, weights, round)
        report(time.perf_counter() - began, weights)


def _bare_round(setup: Setup, model: nn.Module, optimizer: torch.optim.Optimizer, weights: Weights, round: int) -> Weights:
    mean = {name: torch.zeros_like(t) for name, t in weights.items()}
    examples = sum(len(shard) for shard in setup.shards)
    for client, shard in enumerate(setup.shards):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(weights[name])
        for index in setup.protocol.batches(shard, setup.seed, round, client):
            images, labels = setup.batch(index)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                mean[name].add_(p, alpha=len(shard) / examples)
    return mean


def federated(engine: Engine, config: Config, rounds: int, report: Report) -> None:
    """The same through fedsim; round 0, the untrained model, is not reported."""

    def finished(done: Round, state: Checkpoint) -> None:
        if done.failures:
            raise RuntimeError(f"{done.failures} clients failed in round {done.round}")
        if done.round:
            report(done.seconds, state.tensors)

    federation.run(
        setup_of(config),
        engine,
        rounds=rounds,
        choose=lambda round, clients: [],
        listen=lambda seen: None,
        finished=finished,
        evaluation=Evaluation(every=rounds),
    )


def _run(way: str, config: Config, rounds: int, report: Report) -> None:
    if way == BARE:
        bare(config, rounds, report)
    elif way == RAY:
        from fedsim.engines.ray import Ray

        federated(Ray(), config, rounds, report)
    elif way == PFL:
        multiprocessing.current_process().name = "MainProcess"  # pfl takes others for the processes of a DataLoader
        from benchmarks import peer_pfl

        peer_pfl.run(config, rounds, report)
    else:
        federated(Inline(1 if way == ONE else CORES, vectorized=way == TOGETHER), config, rounds, report)


def _serve(pipe: Connection, way: str, config: Config, rounds: int) -> None:
    """The process of one way: a round whenever it is asked for one, in silence. Errors are sent, not shown."""
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    pipe.send(None)
    pipe.recv()
    done = 0
    began, computed = time.perf_counter(), time.process_time()

    def report(seconds: float, weights: Weights) -> None:
        nonlocal done, computed
        done += 1
        last = {name: t.numpy().copy() for name, t in weights.items()} if done == 1 else {}
        pipe.send(Turn(seconds, time.process_time() - computed, time.perf_counter() - began, last))
        if done < rounds:
            pipe.recv()
        computed = time.process_time()

    try:
        _run(way, config, rounds, report)
    except Exception:
        pipe.send(traceback.format_exc())


@dataclass(frozen=True)
class Turn:
    """A round: its wall time, its process's computing time, the time since the run was asked for, and the first round's weights."""

    seconds: float
    cpu: float
    since: float
    weights: dict[str, np.ndarray]


class Runner:
    """One way of doing the work, in a process of its own."""

    def __init__(self, way: str, config: Config, rounds: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.way = way
        self.turns: list[Turn] = []
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, way, config, rounds))
        self._process.start()
        theirs.close()
        self._pipe.recv()  # all imported
        self.first = self._round()

    def turn(self) -> None:
        """Takes one round."""
        self.turns.append(self._round())

    def _round(self) -> Turn:
        self._pipe.send(None)
        answer = self._pipe.recv()
        if isinstance(answer, str):
            raise RuntimeError(f"{self.way} failed:\n{answer}")
        return answer

    def close(self) -> None:
        """Waits for its end. A run that did not come to its end finds the pipe closed, and stops."""
        self._pipe.close()
        self._process.join()

    @property
    def seconds(self) -> list[float]:
        """Wall time of the rounds after the first."""
        return [turn.seconds for turn in self.turns]

    @property
    def start(self) -> float:
        """Seconds from asking for the run to the end of its first round, less the median round."""
        return max(0.0, self.first.since - statistics.median(self.seconds))


def measure(case: Case, ways: list[str], rounds: int, quick: bool) -> list[Runner]:
    """All ways of doing a case, in turns. Raises RuntimeError when they do not arrive at the same weights."""
    runners: list[Runner] = []
    try:
        for way in ways:
            runners.append(Runner(way, case.config(quick), rounds))
        for turn in range(1, rounds):
            for runner in _rotated(runners, turn):
                runner.turn()
    finally:
        for runner in runners:
            runner.close()
    expected = runners[0].first.weights
    for runner in runners[1:]:
        found = runner.first.weights
        gap = max(float(abs(found[name] - t).max()) for name, t in expected.items())
        if not gap <= (IN_AN_EPOCH if case.epoch else TOLERANCE):
            raise RuntimeError(f"{case.title}: the weights of {runner.way} differ from those of {ways[0]} by {gap:.1e}")
    return runners


def _rotated(runners: list[Runner], by: int) -> Iterator[Runner]:
    for i in range(len(runners)):
        yield runners[(i + by) % len(runners)]


def _ratio(one: Runner, other: Runner) -> float:
    return statistics.median(a / b for a, b in zip(one.seconds, other.seconds, strict=True))


def operations(config: Config) -> int:
    """Floating-point operations of the matrix products and convolutions of a round, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    setup = setup_of(config)
    model, counted = setup.model(), FlopCounterMode(display=False)
    with counted:
        for index in setup.protocol.batches(setup.shards[0], setup.seed, 1, 0):
            images, labels = setup.batch(index)
            nn.functional.cross_entropy(model(images), labels).backward()
    return counted.get_total_flops() * len(setup.shards)  # shards of one size


def peak(side: int = 1024, times: int = 20) -> float:
    """Floating-point operations a second of one core in float32 products of two square matrices: the best of `times`."""
    one_thread()
    a, b = torch.rand(2, side, side)
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)


def profile(case: Case, rounds: int, quick: bool, show: int = 10) -> str:
    """The functions that one worker in one process spends its rounds in, the first round left out, by their own time."""
    import cProfile
    import pstats

    from fedsim.engines import inline

    logging.getLogger("flwr").setLevel(logging.ERROR)

    class Here:
        """The thread that is profiled, in place of a pool's."""

        map, shutdown = staticmethod(lambda *args: list(map(*args))), staticmethod(lambda **_: None)

        def __init__(self, *_: object, **__: object) -> None:
            one_thread()

    inline.ThreadPoolExecutor = Here  # type: ignore[attr-defined]
    profiler = cProfile.Profile()
    done = 0

    def report(seconds: float, weights: Weights) -> None:
        nonlocal done
        done += 1
        if done == 1:
            profiler.enable()
        if done == rounds:
            profiler.disable()

    federated(Inline(1), case.config(quick), rounds, report)
    entries = sorted(pstats.Stats(profiler).stats.items(), key=lambda item: -item[1][2])  # type: ignore[attr-defined]
    whole = sum(values[2] for _, values in entries)
    parts: dict[str, float] = {}
    for (file, _, name), values in entries:
        parts[_part(file, name)] = parts.get(_part(file, name), 0) + values[2]
    lines = [
        f"{own / whole:6.1%}{own / (rounds - 1):9.4f}  {part}" for part, own in sorted(parts.items(), key=lambda item: -item[1])
    ]
    lines = [f"{'share':>6}{'s/round':>9}", *lines, f"{'share':>6}{'s/round':>9}{'calls':>9}"]
    for (file, line, name), (_, calls, own, _, _) in entries[:show]:
        where = f"{'/'.join(Path(file).parts[-2:])}:{line} {name}" if line else name
        lines.append(f"{own / whole:6.1%}{own / (rounds - 1):9.4f}{calls / (rounds - 1):9.0f}  {where}")
    return "\n".join(lines)


def _part(file: str, name: str) -> str:
    """Whose function this is; compiled ones have no file."""
    if "torch" in file or "torch" in name:
        return "torch: its compiled operators" if file == "~" else "torch: its Python"
    return next((part for part in ("flwr", "fedsim", "numpy") if f"/{part}/" in file or part in name), "Python and its library")


def context(ways: list[str]) -> str:
    """What the numbers were measured on, and when."""
    import flwr

    packages = f"Python {platform.python_version()}, torch {torch.__version__}, Flower {flwr.__version__}"
    packages += "".join(
        f", {title} {version(name)}" for way, title, name in ((RAY, "Ray", "ray"), (PFL, "pfl", "pfl")) if way in ways
    )
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"{now}; {CORES} cores, 1 thread for each worker; load average before {load}\n{packages}"


def table(runners: list[Runner], least: float) -> str:
    """One row for each way, and one for a round that takes `least` seconds."""
    plain = runners[0]
    ray = next((runner for runner in runners if runner.way == RAY), None)
    head = f"{'':20}{'start':>9}{'s/round':>9}{'fastest':>9}{'cpu':>9}{'rounds/s':>10}{'x bare':>8}" + (
        f"{'x Ray':>8}" if ray else ""
    )
    rows = [head, f"{'matrix work':20}{'':9}{least:9.4f}"]
    for runner in runners:
        median = statistics.median(runner.seconds)
        cpu = "" if runner is ray else f"{statistics.median(turn.cpu for turn in runner.turns):.3f}"
        row = f"{runner.way:20}{runner.start:9.2f}{median:9.3f}{min(runner.seconds):9.3f}{cpu:>9}{1 / median:10.2f}"
        rows.append(row + f"{_ratio(runner, plain):8.2f}" + (f"{_ratio(ray, runner):8.2f}" if ray else ""))
    return "\n".join(rows)


def main() -> None:
    """Prints one table for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"3 rounds after the first, local epochs of {QUICK_IMAGES} images")
    parser.add_argument("--case", action="append", choices=CASES, help="this one only; may be repeated")
    parser.add_argument("--clients", type=int, help="so many in every round, in place of the case's number")
    parser.add_argument("--rounds", type=int, help="rounds after the first (9)")
    parser.add_argument("--profile", action="store_true", help="show the functions that take the time instead")
    parser.add_argument("--no-ray", action="store_true", help="leave Ray out; it is, too, where it is not installed")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (3 if arguments.quick else 9)
    ways = [BARE, ONE] + [ALL] * (CORES > 1) + [TOGETHER]
    if not arguments.no_ray and importlib.util.find_spec("ray"):
        ways.append(RAY)
    if importlib.util.find_spec("pfl"):
        ways.append(PFL)
    print(context(ways))
    for name in arguments.case or CASES:
        case = CASES[name] if arguments.clients is None else replace(CASES[name], clients=arguments.clients)
        images = f" of {QUICK_IMAGES if arguments.quick else IMAGES} images" if case.epoch else ""
        title = f"{case.title.replace('local epoch', f'local epoch{images}')}, {case.clients} clients"
        print(f"\n{name}: {title}; {rounds} rounds after the first")
        if arguments.profile:
            print(profile(case, rounds + 1, arguments.quick), flush=True)
            continue
        work, rate = operations(case.config(arguments.quick)), peak()
        print(f"{work / 1e9:.3g} GFLOP of matrix work a round; a core makes {rate / 1e9:.0f} GFLOP/s of it")
        print(table(measure(case, ways, rounds + 1, arguments.quick), work / rate), flush=True)


if __name__ == "__main__":
    main()
