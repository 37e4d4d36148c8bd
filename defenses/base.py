"""Defenses that are made of other defenses, the one that does nothing, and what those share that treat each tensor by itself."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fedsim.defense import (
    BatchDefense,
    Belief,
    Beliefs,
    Defense,
    Exposure,
    GradientDefense,
    Guarantee,
    Private,
    State,
    declares,
    is_followed,
    mixes,
    parts_of,
    replaces_gradient,
    told_by,
)
from fedsim.training import Batch, batch_gradients
from fedsim.updates import Update
from fedsim.wire import Packet, Packets, pack, unpack


class TensorByTensor(ABC):
    """A defense without a memory that treats each tensor that has entries by itself."""

    def init(self, like: Update) -> State:
        return {}

    def __call__(self, packets: Packets, state: State, rng: torch.Generator) -> tuple[Packets, State]:
        return {name: self.send(p, rng) if p.values.numel() else p for name, p in packets.items()}, state

    def explain(self, packets: Packets, beliefs: Mapping[str, Belief]) -> Beliefs:
        return {name: self.tell(packets[name], belief) for name, belief in beliefs.items()}

    @abstractmethod
    def send(self, packet: Packet, rng: torch.Generator) -> Packet:
        """What to send instead of `packet`, which has values."""

    @abstractmethod
    def tell(self, packet: Packet, belief: Belief) -> Belief:
        """`explain` for one tensor."""


T = TypeVar("T")


class Untouched:
    """A defense without a memory that sends the update as it is: what it does, it does while the client trains."""

    def init(self, like: Update) -> State:
        return {}

    def __call__(self, packets: Packets, state: State, rng: torch.Generator) -> tuple[Packets, State]:
        return packets, state


@dataclass(frozen=True)
class NoDefense(Untouched):
    """Sends the update as it is, 4 bytes an entry."""

    def explain(self, packets: Packets, beliefs: Mapping[str, Belief]) -> Beliefs:
        return dict(beliefs)


@dataclass(frozen=True)
class Chain:
    """Applies `parts` one after the other, first to last."""

    parts: tuple[Defense, ...]

    def __init__(self, parts: Sequence[Defense]) -> None:
        if not parts:
            raise ValueError("a chain needs at least one defense, got none; for no defense use NoDefense()")
        for part in parts:
            if not _is_defense(part):
                raise TypeError(f"a chain is made of defenses, got {part!r}")
        computing = [part for part in parts if replaces_gradient(part)]
        if len(computing) > 1:
            raise ValueError(f"one part of a chain can compute the gradient, got {computing[0]!r} and {computing[1]!r}")
        object.__setattr__(self, "parts", tuple(parts))

    def init(self, like: Update) -> State:
        return {f"{i}/{key}": t for i, part in enumerate(self.parts) for key, t in part.init(like).items()}

    def __call__(self, packets: Packets, state: State, rng: torch.Generator) -> tuple[Packets, State]:
        after: State = {}
        for i, part in enumerate(self.parts):
            packets, new = part(packets, _within(f"{i}/", state), rng)
            after |= {f"{i}/{key}": t for key, t in new.items()}
        return packets, after

    def batch(self, images: Tensor, labels: Tensor, classes: int, rng: torch.Generator) -> Batch:
        for part in self.parts:
            if isinstance(part, BatchDefense):
                images, labels = part.batch(images, labels, classes, rng)
        return images, labels

    def gradients(
        self,
        model: nn.Module,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        images: Tensor,
        labels: Tensor,
        step: int,
        rng: torch.Generator,
    ) -> tuple[Tensor, Update]:
        for part in self.parts:
            if isinstance(part, GradientDefense) and replaces_gradient(part):
                return part.gradients(model, params, buffers, images, labels, step, rng)
        return batch_gradients(model, params, buffers, images, labels)

    def guarantee(self, exposures: Sequence[Exposure]) -> Guarantee | None:
        """The strongest of its parts': what comes after is post-processing, what comes before part of the data's function."""
        mixed = mixes(self)
        found = [made for part in self.parts if isinstance(part, Private) and (made := part.guarantee(exposures)) is not None]
        # One image in several mixtures has several clipped gradients, and no proof.
        found = [made for made in found if made.unit == "client" or not mixed]
        return min(found, key=lambda made: made.epsilon, default=None)

    def planned(self, exposures: Sequence[Exposure]) -> "Chain":
        return Chain([part.planned(exposures) if isinstance(part, Private) else part for part in self.parts])

    @property
    def rescales(self) -> bool:
        """Whether the update that was sent says nothing of the length of the client's own."""
        return any(getattr(part, "rescales", False) for part in self.parts)

    def explain(self, packets: Packets, beliefs: Mapping[str, Belief]) -> Beliefs:
        return self._told(packets, beliefs, None)

    @property
    def followed(self) -> bool:
        return is_followed(self.parts[-1])

    def explain_after(self, packets: Packets, beliefs: Mapping[str, Belief], before: Packets) -> Beliefs:
        """The last part made what was sent before: it alone is told of it."""
        return self._told(packets, beliefs, before)

    def _told(self, packets: Packets, beliefs: Mapping[str, Belief], before: Packets | None) -> Beliefs:
        told: Beliefs = dict(beliefs)
        for i, part in reversed(list(enumerate(self.parts))):
            told = told_by(part, packets, told, before if i == len(self.parts) - 1 else None)
            if declares(part, "fills") and any(declares(earlier, "drops") for earlier in self.parts[:i]):
                told = {name: _hidden(belief) for name, belief in told.items()}
        return told


