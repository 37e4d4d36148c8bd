"""Clipping, and differential privacy by clipping and noise: of a whole update, or of each example's gradient.

A client's own noise protects it from whoever reads what it sends, the server and this laboratory's eavesdropper included; that is
the local model. It is dear: n clients add n times the variance that a trusted server would add once. What is proved covers the
update, not what is reported beside it: the mean training loss, the number of examples, BatchNorm statistics,
whether a client that inspects the model refuses.

The noise is drawn from the run's seed, so that a run can be made again. Whoever knows the seed can take it off, and the server of a
run does: what is proved is of a server that does not use it, as a server whose clients draw their own noise could not.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from defenses.base import Untouched
from fedsim.accounting import epsilon, noise_for
from fedsim.checks import number
from fedsim.defense import Belief, Beliefs, Exposure, Guarantee, State
from fedsim.training import batch_loss
from fedsim.updates import Update, norm
from fedsim.wire import Packet, Packets, pack, unpack

AT_ONCE = 2**26  # gradient entries of examples that are held at a time: 256 MB


@dataclass(frozen=True)
class Clip:
    """Scales the whole update down to a length of at most `clip` (McMahan et al. 2018, flat clipping).

    No protection by itself: all entries shrink by one common factor, which a gap that ignores scale does not notice.
    """

    clip: float

    rescales: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number("clip", self.clip, 0, above=True)

    def init(self, like: Update) -> State:
        return {}

    def __call__(self, packets: Packets, state: State, rng: torch.Generator) -> tuple[Packets, State]:
        length = float(norm(unpack(packets)))
        if length <= self.clip:
            return packets, state
        share = self.clip / length
        factor = math.sqrt(share)  # of each of two factors

        def scaled(p: Packet) -> Packet:  # in double, as float32 has few digits of a share that brings huge entries down
            return replace(p, values=(p.values.double() * (share if p.rank is None else factor)).float(), grid=None)

        return {name: scaled(p) for name, p in packets.items()}, state

    def explain(self, packets: Packets, beliefs: Mapping[str, Belief]) -> Beliefs:
        """What is shorter than `clip` was not touched; of what was, each entry grew by one unknown factor >= 1.

        The values stay as they are, with their weight: a gap that ignores scale takes them for what they are.
        """
        longest = norm({name: torch.maximum(b.low.abs(), b.high.abs()) for name, b in beliefs.items()})
        if float(longest) < self.clip * (1 - 1e-5):  # what was clipped is as long as `clip`, up to float32
            return dict(beliefs)
        return {name: _grown(belief, packets[name].sent()) for name, belief in beliefs.items()}


def _grown(belief: Belief, sent: Tensor) -> Belief:
    """Of a tensor that is the one believed in, times an unknown factor >= 1. A hair's breadth is left for float32, in which what
    shrank to 0 may have had either sign."""
    nothing = (belief.low == 0) & (belief.high == 0)
    low, high = _least(belief.low), -_least(-belief.high)
    return belief.widened(low.masked_fill(nothing, -math.inf), high.masked_fill(nothing, math.inf), sent)


HAIR = 1e-20  # what shrank to nothing in float32 was smaller, unless it shrank to less than 1e-25 of itself


def _least(low: Tensor) -> Tensor:
    """No more than a number that was no smaller than `low` after it shrank: below float32's normal range only its sign is left."""
    rounded = torch.where(low > 0, 0.0, torch.where(low == 0, -HAIR, -math.inf)).to(low)
    return torch.where(low >= torch.finfo(torch.float32).tiny, low * (1 - 1e-5), rounded)


PrivateDefense = TypeVar("PrivateDefense", "DPFedAvg", "DPSGD")


