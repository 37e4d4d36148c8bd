"""Gradients of one network that are cheap to differentiate again.

Those of convolutions are convolutions again, see `attacks.convolution`. Those of large linear layers are left as the two factors
they are made of, (B, O) and (B, I), in place of their (O, I) product.

The weight gradient of a linear layer is the product of what flows back into its output and what it was fed (Goodfellow 2015, on the
norms of such gradients). Where B is small, gaps between updates can be had from the factors: the product, of the size of the layer
itself, is never made, nor differentiated.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from attacks.convolution import Convolution

LARGE = 2**16  # entries of a weight that is worth it


@dataclass(frozen=True)
class Factored:
    """The gradient `back.T @ fed` (O, I) of a linear layer's weight.

    back  (B, O) gradient of the loss by the layer's output
    fed   (B, I) what the layer was fed
    """

    back: Tensor
    fed: Tensor

    def dense(self) -> Tensor:
        """(O, I)"""
        return self.back.T @ self.fed

    def inner(self, other: "Tensor | Factored") -> Tensor:
        """The sum of products with another gradient, a scalar."""
        if isinstance(other, Factored):
            return ((self.back @ other.back.T) * (self.fed @ other.fed.T)).sum()
        return (self.back * (self.fed @ other.T)).sum()

    def distance(self, other: Tensor) -> Tensor:
        """The sum of squared differences from another gradient (O, I), a scalar; exact where the two are close."""
        return _Distance.apply(self.back, self.fed, other)


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, back: Tensor, fed: Tensor, other: Tensor) -> Tensor:
        off = torch.addmm(other, back.T, fed, beta=-1)
        ctx.save_for_backward(back, fed, off)
        return torch.dot(off.view(-1), off.view(-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        back, fed, off = ctx.saved_tensors
        twice = 2 * gradients[0]
        return twice * (fed @ off.T), twice * (back @ off), -twice * off if ctx.needs_input_grad[2] else None


class _Uses(TorchFunctionMode):
    """Notes what linear layers and convolutions of some weights are fed, and the edge at which flows back what is made of it."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = {id(t): name for name, t in weights.items()}
        self.uses: list[tuple[str, GradientEdge, Callable[[Tensor], Tensor | Factored]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (F.linear, F.conv2d):
            return func(*args, **kwargs)
        given = dict(zip(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), args, strict=False)) | kwargs
        x, w, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
        name = self.names.get(id(w))
        if name is None or not x.requires_grad:
            return func(*args, **kwargs)
        w = w.detach()
        made: Callable[[Tensor], Tensor | Factored]
        if func is F.linear and x.dim() == 2 and w.numel() >= LARGE:
            y, made = F.linear(x, w, bias), partial(Factored, fed=x)
        elif func is F.conv2d and x.dim() == 4 and not isinstance(given.get("padding"), str):
            convolution = Convolution(**given)
            y, made = convolution(x, w, bias), partial(convolution.by_weight, x=x, w=w)
        else:
            return func(*args, **kwargs)
        self.uses.append((name, get_gradient_edge(y), made))
        return y


def gradients_of(loss: Callable[[Mapping[str, Tensor]], Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor | Factored]:
    """Gradients of `loss(params)` at these parameters, differentiable in what else it depends on; large layers' as factors."""
    leaves = {name: t.detach().requires_grad_() for name, t in params.items()}
    noted = _Uses(leaves)
    with noted:
        value = loss(leaves)
    edges = [*map(get_gradient_edge, leaves.values()), *(edge for _, edge, _ in noted.uses)]
    found = torch.autograd.grad(value, edges, create_graph=True, allow_unused=True)
    parts: dict[str, list[Tensor | Factored]] = {name: [t] if t is not None else [] for name, t in zip(leaves, found, strict=False)}
    for (name, _, made), back in zip(noted.uses, found[len(leaves) :], strict=True):
        if back is not None:  # None: of no use
            parts[name].append(made(back))
    return {name: _sum(parts[name], leaf) for name, leaf in leaves.items()}


def _sum(parts: Sequence[Tensor | Factored], like: Tensor) -> Tensor | Factored:
    factored = [part for part in parts if isinstance(part, Factored)]
    if factored and len(factored) == len(parts):
        return Factored(torch.cat([part.back for part in factored]), torch.cat([part.fed for part in factored]))
    dense = [part.dense() if isinstance(part, Factored) else part for part in parts]
    return torch.stack(dense).sum(0) if len(dense) > 1 else dense[0] if dense else torch.zeros_like(like)
