"""What the federation knows of a defense: its protocol. The defenses themselves are the package `defenses`."""

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
