"""Which images a client trains on in a round: a function of `(seed, round, client)`, so that whoever scores an attack can ask again."""

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
    for name, value in (("batch_size", batch_size), ("steps" if epochs is None or steps is not None else "epochs", steps or epochs)):
        if value is None or value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    rng = generator(seed, "batch", round, client)
    batches: list[Tensor] = []
    epoch = 0
    while (epoch < epochs) if steps is None else (len(batches) < steps):
        batches.extend(shard[torch.randperm(len(shard), generator=rng)].split(batch_size))
        epoch += 1
    return batches[:steps]


def batch_of(shard: Tensor, *, seed: int, round: int, client: int, batch_size: int) -> Tensor:
    """The one batch of a FedSGD round."""
    return batches_of(shard, seed=seed, round=round, client=client, batch_size=batch_size, steps=1)[0]
