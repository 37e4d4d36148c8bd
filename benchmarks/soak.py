"""What a run of many rounds, or of many clients, takes of the machine: memory, open files and threads, as the run goes.

    python benchmarks/soak.py rounds            500 rounds with 20 taps, read at rounds 50, 100, ..., 500
    python benchmarks/soak.py clients           100, 1,000 and 10,000 clients, 10 of them a round, with and without a memory

Memory is what the process holds of its own (resident, without what it shares with files), as Linux tells it. Each run is a process
of its own.
"""

import argparse
import contextlib
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

MLP = ["model=mlp_2nn"]
SMALL = ["data=synthetic", "data.side=12", "federation=fedsgd", "device=cpu", "engine.workers=1", "attacker=naive"]
SMALL += ["evaluate.every=50", "inspect=off"]


def usage() -> dict[str, float]:
    """Memory in MB, open file descriptors and threads of this process."""
    _, resident, shared, *_ = (int(pages) for pages in Path("/proc/self/statm").read_text().split())
    counts = {what: len(os.listdir(f"/proc/self/{where}")) for what, where in (("files", "fd"), ("threads", "task"))}
    return {"mb": (resident - shared) * os.sysconf("SC_PAGE_SIZE") / 1e6, **counts}


def run(overrides: list[str], every: int, readings: Any) -> None:
    """Runs a configuration and puts what it takes after each `every`-th round into `readings`."""
    torch.set_num_threads(1)
    from experiments import runner
    from experiments.config import compose
    from fedsim.quiet import quiet
    from fedsim.run import RunFolder

    quiet()
    finished, began = RunFolder.save_checkpoint, time.perf_counter()

    def read(folder: RunFolder, checkpoint: Any) -> None:
        finished(folder, checkpoint)
        if checkpoint.round % every == 0:
            readings.send(
                {"round": checkpoint.round, "seconds": time.perf_counter() - began, "cpu": time.process_time(), **usage()}
            )

    RunFolder.save_checkpoint = read  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        runner.start(compose([*SMALL, *overrides]), Path(folder, "run"), "soak")


def measured(overrides: list[str], every: int) -> list[dict[str, float]]:
    """What `run` read, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receives, sends = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(overrides, every, sends))
    process.start()
    sends.close()
    found = []
    with contextlib.suppress(EOFError):  # it has ended
        while True:
            found.append(receives.recv())
            print("  ".join(f"{name} {value:.4g}" for name, value in found[-1].items()), flush=True)
    process.join()
    if process.exitcode:
        raise SystemExit(f"the run failed with exit code {process.exitcode}")
    return found


def rounds(count: int) -> None:
    """Rounds of 20 clients with a memory, all listened to and attacked."""
    taps = ["tap.every=1", "tap.clients=20", "tap.when=live", "attack=analytic"]
    asked = ["federation.clients=20", "federation.per_round=20", "data.train_size=200", "data.test_size=50", "defense=topk_ef"]
    found = measured([*MLP, *asked, *taps, f"rounds={count}"], max(1, count // 10))
    first, last = found[1], found[-1]  # what is built once is there after the first rounds
    grown = last["mb"] / first["mb"] - 1
    flat = grown <= 0.05 and last["files"] <= first["files"] and last["threads"] <= first["threads"]
    print(f"memory from round {first['round']:.0f} to {last['round']:.0f}: {grown:+.1%}; {'flat' if flat else 'not flat'}")


def clients(counts: list[int]) -> None:
    """Ten rounds of ten clients each, out of ever more."""
    for defense in ("none", "topk_ef"):
        for count in counts:
            print(f"{count} clients, defense={defense}")
            own = [f"federation.clients={count}", "federation.per_round=10", "data.train_size=20000", "data.test_size=50"]
            measured([*MLP, *own, f"defense={defense}", "tap.every=null", "tap.rounds=[]", "rounds=10", "attack=none"], 5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rounds", "clients"])
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--clients", type=int, nargs="+", default=[100, 1000, 10000])
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rounds(arguments.rounds) if arguments.what == "rounds" else clients(arguments.clients)
