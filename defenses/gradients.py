"""Defenses that alter the gradient of every local step, where something of it tells most about the images."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from defenses.base import Untouched
from fedsim.checks import number
from fedsim.defense import Belief, Beliefs
from fedsim.training import batch_gradients
from fedsim.updates import Update
from fedsim.wire import Packets

AT_ONCE = 2**24  # entries of derivatives that are held at a time


@dataclass(frozen=True)
class Soteria(Untouched):
    """Zeroes those columns of the last linear layer's gradient whose features tell most about the images (Sun et al. 2021).

    A feature r of the layer's input is pruned when |r| / ||dr/dX|| is among the `share` largest, the paper's choice for the l0
    norm; over a batch, as in the authors' code, when the sum of the inverse is among the smallest. All other entries are those of
    the true gradient: an attacker who leaves that layer out of his gap loses little. One backward pass for each feature and step.

    An attacker who knows it is told so much of FedSGD. Over several local steps the pruned ones lead elsewhere, and he who imitates
    the training imitates it unpruned: what such runs measure is an attacker who could do better.
    """

    share: float

    def __post_init__(self) -> None:
        number("share", self.share, 0, 1)

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
        loss, found = batch_gradients(model, params, buffers, images, labels)
        weight = f"{last_linear(model)}.weight"
        pruned = sensitivity(model, params, buffers, images).argsort(stable=True)[: round(self.share * found[weight].shape[1])]
        return loss, found | {weight: found[weight].index_fill(1, pruned, 0.0)}

    def explain(self, packets: Packets, beliefs: Mapping[str, Belief]) -> Beliefs:
        """Nothing is known of columns that may be all zero in the last matrix; everything else is as it was.

        Of the gradient of one step, without weight decay, which hides the zeros: what then stands there is taken for what it was.
        """
        matrices = [name for name, belief in beliefs.items() if belief.value.dim() == 2]
        if not matrices:
            return dict(beliefs)
        belief = beliefs[matrices[-1]]
        possible = (belief.low <= 0) & (belief.high >= 0)
        return {**beliefs, matrices[-1]: _unknown(belief, possible.all(0).expand_as(belief.value))}


def _unknown(belief: Belief, where: Tensor) -> Belief:
    return replace(
        belief,
        low=belief.low.masked_fill(where, -math.inf),
        high=belief.high.masked_fill(where, math.inf),
        weight=belief.weight.masked_fill(where, 0.0),
    )


def last_linear(model: nn.Module) -> str:
    """The name of the model's last linear layer. Raises ValueError when it has none."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise ValueError(f"Soteria prunes the gradient of a linear layer, and {type(model).__name__} has none")
    return names[-1]


def sensitivity(model: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """(D,) of each feature r that enters the last linear layer, the sum over the batch of ||dr/dX|| / |r|; inf where r is 0."""
    if not images.is_floating_point() or images.dim() != 4:
        raise ValueError(f"Soteria asks how features depend on pixels (B, C, H, W), got {images.dtype} {tuple(images.shape)}")
    found: list[Tensor] = []

    def representation(images: Tensor) -> Tensor:
        own = {name: t.clone() for name, t in buffers.items()}  # BatchNorm writes to them
        functional_call(model, {**params, **own}, (images,))
        return found.pop()

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0])

    handle = model.get_submodule(last_linear(model)).register_forward_pre_hook(keep)
    try:
        features, backward, *_ = vjp(representation, images)
    finally:
        handle.remove()
    (batch, width), pixels = features.shape, images.numel()

    def length(feature: Tensor) -> Tensor:
        (slope,) = backward(feature.expand(batch, width))
        return slope.flatten(1).norm(dim=1)

    each = torch.eye(width, device=images.device)
    lengths = vmap(length, chunk_size=max(1, AT_ONCE // pixels))(each).detach().T
    return torch.where(features == 0, math.inf, lengths / features.abs()).sum(0).detach()


@dataclass(frozen=True)
class OutPost(Untouched):
    """Prunes and perturbs a local step's gradient with a chance that falls from step to step (Wang, Hugenroth and Li 2023).

    The chance is 1 / (1 + decay * step), counted from 0 each round, so the one step of FedSGD is always defended. A layer's risk is
    min(1, variance of its weights): the wider they are spread, the more leaks. The `prune` smallest entries of each layer become 0,
    and N(0, (noise * risk)^2) is added to those that are among the `protect` largest of all by their Fisher information.

    That information is taken as the squared gradient of the batch, as in the authors' code, not the mean of examples' squares.
    Their code then averages it over each tensor's first dimension, so that a convolution's outputs are protected all or none; here
    each entry has its own, as in the paper. Their chance already decays at the first step, and their noise has one seed for all.
    """

    noise: float = 0.8
    prune: float = 0.8
    protect: float = 0.4
    decay: float = 0.125

    def __post_init__(self) -> None:
        number("noise", self.noise, 0)
        number("prune", self.prune, 0, 1)
        number("protect", self.protect, 0, 1)
        number("decay", self.decay, 0)

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
        loss, found = batch_gradients(model, params, buffers, images, labels)
        chance = 1 / (1 + self.decay * step)
        if float(torch.rand((), generator=rng)) >= chance:
            return loss, found
        largest = self._largest(found)
        return loss, {name: self._perturbed(g, params[name], largest[name], rng) for name, g in found.items()}

    def _largest(self, found: Update) -> dict[str, Tensor]:
        """Which entries (bool) are among the `protect` largest of all: squares have the same order. Of equal ones, such as the many
        zeros that ReLU makes, the first."""
        every = torch.cat([g.abs().flatten() for g in found.values()])
        order = every.argsort(descending=True, stable=True)[: round(self.protect * every.numel())]
        chosen = torch.zeros_like(every, dtype=torch.bool).index_fill(0, order, True)
        parts = chosen.split([g.numel() for g in found.values()])
        return {name: part.reshape(g.shape) for (name, g), part in zip(found.items(), parts, strict=True)}

    def _perturbed(self, gradient: Tensor, weights: Tensor, largest: Tensor, rng: torch.Generator) -> Tensor:
        risk = min(1.0, float(weights.var())) if weights.numel() > 1 else 1.0
        noise = self.noise * risk * torch.randn(gradient.shape, generator=rng).to(gradient.device)
        smallest = gradient.abs().flatten().argsort()[: round(self.prune * gradient.numel())]
        pruned = gradient.flatten().index_fill(0, smallest, 0.0).reshape(gradient.shape)
        return torch.where(largest, pruned + noise, pruned)

    def explain(self, packets: Packets, beliefs: Mapping[str, Belief]) -> Beliefs:
        """Zeros were pruned and say nothing; any other entry may have noise of mean zero."""
        opened = {name: belief.unbounded(packets[name].sent()) for name, belief in beliefs.items()}
        return {name: replace(belief, weight=belief.weight * (belief.value != 0)) for name, belief in opened.items()}
