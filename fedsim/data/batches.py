"""Which images a client trains on in a round: a function of `(seed, round, client)`, which whoever scores an attack asks again."""

import torch
from torch import Tensor

from fedsim.seeding import generator


def batches_of(
    shard: Tensor,
    *,
    seed: int,
    round: int,
    client: int,
    batch_size: int,
    epochs: int | None = 1,
    steps: int | None = None,
) -> list[Tensor]:
    """Batches of places in the training set, in the order the client uses them.

    Every epoch is a new shuffle of the client's `shard` cut into batches, the last of which may be smaller; a batch size larger
    than the shard takes the whole shard. With `steps`, exactly that many batches are drawn, however many epochs that takes, and
    `epochs` is not used.
    """
    if not len(shard):
        raise ValueError(f"client {client} has no images to train on")
    if epochs is None and steps is None:
        raise ValueError("a client trains for a number of epochs or of steps, got neither")
    for name, value in (("batch_size", batch_size), ("epochs", epochs), ("steps", steps)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    rng = generator(seed, "batch", round, client)
    batches: list[Tensor] = []
    per_epoch = -(-len(shard) // batch_size)
    count = steps if steps is not None else per_epoch * (epochs or 1)
    while len(batches) < count:
        wanted = (count - len(batches)) * batch_size  # of a shard's thousand batches a round of FedSGD takes one
        batches.extend(shard[torch.randperm(len(shard), generator=rng)[:wanted]].split(batch_size))
    return batches


def batch_of(shard: Tensor, *, seed: int, round: int, client: int, batch_size: int) -> Tensor:
    """The one batch of a FedSGD round."""
    return batches_of(shard, seed=seed, round=round, client=client, batch_size=batch_size, steps=1)[0]
