"""What gradient matching minimises: the gap between two updates, and what is known of images.

Everything is per problem: gradients are dicts of tensors (P, ...), images are (P, B, C, H, W), results are (P,).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, overload

import torch
from torch import Tensor

from attacks.factored import Factored

Gradients = Mapping[str, Tensor]
Candidates = Mapping[str, Tensor | Factored]  # factors are of a single problem


def _per_problem(t: Tensor) -> Tensor:
    return t.flatten(1).sum(1)


def inner(one: Tensor | Factored, other: Tensor | Factored) -> Tensor:
    """Inner products (P,)."""
    if isinstance(one, Factored):
        return one.inner(other if isinstance(other, Factored) else other[0])[None]
    assert isinstance(other, Tensor)
    return _per_problem(one * other)  # bmm and vector_norm are faster, and lose two digits on a large layer


def distance(candidate: Tensor | Factored, observed: Tensor) -> Tensor:
    """Squared distances (P,)."""
    if isinstance(candidate, Factored):
        return candidate.distance(observed[0])[None]
    return _per_problem((candidate - observed).square())


@overload
def scaled(gradient: Tensor, factors: Tensor) -> Tensor: ...


@overload
def scaled(gradient: Tensor | Factored, factors: Tensor) -> Tensor | Factored: ...


def scaled(gradient: Tensor | Factored, factors: Tensor) -> Tensor | Factored:
    """A gradient of P problems times factors (P,)."""
    if isinstance(gradient, Factored):
        return Factored(factors * gradient.back, gradient.fed)
    return gradient * factors.reshape(-1, *[1] * (gradient.dim() - 1))


def squared_norm(gradients: Candidates) -> Tensor:
    """Squared l2 norm over all tensors together, (P,)."""
    if isinstance(gradients, Observed):
        return gradients.squared_norm
    return torch.stack([inner(t, t) for t in gradients.values()]).sum(0)


class Observed(dict[str, Tensor]):
    """What stays the same from one evaluation to the next: what is made of it alone is computed once."""

    @cached_property
    def squared_norm(self) -> Tensor:
        """Over all tensors together, (P,)."""
        return squared_norm(dict(self))

    @cached_property
    def direction(self) -> dict[str, Tensor]:
        """All tensors divided by the norm."""
        norm = self.squared_norm
        factors = norm.clamp(min=torch.finfo(norm.dtype).tiny).rsqrt()
        return {name: scaled(t, factors) for name, t in self.items()}

    @cached_property
    def nonzero(self) -> Tensor:
        """(tensors, P) 1 where a tensor has an entry that is not zero, else 0."""
        return torch.stack([t.flatten(1).any(1) for t in self.values()])


class Gap(Protocol):
    """How far the gradients of a candidate are from the observed ones."""

    scale_free: bool  # whether a factor in front of the observed update changes nothing

    def __call__(self, candidate: Candidates, observed: Gradients) -> Tensor:
        """The gap, (P,); differentiable."""
        ...

    def unit(self, observed: Gradients) -> Tensor:
        """The gap of a candidate that explains nothing, (P,): what "small" is measured against."""
        ...


@dataclass(frozen=True)
class SquaredGap:
    """Sum of squared differences over all entries (Zhu et al. 2019). Converges exactly; minds every factor in the update."""

    scale_free = False

    def __call__(self, candidate: Candidates, observed: Gradients) -> Tensor:
        return torch.stack([distance(candidate[name], t) for name, t in observed.items()]).sum(0)

    def unit(self, observed: Gradients) -> Tensor:
        return squared_norm(observed)


@dataclass(frozen=True)
class CosineGap:
    """1 - cosine similarity over all entries (Geiping et al. 2020). Blind to learning rate, number of steps and clipping.

    skip_zero  leave out tensors that were observed to be all zero, as some implementations do: an attacker who takes them for
               pruned rather than for the client's gradient
    """

    skip_zero: bool = False

    scale_free = True

    def __call__(self, candidate: Candidates, observed: Gradients) -> Tensor:
        # 1 - cos is half the squared distance of the two directions, which float32 can tell from 0 where it cannot tell cos from 1.
        observed = observed if isinstance(observed, Observed) else Observed(observed)
        counted = observed.nonzero if self.skip_zero else 1.0
        ours = (counted * torch.stack([inner(candidate[name], candidate[name]) for name in observed])).sum(0)
        factors = ours.clamp(min=torch.finfo(ours.dtype).tiny).rsqrt()
        apart = torch.stack([distance(scaled(candidate[name], factors), t) for name, t in observed.direction.items()])
        return (counted * apart).sum(0) / 2

    def unit(self, observed: Gradients) -> Tensor:
        return torch.ones_like(squared_norm(observed))


@dataclass(frozen=True)
class GaussianGap:
    """Sum over tensors of 1 - exp(-|difference|^2 / |observed|^2): SAPAG's kernel (Wang et al. 2020), as wide as the observed norm.

    A tensor that is far off pulls no harder than one that is a little off.
    """

    scale_free = False

    def __call__(self, candidate: Candidates, observed: Gradients) -> Tensor:
        def far(ours: Tensor | Factored, theirs: Tensor) -> Tensor:
            width = inner(theirs, theirs)
            return 1 - (-distance(ours, theirs) / torch.where(width > 0, width, 1)).exp()

        return torch.stack([far(candidate[name], t) for name, t in observed.items()]).sum(0)

    def unit(self, observed: Gradients) -> Tensor:
        return torch.full_like(squared_norm(observed), len(observed) * (1 - math.exp(-1)))


class Prior(Protocol):
    """A penalty for images that are unlike photographs."""

    def __call__(self, images: Tensor) -> Tensor:
        """The penalty, (P,), of images (P, B, C, H, W); differentiable."""
        ...


@dataclass(frozen=True)
class TotalVariation:
    """`weight` times the mean absolute difference of neighbouring pixels, across plus down.

    reflected  of |2 p - 1| in place of the pixels p: the same where p was replaced by 1 - p
    """

    weight: float
    reflected: bool = False

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"a prior's weight must be >= 0, got {self.weight}")

    def __call__(self, images: Tensor) -> Tensor:
        images = (2 * images - 1).abs() if self.reflected else images
        return self.weight * total_variation(images)


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, across plus down, (N,); 0 in a direction without neighbours."""
    down, across = (
        step.abs().flatten(1).sum(1) / max(1, step.shape[1:].numel()) for step in (images.diff(dim=-2), images.diff(dim=-1))
    )
    return down + across


