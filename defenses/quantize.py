"""Quantization: the entries of each tensor on a few levels that are fitted to the tensor.

A tensor of n entries costs n codes of ceil(log2(levels)) bits and the header of its lattice (`fedsim.wire`).

What they leave possible of an entry is a cell around its level, as long as the lattice can be seen. It cannot where a later defense
moved the entries; then there are no bounds.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from defenses.base import TensorByTensor
from fedsim.checks import one_of, switch, whole
from fedsim.defense import Belief
from fedsim.wire import MAX_BITS, Codebook, Grid, Multiples, Packet

SMALLEST = torch.finfo(torch.float32).tiny  # below it float32 has fewer digits
SAMPLE = 2**14  # entries that centroids are fitted to
STARTS = 5  # of k-means, of which the best is taken


def _grid(values: Tensor, levels: int) -> Grid:
    low, high = values.aminmax()
    return Grid(float(low), float(high.double() - low.double()) / (levels - 1), (levels - 1).bit_length())


def _steps(values: Tensor, lattice: Grid | Multiples) -> Tensor:
    """How many steps of the lattice each value lies above its low end, or above 0, in float64; 0 for a constant tensor."""
    if lattice.step == 0:
        return torch.zeros_like(values, dtype=torch.float64)
    return (values.double() - (lattice.low if isinstance(lattice, Grid) else 0.0)) / lattice.step


def _on(grid: Grid, codes: Tensor, levels: int, packet: Packet) -> Packet:
    return replace(packet, values=grid.decode(codes.clamp(0, levels - 1)), grid=grid)


def _uniform(like: Tensor, rng: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=rng, dtype=torch.float64).to(like.device)


def multiples(packet: Packet, lattice: Multiples, codes: Tensor, most: int) -> Packet:
    """`packet` with its values at `codes` steps of the lattice, at most `most` to either side."""
    return replace(packet, values=lattice.at(codes.clamp(-most, most)), grid=lattice)


def visible(packet: Packet, belief: Belief) -> bool:
    """Whether the packet's grid is that of the defense being asked: a later one that replaced it moved the entries as well."""
    sent = packet.sent()
    return packet.rank is None and bool((belief.low == belief.high)[sent].all())


def untouched(packet: Packet) -> bool:
    """Whether a quantizer met no entry of the tensor: it had been dropped as a whole, and so has no grid."""
    return packet.grid is None and not len(packet.values)


def within_steps(packet: Packet, belief: Belief, steps: float, ends: tuple[float, float], mean: bool) -> Belief:
    """Of an entry rounded by less than `steps` of the lattice's to what `belief` says, given where the tensor ends.

    The ends and the step travel as float32, whose rounding moves a level by 2**-24 of the farther end each, and the level once
    more: four times that covers the three. Numbers below 2**-126 are rounded to less than that.

    mean  whether the entry is the mean of its level, so that the value still tells something
    """
    assert isinstance(packet.grid, Grid | Multiples)
    slack = 2**-22 * max(map(abs, ends)) + SMALLEST
    away, sent = steps * packet.grid.step + slack, packet.sent()
    low, high = belief.low.double() - away, belief.high.double() + away
    # An entry that was not sent may have been dropped before this defense saw the tensor's ends.
    low = torch.where(sent, low.clamp(min=ends[0] - slack), low).float()
    high = torch.where(sent, high.clamp(max=ends[1] + slack), high).float()
    return replace(belief, low=low, high=high) if mean else belief.rounded(low, high)


def within_cells(belief: Belief, edges: Tensor) -> Belief:
    """Of an entry rounded to the level of its cell, from one of `edges` (float64, ascending) to the next.

    Rounding keeps order, and keeps a level where it is: what lies between two bounds is rounded from between the far edges of their
    cells. The entry is a float32, so it stays on its side of an edge that is rounded to one.
    """

    def nearest(bound: Tensor) -> Tensor:
        return torch.searchsorted(edges[1:-1], bound.double())

    return belief.rounded(edges[nearest(belief.low)].float(), edges[nearest(belief.high) + 1].float())


def edges_of(levels: Tensor) -> Tensor:
    """Where the cells of `levels` meet, half way, and without bound at either end; float64."""
    levels = levels.double()
    nothing = torch.full((1,), torch.inf, dtype=torch.float64, device=levels.device)
    return torch.cat([-nothing, (levels[1:] + levels[:-1]) / 2, nothing])


