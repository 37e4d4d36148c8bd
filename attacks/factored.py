"""Gradients of large linear layers as the two factors they are made of, (B, O) and (B, I), in place of their (O, I) product.

The weight gradient of a linear layer is the product of what flows back into its output and what it was fed (Goodfellow 2015, on the
norms of such gradients). Where B is small, gaps between updates can be had from the factors: the product, of the size of the layer
itself, is never made, nor differentiated.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

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
        return twice * (fed @ off.T), twice * (back @ off), None


class _Taps(TorchFunctionMode):
    """Lets `F.linear` of some weights note what it is fed and where its gradient can be read."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = {id(t): name for name, t in weights.items()}
        self.uses: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear or func is torch._C._nn.linear:
            arguments = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            x, w = arguments["input"], arguments["weight"]
            if id(w) in self.names and x.dim() == 2:
                y = F.linear(x, w.detach(), arguments.get("bias"))
                tap = torch.zeros_like(y, requires_grad=True)
                self.uses[self.names[id(w)]].append((tap, x))
                return y + tap
        return func(*args, **kwargs)


def gradients_of(loss: Callable[[Mapping[str, Tensor]], Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor | Factored]:
    """Gradients of `loss(params)` at these parameters, differentiable; large linear layers' weights as factors."""
    leaves = {name: t.detach().requires_grad_() for name, t in params.items()}
    taps = _Taps({name: t for name, t in leaves.items() if t.dim() == 2 and t.numel() >= LARGE})
    with taps:
        value = loss(leaves)
    tapped: Sequence[Tensor] = [tap for uses in taps.uses.values() for tap, _ in uses]
    found = torch.autograd.grad(value, [*leaves.values(), *tapped], create_graph=True, allow_unused=True)
    gradients, backs = dict(zip(leaves, found, strict=False)), dict(zip(map(id, tapped), found[len(leaves) :], strict=True))
    made: dict[str, Tensor | Factored] = {}
    for name, gradient in gradients.items():
        uses = taps.uses.get(name)
        if uses:
            back = [torch.zeros_like(tap) if backs[id(tap)] is None else backs[id(tap)] for tap, _ in uses]  # None: of no use
            factored = Factored(torch.cat(back), torch.cat([x for _, x in uses]))
            made[name] = factored if gradient is None else factored.dense() + gradient  # the weight is at work elsewhere as well
        else:
            made[name] = torch.zeros_like(leaves[name]) if gradient is None else gradient
    return made
