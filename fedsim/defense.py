"""What the federation knows of a defense: its protocol. The defenses themselves are the package `defenses`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fedsim.seeding import generator
from fedsim.training import Batch, Hooks
from fedsim.updates import Update
from fedsim.wire import Packets

State = dict[str, Tensor]


@runtime_checkable
class Defense(Protocol):
    """What a client does to its update before sending it.

    Pure: no argument is changed, all randomness comes from `rng`, all memory from `state`.
    """

    def init(self, like: Update) -> State:
        """The memory of a client that has not sent anything yet; `like` gives names and shapes."""
        ...

    def __call__(self, packets: Packets, state: State, rng: torch.Generator) -> tuple[Packets, State]:
        """What to send instead of `packets`, and the memory for the next round."""
        ...


# Some defenses act before there is an update. They have one of the next two methods or both, beside those above.


@runtime_checkable
class BatchDefense(Protocol):
    """A defense that trains on other images than the client's own."""

    def batch(self, images: Tensor, labels: Tensor, classes: int, rng: torch.Generator) -> Batch:
        """Images and labels to train on instead of a local step's; labels (B,) may become probabilities (B, classes)."""
        ...


@runtime_checkable
class Mixing(Protocol):
    """A defense that trains on mixtures of a batch's images, whose labels it mixes alike.

    reflects  whether it then replaces pixels p by 1 - p in places drawn at random
    """

    reflects: ClassVar[bool]

    def mixture(self, size: int, rng: torch.Generator) -> Tensor:
        """(size, size) a draw of how much of each image, a column, is in each mixture, a row; rows add up to 1."""
        ...


@runtime_checkable
class Reversible(Protocol):
    """A defense that trains on images which it transformed in ways that can be run backwards."""

    def undone(self, images: Tensor) -> Tensor:
        """The likely originals (B, C, H, W) of transformed images (B, C, H, W), as far as they are left in them."""
        ...


@runtime_checkable
class GradientDefense(Protocol):
    """A defense that computes another gradient than that of the batch's loss."""

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
        """Loss and gradient, by name, of one local step; steps are counted from 0 each round."""
        ...


def replaces_gradient(defense: object) -> bool:
    """Whether a defense, or one that it is made of, computes another gradient than the batch's."""
    if not isinstance(defense, GradientDefense):
        return False
    parts = parts_of(defense)
    return any(map(replaces_gradient, parts)) if parts else True


def check_model(defense: object, model: nn.Module) -> None:
    """Raises ValueError for a model that a defense, or one that it is made of, says that it cannot train."""
    for part in parts_of(defense):
        check_model(part, model)
    if (check := getattr(defense, "check_model", None)) is not None:
        check(model)


def batch_parts(defense: object) -> tuple[BatchDefense, ...]:
    """The defense, or those of its parts in their order, that train on other images than the client's, each time on others."""
    parts = parts_of(defense)
    if parts:
        return tuple(found for part in parts for found in batch_parts(part))
    return (defense,) if isinstance(defense, BatchDefense) else ()


def mixes(defense: object) -> bool:
    """Whether a defense, or one that it is made of, mixes images."""
    return any(isinstance(part, Mixing) for part in batch_parts(defense))


def parts_of(defense: object) -> tuple[object, ...]:
    """The defenses that a defense is made of."""
    return (*getattr(defense, "parts", ()), *([defense.inner] if hasattr(defense, "inner") else []))


def declares(defense: object, what: str) -> bool:
    """Whether a defense, or one that it is made of, says of its class that it `drops` or `fills` entries."""
    return bool(getattr(defense, what, False)) or any(declares(part, what) for part in parts_of(defense))


def hides_failures(defense: object) -> bool:
    """Whether a proof hides that a client has no update: its defense `takes_anything`, or has a proof and a part that does."""
    return bool(getattr(defense, "takes_anything", False)) or (
        isinstance(defense, Private) and any(map(hides_failures, parts_of(defense)))
    )


def hooks_of(defense: object, classes: int, seed: int, round: int, client: int) -> Hooks:
    """What `defense` changes of a client's local training in a round, with streams of its own."""
    batch = gradients = None
    if isinstance(defense, BatchDefense):
        batch_rng = generator(seed, "defense", round, client, "batch")
        batch = lambda images, labels: defense.batch(images, labels, classes, batch_rng)  # noqa: E731
    if isinstance(defense, GradientDefense) and replaces_gradient(defense):
        gradient_rng = generator(seed, "defense", round, client, "gradients")
        gradients = lambda model, params, buffers, images, labels, step: defense.gradients(  # noqa: E731
            model, params, buffers, images, labels, step, gradient_rng
        )
    return Hooks(batch, gradients)