@dataclass(frozen=True)
class UniformQuantization(TensorByTensor):
    """Rounds each entry to the nearest of `levels` equally spaced ones, tensor by tensor.

    Deterministic, and so biased: an entry smaller than half a step near zero is always sent as the same level. The error of an
    entry is at most half a step, and a step is (max - min) / (levels - 1).
    """

    levels: int

    def __post_init__(self) -> None:
        whole("levels", self.levels, 2, 2**MAX_BITS)

    def send(self, packet: Packet, rng: torch.Generator) -> Packet:
        grid = _grid(packet.values, self.levels)
        return _on(grid, _steps(packet.values, grid).round(), self.levels, packet)

    def tell(self, packet: Packet, belief: Belief) -> Belief:
        return _told(packet, belief, self.levels, 0.5, mean=False)


@dataclass(frozen=True)
class StochasticQuantization(TensorByTensor):
    """Rounds each entry up or down to one of `levels` equally spaced ones at random, so that its mean is the entry.

    Unbiased; the error of an entry is below one step, its mean square twice that of rounding to the nearest, of entries that lie
    anywhere between levels (Alistarh et al. 2017, section 3, with min and max in place of the norm).
    """

    levels: int

    def __post_init__(self) -> None:
        whole("levels", self.levels, 2, 2**MAX_BITS)

    def send(self, packet: Packet, rng: torch.Generator) -> Packet:
        grid = _grid(packet.values, self.levels)
        # The floor of a number plus uniform noise has that number as its mean.
        return _on(grid, (_steps(packet.values, grid) + _uniform(packet.values, rng)).floor(), self.levels, packet)

    def tell(self, packet: Packet, belief: Belief) -> Belief:
        return _told(packet, belief, self.levels, 1.0, mean=True)


def _told(packet: Packet, belief: Belief, levels: int, steps: float, mean: bool) -> Belief:
    if untouched(packet):
        return belief
    if not isinstance(packet.grid, Grid) or not visible(packet, belief):
        return belief.unbounded(packet.sent())
    ends = packet.grid.low, packet.grid.low + packet.grid.step * (levels - 1)
    return within_steps(packet, belief, steps, ends, mean)


@dataclass(frozen=True)
class QSGD(TensorByTensor):
    """Rounds each entry, as a share of the tensor's norm, up or down at random to a multiple of 1 / `levels`.

    Alistarh et al. 2017, section 3.1. Unbiased. With `norm="l2"`, the paper's, most entries of a large tensor go to 0; with "linf",
    the largest magnitude, a step is max / levels. An entry costs ceil(log2(2 levels + 1)) bits; the paper's Elias code would take
    fewer for many zeros.
    """

    levels: int
    norm: str = "l2"

    def __post_init__(self) -> None:
        whole("levels", self.levels, 1, 2 ** (MAX_BITS - 1) - 1)
        one_of("norm", self.norm, ["l2", "linf"])

    def send(self, packet: Packet, rng: torch.Generator) -> Packet:
        return _random_multiples(packet, self.levels, self.norm, rng)

    def tell(self, packet: Packet, belief: Belief) -> Belief:
        return _told_of_multiples(packet, belief, self.levels)


@dataclass(frozen=True)
class Ternary(TensorByTensor):
    """Sends -m, 0 or m, where m is the tensor's largest magnitude and an entry x is kept with probability |x| / m.

    TernGrad (Wen et al. 2017, section 3), without its clipping, which is biased. Unbiased; 2 bits an entry.
    """

    def send(self, packet: Packet, rng: torch.Generator) -> Packet:
        return _random_multiples(packet, 1, "linf", rng)

    def tell(self, packet: Packet, belief: Belief) -> Belief:
        return _told_of_multiples(packet, belief, 1)


def _random_multiples(packet: Packet, levels: int, norm: str, rng: torch.Generator) -> Packet:
    size = torch.linalg.vector_norm(packet.values.double(), ord=2 if norm == "l2" else torch.inf)
    lattice = Multiples(float(size) / levels, levels.bit_length() + 1)
    shares = _steps(packet.values, lattice)
    codes = (shares.abs() + _uniform(shares, rng)).floor() * shares.sign()
    return multiples(packet, lattice, codes, levels)