@dataclass(frozen=True)
class SquaredPixels:
    """`weight` times the mean of squared pixels, measured from grey: GradInversion's l2 term (Yin et al. 2021, equation 5)."""

    weight: float

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"a prior's weight must be >= 0, got {self.weight}")

    def __call__(self, images: Tensor) -> Tensor:
        return self.weight * (images - 0.5).square().flatten(1).mean(1)


@dataclass(frozen=True)
class OutOfRange:
    """`weight` times the sum of squares by which pixels leave [0, 1]: zero for every image, so it moves no solution."""

    weight: float

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"a prior's weight must be >= 0, got {self.weight}")

    def __call__(self, images: Tensor) -> Tensor:
        return self.weight * _per_problem((images - images.clamp(0, 1)).square())


@dataclass(frozen=True)
class SquaredAndAbsoluteGap:
    """Squared differences plus `alpha` times absolute ones, alpha falling linearly from the first tensor to the last.

    TAG's gap (Deng et al. 2021, equation 4): large gradients dominate the squares, so absolute differences let small ones count.
    """

    alpha: float = 0.01

    scale_free = False

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ValueError(f"alpha must be >= 0, got {self.alpha}")

    def __call__(self, candidate: Candidates, observed: Gradients) -> Tensor:
        parts = []
        for i, (name, t) in enumerate(observed.items()):
            ours = candidate[name]
            off = (ours.dense()[None] if isinstance(ours, Factored) else ours) - t
            parts.append(_per_problem(off.square()) + self.alpha * (1 - i / len(observed)) * _per_problem(off.abs()))
        return torch.stack(parts).sum(0)

    def unit(self, observed: Gradients) -> Tensor:
        return self({name: torch.zeros_like(t) for name, t in observed.items()}, observed)