def _checked(defense: "DPFedAvg | DPSGD") -> None:
    number("clip", defense.clip, 0, above=True)
    if (defense.noise_multiplier is None) == (defense.epsilon is None):
        given = f"noise_multiplier={defense.noise_multiplier} and epsilon={defense.epsilon}"
        raise ValueError(f"{type(defense).__name__} takes noise_multiplier or epsilon, and null for the other, got {given}")
    if defense.noise_multiplier is not None:
        number("noise_multiplier", defense.noise_multiplier, 0)
    if defense.epsilon is not None:
        number("epsilon", defense.epsilon, 0, above=True)
    number("delta", defense.delta, 0, 1, above=True)
    if defense.delta == 1:
        raise ValueError("delta=1 promises nothing: take less than one over the number of examples, such as 1e-5")


def _noise(defense: "DPFedAvg | DPSGD") -> float:
    """Standard deviation of the noise on a clipped sum."""
    if defense.noise_multiplier is None:
        raise ValueError(
            f"{defense!r} has no noise before it is planned for a run: call planned(exposures), or give noise_multiplier"
        )
    return defense.clip * defense.noise_multiplier


def _planned(defense: PrivateDefense, exposures: Sequence[Exposure]) -> PrivateDefense:
    if defense.epsilon is None:
        return defense
    target = defense.epsilon

    def spent(noise_multiplier: float) -> float:
        return max(defense._epsilon(noise_multiplier, one) for one in exposures)

    return replace(defense, noise_multiplier=noise_for(target, spent), epsilon=None)


@dataclass(frozen=True)
class DPFedAvg:
    """Clips the whole update to a length of `clip` and adds N(0, (clip * noise_multiplier)^2) to every entry of it.

    The client side of DP-FedAvg (McMahan et al. 2018), in the local model: each client adds all the noise that its own protection
    takes, and all that it holds, replaced by anything, is hidden: epsilon is that of a Gaussian mechanism of sensitivity 2 * clip,
    composed over the rounds it takes part in. In the paper's central model a trusted server adds this noise once to the sum; here
    the sum of m clients of equal weight has sqrt(m) times it, so who sees nothing but the global model faces a multiplier of
    noise_multiplier * sqrt(m), and does not know who was chosen. Entries that an earlier defense left out are
    sent as noise: places tell.

    noise_multiplier  or `epsilon`, which a run turns into the multiplier that spends this much at `delta` over its rounds
    """

    clip: float
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float = 1e-5

    unit: ClassVar[str] = "client"
    rescales: ClassVar[bool] = True
    takes_anything: ClassVar[bool] = True  # that a client fails would tell of it, and no noise would hide it

    def __post_init__(self) -> None:
        _checked(self)

    def init(self, like: Update) -> State:
        return {}

    def __call__(self, packets: Packets, state: State, rng: torch.Generator) -> tuple[Packets, State]:
        std = _noise(self)
        shortened, _ = Clip(self.clip)(packets, {}, rng)
        clipped = unpack(shortened)
        if not all(t.isfinite().all() for t in clipped.values()):  # which no noise would hide
            clipped = {name: torch.zeros_like(t) for name, t in clipped.items()}
            shortened = pack(clipped)
        if not std:
            return shortened, state
        noisy = {name: t + std * torch.randn(t.shape, generator=rng).to(t.device) for name, t in clipped.items()}
        return pack(noisy), state

    def explain(self, packets: Packets, beliefs: Mapping[str, Belief]) -> Beliefs:
        """Nothing is certain any more; the values are the clipped update's on average."""
        return _unbounded(packets, beliefs) if _noise(self) else Clip(self.clip).explain(packets, beliefs)

    def guarantee(self, exposures: Sequence[Exposure]) -> Guarantee | None:
        """Of a client, towards the reader of its messages."""
        _noise(self)
        most = max(one.rounds for one in exposures)
        multiplier = self.noise_multiplier or 0.0
        return Guarantee(self._epsilon(multiplier, Exposure(most)), self.delta, self.unit, multiplier, most)

    def planned(self, exposures: Sequence[Exposure]) -> "DPFedAvg":
        return _planned(self, exposures)

    def _epsilon(self, noise_multiplier: float, exposure: Exposure) -> float:
        return epsilon(noise_multiplier, exposure.rounds, self.delta)