def _told_of_multiples(packet: Packet, belief: Belief, levels: int) -> Belief:
    if untouched(packet):
        return belief
    if not isinstance(packet.grid, Multiples) or not visible(packet, belief):
        return belief.unbounded(packet.sent())
    end = packet.grid.step * levels
    return within_steps(packet, belief, 1.0, (-end, end), mean=True)


@dataclass(frozen=True)
class SignSGD(TensorByTensor):
    """Sends the sign of each entry, 1 bit (Bernstein et al. 2018, algorithm 1); zero counts as positive.

    Biased. `scaled` multiplies the signs by the tensor's mean magnitude; within ErrorFeedback that is EF-signSGD (Karimireddy et
    al. 2019, algorithm 1). Unscaled, every entry is -1 or 1, so the server's learning rate must be chosen for it.
    """

    scaled: bool = True

    rescales: ClassVar[bool] = True

    def __post_init__(self) -> None:
        switch("scaled", self.scaled)

    def send(self, packet: Packet, rng: torch.Generator) -> Packet:
        scale = 1.0
        if self.scaled:
            # Not 0 where there is anything, however small, so that signs can be read.
            scale = max(float(packet.values.double().abs().mean()), SMALLEST) if packet.values.any() else 0.0
        grid = Grid(-scale, 2 * scale, 1)
        return replace(packet, values=grid.decode((packet.values >= 0).long()), grid=grid)

    def tell(self, packet: Packet, belief: Belief) -> Belief:
        # A sign sent as 0 is that of an entry, and a whole tensor, of 0.
        positive, negative, loose = belief.low >= 0, belief.high <= 0, belief.unbounded(packet.sent())
        return Belief(
            belief.value,
            torch.where(positive, 0.0, loose.low),
            torch.where(negative, 0.0, loose.high),
            torch.where(positive | negative, 0.0, loose.weight),
        )


@dataclass(frozen=True)
class KMeansQuantization(TensorByTensor):
    """Rounds each entry to the nearest of `centroids` values that k-means fits to the tensor (Han et al. 2016, section 3).

    Biased. The centroids travel as a codebook, 4 bytes each, and an entry costs ceil(log2(centroids)) bits. They are the best of
    five starts drawn by k-means++, on a random 16,384 entries of a larger tensor; fewer where the tensor has fewer values.
    """

    centroids: int

    def __post_init__(self) -> None:
        whole("centroids", self.centroids, 2, 2**16)

    def send(self, packet: Packet, rng: torch.Generator) -> Packet:
        levels = self._levels(packet.values.cpu(), rng).to(packet.values.device)
        nearest = torch.searchsorted(edges_of(levels)[1:-1], packet.values.double())
        return replace(packet, values=levels[nearest], grid=Codebook(tuple(levels.tolist())))

    def _levels(self, values: Tensor, rng: torch.Generator) -> Tensor:
        from scipy.cluster.vq import kmeans, kmeans2  # a second for every process of a federation, and needed here only

        there = values.unique()
        if len(there) <= self.centroids:
            return there
        chosen = torch.randperm(len(values), generator=rng)[:SAMPLE]
        sample = values[chosen].double().numpy()
        # What counts as converged in kmeans is not relative, so the entries are brought to size 1.
        size = float(np.abs(sample).max()) or 1.0
        points = (sample / size)[:, None]
        count = min(self.centroids, len(np.unique(points)))
        chance = np.random.default_rng(int(torch.randint(2**62, (), generator=rng)))
        # kmeans2 draws the starts; a cluster that loses all its entries later is dropped by kmeans.
        starts = [kmeans2(points, count, iter=1, minit="++", rng=chance)[0] for _ in range(STARTS)]
        best, _ = min((kmeans(points, start) for start in starts), key=lambda found: found[1])
        return torch.from_numpy(best[:, 0] * size).float().unique()

    def tell(self, packet: Packet, belief: Belief) -> Belief:
        if untouched(packet):
            return belief
        if not isinstance(packet.grid, Codebook) or not visible(packet, belief):
            return belief.unbounded(packet.sent())
        levels = torch.tensor(packet.grid.values, device=belief.value.device)
        return within_cells(belief, edges_of(levels))