@dataclass(frozen=True)
class Exposure:
    """How often a run may use what it must protect of one client: the whole client, or one of its examples.

    rounds  in which the client takes part
    uses    of an example in such a round, at most
    rate    chance that such a use takes place, 1 if certain
    """

    rounds: int
    uses: int = 1
    rate: float = 1.0


@dataclass(frozen=True)
class Guarantee:
    """Differential privacy towards somebody who reads all that a client sends.

    epsilon, delta    for any two neighbours: data sets that differ in one `unit` replaced by any other
    unit              `example` or `client`, which is all its examples
    noise_multiplier  standard deviation of the noise of a release, over the most that a unit can add to it
    releases          of the unit, at most
    """

    epsilon: float
    delta: float
    unit: str
    noise_multiplier: float
    releases: int


@runtime_checkable
class Private(Protocol):
    """A defense with a proof, given in advance how often it is applied."""

    def guarantee(self, exposures: Sequence[Exposure]) -> Guarantee | None:
        """What holds for the most exposed of clients; None when nothing does."""
        ...

    def planned(self, exposures: Sequence[Exposure]) -> Defense:
        """The same defense with as much noise as its target asks for when it is applied so often."""
        ...


@dataclass(frozen=True)
class Belief:
    """What can be said of each entry of one tensor, in the tensor's shape.

    value   the best guess of an entry
    low     it is no smaller; -inf where nothing is known
    high    it is no larger; inf where nothing is known
    weight  1 where `value` is the entry itself, or has it as its mean, or is all there is of an entry that was sent;
            0 where `value` says no more than the bounds do
    """

    value: Tensor
    low: Tensor
    high: Tensor
    weight: Tensor

    @classmethod
    def exact(cls, value: Tensor) -> "Belief":
        """Of somebody who saw the tensor itself."""
        return cls(value, value, value, torch.ones_like(value))

    @property
    def is_exact(self) -> bool:
        """Whether each entry is known."""
        return torch.equal(self.low, self.value) and torch.equal(self.high, self.value) and bool((self.weight == 1).all())

    def rounded(self, low: Tensor, high: Tensor) -> "Belief":
        """Of an entry that was rounded to what this says: the bounds are `low` and `high`, within which `value` tells nothing. What
        it told it still tells where there are none."""
        return Belief(self.value, low, high, torch.where(_open(low, high), self.weight, 0.0))

    def widened(self, low: Tensor, high: Tensor, sent: Tensor) -> "Belief":
        """With bounds that are farther apart; of an entry that was `sent` (bool) and loses the last of them, `value` is then all
        there is to go by."""
        lost = _open(low, high) & ~_open(self.low, self.high)
        return Belief(self.value, low, high, torch.where(lost & sent, 1.0, self.weight))

    def unbounded(self, sent: Tensor) -> "Belief":
        """As `widened`, without any bounds."""
        nothing = torch.full_like(self.value, torch.inf)
        return self.widened(-nothing, nothing, sent)


def _open(low: Tensor, high: Tensor) -> Tensor:
    return (low == -torch.inf) & (high == torch.inf)


Beliefs = dict[str, Belief]


@runtime_checkable
class Explained(Protocol):
    """A defense that says what somebody who knows it can conclude. One that does not is taken for one that changes nothing."""

    def explain(self, packets: Packets, beliefs: Mapping[str, Belief]) -> Beliefs:
        """Beliefs about what the defense was given, from those about what it handed on.

        Sound: what it was given lies within the bounds. Of a chain the last defense is asked first.

        packets  what arrived at the server, whose supports and grids tell what the defenses did
        """
        ...


@runtime_checkable
class Followed(Protocol):
    """A defense whose memory shows in what a client sent before."""

    def explain_after(self, packets: Packets, beliefs: Mapping[str, Belief], before: Packets) -> Beliefs:
        """As `explain`, to somebody who saw what the client sent the last time: `before`, empty where there was none."""
        ...


def is_followed(defense: object) -> bool:
    """Whether what a client sent before tells somebody who knows `defense` more. One made of others says so itself: `followed`."""
    return isinstance(defense, Followed) and getattr(defense, "followed", True)


def beliefs_of(packets: Packets, defense: object | None = None, before: Packets | None = None) -> Beliefs:
    """What an attacker who knows `defense` can say of the update behind `packets`; None knows of no defense.

    before  what the same client sent the last time, empty if nothing; None for somebody who does not know
    """
    return told_by(defense, packets, {name: Belief.exact(packet.dense()) for name, packet in packets.items()}, before)


def told_by(defense: object | None, packets: Packets, beliefs: Mapping[str, Belief], before: Packets | None = None) -> Beliefs:
    """Beliefs about what `defense`, or one part of it, was given, from those about what it handed on."""
    if before is not None and isinstance(defense, Followed):
        return defense.explain_after(packets, beliefs, before)
    return defense.explain(packets, beliefs) if isinstance(defense, Explained) else dict(beliefs)