@dataclass(frozen=True)
class DPSGD(Untouched):
    """Clips the gradient of each example to a length of `clip` and adds N(0, (clip * noise_multiplier)^2) to their sum, each step.

    Abadi et al. (2016, algorithm 1), by each client itself: one example replaced by any other is hidden, towards the reader of the
    client's messages. Needs a model that treats examples apart, so no BatchNorm in training mode. Costs the memory of many
    gradients; epsilon counts on the examples of a batch being secret.

    noise_multiplier  or `epsilon`, which a run turns into the multiplier that spends this much at `delta` over its rounds
    """

    clip: float
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float = 1e-5

    unit: ClassVar[str] = "example"
    rescales: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checked(self)

    def check_model(self, model: nn.Module) -> None:
        """Raises ValueError for a model that does not treat examples apart."""
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                raise ValueError(
                    f"DPSGD needs each example's own gradient, and {name or 'the model'} normalises by the batch: take "
                    "model.norm=group, or federation.train_mode=false"
                )

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
        self.check_model(model)
        std, batch = _noise(self), len(images)
        total, losses = clipped_sum(model, params, buffers, images, labels, self.clip)
        noisy = {name: t + std * torch.randn(t.shape, generator=rng).to(t.device) for name, t in total.items()}
        return losses.mean(), {name: t / batch for name, t in noisy.items()}

    def explain(self, packets: Packets, beliefs: Mapping[str, Belief]) -> Beliefs:
        """Nothing is certain any more; the values are the mean of the clipped gradients on average."""
        return _unbounded(packets, beliefs)

    def guarantee(self, exposures: Sequence[Exposure]) -> Guarantee | None:
        """Of an example, towards the reader of its client's messages."""
        _noise(self)
        multiplier = self.noise_multiplier or 0.0
        spent = max(self._epsilon(multiplier, one) for one in exposures)
        return Guarantee(spent, self.delta, self.unit, multiplier, max(one.rounds * one.uses for one in exposures))

    def planned(self, exposures: Sequence[Exposure]) -> "DPSGD":
        return _planned(self, exposures)

    def _epsilon(self, noise_multiplier: float, exposure: Exposure) -> float:
        return epsilon(noise_multiplier, exposure.rounds * exposure.uses, self.delta, exposure.rate)


def clipped_sum(
    model: nn.Module,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    clip: float,
) -> tuple[Update, Tensor]:
    """The sum of the examples' gradients, each of a length of at most `clip`, and their losses (B,).

    A gradient that is no number is left out: a server can broadcast weights at which chosen images have one, and no noise hides it.
    """

    def one(params: Update, image: Tensor, label: Tensor) -> Tensor:
        return batch_loss(model, params, buffers, image[None], label[None])

    # Dropout, if any, draws for each example.
    each = vmap(grad_and_value(one), in_dims=(None, 0, 0), randomness="different")
    at_once = max(1, AT_ONCE // max(1, sum(t.numel() for t in params.values())))
    total = {name: torch.zeros_like(t) for name, t in params.items()}
    losses = []
    start = {name: t.detach() for name, t in params.items()}
    for some, their in zip(images.split(at_once), labels.split(at_once), strict=True):
        gradients, loss = each(start, some, their)
        squares = sum(g.double().square().flatten(1).sum(1) for g in gradients.values())
        lengths = torch.as_tensor(squares).sqrt()
        shares, finite = (clip / lengths).clamp(max=1.0), lengths.isfinite()
        for name, g in gradients.items():
            kept = torch.where(finite.view(-1, *[1] * (g.dim() - 1)), g, 0)
            total[name] += torch.tensordot(torch.where(finite, shares, 0), kept.double(), 1).to(g)  # in double, see Clip
        losses.append(loss.detach())
    return total, torch.cat(losses)


def _unbounded(packets: Packets, beliefs: Mapping[str, Belief]) -> Beliefs:
    return {name: belief.unbounded(packets[name].sent()) for name, belief in beliefs.items()}
