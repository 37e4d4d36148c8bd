"""How often a run uses each client's data: known before it starts, since who is chosen follows from the seed."""

import functools
import random
from collections import Counter
from collections.abc import Sequence

from fedsim.defense import Exposure
from fedsim.protocols import Protocol
from fedsim.seeding import seed_of


@functools.lru_cache(maxsize=4096)  # asked again after each round
def chosen(seed: int, round: int, clients: int, per_round: int) -> tuple[int, ...]:
    """The clients that `SeededStrategy` lets a Flower strategy choose in `round`."""
    return tuple(random.Random(seed_of(seed, "clients", round)).sample(range(clients), per_round))


def exposures(protocol: Protocol, shards: Sequence[int], seed: int, rounds: int) -> tuple[Exposure, ...]:
    """Of the clients with shards of these sizes after `rounds` rounds, without those that another one exceeds in everything."""
    taken = Counter(one for round in range(1, rounds + 1) for one in chosen(seed, round, protocol.clients, protocol.per_round))
    found = sorted({(taken[client], *protocol.uses(shard)) for client, shard in enumerate(shards)}, reverse=True)
    most: list[tuple[int, int, float]] = []
    for one in found:
        if not any(uses >= one[1] and rate >= one[2] for _, uses, rate in most):
            most.append(one)
    return tuple(Exposure(*one) for one in most)
