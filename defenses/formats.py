"""Number formats: each entry rounded to the nearest number that a format has, the same for every tensor (but for scaled Int8).

All are deterministic and biased. They leave the cell of numbers that are rounded alike; what is larger than the format's largest
number is sent as that, and is then bounded on one side only.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from defenses.base import TensorByTensor
from defenses.quantize import edges_of, multiples, untouched, visible, within_cells, within_steps
from fedsim.checks import one_of, switch, whole
from fedsim.defense import Belief
from fedsim.wire import FORMATS, MAX_BITS, Codebook, Floats, Multiples, Packet

EXPONENTS = (-149, 127)  # of the smallest and the largest power of two in float32


@dataclass(frozen=True)
class FloatFormat(TensorByTensor):
    """Rounds each entry to a shorter float: fp16 or bf16, 2 bytes, fp8_e4m3 or fp8_e5m2, 1 byte (Micikevicius et al. 2022).

    An entry beyond the largest number (65504, 3.39e38, 448, 57344) becomes that number, not infinity. The relative error is at
    most 2**-11, 2**-8, 2**-4 and 2**-3, unless the entry is below the smallest normal number (6.1e-5, 1.2e-38, 0.016, 6.1e-5).
    """

    format: str

    def __post_init__(self) -> None:
        one_of("float format", self.format, FORMATS)

    def send(self, packet: Packet, rng: torch.Generator) -> Packet:
        floats = Floats(self.format)
        finite = packet.values.clamp(-floats.largest, floats.largest)
        return replace(packet, values=floats.decode(floats.encode(finite)), grid=floats)

    def tell(self, packet: Packet, belief: Belief) -> Belief:
        return within_cells(belief, edges_of(Floats(self.format).levels().to(belief.value.device)))


@dataclass(frozen=True)
class FixedPoint(TensorByTensor):
    """Rounds each entry to the nearest multiple of 2**-`fraction` in [-2**(bits - fraction - 1), 2**(bits - fraction - 1)).

    `bits` bits an entry, of which `fraction` stand behind the binary point and one is the sign. The error is at most half a step
    within that range; entries beyond it go to its ends.
    """

    bits: int
    fraction: int

    def __post_init__(self) -> None:
        whole("bits", self.bits, 2, MAX_BITS)
        whole("fraction", self.fraction, 0, 126)

    def send(self, packet: Packet, rng: torch.Generator) -> Packet:
        lattice = Multiples(2.0**-self.fraction, self.bits)
        half = 2 ** (self.bits - 1)
        codes = (packet.values.double() / lattice.step).round().clamp(-half, half - 1)
        return replace(packet, values=lattice.at(codes), grid=lattice)

    def tell(self, packet: Packet, belief: Belief) -> Belief:
        half, step = 2 ** (self.bits - 1), 2.0**-self.fraction

        def code(bound: Tensor) -> Tensor:
            return (bound.double() / step).round().clamp(-half, half - 1)

        low, high = code(belief.low), code(belief.high)
        below = torch.where(low == -half, -torch.inf, (low - 0.5) * step)
        above = torch.where(high == half - 1, torch.inf, (high + 0.5) * step)
        return belief.rounded(below.float(), above.float())


@dataclass(frozen=True)
class Int8(TensorByTensor):
    """Whole numbers of 8 bits; with `scaled`, times the tensor's largest magnitude / 127, for an error of half of that at most.

    Without it, what casting to an 8-bit integer does: an entry loses what stands behind its point, and stays within -128..127. Of
    gradients, whose entries are mostly below 1, hardly anything is left.
    """

    scaled: bool = True

    def __post_init__(self) -> None:
        switch("scaled", self.scaled)

    def send(self, packet: Packet, rng: torch.Generator) -> Packet:
        if not self.scaled:
            lattice = Multiples(1.0, 8)
            return replace(packet, values=lattice.at(packet.values.double().trunc().clamp(-128, 127)), grid=lattice)
        lattice = Multiples(float(packet.values.double().abs().max()) / 127, 8)
        steps = packet.values.double() / lattice.step if lattice.step else torch.zeros_like(packet.values)
        return multiples(packet, lattice, steps.round(), 127)

    def tell(self, packet: Packet, belief: Belief) -> Belief:
        if not self.scaled:
            low, high = belief.low.trunc().clamp(-128, 127), belief.high.trunc().clamp(-128, 127)
            below = torch.where(low == -128, -torch.inf, torch.where(low <= 0, low - 1, low))
            return belief.rounded(below, torch.where(high == 127, torch.inf, torch.where(high >= 0, high + 1, high)))
        if untouched(packet):
            return belief
        if not isinstance(packet.grid, Multiples) or not visible(packet, belief):
            return belief.unbounded(packet.sent())
        end = 127 * packet.grid.step
        return within_steps(packet, belief, 0.5, (-end, end), mean=False)


@dataclass(frozen=True)
class LogQuantization(TensorByTensor):
    """Sends sign(x) * 2**round(log2 |x|), and 0 for 0 (Miyashita et al. 2016): each entry to within a factor of the root of 2.

    The powers that occur travel as a codebook: of a gradient about 60, so 6 bits an entry and 4 bytes a power.
    """

    def send(self, packet: Packet, rng: torch.Generator) -> Packet:
        exponents = packet.values.double().abs().log2().round().clamp(*EXPONENTS)
        values = (packet.values.sign() * 2**exponents).float()
        return replace(packet, values=values, grid=Codebook(tuple(values.unique().tolist())))

    def tell(self, packet: Packet, belief: Belief) -> Belief:
        low, high = EXPONENTS
        roots = 2 ** (torch.arange(low, high, dtype=torch.float64, device=belief.value.device) + 0.5)
        edges = torch.cat([roots.new_zeros(1), roots, roots.new_full((1,), torch.inf)])  # of magnitudes

        def cell(bound: Tensor, upper: bool) -> Tensor:
            above = torch.searchsorted(edges, bound.double().abs()).clamp(1, len(edges) - 1)
            larger, smaller = edges[above], edges[above - 1]
            end = torch.where(bound > 0, larger if upper else smaller, -(smaller if upper else larger))
            return torch.where(bound == 0, 0.0, end).float()  # only 0 is sent as 0

        return belief.rounded(cell(belief.low, upper=False), cell(belief.high, upper=True))