def _hidden(belief: Belief) -> Belief:
    """Of a tensor in which nobody sees which entries were dropped, as all were sent since: what is 0 may have been dropped."""
    return replace(belief.unbounded(belief.value != 0), weight=belief.weight * (belief.value != 0))


@dataclass(frozen=True)
class ErrorFeedback:
    """Adds to each update what `inner` dropped from the earlier ones (Seide et al. 2014; Karimireddy et al. 2019, algorithm 2).

    Nothing is lost for good: what was sent plus what is remembered is the sum of all updates. The memory is one dense update for
    each client. What a round reveals is then a mixture of this round's data and earlier ones'.
    """

    inner: Defense

    fills: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not _is_defense(self.inner):
            raise TypeError(f"error feedback wraps a defense, got {self.inner!r}")

    def init(self, like: Update) -> State:
        memory = {f"residual/{name}": torch.zeros_like(t) for name, t in like.items()}
        return memory | {f"inner/{key}": t for key, t in self.inner.init(like).items()}

    def __call__(self, packets: Packets, state: State, rng: torch.Generator) -> tuple[Packets, State]:
        residual = _within("residual/", state)
        wanted = {name: t + residual[name] for name, t in unpack(packets).items()}
        sent, inner = self.inner(pack(wanted), _within("inner/", state), rng)
        dropped = {f"residual/{name}": wanted[name] - t for name, t in unpack(sent).items()}
        return sent, dropped | {f"inner/{key}": t for key, t in inner.items()}

    def batch(self, images: Tensor, labels: Tensor, classes: int, rng: torch.Generator) -> Batch:
        return Chain((self.inner,)).batch(images, labels, classes, rng)

    def gradients(
        self,
        model: nn.Module,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        images: Tensor,
        labels: Tensor,
        step: int,
        rng: torch.Generator,
    ) -> tuple[Tensor, Update]:
        return Chain((self.inner,)).gradients(model, params, buffers, images, labels, step, rng)

    def guarantee(self, exposures: Sequence[Exposure]) -> Guarantee | None:
        """That of `inner`, which holds whatever the memory adds to what it is given."""
        return Chain((self.inner,)).guarantee(exposures)

    def planned(self, exposures: Sequence[Exposure]) -> "ErrorFeedback":
        return replace(self, inner=self.inner.planned(exposures)) if isinstance(self.inner, Private) else self

    @property
    def rescales(self) -> bool:
        return Chain((self.inner,)).rescales

    def explain(self, packets: Packets, beliefs: Mapping[str, Belief]) -> Beliefs:
        """No bounds: what `inner` leaves possible is said of the update plus the residual, which a message does not tell apart."""
        return {name: belief.unbounded(packets[name].sent()) for name, belief in self._of_sum(packets, beliefs).items()}

    def explain_after(self, packets: Packets, beliefs: Mapping[str, Belief], before: Packets) -> Beliefs:
        """Bounds once more: the residual is what the message before left out, which `inner` bounds as well.

        An entry that top-k sent the last time has none, and is the update's own when it is sent again.
        """
        told = self._of_sum(packets, beliefs)
        if not before:
            return told
        earlier = self._of_sum(before, {name: Belief.exact(packet.dense()) for name, packet in before.items()})
        made = {}
        for name, now in told.items():
            sent = before[name].dense()
            least, most = earlier[name].low - sent, earlier[name].high - sent
            low, high = now.low - most, now.high - least
            bounded = low.isfinite() & high.isfinite()
            weight = torch.where(least == most, now.weight, torch.where(bounded, 0.0, packets[name].sent().to(now.weight)))
            made[name] = Belief(now.value - (earlier[name].value - sent), low, high, weight)
        return made

    def _of_sum(self, packets: Packets, beliefs: Mapping[str, Belief]) -> Beliefs:
        """What is told of the update plus the residual."""
        return told_by(self.inner, packets, beliefs)


