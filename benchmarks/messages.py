"""What each defense makes of one client's gradient: bytes, milliseconds, and how wrong it is, in whole and in the first layer.

    python benchmarks/messages.py             every choice of experiments/conf/defense, and further levels of some
    python benchmarks/messages.py topk qsgd   these only

Images are of CIFAR-10 under $FEDSIM_DATA, or embedded ones with --data synthetic. One thread. Times are the fastest of a few; of a
defense with a memory, what it sends in its first round.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from experiments.config import choices, compose
from fedsim.data import Dataset, load
from fedsim.defense import Defense
from fedsim.models import lenet, mcmahan_cnn
from fedsim.seeding import generator
from fedsim.setup import build
from fedsim.training import local_update, split
from fedsim.updates import Update, relative_error
from fedsim.wire import Packets, from_bytes, nbytes, pack, to_bytes

NETWORKS = {"LeNet": lenet, "McMahan CNN": mcmahan_cnn}
# Settings besides the one in a choice's file.
LEVELS: dict[str, list[dict[str, Any]]] = {
    "uniform": [{"levels": 120}, {"levels": 256}],
    "stochastic": [{"levels": 240}],
    "qsgd": [{"levels": 6, "norm": "linf"}],
    "kmeans": [{"centroids": 3}],
    "fixed_point": [{"bits": 16, "fraction": 15}],
    "topk": [{"ratio": 0.8}, {"ratio": 0.01}],
    "topk_global": [{"ratio": 0.01}],
    "pruning": [{"mode": "entries"}, {"mode": "literal"}],
    "dgc": [{"warmup": 0}],
}


def gradient(data: Dataset, network: str, size: int) -> Update:
    """The gradient of a random network at a random batch of `size`."""
    model = NETWORKS[network](data.image_shape, data.num_classes, rng=generator(0, "network"))
    index = torch.randperm(len(data.train.labels), generator=generator(0, "batch"))[:size]
    return local_update(model, *split(model), [data.train.batch(index)], lr=1.0).update


def fastest(work: Callable[[], Any], seconds: float = 0.3) -> float:
    """Milliseconds that `work` takes, the least of at least three times."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1e3 * min(times)


def row(name: str, defense: Defense, update: Update) -> str:
    """What one defense makes of one update, as a line of the table."""
    state, packets = defense.init(update), pack(update)

    def encode() -> tuple[Packets, list[bytes]]:
        sent, _ = defense(packets, state, generator(0, "defense", 1, 0))
        return sent, [to_bytes(packet) for packet in sent.values()]

    sent, data = encode()
    arrived = {key: packet.dense() for key, packet in sent.items()}
    dense, packed = (sum(map(nbytes, of.values())) for of in (packets, sent))
    assert packed == sum(map(len, data))
    first = next(iter(update))
    wrong = [relative_error(arrived, update), relative_error({first: arrived[first]}, {first: update[first]})]
    took = fastest(encode), fastest(lambda: [from_bytes(one).dense() for one in data])
    return f"  {name:<42}{packed:>10,}{dense / packed:>8.1f}x{took[0]:>9.1f}{took[1]:>9.1f}{wrong[0]:>11.2g}{wrong[1]:>11.2g}"


def settings(chosen: list[str]) -> list[tuple[str, Defense]]:
    """Names and defenses: each choice as its file has it, then at further levels."""
    made = []
    for name in chosen:
        for level in [{}, *LEVELS.get(name, [])]:
            node = compose([f"defense={name}", *(f"defense.{key}={value}" for key, value in level.items())])["defense"]
            shown = node.get("inner", node)
            parts = [f"{key}={value}" for key, value in shown.items() if isinstance(value, int | float | str) and key[0] != "_"]
            made.append((f"{name} {', '.join(parts)}", build(node)))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("defenses", nargs="*", metavar="DEFENSE", help="choices of experiments/conf/defense; all if none is given")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--batch", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = load(name=given.data, seed=0)
    for network in NETWORKS:
        update = gradient(data, network, given.batch)
        dense, entries = sum(map(nbytes, pack(update).values())), sum(t.numel() for t in update.values())
        print(f"{network}, batch of {given.batch}, {given.data}: {entries:,} entries, {dense:,} bytes")
        print(f"  {'':<42}{'bytes':>10}{'ratio':>9}{'enc ms':>9}{'dec ms':>9}{'error':>11}{'1st layer':>11}")
        for name, defense in settings(given.defenses or list(choices("defense"))):
            print(row(name, defense, update), flush=True)


if __name__ == "__main__":
    main()
