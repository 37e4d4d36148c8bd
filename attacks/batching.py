"""How observations become programs: those of equal shapes run together, and each victim keeps a random stream of its own."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence

import torch

from fedsim.observation import Observation, Reconstruction
from fedsim.seeding import generator


def streams(seen: Sequence[Observation], seed: int, name: str) -> list[torch.Generator]:
    """A stream for each observation; it does not depend on who else is attacked."""
    asked: Counter[tuple[int, int]] = Counter()
    found = []
    for one in seen:
        who = (one.round, one.client)
        if one.chance is None:
            found.append(generator(seed, name, *who, asked[who]))
            asked[who] += 1
        else:  # once in a run of its own
            found.append(generator(one.chance, name, *who, 0))
    return found


def alike(seen: Sequence[Observation], keys: Sequence[Hashable]) -> list[list[int]]:
    """Places of observations that can be stacked: equal keys, equal tensors."""
    groups: dict[object, list[int]] = defaultdict(list)
    for i, (one, key) in enumerate(zip(seen, keys, strict=True)):
        groups[(key, tuple((name, p.shape) for name, p in one.packets.items()))].append(i)
    return list(groups.values())


def one_by_one(
    seen: Sequence[Observation], invert: Callable[[Observation], Reconstruction], report: Callable[[int, int], None] | None
) -> list[Reconstruction]:
    """What `invert` makes of each observation, in order, for attacks that have no use for company."""
    found = []
    for one in seen:
        found.append(invert(one))
        if report:
            report(len(found), len(seen))
    return found
