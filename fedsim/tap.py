"""Which replies an eavesdropper takes down."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedsim.checks import one_of, whole
from fedsim.seeding import generator


@dataclass(frozen=True)
class Tap:
    """Rounds and clients to listen to, and when to attack.

    every    each k-th round; None for none
    rounds   these rounds as well; "all", or None for none
    clients  so many of a round's clients at random, those of a list that take part, or "all"
    when     attack "live", while the federation runs; at its "end", all at once; or "later", by `fedsim attack`
    """

    every: int | None = 5
    rounds: Sequence[int] | str | None = None
    clients: int | Sequence[int] | str = 2
    when: str = "live"

    def __post_init__(self) -> None:
        if self.every is not None:
            whole("tap.every", self.every)
        if isinstance(self.rounds, str):
            one_of("tap.rounds", self.rounds, ["all"])
        elif self.rounds is not None and not isinstance(self.rounds, Sequence):
            raise ValueError(f"tap.rounds must be a list of rounds, all, or null, got {self.rounds!r}")
        for round in self.rounds if isinstance(self.rounds, Sequence) and not isinstance(self.rounds, str) else ():
            whole("tap.rounds", round)
        if isinstance(self.clients, str):
            one_of("tap.clients", self.clients, ["all"])
        elif isinstance(self.clients, Sequence):
            for client in self.clients:
                whole("tap.clients", client, low=0)
        else:
            whole("tap.clients", self.clients)
        one_of("tap.when", self.when, ["live", "end", "later"])

    def listens(self, round: int) -> bool:
        """Whether anybody is listened to in `round` = 1, 2, …"""
        if self.rounds == "all" or (self.every is not None and round % self.every == 0):
            return True
        return isinstance(self.rounds, Sequence) and round in self.rounds

    @property
    def follows_any(self) -> bool:
        """Whether there are clients of whom nothing is missed."""
        return (self.rounds == "all" or self.every == 1) and not isinstance(self.clients, int)

    def follows(self, client: int) -> bool:
        """Whether nothing that a client sends is missed."""
        return self.follows_any and (self.clients == "all" or (isinstance(self.clients, Sequence) and client in self.clients))

    def choose(self, seed: int, round: int, clients: Sequence[int]) -> list[int]:
        """Whom to listen to of the `clients` that replied in `round`."""
        if not self.listens(round):
            return []
        if self.clients == "all":
            return list(clients)
        if isinstance(self.clients, int):
            order = torch.randperm(len(clients), generator=generator(seed, "tap", round))
            return sorted(clients[i] for i in order[: self.clients])
        return [client for client in clients if client in self.clients]