def _aims(defense: object) -> bool:
    """Whether the noise of a defense, or of one that it is made of, is planned for an epsilon."""
    return getattr(defense, "epsilon", None) is not None or any(map(_aims, parts_of(defense)))


def _acts_in_training(defense: object) -> bool:
    inner = parts_of(defense)
    return any(map(_acts_in_training, inner)) if inner else isinstance(defense, BatchDefense | GradientDefense)


@dataclass(frozen=True)
class Partial:
    """Applies `inner` to the tensors whose names begin with one of `prefixes`; the others are sent as they are, without any proof.

    Noise on the layers in front of a variational bottleneck, whose gradients it does not hide, is PRECODE with partial perturbation
    (Scheliga et al. 2022, arXiv:2208.04767). A size of noise that is `relative` is so to the tensors it is added to.
    """

    inner: Defense
    prefixes: tuple[str, ...]

    def __init__(self, inner: Defense, prefixes: Sequence[str]) -> None:
        if not _is_defense(inner):
            raise TypeError(f"a partial defense wraps a defense, got {inner!r}")
        if _acts_in_training(inner):
            raise ValueError(f"a partial defense is one of the update, and {inner!r} acts on all tensors while the client trains")
        if _aims(inner):
            raise ValueError(
                f"a partial defense proves nothing, so there is no epsilon to aim at: give noise_multiplier, got {inner!r}"
            )
        if isinstance(prefixes, str) or not prefixes or not all(isinstance(one, str) for one in prefixes):
            raise ValueError(
                f"prefixes must be a list of at least one beginning of a name, such as ['features.'], got {prefixes!r}"
            )
        object.__setattr__(self, "inner", inner)
        object.__setattr__(self, "prefixes", tuple(prefixes))

    def init(self, like: Update) -> State:
        return self.inner.init(self._chosen(like))

    def __call__(self, packets: Packets, state: State, rng: torch.Generator) -> tuple[Packets, State]:
        sent, state = self.inner(self._chosen(packets), state, rng)
        return {name: sent.get(name, packet) for name, packet in packets.items()}, state

    @property
    def rescales(self) -> bool:
        return Chain((self.inner,)).rescales

    def explain(self, packets: Packets, beliefs: Mapping[str, Belief]) -> Beliefs:
        return self._told(packets, beliefs, None)

    @property
    def followed(self) -> bool:
        return is_followed(self.inner)

    def explain_after(self, packets: Packets, beliefs: Mapping[str, Belief], before: Packets) -> Beliefs:
        return self._told(packets, beliefs, before and self._chosen(before))

    def _told(self, packets: Packets, beliefs: Mapping[str, Belief], before: Packets | None) -> Beliefs:
        chosen = told_by(self.inner, self._chosen(packets), self._chosen(beliefs), before)
        return {name: chosen.get(name, belief) for name, belief in beliefs.items()}

    def _chosen(self, named: Mapping[str, T]) -> dict[str, T]:
        chosen = {name: value for name, value in named.items() if name.startswith(self.prefixes)}
        if not chosen:
            raise ValueError(f"no tensor's name begins with {' or '.join(self.prefixes)}: they are {', '.join(named)}")
        return chosen


def _is_defense(value: object) -> bool:
    return isinstance(value, Defense) and not isinstance(value, type)  # `TopK` in place of `TopK(0.1)` has all methods as well


def _within(prefix: str, state: State) -> State:
    return {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
