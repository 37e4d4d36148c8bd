"""Sparsification: only some entries of each tensor are sent, with their places."""

import math
from dataclasses import dataclass

import torch

from fedsim.checks import number
from fedsim.defense import State
from fedsim.updates import Update
from fedsim.wire import Packet, Packets


@dataclass(frozen=True)
class TopK:
    """Keeps the `ratio` of entries largest in magnitude, tensor by tensor, at least one (Aji and Heafield 2017).

    Biased; use within ErrorFeedback to recover what is dropped (Stich et al. 2018). A kept entry costs its value and its place,
    whichever of indices or bitmap is shorter. An attacker sees which entries were kept.
    """

    ratio: float

    def __post_init__(self) -> None:
        number("ratio", self.ratio, 0, 1, above=True)

    def init(self, like: Update) -> State:
        return {}

    def __call__(self, packets: Packets, state: State, rng: torch.Generator) -> tuple[Packets, State]:
        return {name: self._sparse(packet) for name, packet in packets.items()}, state

    def _sparse(self, packet: Packet) -> Packet:
        n = packet.values.numel()
        # A millionth of an entry of slack: 0.07 * 100 is 7.000000000000001 in floating point, and means 7.
        k = min(n, max(1, math.ceil(self.ratio * n - 1e-6)))
        if k == n:
            return packet
        kept = packet.values.abs().topk(k, sorted=False).indices.sort().values
        support = kept if packet.support is None else packet.support[kept]
        return Packet(packet.values[kept], packet.shape, support, packet.grid)
