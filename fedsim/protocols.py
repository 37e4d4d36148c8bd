"""What a client computes in a round, and what the server does with it.

FedSGD sends the gradient of one batch and lets the server take the step; FedAvg takes several steps and sends how far it came
(McMahan et al. 2017, algorithm 1). Both are seen by an eavesdropper as an update, parameters before minus after.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol as TypingProtocol

from torch import Tensor, nn

from fedsim.checks import number, whole
from fedsim.data.batches import batch_of, batches_of
from fedsim.training import Batch, Hooks, Trained, batch_loss, local_update


class Protocol(TypingProtocol):
    """What both share: the size of the federation, and how one client trains."""

    clients: int
    per_round: int
    batch_size: int
    lr: float
    train_mode: bool

    @property
    def server_scale(self) -> float:
        """What the server multiplies an update with before subtracting it."""
        ...

    def batches(self, shard: Tensor, seed: int, round: int, client: int) -> list[Tensor]:
        """Indices of the images of each local step, in order."""
        ...

    def uses(self, shard: int) -> tuple[int, float]:
        """How often a round may use one example of a `shard` of that many, and by what chance it does each time.

        A bound for accounting, no promise: chances below 1 are claimed only where the examples are a uniformly random subset.
        """
        ...

    def train(
        self,
        model: nn.Module,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        batches: Iterable[Batch],
        proximal: float = 0.0,
        hooks: Hooks = Hooks(),
        loss_of_batch: Callable[..., Tensor] = batch_loss,
    ) -> Trained:
        """The client's update; `hooks` are what its defense changes of training. With `stacked_loss`, those of many clients."""
        ...


def _checked(protocol: "FedSGD | FedAvg") -> None:
    whole("federation.clients", protocol.clients)
    whole("federation.per_round", protocol.per_round)
    if protocol.per_round > protocol.clients:
        told = f"federation.per_round={protocol.per_round} are more than federation.clients={protocol.clients}"
        raise ValueError(f"{told}: add federation.per_round={protocol.clients}, or take more clients")
    whole("federation.batch_size", protocol.batch_size)
    number("federation.lr", protocol.lr, 0, above=True)


@dataclass(frozen=True)
class FedSGD:
    """Each chosen client sends the gradient of one batch; the server steps by `lr` along their mean.

    clients     size of the federation
    per_round   how many of them are chosen each round
    train_mode  whether the model is in training mode (dropout, batch statistics) while the gradient is taken
    """

    clients: int = 10
    per_round: int = 10
    batch_size: int = 1
    lr: float = 0.1
    train_mode: bool = True

    def __post_init__(self) -> None:
        _checked(self)

    @property
    def server_scale(self) -> float:
        return self.lr

    def batches(self, shard: Tensor, seed: int, round: int, client: int) -> list[Tensor]:
        return [batch_of(shard, seed=seed, round=round, client=client, batch_size=self.batch_size)]

    def uses(self, shard: int) -> tuple[int, float]:
        return 1, min(1.0, self.batch_size / shard)

    def train(
        self,
        model: nn.Module,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        batches: Iterable[Batch],
        proximal: float = 0.0,
        hooks: Hooks = Hooks(),
        loss_of_batch: Callable[..., Tensor] = batch_loss,
    ) -> Trained:
        return local_update(model, params, buffers, batches, lr=1.0, proximal=proximal, loss_of_batch=loss_of_batch, hooks=hooks)


@dataclass(frozen=True)
class FedAvg:
    """Each chosen client takes local steps of SGD and sends how far it came; the server averages.

    clients     size of the federation
    per_round   how many of them are chosen each round
    epochs      passes over the client's shard each round, unless `steps` is given
    steps       local steps each round, whatever the size of the shard
    train_mode  whether the model is in training mode (dropout, batch statistics)
    """

    clients: int = 100
    per_round: int = 10
    batch_size: int = 50
    lr: float = 0.05
    epochs: int = 1
    steps: int | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0
    train_mode: bool = True

    def __post_init__(self) -> None:
        _checked(self)
        whole("federation.epochs", self.epochs)
        if self.steps is not None:
            whole("federation.steps", self.steps)
        number("federation.momentum", self.momentum, 0, 1)
        number("federation.weight_decay", self.weight_decay, 0)

    @property
    def server_scale(self) -> float:
        return 1.0

    def batches(self, shard: Tensor, seed: int, round: int, client: int) -> list[Tensor]:
        return batches_of(
            shard, seed=seed, round=round, client=client, batch_size=self.batch_size, epochs=self.epochs, steps=self.steps
        )

    def uses(self, shard: int) -> tuple[int, float]:
        # Batches are cut from a shuffle, so an epoch uses each example once, and for certain.
        return (self.epochs if self.steps is None else math.ceil(self.steps / math.ceil(shard / self.batch_size))), 1.0

    def train(
        self,
        model: nn.Module,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        batches: Iterable[Batch],
        proximal: float = 0.0,
        hooks: Hooks = Hooks(),
        loss_of_batch: Callable[..., Tensor] = batch_loss,
    ) -> Trained:
        return local_update(
            model,
            params,
            buffers,
            batches,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            proximal=proximal,
            loss_of_batch=loss_of_batch,
            hooks=hooks,
        )
