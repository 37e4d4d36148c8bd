"""Quantization: the entries of each tensor on a lattice of a few levels between its smallest and its largest entry.

A tensor of n entries costs n * ceil(log2(levels)) bits and 9 bytes for its grid.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsim.checks import whole
from fedsim.defense import State
from fedsim.updates import Update
from fedsim.wire import MAX_BITS, Grid, Packet, Packets


def _grid(values: Tensor, levels: int) -> Grid:
    low, high = values.aminmax()
    return Grid(float(low), float(high.double() - low.double()) / (levels - 1), (levels - 1).bit_length())


def _steps(values: Tensor, grid: Grid) -> Tensor:
    """How many steps of the grid each value lies above its low end, in float64; 0 for a constant tensor."""
    if grid.step == 0:
        return torch.zeros_like(values, dtype=torch.float64)
    return (values.double() - grid.low) / grid.step


def _on(grid: Grid, codes: Tensor, levels: int, packet: Packet) -> Packet:
    return replace(packet, values=grid.decode(codes.clamp(0, levels - 1)), grid=grid)


@dataclass(frozen=True)
class UniformQuantization:
    """Rounds each entry to the nearest of `levels` equally spaced ones, tensor by tensor.

    Deterministic, and so biased: an entry smaller than half a step near zero is always sent as the same level. The error of an
    entry is at most half a step, and a step is (max - min) / (levels - 1).
    """

    levels: int

    def __post_init__(self) -> None:
        whole("levels", self.levels, 2, 2**MAX_BITS)

    def init(self, like: Update) -> State:
        return {}

    def __call__(self, packets: Packets, state: State, rng: torch.Generator) -> tuple[Packets, State]:
        return {name: self._quantized(p) if p.values.numel() else p for name, p in packets.items()}, state

    def _quantized(self, packet: Packet) -> Packet:
        grid = _grid(packet.values, self.levels)
        return _on(grid, _steps(packet.values, grid).round(), self.levels, packet)


@dataclass(frozen=True)
class StochasticQuantization:
    """Rounds each entry up or down to one of `levels` equally spaced ones at random, so that its mean is the entry.

    Unbiased; the error of an entry is below one step, with up to twice the variance of rounding to the nearest
    (Alistarh et al. 2017, section 3, with min and max in place of the norm).
    """

    levels: int

    def __post_init__(self) -> None:
        whole("levels", self.levels, 2, 2**MAX_BITS)

    def init(self, like: Update) -> State:
        return {}

    def __call__(self, packets: Packets, state: State, rng: torch.Generator) -> tuple[Packets, State]:
        return {name: self._quantized(p, rng) if p.values.numel() else p for name, p in packets.items()}, state

    def _quantized(self, packet: Packet, rng: torch.Generator) -> Packet:
        grid = _grid(packet.values, self.levels)
        uniform = torch.rand(packet.values.shape, generator=rng, dtype=torch.float64).to(packet.values.device)
        # The floor of a number plus uniform noise has that number as its mean.
        return _on(grid, (_steps(packet.values, grid) + uniform).floor(), self.levels, packet)
