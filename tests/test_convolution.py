"""Convolutions that are differentiated twice say the same as PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attacks.convolution import Convolution
from attacks.factored import Factored, gradients_of
from fedsim.seeding import generator
from fedsim.training import batch_loss, split


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"stride": 2, "padding": 1},
        {"stride": (1, 2), "padding": (2, 0)},
        {"dilation": 2, "padding": 1},
        {"groups": 2, "stride": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("biased", [True, False])
def test_first_and_second_derivatives_are_those_of_pytorch(how, biased):
    rng = generator(0, "convolution")

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=rng, dtype=torch.float64)

    image, w = draw(3, 4, 9, 8), draw(6, 4 // how.get("groups", 1), 3, 2).requires_grad_()
    bias, goal = draw(6).requires_grad_() if biased else None, draw(*w.shape)

    def second(ours: bool) -> list[torch.Tensor]:
        x = image.clone().requires_grad_()
        asked = [x, *([bias] if biased else [])]
        if ours:
            one = Convolution(**how)
            y = one(x, w.detach(), bias)
            back, *found = torch.autograd.grad(y.tanh().sum(), [y, *asked], create_graph=True)
            found.append(one.by_weight(back, x, w.detach()))
        else:
            y = F.conv2d(x, w, bias, **how)
            found = list(torch.autograd.grad(y.tanh().sum(), [*asked, w], create_graph=True))
        gap = (found[-1] - goal).square().sum() + sum(t.cos().sum() for t in found[:-1])
        return [*found, *torch.autograd.grad(gap, x)]

    ours, theirs = second(True), second(False)
    assert len(ours) == len(theirs) == 3 + biased
    for one, other in zip(ours, theirs, strict=True):
        assert one.abs().max() > 0
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)


class Odd(nn.Module):
    """A weight at work twice and in a penalty; a convolution of a constant, one padded by name, one that ReLU overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.constant = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(1, 3, 1)
        self.same, self.last = nn.Conv2d(3, 8, 3, padding="same"), nn.Conv2d(8, 4, 3, stride=2)
        self.overwrites, self.head = nn.ReLU(inplace=True), nn.Linear(4, 5)
        self.idle = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.shared(self.shared(x).tanh()) + self.constant(torch.ones(1, 1, *x.shape[2:]).to(x))
        x = self.overwrites(self.last(self.same(x).sigmoid()))
        return self.head(x.mean((2, 3))) + 0.1 * self.shared.weight.square().sum()


def test_gradients_of_odd_networks_are_those_of_pytorch():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Odd().double()
        x, y = torch.rand(2, 3, 9, 11, dtype=torch.float64), torch.tensor([0, 3])
    params, buffers = split(model)
    results = []
    for ours in (True, False):
        image = x.clone().requires_grad_()

        def loss(leaves, image=image):
            return batch_loss(model, leaves, buffers, image, y)

        if ours:
            found = gradients_of(loss, params)
            assert "ByWeight" in found["last.weight"].grad_fn.name()
        else:
            leaves = {name: t.clone().requires_grad_() for name, t in params.items()}
            values = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True, allow_unused=True)
            found = {name: torch.zeros_like(params[name]) if t is None else t for name, t in zip(params, values, strict=True)}
        assert not any(isinstance(t, Factored) for t in found.values())
        (slope,) = torch.autograd.grad(torch.stack([t.cos().sum() for t in found.values()]).sum(), image)
        results.append([*(found[name] for name in params), slope])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)
    assert results[0][-1].abs().max() > 0
