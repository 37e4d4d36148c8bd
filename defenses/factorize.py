"""Factorization: a matrix is sent as the product of two thin ones."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.checks import whole
from fedsim.defense import Belief, Beliefs, State
from fedsim.updates import Update
from fedsim.wire import Packet, Packets


@dataclass(frozen=True)
class PowerSGD:
    """Sends P and Q of rank `rank` in place of each tensor M, as a matrix of shape[0] rows (Vogels et al. 2019, algorithm 1).

    One power iteration from the Q of the client's last round: P = orthogonalised M Q, Q = M' P, so P Q' is M projected onto P's
    columns. Biased; to be used within ErrorFeedback. Costs rank (m + n / m) floats a tensor; tensors of one dimension, and those
    whose factors would be longer, travel as they are. Each client has factors of its own here, which a server cannot add up before
    it multiplies them. An attacker knows P' M = Q' exactly, but of single entries there are no bounds.
    """

    rank: int

    def __post_init__(self) -> None:
        whole("rank", self.rank)

    def init(self, like: Update) -> State:
        return {name: torch.zeros(t.numel() // len(t), self.rank, device=t.device) for name, t in like.items() if self._factored(t)}

    def __call__(self, packets: Packets, state: State, rng: torch.Generator) -> tuple[Packets, State]:
        dense = {name: p.dense() for name, p in packets.items()}
        after: State = {}
        sent = dict(packets)
        for name, t in dense.items():
            if self._factored(t):
                matrix = t.flatten(1).double()
                before = state[name].to(matrix)
                if not before.any():  # the first round, or nothing came of the last
                    before = torch.randn(before.shape, generator=rng).to(matrix)
                left = torch.linalg.qr(matrix @ before).Q.float()
                after[name] = right = (matrix.T @ left.double()).float()
                factors = torch.cat([left.flatten(), right.flatten()])
                sent[name] = Packet(factors, tuple(t.shape), rank=self.rank)
        return sent, after

    def explain(self, packets: Packets, beliefs: Mapping[str, Belief]) -> Beliefs:
        # Not by the packet's rank: a memory that sends what is left of the product sends no factors.
        return {name: b.unbounded(packets[name].sent()) if self._factored(b.value) else b for name, b in beliefs.items()}

    def _factored(self, t: Tensor) -> bool:
        return t.dim() > 1 and t.numel() > self.rank * (len(t) + t.numel() // max(1, len(t)))
