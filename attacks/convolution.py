"""Convolutions whose second derivatives are convolutions.

What a convolution makes of an input x and a weight w, dotted with what flows back b, is linear in each of the three. So each of its
gradients is a convolution whose gradients are the two others again. PyTorch does not use that for second derivatives, which take it
longer on a CPU: see `benchmarks/searches.py twice`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Pair = int | tuple[int, int]


@dataclass(frozen=True)
class Convolution:
    """How `F.conv2d` moves over images (n, C, H, W); can be differentiated twice by them."""

    stride: Pair = 1
    padding: Pair = 0
    dilation: Pair = 1
    groups: int = 1

    def __call__(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        """(n, O, H', W'); no gradient reaches the weight w (O, C / groups, h, w), see `by_weight`."""
        made: Tensor = _Forward.apply(x, w, bias, self)
        return made

    def by_weight(self, back: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """The gradient by w of a loss whose gradient by the output is `back` (n, O, H', W'); differentiable in x and `back`."""
        made: Tensor = _ByWeight.apply(back, x, w, self)
        return made

    def forward(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        """The output, of plain tensors."""
        return F.conv2d(x, w, bias, self.stride, self.padding, self.dilation, self.groups)

    def backward(self, back: Tensor, x: Tensor, w: Tensor, *, by: int) -> Tensor:
        """The gradient by x (0) or by w (1), of plain tensors; of the one asked for, only the shape counts."""
        pairs = [[p, p] if isinstance(p, int) else [*p] for p in (self.stride, self.padding, self.dilation)]
        gradients = torch.ops.aten.convolution_backward(
            back, x, w, None, *pairs, False, [0, 0], self.groups, [by == 0, by == 1, False]
        )
        return gradients[by]


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, how: Convolution) -> Tensor:
        ctx.save_for_backward(w)
        ctx.how, ctx.shape = how, x.shape
        return how.forward(x, w, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (back,), (w,) = gradients, ctx.saved_tensors
        return (
            _ByInput.apply(back, w, ctx.shape, ctx.how) if ctx.needs_input_grad[0] else None,
            None,
            back.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None,
            None,
        )


class _ByInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, back: Tensor, w: Tensor, shape: torch.Size, how: Convolution) -> Tensor:
        ctx.save_for_backward(w)
        ctx.how = how
        return how.backward(back, back.new_empty(shape), w, by=0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (w,) = ctx.saved_tensors
        return ctx.how.forward(gradients[0], w), None, None, None


class _ByWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, back: Tensor, x: Tensor, w: Tensor, how: Convolution) -> Tensor:
        ctx.save_for_backward(back, x)
        ctx.how = how
        return how.backward(back, x, w, by=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (w,), (back, x) = gradients, ctx.saved_tensors
        by_back = ctx.how.forward(x, w) if ctx.needs_input_grad[0] else None
        by_x = ctx.how.backward(back, x, w, by=0) if ctx.needs_input_grad[1] else None
        return by_back, by_x, None, None
