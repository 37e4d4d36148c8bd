"""Defenses that are made of other defenses, and the one that does nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedsim.defense import BatchDefense, Defense, Exposure, GradientDefense, Guarantee, Private, State
from fedsim.training import Batch, batch_gradients
from fedsim.updates import Update
from fedsim.wire import Packets, pack, unpack


@dataclass(frozen=True)
class NoDefense:
    """Sends the update as it is, 4 bytes an entry."""

    def init(self, like: Update) -> State:
        return {}

    def __call__(self, packets: Packets, state: State, rng: torch.Generator) -> tuple[Packets, State]:
        return packets, state


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
        mixed = any(getattr(part, "mixes", False) for part in self.parts)
        found = [made for part in self.parts if isinstance(part, Private) and (made := part.guarantee(exposures)) is not None]
        # One image in several mixtures has several clipped gradients, and no proof.
        found = [made for made in found if made.unit == "client" or not mixed]
        return min(found, key=lambda made: made.epsilon, default=None)

    def planned(self, exposures: Sequence[Exposure]) -> "Chain":
        return Chain([part.planned(exposures) if isinstance(part, Private) else part for part in self.parts])

    @property
    def mixes(self) -> bool:
        return any(getattr(part, "mixes", False) for part in self.parts)


@dataclass(frozen=True)
class ErrorFeedback:
    """Adds to each update what `inner` dropped from the earlier ones (Seide et al. 2014; Karimireddy et al. 2019, algorithm 2).

    Nothing is lost for good: what was sent plus what is remembered is the sum of all updates. The memory is one dense update for
    each client. What a round reveals is then a mixture of this round's data and earlier ones'.
    """

    inner: Defense

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
    def mixes(self) -> bool:
        return Chain((self.inner,)).mixes


def replaces_gradient(defense: object) -> bool:
    """Whether a defense, or one that it is made of, computes another gradient than the batch's."""
    inner = (*getattr(defense, "parts", ()), *([defense.inner] if isinstance(defense, ErrorFeedback) else []))
    return any(map(replaces_gradient, inner)) if inner else isinstance(defense, GradientDefense)


def _is_defense(value: object) -> bool:
    return isinstance(value, Defense) and not isinstance(value, type)  # `TopK` in place of `TopK(0.1)` has all methods as well


def _within(prefix: str, state: State) -> State:
    return {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
