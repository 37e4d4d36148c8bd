"""What the federation knows of a defense: its protocol. The defenses themselves are the package `defenses`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

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

    def rounded(self, low: Tensor, high: Tensor) -> "Belief":
        """Of an entry that was rounded to what this says: the bounds are `low` and `high`, within which `value` tells nothing."""
        return Belief(self.value, low, high, torch.zeros_like(self.weight))

    def unbounded(self, sent: Tensor) -> "Belief":
        """Without bounds; of an entry that was `sent` (bool), `value` is then all there is to go by."""
        nothing = torch.full_like(self.value, torch.inf)
        return Belief(self.value, -nothing, nothing, torch.where(sent, 1.0, self.weight))


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


def beliefs_of(packets: Packets, defense: object | None = None) -> Beliefs:
    """What an attacker who knows `defense` can say of the update behind `packets`; None knows of no defense."""
    beliefs = {name: Belief.exact(packet.dense()) for name, packet in packets.items()}
    return defense.explain(packets, beliefs) if isinstance(defense, Explained) else beliefs
