"""Who holds which images: flwr-datasets' partitioners, asked for places in the training set instead of copies of it.

A partition is called with the labels (N,) of the training set and returns one ascending int64 tensor of places for each client;
no place is given twice. The images are shuffled by our own seed first, so that which image of a class a client holds depends on
the seed and not on the order of a file. No global random state is read or changed.
"""

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from fedsim.checks import one_of, whole
from fedsim.data import cache
from fedsim.seeding import generator, seed_of

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

VERSION = 1  # raise it when the same labels and seed would give other shares
KEPT = 100  # partitions on disk; one of 50,000 images takes 200 kB


class Partition(Protocol):
    """A rule that deals a training set out to clients."""

    def __call__(self, labels: Tensor, num_clients: int, seed: int) -> list[Tensor]:
        """Places of each client's images, ascending."""
        ...


@dataclass(frozen=True)
class IID:
    """Equal shares at random; sizes differ by one image at most."""

    def __call__(self, labels: Tensor, num_clients: int, seed: int) -> list[Tensor]:
        """Places of each client's images, ascending."""

        def build() -> "Partitioner":
            from flwr_datasets.partitioner import IidPartitioner

            return IidPartitioner(num_clients)

        return _deal(self, build, labels, num_clients, seed)


@dataclass(frozen=True)
class Dirichlet:
    """Each class is split among the clients in proportions drawn from Dirichlet(`alpha`); small alpha is skewed (Yurochkin 2019).

    Proportions are drawn again, ten times at most, until every client holds `min_size` images.
    """

    alpha: float
    min_size: int = 1

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f"alpha must be > 0, got {self.alpha}")
        whole("partition.min_size", self.min_size)  # a client without images has nothing to train on

    def __call__(self, labels: Tensor, num_clients: int, seed: int) -> list[Tensor]:
        """Places of each client's images, ascending."""

        def build() -> "Partitioner":
            from flwr_datasets.partitioner import DirichletPartitioner

            return DirichletPartitioner(
                num_clients, "label", float(self.alpha), self.min_size, shuffle=False, seed=seed_of(seed, "partition", "numpy")
            )

        return _deal(self, build, labels, num_clients, seed)


@dataclass(frozen=True)
class ByClass:
    """Every client holds images of exactly `classes_per_client` classes (the "pathological" split, Li et al. 2021).

    Client i is given class i mod K, the others at random; the images of a class are shared equally by its holders. With fewer
    clients than classes, the images of a class that nobody was given are left out.
    """

    classes_per_client: int = 2

    def __post_init__(self) -> None:
        whole("partition.classes_per_client", self.classes_per_client)

    def __call__(self, labels: Tensor, num_clients: int, seed: int) -> list[Tensor]:
        """Places of each client's images, ascending."""
        num_classes = len(labels.unique())
        if self.classes_per_client > num_classes:
            raise ValueError(
                f"classes_per_client must be at most the {num_classes} classes there are, got {self.classes_per_client}"
            )

        def build() -> "Partitioner":
            from flwr_datasets.partitioner import PathologicalPartitioner

            return PathologicalPartitioner(
                num_clients,
                "label",
                self.classes_per_client,
                "first-deterministic",
                shuffle=False,
                seed=seed_of(seed, "partition", "numpy"),
            )

        return _deal(self, build, labels, num_clients, seed)


@dataclass(frozen=True)
class SizeSkewed:
    """Client i (1, 2, …) holds a share in proportion to i (`linear`), i**2 (`square`) or e**i (`exponential`)."""

    kind: str = "linear"

    def __post_init__(self) -> None:
        one_of("kind of size skew", self.kind, ("linear", "square", "exponential"))

    def __call__(self, labels: Tensor, num_clients: int, seed: int) -> list[Tensor]:
        """Places of each client's images, ascending."""

        def build() -> "Partitioner":
            from flwr_datasets.partitioner import ExponentialPartitioner, LinearPartitioner, SquarePartitioner

            kinds = {"linear": LinearPartitioner, "square": SquarePartitioner, "exponential": ExponentialPartitioner}
            return kinds[self.kind](num_clients)

        return _deal(self, build, labels, num_clients, seed)


def _deal(rule: Partition, build: "Callable[[], Partitioner]", labels: Tensor, num_clients: int, seed: int) -> list[Tensor]:
    """The shares, as this process or one before it has dealt them: to import flwr-datasets takes seconds."""
    if num_clients < 1:
        raise ValueError(f"num_clients must be at least 1, got {num_clients}")
    if num_clients > len(labels):
        raise ValueError(f"num_clients must be at most the {len(labels)} images there are, got {num_clients}")
    labels = labels.cpu()
    about = json.dumps([VERSION, *map(version, ("flwr-datasets", "numpy", "torch")), repr(rule), num_clients, seed])
    path = cache.path_of("partition", hashlib.sha256(about.encode() + labels.numpy().tobytes()).hexdigest())
    kept = cache.read_tensors(path)
    if kept is not None:
        places, sizes = kept[0]["places"], kept[0]["sizes"]
        return [share.long() for share in places.split(sizes.tolist())]
    shares = _dealt(rule, build, labels, num_clients, seed)
    cache.write_tensors(path, {"places": torch.cat(shares).int(), "sizes": torch.tensor([len(share) for share in shares])}, {})
    cache.prune("partition", KEPT)
    return shares


def _dealt(rule: Partition, build: "Callable[[], Partitioner]", labels: Tensor, num_clients: int, seed: int) -> list[Tensor]:
    import datasets
    import pyarrow as pa

    place = torch.randperm(len(labels), generator=generator(seed, "partition"))
    table = pa.table({"label": labels[place].numpy(), "place": place.numpy()})
    partitioner = build()
    partitioner.dataset = datasets.Dataset(table).with_format("arrow")  # whole columns: row by row takes seconds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # draws made again, classes left out: said in the docstrings above
        try:
            shares = [partitioner.load_partition(i)["place"].to_numpy() for i in range(num_clients)]
        except ValueError as error:
            way_out = "take fewer clients or a milder skew"
            raise ValueError(f"{rule} cannot give {num_clients} clients their share of {len(labels)} images: {way_out}") from error
    return [torch.from_numpy(np.sort(share)) for share in shares]
