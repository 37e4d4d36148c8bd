"""Attacks: the optimizers on functions whose minima are known, labels, gradient matching end to end, and what all presets keep."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import attacks
from attacks import (
    LBFGS,
    SGD,
    Adam,
    CosineGap,
    GradientMatching,
    OutOfRange,
    SquaredGap,
    SquaredPixels,
    TotalVariation,
    analytic_labels,
    metrics,
)
from attacks.labels import labels_behind
from attacks.optimizers import DIVERGED, RUNNING, STALLED, Minima, Stop, minimise
from fedsim.models import Xavier, resnet18, resnet20
from fedsim.observation import Attack, Knowledge, Observation
from fedsim.seeding import generator
from fedsim.training import batch_loss, local_update, split
from fedsim.wire import pack

torch.set_num_threads(1)


# Functions with known minima -----------------------------------------------------------------------------------------------------


class Quadratics:
    """(x - c)' Q (x - c) / 2 with eigenvalues from 1 to `condition`, one for each problem."""

    def __init__(self, conditions: list[float], dimension: int) -> None:
        rng = generator(0, "quadratics")
        p = len(conditions)
        basis, _ = torch.linalg.qr(torch.randn(p, dimension, dimension, generator=rng, dtype=torch.float64))
        powers = torch.linspace(0, 1, dimension, dtype=torch.float64)
        values = torch.tensor(conditions, dtype=torch.float64)[:, None] ** powers
        self.matrix = basis @ torch.diag_embed(values) @ basis.mT
        self.centre = torch.randn(p, dimension, generator=rng, dtype=torch.float64)
        self.starts = torch.randn(p, 1, dimension, generator=rng, dtype=torch.float64)

    def __call__(self, points: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        away = points - self.centre[problems]
        gradient = (self.matrix[problems] @ away[..., None]).squeeze(-1)
        return (away * gradient).sum(1) / 2, gradient


def rosenbrock(points: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
    points = points.detach().requires_grad_()
    x, y = points[:, 0], points[:, 1]
    losses = 100 * (y - x**2) ** 2 + (1 - x) ** 2
    (gradient,) = torch.autograd.grad(losses.sum(), points)
    return losses.detach(), gradient


def test_lbfgs_solves_quadratics_of_different_conditioning_side_by_side() -> None:
    problem = Quadratics([1, 10, 1e2, 1e3, 1e4], dimension=13)
    found = minimise(problem, problem.starts, LBFGS(500), stop=Stop(1e-17), chunk=3)
    assert (found.losses < 1e-16).all()
    # The smallest eigenvalue is 1, so |x - c|^2 <= 2 loss.
    assert (found.points[:, 0] - problem.centre).abs().max() < 1e-8
    assert found.evaluations[0] < found.evaluations[4] <= 500


def test_lbfgs_walks_the_valley_of_rosenbrock() -> None:
    starts = torch.tensor([[-1.2, 1.0], [2.0, -3.0], [0.0, 7.0], [-5.0, -5.0]], dtype=torch.float64).unsqueeze(1)
    found = minimise(rosenbrock, starts, LBFGS(300), stop=Stop(1e-18), chunk=4)
    assert (found.points - 1).abs().max() < 1e-8


def test_the_direction_is_that_of_the_bfgs_formula() -> None:
    # H <- (1 - rho s y')' ... over the last m pairs from H = (s'y / y'y) 1, multiplied out; more pairs than places, so they wrap.
    d, m = 9, 4
    rng = generator(0, "pairs")
    root = torch.randn(d, d, generator=rng, dtype=torch.float64)
    hessian, eye = root @ root.T + torch.eye(d), torch.eye(d, dtype=torch.float64)
    optimizer = LBFGS(history=m)
    state = optimizer.start(torch.zeros(1, d, dtype=torch.float64))
    state.loss.fill_(1)
    pairs = []
    for _ in range(7):
        s, g = torch.randn(2, d, generator=rng, dtype=torch.float64)
        y = hessian @ s
        pairs.append((s, y))
        state.point, state.gradient, state.trial = torch.zeros(1, d).double(), (g - y)[None], s[None].clone()
        optimizer._accept(state, torch.tensor([0]), torch.tensor([0.5]).double(), g[None])
        inverse = (s @ y) / (y @ y) * eye
        for s, y in pairs[-m:]:
            v = eye - torch.outer(y, s) / (s @ y)
            inverse = v.T @ inverse @ v + torch.outer(s, s) / (s @ y)
        assert torch.allclose(state.direction[0], -inverse @ g, rtol=1e-10)


def test_every_accepted_point_satisfies_the_weak_wolfe_conditions() -> None:
    # On a quartic from far away a unit step along the gradient is absurdly long: the line search has work to do.
    optimizer = LBFGS(60)
    state = optimizer.start(torch.full((1, 3), 50.0, dtype=torch.float64))
    accepted = 0
    for _ in range(60):
        point, loss, slope, direction, t = (x.clone() for x in (state.point, state.loss, state.slope, state.direction, state.t))
        optimizer.step(state, (state.trial**4).sum(1), 4 * state.trial**3)
        if loss.isfinite() and not torch.equal(point, state.point):
            accepted += 1
            assert float(state.loss) <= float(loss + 1e-4 * t * slope)
            assert float((state.gradient * direction).sum()) >= 0.9 * float(slope)
    assert accepted > 10
    assert float(state.loss) < 1e-6


@pytest.mark.parametrize("optimizer", [LBFGS(80), LBFGS(80, reach=0.1), Adam(80), Adam(80, signed=True)], ids=repr)
def test_a_problem_does_not_notice_its_companions(optimizer: LBFGS | Adam) -> None:
    problem = Quadratics([3, 1e3, 40], dimension=11)

    def solve_alone(i: int) -> Minima:
        return minimise(lambda x, v: problem(x, v + i), problem.starts[i : i + 1], optimizer, stop=Stop(1e-10), chunk=1)

    alone = [solve_alone(i) for i in range(3)]
    for chunk in (2, 3):
        together = minimise(problem, problem.starts, optimizer, stop=Stop(1e-10), chunk=chunk)
        for i in range(3):
            assert torch.allclose(together.points[i], alone[i].points[0], atol=1e-9)
            assert together.evaluations[i] == alone[i].evaluations[0]


@pytest.mark.parametrize("optimizer", [LBFGS(200), Adam(200)], ids=repr)
def test_a_problem_that_is_not_a_number_diverges_alone(optimizer: LBFGS | Adam) -> None:
    healthy = Quadratics([5, 50], dimension=7)

    def evaluate(points: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        losses, gradient = healthy(points, problems.clamp(max=1))
        return torch.where(problems == 2, math.nan, losses), gradient

    starts = torch.cat([healthy.starts, healthy.starts[:1]])
    found = minimise(evaluate, starts, optimizer, stop=Stop(1e-12), chunk=3)
    assert found.status[2] == DIVERGED
    assert found.losses[2] == math.inf
    assert found.evaluations[2] == 1
    expected = minimise(healthy, healthy.starts, optimizer, stop=Stop(1e-12), chunk=2)
    assert torch.allclose(found.points[:2], expected.points, atol=1e-12)


@pytest.mark.parametrize("optimizer", [LBFGS(200), Adam(200, rate=0.05), SGD(200, rate=0.05)], ids=repr)
def test_what_was_found_before_a_loss_that_is_no_number_is_kept(optimizer: LBFGS | Adam | SGD) -> None:
    asked = 0

    def evaluate(points: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal asked
        asked += 1
        losses = (points - 1).square().sum(1) + (points - 1).pow(4).sum(1)
        return losses * (math.nan if asked == 8 else 1), 2 * (points - 1) + 4 * (points - 1).pow(3)

    found = minimise(evaluate, torch.zeros(1, 1, 3), optimizer, chunk=1)
    assert float(found.losses) == pytest.approx(
        float((found.points - 1).square().sum() + (found.points - 1).pow(4).sum()), rel=1e-4
    )
    assert float(found.losses) < 6


def test_lbfgs_backs_off_from_where_the_loss_is_not_finite() -> None:
    # -log(1 - |x|) + x^2 has its minimum at 0 and no value beyond 1; large steps land there.
    def barrier(points: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        inside = 1 - points.abs()
        return (points.square() - inside.log()).sum(1), 2 * points + points.sign() / inside

    found = minimise(barrier, torch.full((1, 1, 2), 0.999), LBFGS(300), stop=Stop(1e-4), chunk=1)
    assert found.losses[0] < 1e-2


def test_a_problem_on_which_nothing_helps_stalls_early() -> None:
    def liar(points: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        return points.square().sum(1), -2 * points  # the gradient points the wrong way

    found = minimise(liar, torch.ones(1, 1, 3), LBFGS(500), chunk=1)
    assert found.status[0] == STALLED
    assert found.evaluations[0] < 50


def test_the_next_start_runs_only_when_those_before_it_failed() -> None:
    # The first problem is solved from its first start; the second has a floor of 1 and uses up all three.
    problem = Quadratics([2, 2], dimension=5)

    def evaluate(points: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        losses, gradient = problem(points, problems)
        return losses + problems, gradient

    found = minimise(evaluate, problem.starts.expand(2, 3, 5).clone(), LBFGS(40), stop=Stop(1e-10), chunk=2)
    assert found.tried.tolist() == [1, 3]
    assert found.losses[0, 1:].isinf().all()
    assert torch.allclose(found.losses[1], torch.ones(3, dtype=torch.float64))
    assert (found.status[0] == RUNNING).all()


def test_adam_takes_the_step_of_the_paper() -> None:
    # The first step is rate * g / (|g| + eps), whatever the scale of g; signed or not.
    for signed in (False, True):
        state = Adam(8, rate=0.25, signed=signed).start(torch.zeros(2, 3))
        Adam(8, rate=0.25, signed=signed).step(state, torch.ones(2), torch.tensor([[1.0, -2, 3], [100, 0, -0.5]]))
        assert torch.allclose(state.trial, 0.25 * torch.tensor([[-1.0, 1, -1], [-1, 0, 1]]))


def test_adam_divides_its_rate_at_three_five_and_seven_eighths() -> None:
    optimizer = Adam(16, rate=1.0, signed=True)
    state = optimizer.start(torch.zeros(1, 1))
    moves = []
    for _ in range(16):
        before = state.trial.clone()
        optimizer.step(state, torch.ones(1), torch.ones(1, 1))
        moves.append(float(before - state.trial))
    # Constant signs leave both moments at 1: each move is the rate itself.
    assert moves == pytest.approx([1.0] * 6 + [0.1] * 4 + [0.01] * 4 + [0.001] * 2, rel=1e-3)


# Networks and what they leak -----------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Two strided convolutions and a head, sigmoid: more equations than unknowns for a (2, 8, 8) image."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.Sigmoid(), nn.Conv2d(6, 8, 3, padding=1), nn.Sigmoid(), nn.Flatten()
        )
        self.head = nn.Linear(128, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


SHAPE, CLASSES = (2, 8, 8), 5
KNOWN = Knowledge(SHAPE, CLASSES)


def smooth_images(count: int, stream: str = "images") -> Tensor:
    coarse = torch.rand(count, SHAPE[0], 3, 3, generator=generator(0, stream))
    return nn.functional.interpolate(coarse, SHAPE[1:], mode="bilinear", align_corners=True)


def random_params(model: nn.Module, rng: torch.Generator) -> dict[str, Tensor]:
    return {name: torch.rand(p.shape, generator=rng) - 0.5 for name, p in model.named_parameters()}


def victims(model: nn.Module, sizes: list[int]) -> tuple[list[Observation], list[Tensor], list[Tensor]]:
    """Observations of batches of these sizes, each of another random network; their images and labels."""
    rng = generator(0, "victims")
    images = list(smooth_images(sum(sizes)).split(sizes))
    labels = [torch.randint(CLASSES, (size,), generator=rng) for size in sizes]
    seen = []
    for x, y in zip(images, labels, strict=True):
        params = random_params(model, rng)
        seen.append(Observation(params, pack(local_update(model, params, {}, [(x, y)], lr=1).update), len(x)))
    return seen, images, labels


def test_the_label_is_exact_for_every_single_image() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 7))
    rng = generator(0, "labels")
    for _ in range(1000):
        params = random_params(model, rng)
        label = torch.randint(7, (1,), generator=rng)
        update = local_update(model, params, {}, [(torch.rand(1, 3, 2, 2, generator=rng), label)], lr=0.1).update
        assert torch.equal(analytic_labels(update, 7), label)


def test_the_label_is_exact_without_a_bias_where_features_are_positive() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.Sigmoid(), nn.Linear(9, 7, bias=False))
    rng = generator(0, "no bias")
    for _ in range(200):
        params = {name: torch.randn(p.shape, generator=rng) for name, p in model.named_parameters()}
        label = torch.randint(7, (1,), generator=rng)
        update = local_update(model, params, {}, [(torch.rand(1, 3, 2, 2, generator=rng), label)], lr=1).update
        assert torch.equal(analytic_labels(update, 7), label)


def test_a_hidden_layer_of_as_many_units_as_classes_is_no_head() -> None:
    layers = [nn.Flatten(), nn.Linear(12, 7), nn.Sigmoid(), nn.Linear(7, 7, bias=False)]
    model, rng = nn.Sequential(*layers), generator(0, "hidden")
    for _ in range(50):
        params = {name: torch.randn(p.shape, generator=rng) for name, p in model.named_parameters()}
        label = torch.randint(7, (1,), generator=rng)
        update = local_update(model, params, {}, [(torch.rand(1, 3, 2, 2, generator=rng), label)], lr=1).update
        assert torch.equal(analytic_labels(update, 7), label)


def test_repeated_labels_are_counted() -> None:
    # Uniform predictions: the entry of a class that occurs n times in B is 1/K - n/B, exactly.
    labels = torch.tensor([0, 0, 0, 4, 4, 9, 2])
    bias = 1 / 10 - torch.bincount(labels, minlength=10) / 7
    assert analytic_labels({"head.bias": bias}, 10, 7).tolist() == [0, 0, 0, 2, 4, 4, 9]


def test_labels_are_counted_from_what_each_round_s_model_predicts() -> None:
    """A model that has begun to learn predicts otherwise than the one before, and so is what it sends read."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 7))
    images, labels = torch.rand(8, 3, 2, 2, generator=generator(0, "images")), torch.tensor([0, 0, 0, 1, 1, 4, 4, 6])
    seen: list[Observation] = []
    for bias in (0.0, 3.0, -3.0):
        params = {"1.weight": torch.zeros(7, 12), "1.bias": torch.linspace(0, bias, 7)}
        update = local_update(model, params, {}, [(images, labels)], lr=1).update
        seen.append(Observation(params, pack(update), 8))
    assert torch.equal(labels_behind(seen, Knowledge((3, 2, 2), 7), model, 8), labels)


def test_labels_say_which_head_they_looked_for() -> None:
    with pytest.raises(ValueError, match="head of 10 classes"):
        analytic_labels({"weight": torch.zeros(3, 4)}, 10)


def test_the_truth_explains_the_update_to_the_last_bit_of_float32() -> None:
    # Sign and scale of what is matched are the client's own: at the true images and labels the gap vanishes, at -update it is 4.
    model = Small()
    seen, images, labels = victims(model, [3])
    target = {name: t[None] for name, t in seen[0].update.items()}
    leaves = {name: p.clone().requires_grad_() for name, p in seen[0].params.items()}
    loss = batch_loss(model, leaves, {}, images[0], labels[0])
    gradient = dict(zip(leaves, (g[None] for g in torch.autograd.grad(loss, list(leaves.values()))), strict=True))
    gap = SquaredGap()
    assert float(gap(gradient, target) / gap.unit(target)) < 1e-12
    negated = {name: -t for name, t in target.items()}
    assert float(gap(gradient, negated) / gap.unit(target)) == pytest.approx(4, abs=1e-4)
    # A start at the truth stays there.
    known = Knowledge(SHAPE, CLASSES, labels=labels)
    attack = GradientMatching(labels="given", optimizer=LBFGS(1), stop=Stop())
    group = attacks.problems.Problems.of(seen, attacks.problems.Plan.of(seen[0], known, False), known, model, attack)
    group.labels = torch.stack(labels)
    loss_there, slope = group.evaluate(images[0].reshape(1, -1), torch.zeros(1, dtype=torch.int64))
    assert float(loss_there) < 1e-12
    assert float(slope.abs().max()) < 1e-4


def test_cosine_ignores_what_squared_minds() -> None:
    g = {"a": torch.randn(2, 3, 5, generator=generator(0, "g")), "b": torch.ones(2, 7)}
    tripled = {name: 3 * t for name, t in g.items()}
    assert torch.allclose(CosineGap()(g, tripled), torch.zeros(2), atol=1e-6)
    # |g - 3g|^2 / |3g|^2 = 4/9
    assert torch.allclose(SquaredGap()(g, tripled) / SquaredGap().unit(tripled), torch.full((2,), 4 / 9))
    assert torch.allclose(CosineGap()(g, {name: -t for name, t in g.items()}), torch.full((2,), 2.0))


def test_priors_are_zero_where_they_should_be() -> None:
    images = torch.rand(2, 1, 3, 5, 7, generator=generator(0, "priors"))
    assert OutOfRange(1.0)(images).tolist() == [0, 0]
    assert OutOfRange(2.0)(torch.full((1, 1, 1, 2, 3), 1.5)).item() == pytest.approx(2 * 6 * 0.25)
    assert TotalVariation(1.0)(torch.full((1, 1, 1, 4, 4), 0.3)).item() == 0
    # A ramp of 0.1 a row: every vertical difference is 0.1, every horizontal one 0.
    ramp = torch.arange(4).reshape(1, 1, 1, 4, 1).expand(1, 1, 1, 4, 5) / 10
    assert TotalVariation(2.0)(ramp).item() == pytest.approx(0.2)
    for signal in (ramp[..., :1], ramp[..., :1].transpose(-2, -1)):  # one pixel wide, or high
        assert TotalVariation(2.0)(signal).item() == pytest.approx(0.2)
    assert TotalVariation(1.0)(ramp[..., :1, :1]).item() == 0


@pytest.mark.parametrize(
    "attack", [attacks.dlg(restarts=3, evaluations=1500), attacks.idlg(restarts=3, evaluations=1500)], ids=repr
)
def test_deep_leakage_recovers_smooth_images(attack: GradientMatching) -> None:
    model = Small()
    seen, images, labels = victims(model, [1] * 4)
    for one, x, y in zip(attack(seen, KNOWN, model, generator(0, "attack")), images, labels, strict=True):
        assert one.converged
        assert metrics.mse(one.images, x).item() < 1e-3
        assert torch.equal(one.labels, y)
        assert 0 < one.evaluations <= 4500


def test_units_for_every_tensor_show_what_a_deep_network_hides_in_a_sum_of_squares() -> None:
    deep = resnet20(SHAPE, CLASSES, norm="none", activation="sigmoid", strides=False)
    seen, images, _ = victims(deep, [1, 1])
    for attack, finds in ((attacks.idlg(evaluations=100), False), (attacks.sapag(evaluations=100), True)):
        for one, saw, x in zip(attack(seen, KNOWN, deep, generator(0, "attack")), seen, images, strict=True):
            unit = attack.gap.unit({name: t.unsqueeze(0) for name, t in saw.update.items()}).item()
            assert one.loss <= attack.tolerance * unit  # any image's is, where little shows
            assert one.converged is finds
            assert (metrics.mse(one.images, x).item() < 0.03) is finds


def test_a_search_that_begins_where_float32_cannot_tell_two_directions_apart_ends_there() -> None:
    attack = attacks.cosine_adam(iterations=20)
    blind = resnet18(SHAPE, CLASSES, norm="batch", activation="sigmoid", init=Xavier(), rng=generator(0, "init")).eval()
    params, buffers = split(blind)
    x, y = smooth_images(1), torch.tensor([3])
    update = pack(local_update(blind, params, buffers, [(x, y)], lr=1.0).update)
    (one,) = attack([Observation(params, update, 1, buffers=buffers)], KNOWN, blind, generator(0, "attack"))
    assert (one.evaluations, one.converged) == (1, False)
    assert metrics.mse(one.images, x).item() > 0.1  # the noise it began with
    (other,) = attack(victims(Small(), [1])[0], KNOWN, Small(), generator(0, "attack"))
    assert other.evaluations == 20


def test_a_batch_of_two_is_recovered_up_to_its_order() -> None:
    model = Small()
    seen, images, labels = victims(model, [2])
    (one,) = attacks.idlg(restarts=3, evaluations=1500)(seen, KNOWN, model, generator(0, "batch"))
    order = metrics.align(one.images, images[0])
    assert metrics.psnr_db(one.images[order], images[0]).min() > 20
    assert metrics.label_accuracy(one.labels, labels[0]) == 1


def test_an_update_of_a_known_learning_rate_is_scaled_back() -> None:
    model = Small()
    (seen, *_), images, _ = victims(model, [1])
    packets = pack({name: 0.05 * t for name, t in seen.update.items()})
    known = replace(KNOWN, lr=0.05)
    (one,) = attacks.dlg(restarts=3, evaluations=1500)([replace(seen, packets=packets)], known, model, generator(0, "lr"))
    assert metrics.mse(one.images, images[0]).item() < 1e-3


def test_several_local_steps_need_a_learning_rate_or_a_scale_free_gap() -> None:
    model = Small()
    seen, *_ = victims(model, [1])
    known = replace(KNOWN, local_steps=3)
    with pytest.raises(ValueError, match=r"known\.lr"):
        attacks.dlg(evaluations=5)(seen, known, model, generator(0, "steps"))
    GradientMatching(gap=CosineGap(), optimizer=LBFGS(3))(seen, known, model, generator(0, "steps"))


def test_the_start_with_the_smallest_loss_is_reported() -> None:
    model = Small()
    seen, *_ = victims(model, [1, 1])
    attack = GradientMatching(optimizer=LBFGS(25), restarts=4, stop=Stop())
    for one in attack(seen, KNOWN, model, generator(0, "choice")):
        assert one.losses.shape == (4,)
        assert one.loss == float(one.losses.min())
        assert torch.equal(one.images, one.starts[one.losses.argmin()])
        assert len(set(one.losses.tolist())) == 4


def test_a_victim_that_is_not_a_number_is_reported_as_such_and_harms_nobody() -> None:
    model = Small()
    seen, images, _ = victims(model, [1, 1])
    broken = pack({name: torch.full_like(t, math.nan) for name, t in seen[0].update.items()})
    attack = attacks.dlg(restarts=2, evaluations=1500)
    nan, healthy = attack([replace(seen[0], packets=broken), seen[1]], KNOWN, model, generator(0, "nan"))
    assert nan.losses.tolist() == [math.inf, math.inf]
    assert not nan.converged
    assert nan.images.isfinite().all()
    assert healthy.converged
    assert metrics.mse(healthy.images, images[1]).item() < 1e-3


@pytest.mark.parametrize("chunk", [1, 2, 5, None])
def test_chunks_do_not_change_the_result(chunk: int | None) -> None:
    # Few evaluations: kernels for different batches round differently, and a long search amplifies it.
    model = Small()
    seen, *_ = victims(model, [1] * 5)
    attack = replace(attacks.dlg(restarts=2, evaluations=10), chunk=chunk)
    reference = replace(attack, chunk=10)(seen, KNOWN, model, generator(0, "chunks"))
    for one, other in zip(attack(seen, KNOWN, model, generator(0, "chunks")), reference, strict=True):
        assert torch.allclose(one.starts, other.starts, atol=1e-4)
        assert torch.allclose(one.losses, other.losses, rtol=1e-4)


def test_progress_counts_victims_to_the_end() -> None:
    model = Small()
    seen, *_ = victims(model, [1, 2, 1])
    calls: list[tuple[int, int]] = []
    attacks.dlg(evaluations=5)(seen, KNOWN, model, generator(0, "report"), report=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (3, 3)
    assert calls == sorted(calls)


# What every preset keeps ---------------------------------------------------------------------------------------------------------

PRESETS = [
    attacks.dlg(restarts=2, evaluations=12),
    attacks.idlg(restarts=2, evaluations=12),
    attacks.sapag(restarts=2, evaluations=12),
    attacks.inverting_gradients(restarts=2, iterations=12),
    attacks.cosine_lbfgs(restarts=2, evaluations=12),
    attacks.cosine_adam(restarts=2, iterations=12, tv=1e-4),
    attacks.gradinversion(restarts=2, iterations=12, batch_norm=0),
    attacks.fedavg(restarts=2, evaluations=12),
    attacks.precode_naive(restarts=2, iterations=12),
    attacks.precode_ignore(restarts=2, iterations=12),
    attacks.precode_aware(restarts=2, evaluations=12),
]


@pytest.mark.parametrize("attack", PRESETS, ids=repr)
def test_every_preset_keeps_the_contract(attack: GradientMatching) -> None:
    assert isinstance(attack, Attack)
    model = Small()
    sizes = [1, 3, 1, 2]
    seen, *_ = victims(model, sizes)
    before = [({n: t.clone() for n, t in one.params.items()}, {n: t.clone() for n, t in one.update.items()}) for one in seen]
    weights = {name: p.clone() for name, p in model.named_parameters()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    found = attack(seen, KNOWN, model, generator(0, "contract"))
    assert torch.equal(torch.get_rng_state(), state)
    again = attack(seen, KNOWN, model, generator(0, "contract"))
    other = attack(seen, KNOWN, model, generator(1, "contract"))
    assert len(found) == len(seen)
    for i, (one, same, different, size) in enumerate(zip(found, again, other, sizes, strict=True)):
        assert one.images.shape == (size, *SHAPE)
        assert one.labels.shape == (size,)
        assert one.labels.dtype == torch.int64
        assert one.starts.shape == (2, size, *SHAPE)
        assert one.losses.shape == (2,)
        assert one.images.amin() >= 0
        assert one.images.amax() <= 1
        assert one.seconds > 0
        assert torch.equal(one.images, same.images)
        assert not torch.equal(one.images, different.images)
        params, update = before[i]
        assert all(torch.equal(t, params[name]) for name, t in seen[i].params.items())
        assert all(torch.equal(t, update[name]) for name, t in seen[i].update.items())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert not any(p.requires_grad and p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("preset", [attacks.dlg, attacks.idlg, attacks.inverting_gradients, attacks.cosine_lbfgs, attacks.fedavg])
def test_order_is_that_of_the_observations(preset: type) -> None:
    # The same victims the other way round, with the same starts: shapes tell them apart, results must follow.
    model = Small()
    seen, *_ = victims(model, [1, 2, 3])
    attack = preset()
    attack = replace(attack, optimizer=replace(attack.optimizer, evaluations=3))
    backwards = attack(seen[::-1], KNOWN, model, generator(0, "order"))
    assert [len(one.images) for one in backwards] == [3, 2, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: attacks.dlg(restarts=0), "restarts must be >= 1, got 0"),
        (lambda: attacks.dlg(evaluations=0), "evaluations must be >= 1, got 0"),
        (lambda: GradientMatching(chunk=0), "chunk must be >= 1 or None, got 0"),
        (lambda: GradientMatching(init="zeros"), "init must be"),  # type: ignore[arg-type]
        (lambda: GradientMatching(labels="told"), "labels must be"),  # type: ignore[arg-type]
        (lambda: GradientMatching(box=True), "box=True needs"),
        (lambda: GradientMatching(tolerance=0), "tolerance must be > 0"),
        (lambda: LBFGS(history=0), "history must be >= 1, got 0"),
        (lambda: LBFGS(armijo=0.5, curvature=0.1), "armijo < curvature"),
        (lambda: LBFGS(reach=-1), "reach must be positive"),
        (lambda: Adam(rate=0), "rate must be positive, got 0"),
        (lambda: Adam(betas=(1.0, 0.9)), "betas must lie"),
        (lambda: TotalVariation(-1), "weight must be >= 0, got -1"),
        (lambda: OutOfRange(-1), "weight must be >= 0, got -1"),
        (lambda: SquaredPixels(-1), "weight must be >= 0, got -1"),
    ],
)
def test_settings_are_checked_where_they_enter(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()  # type: ignore[operator]


def test_given_labels_must_be_told() -> None:
    model = Small()
    seen, *_ = victims(model, [1])
    with pytest.raises(ValueError, match=r"known\.labels"):
        GradientMatching(labels="given")(seen, KNOWN, model, generator(0, "given"))


def test_a_models_own_gradients_are_an_observation() -> None:
    model = Small()
    (seen, *_), images, labels = victims(model, [2])
    with pytest.raises(ValueError, match=r"features\.0\.weight, .* has no gradient: call loss\.backward\(\) first"):
        Observation.of(model, 2)
    model.load_state_dict(seen.params)
    nn.functional.cross_entropy(model(images[0]), labels[0]).backward()
    own = Observation.of(model, 2)
    assert all(torch.allclose(own.update[name], t, atol=1e-7) for name, t in seen.update.items())
    assert all(torch.equal(own.params[name], t) for name, t in seen.params.items())
    assert not any(t.requires_grad for t in [*own.params.values(), *own.update.values()])
