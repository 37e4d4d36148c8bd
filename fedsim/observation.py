"""What an eavesdropper sees, and what else it is told. The truth is in neither."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fedsim.data.images import Images
from fedsim.updates import Update
from fedsim.wire import Packets, pack, unpack

SUM = -1  # who "sent" what secure aggregation leaves the server with


@dataclass(frozen=True)
class Observation:
    """One client's reply as seen on its way to the server. Holds nothing that was not sent.

    Of secure aggregation, a reply under its mask; or the sum of a round's, which nobody sent: the update of a larger batch.

    params        parameters broadcast to the client this round
    packets       what the client sent (an attack may also use their support and grid)
    num_examples  number of examples the client reports, as the protocol demands
    round         1, 2, … as the server counts
    client        who sent it, SUM for a sum
    buffers       BatchNorm statistics broadcast this round; empty for a model without
    sent_buffers  BatchNorm statistics the client sent back
    summed        of a sum, whose updates it is the mean of, weighted by their examples
    masked        whether what was sent is masked; packets then hold it as one reads it, to the precision of float32
    previous      what the same client sent in an earlier round, itself with what came before
    followed      whether the client is known to have sent nothing since `previous`, or, where that is None, never before
    chance        seed of what an attacker draws for this observation, where those of several runs are attacked together
    """

    params: dict[str, Tensor]
    packets: Packets
    num_examples: int
    round: int = 1
    client: int = 0
    buffers: dict[str, Tensor] = field(default_factory=dict)
    sent_buffers: dict[str, Tensor] = field(default_factory=dict)
    summed: tuple[int, ...] = ()
    masked: bool = False
    previous: "Observation | None" = None
    followed: bool = False
    chance: int | None = None

    @property
    def before(self) -> Packets | None:
        """What the client sent the last time: empty if there was none, None if that is not known."""
        if not self.followed:
            return None
        return {} if self.previous is None else self.previous.packets

    @property
    def clients(self) -> tuple[int, ...]:
        """Whose updates are in it."""
        return self.summed or (self.client,)

    @classmethod
    def of(cls, model: nn.Module, num_examples: int) -> "Observation":
        """What a client of FedSGD shows that has computed `model`'s gradients (`.grad`), the mean over `num_examples`."""
        missing = [name for name, p in model.named_parameters() if p.grad is None]
        if missing:
            raise ValueError(f"{', '.join(missing)} has no gradient: call loss.backward() first, with no parameter frozen")
        params = {name: p.detach().clone() for name, p in model.named_parameters()}
        gradients = {name: p.grad.detach() for name, p in model.named_parameters() if p.grad is not None}
        return cls(params, pack(gradients), num_examples, buffers={name: b.clone() for name, b in model.named_buffers()})

    @property
    def update(self) -> Update:
        """The update as the server reads it."""
        return unpack(self.packets)


@dataclass(frozen=True)
class Knowledge:
    """The threat model, as values: what the attacker is told besides the wire. None means not told.

    image_shape  (C, H, W); of text (L,)
    num_classes  K; of text the number of tokens V
    batch_size   examples in the batch of one local step; None takes the reported number of examples
    labels       true labels, one tensor (B,) for each observation
    local_steps  SGD steps behind one update; FedSGD has 1
    lr           the clients' learning rate; for FedSGD 1, since the gradient itself is sent
    momentum, weight_decay, proximal  the rest of what the server ordered the clients to do, as in `fedsim.training.local_update`
    same_images  whether each of a client's batches holds all its images, so that its updates of all rounds are of the same
    defense      the clients' defense (an attacker who knows it)
    public       images of the same kind that anybody can have; none of them is a client's
    """

    image_shape: tuple[int, ...]
    num_classes: int
    batch_size: int | None = None
    labels: Sequence[Tensor] | None = None
    local_steps: int | None = None
    lr: float | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0
    proximal: float = 0.0
    same_images: bool = False
    defense: object | None = None
    public: Images | None = None


@dataclass(frozen=True)
class Trace:
    """How a reconstruction came about: T moments of the start that was reported.

    evaluations  (T,) int64, gradient evaluations of that start so far
    losses       (T,) what was minimised, at the best point so far
    images       (T, B, C, H, W) that point's images; of text (T, B, L) its sentences, the predicted words in their places
    layers       name of a parameter -> (T,) squared distance of its gradient from the observed one, before any weighting
    """

    evaluations: Tensor
    losses: Tensor
    images: Tensor
    layers: dict[str, Tensor]


@dataclass(frozen=True)
class Reconstruction:
    """What an attack makes of one observation: a batch as the client trained on it. Images are in [0, 1].

    Of text, `images` are the tokens (B, L) int64 that the model was given, [MASK] among them, and `labels` (B, L) the words behind
    the masks, IGNORED elsewhere; `starts` are (R, B, L).

    images     (B, C, H, W), from the start with the smallest matching loss
    labels     (B,) int64
    loss       its matching loss
    converged  whether the optimisation came to rest near zero loss; a reconstruction that did not says nothing about privacy
    starts     (R, B, C, H, W) what each of the R starts ended with, in order; R is 1 for attacks without restarts
    losses     (R,) their matching losses; inf for a diverged start
    evaluations  gradient evaluations spent, over all starts
    seconds    the share of the wall time of the program it was computed in
    trace      how the reported start got there, where the attack was asked to record it
    certain    (B,) which images the attack itself vouches for, where it can tell one by one; None where `converged` is all it knows
    missed     images of the batch that the attack knows it has nothing of; `images` then holds so many fewer
    attack     which attack of several found it; empty for an attack that is one
    probabilities  (B, K) soft labels, where these were looked for
    """

    images: Tensor
    labels: Tensor
    loss: float
    converged: bool
    starts: Tensor
    losses: Tensor
    evaluations: int
    seconds: float
    trace: Trace | None = None
    certain: Tensor | None = None
    missed: int = 0
    attack: str = ""
    probabilities: Tensor | None = None


@runtime_checkable
class Attack(Protocol):
    """Images and labels that would explain observed updates. A sequence, so that equal shapes run as one program."""

    def __call__(
        self,
        seen: Sequence[Observation],
        known: Knowledge,
        model: nn.Module,
        rng: torch.Generator,
        *,
        report: Callable[[int, int], None] | None = None,
    ) -> list[Reconstruction]:
        """One reconstruction for each observation, in order; `report(finished, total)` may be called as victims finish."""
        ...
