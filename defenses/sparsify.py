"""Sparsification: only some entries are sent, with their places, whichever of indices or bitmap is shorter.

What was not sent is known to be no larger than what was, if the largest are sent; an attacker sees which those are, unless a later
defense sends all entries. Classes say so: one whose `drops` is true leaves entries out, one whose `fills` is true sends all places.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from defenses.base import TensorByTensor
from fedsim.checks import number, one_of, switch, whole
from fedsim.defense import Belief, Beliefs, State
from fedsim.updates import Update, norm
from fedsim.wire import Packet, Packets


def _count(ratio: float, n: int) -> int:
    # A millionth of an entry of slack: 0.07 * 100 is 7.000000000000001 in floating point, and means 7.
    return min(n, max(1, math.ceil(ratio * n - 1e-6)))


def _only(packet: Packet, kept: Tensor) -> Packet:
    """Of the values sent those at `kept`, ascending."""
    if len(kept) == len(packet.values):
        return packet
    return replace(packet, values=packet.values[kept], support=kept if packet.support is None else packet.support[kept])


def _largest(values: Tensor, k: int) -> Tensor:
    return values.abs().topk(k, sorted=False).indices.sort().values


def _magnitude(belief: Belief) -> Tensor:
    """The largest an entry may be."""
    return torch.maximum(belief.low.abs(), belief.high.abs())


def _bound(packets: list[Packet], beliefs: list[Belief]) -> float:
    """How large an entry may be that was dropped for being smaller than all that were kept.

    No larger than any that arrived. Where none did, a later defense dropped them all, and it is no larger than the largest may be.
    Entries of factors are compared without saying anything of the tensor's.
    """
    if any(p.rank is not None for p in packets):
        return math.inf
    sent = torch.cat([_magnitude(b)[p.sent()] for p, b in zip(packets, beliefs, strict=True)])
    if len(sent):
        return float(sent.min())
    return max((float(_magnitude(b).max()) for b in beliefs if b.value.numel()), default=0.0)


def _dropped(belief: Belief, where: Tensor, bound: float) -> Belief:
    """Of entries that, `where` (bool) they are missing, were dropped here, being no larger than `bound`, or later."""
    return Belief(
        belief.value,
        torch.where(where, belief.low.clamp(max=-bound), belief.low),
        torch.where(where, belief.high.clamp(min=bound), belief.high),
        torch.where(where, 0.0, belief.weight),
    )


def _divided(belief: Belief, scale: float) -> Belief:
    """Of entries that 1 / `scale` times what `belief` says was made of, give or take four roundings to float32, of 2**-24 each."""
    low, high = belief.low.double() * scale, belief.high.double() * scale
    slack = 2**-22
    return Belief(belief.value * scale, (low - slack * low.abs()).float(), (high + slack * high.abs()).float(), belief.weight)


@dataclass(frozen=True)
class TopK:
    """Keeps the `ratio` of entries largest in magnitude, at least one (Aji and Heafield 2017).

    Biased; use within ErrorFeedback to recover what is dropped (Stich et al. 2018). `scope="tensor"` keeps that share of each
    tensor; "global" of the whole update, so that a tensor of small entries may be dropped altogether.
    """

    ratio: float
    scope: str = "tensor"

    drops: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number("ratio", self.ratio, 0, 1, above=True)
        one_of("scope", self.scope, ["tensor", "global"])

    def init(self, like: Update) -> State:
        return {}

    def __call__(self, packets: Packets, state: State, rng: torch.Generator) -> tuple[Packets, State]:
        if self.scope == "tensor":
            return {name: _only(p, _largest(p.values, _count(self.ratio, len(p.values)))) for name, p in packets.items()}, state
        values = torch.cat([p.values for p in packets.values()])
        kept = torch.zeros(len(values), dtype=torch.bool, device=values.device)
        kept[_largest(values, _count(self.ratio, len(values)))] = True
        parts = kept.split([len(p.values) for p in packets.values()])
        return {name: _only(p, part.nonzero()[:, 0]) for (name, p), part in zip(packets.items(), parts, strict=True)}, state

    def explain(self, packets: Packets, beliefs: Mapping[str, Belief]) -> Beliefs:
        everything = _bound(list(packets.values()), list(beliefs.values())) if self.scope == "global" else None
        return {
            name: _dropped(b, ~packets[name].sent(), _bound([packets[name]], [b]) if everything is None else everything)
            for name, b in beliefs.items()
        }


@dataclass(frozen=True)
class RandomK(TensorByTensor):
    """Sends the `ratio` of each tensor's entries, at least one, at random places (Stich et al. 2018, definition 2.2).

    With `scaled`, times n / k, so that what arrives has the update as its mean; an attacker divides by it. Without, biased, for use
    within ErrorFeedback. Nothing is known of an entry that is not sent.
    """

    ratio: float
    scaled: bool = True

    drops: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number("ratio", self.ratio, 0, 1, above=True)
        switch("scaled", self.scaled)

    def send(self, packet: Packet, rng: torch.Generator) -> Packet:
        # Of all places, not of those that an earlier defense left, so that n / k can be told from the tensor's shape.
        n, k = packet.places, _count(self.ratio, packet.places)
        if k == n:
            return packet
        chosen = torch.randperm(n, generator=rng)[:k].sort().values.to(packet.values.device)
        kept = chosen if packet.support is None else torch.isin(packet.support, chosen).nonzero()[:, 0]
        sparse = _only(packet, kept)
        return replace(sparse, values=sparse.values * (n / k), grid=None) if self.scaled else sparse

    def tell(self, packet: Packet, belief: Belief) -> Belief:
        n, k = packet.places, _count(self.ratio, packet.places)
        if k == n:
            return belief
        told = _divided(belief, k / n) if self.scaled else belief
        return _dropped(told, ~packet.sent(), math.inf)


@dataclass(frozen=True)
class Threshold(TensorByTensor):
    """Sends the entries of magnitude `threshold` or more (Strom 2015). Biased; how many bytes that takes depends on the update."""

    threshold: float

    drops: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number("threshold", self.threshold, 0)

    def send(self, packet: Packet, rng: torch.Generator) -> Packet:
        return _only(packet, (packet.values.abs() >= self.threshold).nonzero()[:, 0])

    def tell(self, packet: Packet, belief: Belief) -> Belief:
        return _dropped(belief, ~packet.sent(), self.threshold)


@dataclass(frozen=True)
class Pruning:
    """Drops the `share` of an update that matters least, by one of three modes that a study compares.

    "entries"  the int(share n) entries smallest in magnitude, of each tensor of n
    "tensors"  the int(share t) + 1 whole tensors smallest in l2 norm, of t; one is always sent
    "literal"  as many tensors, but the first ones: what the published code of "tensors" does, which sorts the norms and then drops
               the tensors at places 0, 1, … of the model instead of those the norms came from
    """

    share: float
    mode: str = "tensors"

    drops: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number("share", self.share, 0, 1)
        one_of("mode", self.mode, ["entries", "tensors", "literal"])

    def init(self, like: Update) -> State:
        return {}

    def __call__(self, packets: Packets, state: State, rng: torch.Generator) -> tuple[Packets, State]:
        if self.mode == "entries":
            kept = {name: len(p.values) - int(self.share * len(p.values) + 1e-6) for name, p in packets.items()}
            return {name: _only(p, _largest(p.values, kept[name])) for name, p in packets.items()}, state
        names = [name for name, p in packets.items() if p.values.numel()]
        if self.mode == "tensors":
            names.sort(key=lambda name: float(packets[name].values.double().norm()))
        dropped = names[: min(int(self.share * len(names) + 1e-6) + 1, len(names) - 1)]
        none = torch.zeros(0, dtype=torch.int64)
        return {name: _only(p, none.to(p.values.device)) if name in dropped else p for name, p in packets.items()}, state

    def explain(self, packets: Packets, beliefs: Mapping[str, Belief]) -> Beliefs:
        missing = {name: ~packets[name].sent() for name in beliefs}
        if self.mode == "entries":
            return {name: _dropped(b, missing[name], _bound([packets[name]], [b])) for name, b in beliefs.items()}
        bound = math.inf
        if self.mode == "tensors" and not any(p.rank is not None for p in packets.values()):
            # A dropped tensor's norm, and so each entry, is no larger than a kept tensor's.
            norms = {name: float(_magnitude(b).double().norm()) for name, b in beliefs.items()}
            arrived = [norms[name] for name in beliefs if len(packets[name].values)]
            bound = min(arrived) if arrived else max(norms.values(), default=0.0)
        return {name: _dropped(b, missing[name], bound) if missing[name].all() else b for name, b in beliefs.items()}


@dataclass(frozen=True)
class DeepGradientCompression:
    """Sends the largest `ratio` of each tensor's accumulated momentum, and keeps the rest for later (Lin et al. 2018, algorithm 4).

    Its own error feedback: u = momentum u + update and v = v + u are kept, and set to 0 where v is sent (momentum correction, local
    accumulation, momentum factor masking). No momentum may be used on the server or in local steps besides. An attacker who sees a
    message sees several rounds' updates in it, so it has no bounds on one, but of a client's first message, and of entries that the
    message before sent as well.

    clip     l2 norm that an update is scaled down to before it is added: of N clients, the paper's threshold / sqrt(N)
    warmup   rounds (those the client took part in) until `ratio` is reached, from 25 % down by an equal factor for 0.001 and 4
    """

    ratio: float = 0.001
    momentum: float = 0.9
    clip: float | None = None
    warmup: int = 4

    drops: ClassVar[bool] = True
    fills: ClassVar[bool] = True
    rescales: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number("ratio", self.ratio, 0, 1, above=True)
        number("momentum", self.momentum, 0, 1)
        if self.clip is not None:
            number("clip", self.clip, 0, above=True)
        whole("warmup", self.warmup, 0)

    def init(self, like: Update) -> State:
        kept = {f"{key}/{name}": torch.zeros_like(t) for key in ("momentum", "accumulated") for name, t in like.items()}
        return kept | {"rounds": torch.zeros((), dtype=torch.int64)}

    def ratio_of(self, rounds: int) -> float:
        """The share of entries that a client sends who has sent `rounds` times before."""
        return self.ratio ** min(1.0, (rounds + 1) / (self.warmup + 1))

    def __call__(self, packets: Packets, state: State, rng: torch.Generator) -> tuple[Packets, State]:
        update = {name: p.dense() for name, p in packets.items()}
        length = float(norm(update))
        scale = 1.0 if self.clip is None or length <= self.clip else self.clip / length
        ratio = self.ratio_of(int(state["rounds"]))
        sent: Packets = {}
        after: State = {"rounds": state["rounds"] + 1}
        for name, g in update.items():
            u = self.momentum * state[f"momentum/{name}"] + scale * g
            v = state[f"accumulated/{name}"] + u
            sent[name] = _only(whole := Packet(v.flatten(), tuple(v.shape)), _largest(whole.values, _count(ratio, v.numel())))
            kept = ~sent[name].sent()
            after |= {f"momentum/{name}": u * kept, f"accumulated/{name}": v * kept}
        return sent, after

    def explain(self, packets: Packets, beliefs: Mapping[str, Belief]) -> Beliefs:
        missing = {name: ~packets[name].sent() for name in beliefs}
        return {name: _dropped(b.unbounded(~missing[name]), missing[name], math.inf) for name, b in beliefs.items()}

    def explain_after(self, packets: Packets, beliefs: Mapping[str, Belief], before: Packets) -> Beliefs:
        """Of entries of which nothing was kept, what top-k leaves possible: the update alone was sent, or was too small to be."""
        told = self.explain(packets, beliefs)
        if self.clip is not None:
            return told
        alone = TopK(self.ratio).explain(packets, beliefs)
        empty = {name: before[name].sent() if before else torch.ones_like(b.value, dtype=torch.bool) for name, b in told.items()}
        return {
            name: Belief(
                b.value,
                torch.where(empty[name], alone[name].low, b.low),
                torch.where(empty[name], alone[name].high, b.high),
                torch.where(empty[name], alone[name].weight, b.weight),
            )
            for name, b in told.items()
        }
