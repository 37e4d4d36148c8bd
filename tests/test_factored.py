"""Gradients of linear layers as factors say the same as the gradients themselves."""

import pytest
import torch
from torch import nn

import attacks
from attacks import CosineGap, GaussianGap, SquaredAndAbsoluteGap, SquaredGap
from attacks.factored import LARGE, Factored, gradients_of
from attacks.problems import Plan, Problems
from defenses import Clip, NoDefense, Partial, StochasticQuantization, UniformQuantization
from fedsim.models import mcmahan_cnn
from fedsim.observation import Knowledge, Observation
from fedsim.seeding import generator
from fedsim.training import batch_loss, local_update, split
from fedsim.wire import pack

TINY = (3, 9, 11)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 7, 3), nn.SiLU(), nn.Flatten(), nn.Linear(441, 151), nn.SiLU(), nn.Linear(151, 5))


def batch(n: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    rng = generator(0, "batch")
    return torch.rand(n, *TINY, generator=rng), torch.randint(5, (n,), generator=rng)


def dense(gradients) -> dict[str, torch.Tensor]:
    return {name: t.dense() if isinstance(t, Factored) else t for name, t in gradients.items()}


def test_only_large_linear_weights_are_left_in_factors():
    model, (x, y) = network(), batch()
    params, _ = split(model)
    found = gradients_of(lambda leaves: batch_loss(model, leaves, {}, x, y), params)
    assert [name for name, t in found.items() if isinstance(t, Factored)] == ["3.weight"]
    assert params["3.weight"].numel() >= LARGE > params["5.weight"].numel()


def test_factors_multiply_to_the_gradient():
    model, (x, y) = network(), batch()
    params, buffers = split(model)
    true = local_update(model, params, buffers, [(x, y)], lr=1.0).update
    for name, t in dense(gradients_of(lambda leaves: batch_loss(model, leaves, {}, x, y), params)).items():
        assert torch.allclose(t, true[name], rtol=1e-5, atol=1e-7), name


def test_a_weight_that_is_used_twice_or_in_other_ways_has_its_whole_gradient():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(257, 257)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.flatten(1)[:, :257]
            return self.linear(self.linear(x).tanh()) + 0.1 * self.linear.weight.square().sum()

    model, (x, y) = Odd(), batch()
    params, buffers = split(model)
    true = local_update(model, params, buffers, [(x, y)], lr=1.0).update
    found = dense(gradients_of(lambda leaves: batch_loss(model, leaves, {}, x, y), params))
    assert torch.allclose(found["linear.weight"], true["linear.weight"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "gap", [SquaredGap(), CosineGap(), CosineGap(skip_zero=True), GaussianGap(), SquaredAndAbsoluteGap()], ids=repr
)
def test_every_gap_and_its_gradient_by_the_image_are_the_same_from_factors(gap):
    model, (x, y) = network(), batch()
    params, _ = split(model)
    observed = {name: t[None] + 0.01 for name, t in params.items()}
    results = []
    for factors in (True, False):
        image = x.clone().requires_grad_()
        found = gradients_of(lambda leaves, image=image: batch_loss(model, leaves, {}, image, y), params)
        assert any(isinstance(t, Factored) for t in found.values())
        if not factors:
            found = dense(found)
        value = gap({name: t if isinstance(t, Factored) else t[None] for name, t in found.items()}, observed)
        results.append((value.detach(), torch.autograd.grad(value.sum(), image)[0]))
    (one, by_one), (other, by_other) = results
    assert torch.allclose(one, other, rtol=1e-5)
    assert torch.allclose(by_one, by_other, rtol=1e-3, atol=1e-6 * float(by_other.abs().max()))


@pytest.mark.parametrize("gap", [SquaredGap(), CosineGap(), GaussianGap(), SquaredAndAbsoluteGap()], ids=repr)
def test_what_factors_are_held_against_may_depend_on_the_image_too(gap):
    model, (x, y) = network(), batch()
    params, _ = split(model)
    results = []
    for factors in (True, False):
        image = x.clone().requires_grad_()
        found = gradients_of(lambda leaves, image=image: batch_loss(model, leaves, {}, image, y), params)
        found = {name: t if isinstance(t, Factored) else t[None] for name, t in (found if factors else dense(found)).items()}
        # As where a defense left out one tensor, of which the candidate's own is taken: its length is part of the whole's.
        observed = {name: t[None] * (1 + image.mean()) + 0.01 for name, t in params.items()}
        results.append(torch.autograd.grad(gap(found, observed).sum(), image)[0])
    one, other = results
    assert torch.allclose(one, other, rtol=1e-3, atol=1e-6 * float(other.abs().max()))


@pytest.mark.parametrize(
    "defense", [NoDefense(), Partial(StochasticQuantization(16), ["features."]), UniformQuantization(16), Clip(0.1)], ids=repr
)
@pytest.mark.parametrize("mode", [False, True], ids=["eval", "train"])
def test_a_large_network_is_attacked_alike_from_factors_and_as_one_program(mode, defense):
    model = mcmahan_cnn((3, 32, 32), 10, norm="batch", activation="silu", rng=generator(0, "init")).train(mode)
    params, buffers = split(model)
    x, y = torch.rand(3, 1, 3, 32, 32, generator=generator(0, "images")), torch.tensor([3, 5, 7])
    seen = []
    for i in range(3):
        update = local_update(model, params, buffers, [(x[i], y[i : i + 1])], lr=1.0).update
        packets, _ = defense(pack(update), defense.init(update), generator(0, "defense", i))
        seen.append(Observation(params, packets, 1, client=i, buffers=buffers))
    known, attack = Knowledge((3, 32, 32), 10, lr=1.0, local_steps=1, defense=defense), attacks.cosine_adam()
    group = Problems.of(seen, Plan.of(seen[0], known, False), known, model, attack)
    group.labels = y[:, None]
    points, problems = torch.rand(3, 3 * 32 * 32, generator=generator(0, "points")), torch.arange(3)
    losses, gradients = group.evaluate(points, problems)
    for i in range(3):
        loss, gradient = group.evaluate(points[i : i + 1], problems[i : i + 1])
        assert torch.allclose(loss, losses[i : i + 1], rtol=1e-4)
        assert float((gradient - gradients[i]).norm() / gradients[i].norm()) < 1e-3
    assert group.chunk(points[:1], attack.optimizer) == 1
