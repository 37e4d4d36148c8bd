"""The engine of gradient matching: when searches end, what they record, where they begin, local steps, batches, BatchNorm."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import attacks
from attacks import LBFGS, SGD, Adam, CosineGap, GaussianGap, GradientMatching, SquaredPixels, Stop, metrics
from attacks.evidence import batch_statistics, believed, gradient_of, views
from attacks.optimizers import RUNNING, minimise
from attacks.problems import Plan, Problems
from defenses import UniformQuantization
from fedsim.data import Images
from fedsim.models import Precode, lenet
from fedsim.observation import Attack, Knowledge, Observation, Reconstruction
from fedsim.seeding import generator
from fedsim.training import Batch, local_update
from fedsim.wire import pack

torch.set_num_threads(1)

SHAPE, CLASSES = (2, 8, 8), 5
KNOWN = Knowledge(SHAPE, CLASSES)


class Small(nn.Module):
    """Two sigmoid convolutions and a head with DLG's weights, on 8x8 images of two channels."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        channels = [2, 7, 11]
        layers: list[nn.Module] = []
        for before, after in pairwise(channels):
            layers += [nn.Conv2d(before, after, 5, stride=1, padding=2)]
            layers += [nn.BatchNorm2d(after)] if norm else []
            layers += [nn.Sigmoid()]
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(11 * 64, CLASSES)
        rng = generator(0, "small")
        with torch.no_grad():
            for p in self.parameters():
                p.uniform_(-0.5, 0.5, generator=rng)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def smooth(count: int, stream: str = "images") -> Tensor:
    """Images of low frequency, (count, 2, 8, 8) in [0, 1]."""
    coarse = torch.rand(count, 2, 3, 3, generator=generator(0, stream))
    return nn.functional.interpolate(coarse, size=SHAPE[1:], mode="bilinear", align_corners=True)


def sent(model: nn.Module, batches: Sequence[Batch], num_examples: int, **training: float) -> Observation:
    """What a client that trained on these batches sends."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    update = local_update(model, params, buffers, batches, **{"lr": 1.0} | training).update
    return Observation(params, pack(update), num_examples, buffers=buffers)


# When a search ends --------------------------------------------------------------------------------------------------------------


def scripted(losses: Sequence[float]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """An `evaluate` of one problem that answers these losses, one after the other, whatever the point."""
    script = iter(losses)
    return lambda points, problems: (torch.tensor([next(script)]), torch.ones_like(points))


@pytest.mark.parametrize(
    ("stop", "losses", "expected"),
    [
        (Stop(), [9, 8, 7, 6, 5, 4, 3, 2], 6),  # the budget
        (Stop(threshold=7), [9, 8, 7, 6, 5, 4], 3),  # the first loss of 7 or less is the third
        (Stop(variation=0.5), [9, 8, 7, 6.75, 5, 4], 4),  # the fourth differs by 0.25
        (Stop(patience=2), [9, 5, 6, 7, 1, 1], 4),  # two after the second, which is the best
    ],
    ids=str,
)
def test_a_search_ends_by_budget_threshold_variation_or_patience(stop: Stop, losses: list[float], expected: int) -> None:
    found = minimise(scripted(losses), torch.zeros(1, 1, 3), SGD(6), stop=stop, chunk=1)
    assert found.evaluations.item() == expected
    assert found.losses.item() == min(losses[:expected])


def test_time_ends_all_searches_and_those_that_never_ran_say_so() -> None:
    def slow(points: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        return points.square().sum(1), 2 * points

    starts = torch.ones(3, 2, 5)
    found = minimise(slow, starts, SGD(10**9), stop=Stop(seconds=0.05), chunk=2)
    assert found.tried.tolist() == [1, 1, 0]
    assert found.losses[2].isinf().all()
    assert torch.equal(found.points[2], starts[2])


def test_an_attack_without_time_returns_its_start_unconverged() -> None:
    model = Small()
    seen = sent(model, [(smooth(1), torch.tensor([3]))], 1)
    attack = GradientMatching(stop=Stop(seconds=1e-9), chunk=1)
    found = attack([seen, seen], KNOWN, model, generator(0, "time"))
    assert [one.converged for one in found] == [False, False]
    assert found[1].evaluations == 0
    assert found[1].losses.isinf().all()


def test_sgd_is_that_of_torch() -> None:
    point = torch.tensor([[3.0, -2.0]], requires_grad=True)
    theirs = torch.optim.SGD([point], lr=0.003, momentum=0.7)
    ours = SGD(5, rate=0.003, momentum=0.7)
    state = ours.start(point.detach().clone())
    for _ in range(5):
        theirs.zero_grad()
        loss = point.pow(4).sum()
        loss.backward()
        theirs.step()
        ours.step(state, state.trial.pow(4).sum(1), 4 * state.trial**3)
    assert torch.allclose(state.trial, point.detach(), atol=1e-6)


@pytest.mark.parametrize(
    ("decay", "rates"), [("linear", [1, 3 / 4, 1 / 2, 1 / 4]), ("cosine", [1, 0.853553, 0.5, 0.146447]), ("none", [1] * 4)]
)
def test_rates_decay_as_named(decay: str, rates: list[float]) -> None:
    # Without momentum and with a gradient of one, each step is the rate itself; cosine: (1 + cos(pi k / 4)) / 2.
    optimizer = SGD(4, rate=1.0, momentum=0.0, decay=decay)  # type: ignore[arg-type]
    state = optimizer.start(torch.zeros(1, 1))
    places = [0.0]
    for _ in range(4):
        optimizer.step(state, torch.ones(1), torch.ones(1, 1))
        places.append(state.trial.item())
    assert [a - b for a, b in pairwise(places)] == pytest.approx(rates, abs=1e-5)


# What is recorded ----------------------------------------------------------------------------------------------------------------


def test_a_trace_begins_at_the_start_and_ends_at_the_reconstruction() -> None:
    model = Small()
    seen = sent(model, [(smooth(1), torch.tensor([3]))], 1)
    attack = GradientMatching(optimizer=LBFGS(35), stop=Stop(), record=10, restarts=2)
    (found,) = attack([seen], KNOWN, model, generator(0, "trace"))
    trace = found.trace
    assert trace is not None
    assert trace.evaluations.tolist() == [1, 11, 21, 31, 35]
    assert (trace.losses.diff() <= 0).all()
    assert torch.equal(trace.images[-1], found.images)
    # The squared gap is the sum of its layers'.
    assert list(trace.layers) == list(seen.update)
    assert sum(float(far[-1]) for far in trace.layers.values()) == pytest.approx(found.loss, rel=1e-3)
    assert replace(attack, record=0)([seen], KNOWN, model, generator(0, "trace"))[0].trace is None


# Where it begins -----------------------------------------------------------------------------------------------------------------


def started(init: object, known: Knowledge = KNOWN, restarts: int = 1) -> Tensor:
    """(R, 1, C, H, W) starts of one victim, clamped to [0, 1]: what a search without time to move returns."""
    model = Small()
    seen = sent(model, [(smooth(1), torch.tensor([3]))], 1)
    attack = GradientMatching(init=init, optimizer=LBFGS(1), restarts=restarts)  # type: ignore[arg-type]
    return attack([seen], known, model, generator(0, "init"))[0].starts


def test_tiles_repeat_a_pattern() -> None:
    images = started("tiles")[0, 0]
    assert torch.equal(images[:, :4, :4], images[:, 4:, 4:])
    assert images[:, :4, :4].unique().numel() == 2 * 16


def test_a_start_can_be_the_mean_of_public_images() -> None:
    pixels = torch.stack([torch.full(SHAPE, 90), torch.full(SHAPE, 150)]).to(torch.uint8)  # away from where clamping would show
    public = Images(pixels, torch.tensor([0, 1]))
    away = started("mean_image", replace(KNOWN, public=public))[0, 0] - 120 / 255
    assert 0 < away.std() < 0.15
    assert away.mean().abs() < 4 * 0.1 / 128**0.5  # 128 pixels
    with pytest.raises(ValueError, match=r"known\.public"):
        started("mean_image")


def test_a_start_can_be_another_attacks_reconstruction() -> None:
    images = smooth(1, "given")

    guess = Guess([images], [torch.tensor([1])])
    assert isinstance(guess, Attack)
    starts = started(guess, restarts=2)
    assert torch.equal(starts[0], images)
    assert not torch.equal(starts[1], images)


# Memory --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), MemoryError(), RuntimeError("alloc: can't allocate memory")], ids=repr
)
@pytest.mark.parametrize("together", [False, True])
def test_a_search_without_memory_goes_on_with_half_as_many_and_finds_the_same(error, together, caplog) -> None:
    def evaluate(points: Tensor, problems: Tensor, most: int = 100) -> tuple[Tensor, Tensor]:
        asked.append(len(points))
        if len(points) > most:
            raise error
        away = points - problems[:, None]
        return away.square().sum(1), 2 * away

    starts = torch.randn(7, 3, 5, generator=generator(0, "memory"))
    asked: list[int] = []
    searched = [Adam(20, rate=0.5), LBFGS(20)][not together]
    whole = minimise(evaluate, starts, searched, chunk=14, together=together)
    assert max(asked) == (12 if together else 7)  # each problem's starts one after the other, or all at once
    asked.clear()
    with caplog.at_level("WARNING"):
        found = minimise(lambda p, v: evaluate(p, v, 4), starts, searched, chunk=14, together=together)
    assert {size for size in asked if size > 4} == ({12, 6} if together else {7})  # each was tried once
    assert sum(size > 4 for size in asked) == (2 if together else 1)
    assert all(size % 3 == 0 for size in asked if together)
    for part in ("points", "losses", "evaluations", "status", "tried"):
        assert torch.equal(getattr(found, part), getattr(whole, part)), part
    said = ["no memory for 12 problems at a time: going on with 6", "no memory for 6 problems at a time: going on with 3"]
    assert [record.getMessage() for record in caplog.records] == (
        said if together else ["no memory for 7 problems at a time: going on with 3"]
    )


def test_an_attack_without_memory_finds_the_same_and_one_problem_too_many_is_an_error(monkeypatch) -> None:
    model = Small()
    seen = [sent(model, [(smooth(1, str(i)), torch.tensor([i % 5]))], 1) for i in range(5)]
    attack = GradientMatching(optimizer=Adam(15), restarts=2, record=10, stop=Stop(), workers=1, chunk=8)
    expected = attack(seen, KNOWN, model, generator(0, "memory"))
    objective, most = Problems.objective, 2

    def short(problems: Problems, points: Tensor, rows: Tensor) -> Tensor:
        if len(points) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return objective(problems, points, rows)

    monkeypatch.setattr(Problems, "objective", short)
    for one, same in zip(attack(seen, KNOWN, model, generator(0, "memory")), expected, strict=True):
        assert torch.allclose(one.images, same.images, atol=2e-3)  # as for workers: they are rounded otherwise
        assert one.evaluations == same.evaluations
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        attack(seen, KNOWN, model, generator(0, "memory"))


# Workers -------------------------------------------------------------------------------------------------------------------------


def test_workers_share_victims_and_change_nothing_but_rounding() -> None:
    model = Small()
    seen = [sent(model, [(smooth(1, str(i)), torch.tensor([i % 5]))], 1) for i in range(5)]
    alone = GradientMatching(optimizer=Adam(25), restarts=2, record=10, stop=Stop(), workers=1)
    told: list[int] = []
    expected = alone(seen, KNOWN, model, generator(0, "workers"))
    found = replace(alone, workers=3)(seen, KNOWN, model, generator(0, "workers"), report=lambda done, _: told.append(done))
    assert told[-1] == 5
    assert told == sorted(told)
    for one, same in zip(found, expected, strict=True):
        # Products of many rows and of few are rounded differently.
        assert torch.allclose(one.images, same.images, atol=2e-3)
        assert torch.allclose(one.losses, same.losses, rtol=1e-2)
        assert one.trace is not None
        assert same.trace is not None
        assert torch.equal(one.trace.evaluations, same.trace.evaluations)
        assert torch.allclose(one.trace.images, same.trace.images, atol=2e-3)


@pytest.mark.parametrize("chunk", [None, 1])
def test_a_model_that_draws_has_one_worker_since_they_would_share_what_it_draws_from(chunk: int | None) -> None:
    model = nn.Sequential(Small(), nn.Dropout(0.5))
    seen = [sent(model, [(smooth(1, str(i)), torch.tensor([i]))], 1) for i in range(4)]
    attack = GradientMatching(optimizer=Adam(9), stop=Stop(), chunk=chunk, workers=4)
    first, second = (attack(seen, KNOWN, model, generator(0, "draws")) for _ in range(2))
    alone = replace(attack, workers=1)(seen, KNOWN, model, generator(0, "draws"))
    for one, again, same in zip(first, second, alone, strict=True):
        assert torch.equal(one.images, again.images)
        assert torch.equal(one.images, same.images)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_small_network_is_attacked_by_one_thread_and_the_caller_keeps_his(workers: int) -> None:
    model, threads = Small(), []
    seen = [sent(model, [(smooth(1, str(i)), torch.tensor([i]))], 1) for i in range(2)]
    torch.set_num_threads(2)
    attack = GradientMatching(optimizer=Adam(3), workers=workers)
    attack(seen, KNOWN, model, generator(0, "threads"), report=lambda *_: threads.append(torch.get_num_threads()))
    assert set(threads) == {1}
    assert torch.get_num_threads() == 2


class Guess:
    """An attack that answers these images and labels, whatever it sees."""

    def __init__(self, images: Sequence[Tensor], labels: Sequence[Tensor]) -> None:
        self.answers = list(zip(images, labels, strict=True))

    def __call__(self, seen: Sequence[Observation], *_: object) -> list[Reconstruction]:
        return [Reconstruction(x, y, 0.0, False, x[None], torch.zeros(1), 1, 0.0) for x, y in self.answers]


@pytest.mark.parametrize("quick", [0, 1])
def test_an_interrupted_attack_stops_its_workers(quick: int) -> None:
    # One worker's victim begins at its solution, and the other one's search would take ten million evaluations.
    model = Small()
    images, labels = smooth(2).split(1), torch.tensor([3, 1]).split(1)
    seen = [sent(model, [(x, y)], 1) for x, y in zip(images, labels, strict=True)]
    guesses = [x if i == quick else torch.rand(x.shape) for i, x in enumerate(images)]

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    attack = GradientMatching(labels="given", init=Guess(guesses, labels), optimizer=SGD(10**7, rate=1e-9), workers=2)
    with pytest.raises(KeyboardInterrupt):
        attack(seen, replace(KNOWN, labels=labels), model, generator(0, "stop"), report=interrupt)


@pytest.mark.parametrize("labels", ["analytic", "given"])
def test_images_that_a_search_begins_with_keep_their_labels(labels) -> None:
    model, images, true = Small(), smooth(2), torch.tensor([3, 0])
    seen = sent(model, [(images, true)], 2)
    attack = GradientMatching(labels=labels, init=Guess([images], [true]), optimizer=LBFGS(1))
    (found,) = attack([seen], replace(KNOWN, labels=[true.flip(0)]), model, generator(0, "order"))
    assert torch.equal(found.labels, true)
    assert found.converged


# Terms ---------------------------------------------------------------------------------------------------------------------------


def test_the_gaussian_gap_is_that_of_its_formula_and_its_unit_that_of_nothing() -> None:
    observed = {"a": torch.tensor([[3.0, 4.0]]), "b": torch.tensor([[2.0]])}
    candidate = {"a": torch.tensor([[3.0, 9.0]]), "b": torch.tensor([[2.0]])}
    assert GaussianGap()(candidate, observed).item() == pytest.approx(1 - math.exp(-25 / 25))
    nothing = {name: torch.zeros_like(t) for name, t in observed.items()}
    assert GaussianGap()(nothing, observed).item() == pytest.approx(GaussianGap().unit(observed).item())


def test_a_line_search_goes_ten_times_as_far_while_it_is_downhill() -> None:
    # A cone, whose slope hardly changes on the way down; its bottom is 1e4 away, and the first step one of 1e-2.
    def cone(points: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        height = (1 + points.square().sum(1)).sqrt()
        return height, points / height[:, None]

    found = minimise(cone, torch.full((1, 1, 100), 1e3), LBFGS(12), chunk=1)
    assert float(found.losses) < 1e3


def test_skipping_zero_tensors_is_blind_to_what_was_pruned() -> None:
    observed = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.zeros(1, 3)}
    candidate = {"a": torch.tensor([[2.0, 4.0]]), "b": torch.ones(1, 3)}
    assert CosineGap(skip_zero=True)(candidate, observed).item() == pytest.approx(0, abs=1e-6)
    assert CosineGap()(candidate, observed).item() == pytest.approx(1 - 10 / math.sqrt(5 * 23))


def test_squared_pixels_count_from_grey() -> None:
    assert SquaredPixels(2.0)(torch.full((1, 1, 1, 2, 3), 0.8)).item() == pytest.approx(2 * 0.09)


def problems(attack: GradientMatching, seen: Observation, model: nn.Module, known: Knowledge, labels: Tensor) -> Problems:
    """The problem of one observation, with its labels known."""
    plan = Plan.of(seen, known, attack.imitate)
    group = Problems.of([seen], plan, known, model, attack)
    group.labels = labels[None]
    return group


def test_the_statistics_of_a_batch_are_compared_with_the_running_ones() -> None:
    model = Small(norm=True)
    images, labels = smooth(3), torch.tensor([0, 3, 1])
    statistics: list[Tensor] = []
    for layer in model.features:
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda _, x: statistics.extend([x[0].mean((0, 2, 3)), x[0].var((0, 2, 3))]))
    model.train()
    functional_call(model, dict(model.named_parameters()), (images,))
    measured = [s.detach().clone() for s in statistics]
    model.eval()
    attack = GradientMatching(labels="given", batch_norm=1.0)
    none = torch.zeros(1, dtype=torch.int64)

    def penalty(mean: Tensor, var: Tensor) -> float:
        """Where the running statistics of the first layer are these, of the second those of the same batch."""
        first, second = (layer for layer in model.features if isinstance(layer, nn.BatchNorm2d))
        with torch.no_grad():
            first.running_mean.copy_(mean)
            first.running_var.copy_(var)
            statistics.clear()
            functional_call(model, dict(model.named_parameters()), (images,))
            second.running_mean.copy_(statistics[2])
            second.running_var.copy_(statistics[3])
        seen = sent(model, [(images, labels)], 3)
        group = problems(attack, seen, model, replace(KNOWN, labels=[labels]), labels)
        return float(group._unusual_statistics(images[None], none))

    mean, var = measured[:2]
    assert penalty(mean, var) < 1e-9
    shifted = mean + 1
    expected = 7 / max(1.0, float(shifted.square().sum()))  # 7 channels, each off by one
    assert penalty(shifted, var) == pytest.approx(expected, rel=1e-3)
    with pytest.raises(ValueError, match="batch_norm > 0 needs a model with BatchNorm"):
        attack([sent(Small(), [(images, labels)], 3)], replace(KNOWN, labels=[labels]), Small(), generator(0, "none"))


def test_consistency_draws_the_starts_of_a_victim_together_and_of_others_not() -> None:
    model = Small()
    seen = [sent(model, [(smooth(1, str(i)), torch.tensor([i]))], 1) for i in range(3)]
    loose = GradientMatching(gap=CosineGap(), labels="analytic", optimizer=Adam(30), restarts=3, stop=Stop())
    tight = replace(loose, consistency=100.0)

    def spread(attack: GradientMatching, chunk: int | None = None) -> list[float]:
        found = replace(attack, chunk=chunk)(seen, KNOWN, model, generator(0, "group"))
        assert all(len(one.starts) == 3 for one in found)
        return [float(one.starts.std(0).mean()) for one in found]

    assert max(spread(tight)) < 0.5 * min(spread(loose))
    assert spread(tight, chunk=3) == pytest.approx(spread(tight, chunk=6), rel=1e-3)


# Batches -------------------------------------------------------------------------------------------------------------------------


def test_in_a_round_robin_one_image_moves_at_a_time() -> None:
    moved: list[Tensor] = []

    def evaluate(points: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        moved.append(points.clone())
        away = points - torch.arange(6.0)
        return away.square().sum(1), 2 * away

    blocks = torch.eye(3, dtype=torch.bool).repeat_interleave(2, 1)
    minimise(evaluate, torch.full((1, 1, 6), 9.0), LBFGS(15), blocks=blocks, turn=5, chunk=1)
    for turn in range(3):
        within = torch.stack(moved[5 * turn : 5 * turn + 5])
        still = ~blocks[turn]
        assert (within[:, 0, still] == within[0, 0, still]).all()
        assert within[-1, 0, blocks[turn]] == pytest.approx(torch.arange(6.0)[blocks[turn]], abs=1e-3)


def test_the_turns_of_a_single_image_are_one_search() -> None:
    model = Small()
    seen = sent(model, [(smooth(1), torch.tensor([3]))], 1)
    joint = GradientMatching(optimizer=LBFGS(45), stop=Stop())
    expected, found = (replace(joint, update=how)([seen], KNOWN, model, generator(0, "one")) for how in ("joint", "round_robin"))
    assert torch.equal(found[0].images, expected[0].images)


def test_a_turn_that_has_come_to_rest_waits_for_the_next() -> None:
    # The first block's loss is flat, so its search stalls at once; the second block's minimum is 5.
    def evaluate(points: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        away = points[:, 1] - 5
        return away.square(), torch.stack([torch.zeros_like(away), 2 * away], 1)

    found = minimise(evaluate, torch.zeros(1, 1, 2), LBFGS(30), blocks=torch.eye(2, dtype=torch.bool), turn=10, chunk=1)
    assert found.points[0, 0].tolist() == pytest.approx([0, 5], abs=1e-4)


def test_patience_is_counted_over_all_turns() -> None:
    blocks = torch.eye(2, dtype=torch.bool)
    flat = minimise(
        lambda points, _: (torch.ones(len(points)), torch.zeros_like(points)),
        torch.zeros(1, 1, 2),
        LBFGS(100),
        stop=Stop(patience=12),
        blocks=blocks,
        turn=5,
        chunk=1,
    )
    assert flat.evaluations.item() == 13  # the first was better than none


def test_a_batch_is_recovered_image_by_image_in_turns() -> None:
    model = Small()
    images, labels = smooth(2), torch.tensor([0, 3])
    attack = replace(attacks.dlg(restarts=2, evaluations=1600), update="round_robin", turn=40)
    (found,) = attack([sent(model, [(images, labels)], 2)], KNOWN, model, generator(0, "turns"))
    order = metrics.align(found.images, images)
    assert (metrics.mse(found.images[order], images) < 0.03).all()


# Local steps ---------------------------------------------------------------------------------------------------------------------


def test_a_plan_names_the_images_of_each_step() -> None:
    seen = Observation({}, {}, num_examples=5)
    one_epoch = replace(KNOWN, batch_size=2, local_steps=3)
    assert Plan.of(seen, one_epoch, True) == Plan(5, 1, ((0, 1), (2, 3), (4,)))
    assert Plan.of(seen, one_epoch, False) == Plan(5, 1, (tuple(range(5)),))
    # Two epochs see the same images in orders of their own: each looks for its own copies. Five steps cut the last batch off.
    assert Plan.of(seen, replace(one_epoch, local_steps=5), True) == Plan(5, 2, ((0, 1), (2, 3), (4,), (5, 6), (7, 8)))
    # Batches of everything have no order.
    assert Plan.of(seen, replace(KNOWN, batch_size=5, local_steps=2), True) == Plan(5, 1, (tuple(range(5)),) * 2)


@pytest.mark.parametrize("training", [{}, {"momentum": 0.5}, {"weight_decay": 0.01}, {"proximal": 0.1}], ids=str)
def test_at_the_truth_an_imitated_update_is_the_clients_own(training: dict[str, float]) -> None:
    model = Small()
    images, labels = smooth(5), torch.tensor([0, 3, 1, 4, 2])
    batches = [(images[i], labels[i]) for i in (slice(0, 2), slice(2, 4), slice(4, 5))]
    seen = sent(model, batches, 5, lr=0.1, **training)
    known = replace(KNOWN, batch_size=2, local_steps=3, lr=0.1, **training)
    group = problems(GradientMatching(labels="given", imitate=True), seen, model, known, labels)
    loss, slope = group.evaluate(images.reshape(1, -1), torch.zeros(1, dtype=torch.int64))
    assert loss.item() < 1e-10
    assert slope.abs().max() < 1e-4
    # Without the setting the attacker would be explaining another client.
    if training:
        group = problems(
            GradientMatching(labels="given", imitate=True), seen, model, replace(KNOWN, batch_size=2, local_steps=3, lr=0.1), labels
        )
        assert group.evaluate(images.reshape(1, -1), torch.zeros(1, dtype=torch.int64))[0].item() > 1e-6


DECAYED = replace(KNOWN, batch_size=2, local_steps=1, lr=0.1, weight_decay=0.5)


def test_at_the_truth_one_step_with_weight_decay_is_explained() -> None:
    model, images, labels = Small(), smooth(2), torch.tensor([0, 3])
    seen = sent(model, [(images, labels)], 2, lr=0.1, weight_decay=0.5)
    for attack in (GradientMatching(labels="given"), GradientMatching(labels="given", imitate=True)):
        group = problems(attack, seen, model, DECAYED, labels)
        assert group.evaluate(images.reshape(1, -1), torch.zeros(1, dtype=torch.int64))[0].item() < 1e-10


def test_what_a_quantizer_leaves_possible_holds_the_gradient_without_weight_decay() -> None:
    model, images, labels, defense = Small(), smooth(2), torch.tensor([0, 3]), UniformQuantization(64)
    plain, seen = (sent(model, [(images, labels)], 2, lr=0.1, weight_decay=decay) for decay in (0.0, 0.5))
    seen = replace(seen, packets=defense(seen.packets, {}, generator(0, "defense"))[0])
    gradient = gradient_of(plain, replace(DECAYED, weight_decay=0.0))
    for name, b in believed(seen, replace(DECAYED, defense=defense)).items():
        assert (b.low - 1e-5 <= gradient[name]).all()
        assert (gradient[name] <= b.high + 1e-5).all()


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
@pytest.mark.parametrize("rounds", [0, 2])
def test_what_a_client_in_training_mode_sends_back_tells_the_statistics_of_its_batch(momentum: float | None, rounds: int) -> None:
    model = Small(norm=True).train()
    first, second = (layer for layer in model.features if isinstance(layer, nn.BatchNorm2d))
    first.momentum = second.momentum = momentum
    for i in range(rounds):
        model(smooth(3, f"round {i}"))
    images, labels = smooth(4), torch.tensor([0, 3, 1, 2])
    params, buffers = ({n: t.detach().clone() for n, t in part} for part in (model.named_parameters(), model.named_buffers()))
    trained = local_update(model, params, buffers, [(images, labels)], lr=1.0)
    seen = Observation(params, pack(trained.update), 4, buffers=buffers, sent_buffers=trained.buffers)
    told = batch_statistics(seen, KNOWN, model)
    fed: list[Tensor] = []
    second.register_forward_pre_hook(lambda _, x: fed.append(x[0]))
    functional_call(model, {**params, **{n: t.clone() for n, t in buffers.items()}}, (images,))
    for layer, x in (("features.1", model.features[0](images)), ("features.4", fed[0])):
        assert torch.allclose(told[f"{layer}.running_mean"], x.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
        assert torch.allclose(told[f"{layer}.running_var"], x.var((0, 2, 3)), rtol=1e-3, atol=1e-4)
    if momentum is not None:  # PyTorch maps no cumulative mean over problems
        group = problems(GradientMatching(labels="given", batch_norm=1.0), seen, model, replace(KNOWN, labels=[labels]), labels)
        none = torch.zeros(1, dtype=torch.int64)
        truth, other = (float(group._unusual_statistics(x[None], none)) for x in (images, smooth(4, "others")))
        assert truth < 1e-6 < 1e-3 < other
    # Several steps tell a weighted mean of theirs; masked statistics tell nothing, nor do those that have not moved.
    batches = [(images[i : i + 2], labels[i : i + 2]) for i in (0, 2)]
    trained = local_update(model, params, buffers, batches, lr=0.0)
    told = batch_statistics(replace(seen, sent_buffers=trained.buffers), replace(KNOWN, local_steps=2), model)
    halves = [model.features[0](x).mean((0, 2, 3)) for x, _ in batches]
    weights = (0.5, 0.5) if momentum is None else ((1 - momentum) / (2 - momentum), 1 / (2 - momentum))
    mean = sum(w * half for w, half in zip(weights, halves, strict=True))
    assert torch.allclose(told["features.1.running_mean"], mean, rtol=1e-3, atol=1e-4)
    for blind in (replace(seen, masked=True), replace(seen, sent_buffers={}), replace(seen, sent_buffers=buffers)):
        told = batch_statistics(blind, KNOWN, model)
        assert all(torch.equal(t, buffers[name]) for name, t in told.items())


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_local_steps_with_momentum_are_as_long_as_they_are_together(momentum: float) -> None:
    model = Small()
    batch = smooth(3), torch.tensor([0, 3, 1])
    seen = sent(model, [batch] * 6, 3, lr=1e-6, momentum=momentum)
    gradient = sent(model, [batch], 3).update
    found = gradient_of(seen, replace(KNOWN, local_steps=6, lr=1e-6, momentum=momentum))
    for name, t in gradient.items():
        assert torch.allclose(found[name], t, rtol=1e-2, atol=1e-3 * float(t.abs().max())), name


def test_images_of_a_last_epoch_that_no_step_has_seen_are_not_averaged_in() -> None:
    model = Small()
    images, labels = smooth(3), torch.tensor([0, 3, 1])
    batches = [(images[i : i + 1], labels[i : i + 1]) for i in (0, 1, 2, 2)]
    known = replace(KNOWN, batch_size=1, local_steps=4, lr=0.1)
    group = problems(GradientMatching(imitate=True), sent(model, batches, 3, lr=0.1), model, known, labels.repeat(2))
    assert group.plan.steps == ((0,), (1,), (2,), (3,))
    again = images[2:] + 0.01 * (0.5 - images[2:])
    found = group.united(torch.cat([images, again, smooth(2, "unseen")]))
    assert torch.allclose(found, torch.cat([images[:2], (images[2:] + again) / 2]))


def test_imitating_five_local_steps_beats_taking_them_for_one_gradient() -> None:
    model = Small()
    images, labels = smooth(5), torch.tensor([0, 3, 1, 4, 2])
    seen = sent(model, [(images[i : i + 1], labels[i : i + 1]) for i in range(5)], 5, lr=0.1)
    known = replace(KNOWN, batch_size=1, local_steps=5, lr=0.1)
    one_gradient = replace(attacks.dlg(evaluations=300, restarts=3), init="grey")
    psnr = {}
    for imitate in (False, True):
        (found,) = replace(one_gradient, imitate=imitate)([seen], known, model, generator(0, "fedavg"))
        psnr[imitate] = metrics.psnr_db(found.images[metrics.align(found.images, images)], images).mean().item()
    assert psnr[True] > psnr[False] + 3


def test_copies_of_an_image_are_matched_before_they_are_averaged() -> None:
    model = Small()
    images, labels = smooth(3), torch.tensor([0, 3, 1])
    batches = [(images[i : i + 1], labels[i : i + 1]) for i in (0, 1, 2, 2, 0, 1)]
    seen = sent(model, batches, 3, lr=0.1)
    known = replace(KNOWN, batch_size=1, local_steps=6, lr=0.1)
    group = problems(GradientMatching(imitate=True), seen, model, known, labels.repeat(2))
    assert group.plan.copies == 2
    assert torch.allclose(group.united(torch.cat([images, images[[2, 0, 1]]])), images)
    # What does not depend on the order cannot tell the epochs apart; another image can.
    assert group._disagreement(torch.cat([images, images[[2, 0, 1]]])[None]).item() < 1e-10
    assert group._disagreement(torch.cat([images, smooth(3, "others")])[None]).item() > 1e-4


# Precision -----------------------------------------------------------------------------------------------------------------------


def test_float64_goes_on_where_float32_stops() -> None:
    model = Small()
    image, label = smooth(1).double(), torch.tensor([3])
    params = {name: p.detach().double() for name, p in model.named_parameters()}
    update = local_update(model, params, {}, [(image, label)], lr=1.0).update
    seen = Observation({n: p.float() for n, p in params.items()}, pack({n: t.float() for n, t in update.items()}), 1)
    reached = {}
    for dtype in ("float32", "float64"):
        attack = GradientMatching(optimizer=LBFGS(900), labels="analytic", init="grey", stop=Stop(), dtype=dtype)  # type: ignore[arg-type]
        (found,) = attack([seen], KNOWN, model, generator(0, "double"))
        reached[dtype] = found.loss
    assert reached["float64"] < 0.5 * reached["float32"]


def test_settings_that_exclude_each_other_are_named() -> None:
    with pytest.raises(ValueError, match=r"consistency needs optimizer=Adam"):
        GradientMatching(consistency=1.0)
    with pytest.raises(ValueError, match=r'update="round_robin" needs optimizer=LBFGS'):
        GradientMatching(update="round_robin", optimizer=Adam())
    with pytest.raises(ValueError, match=r"threshold must be >= 0, got -1"):
        Stop(threshold=-1)
    with pytest.raises(ValueError, match=r"patience must be > 0 or None, got 0"):
        Stop(patience=0)
    with pytest.raises(ValueError, match=r"decay must be"):
        Adam(decay="exponential")  # type: ignore[arg-type]
    seen = sent(Small(), [(smooth(2), torch.tensor([0, 1]))], 2)
    with pytest.raises(ValueError, match=r"known\.lr"):
        GradientMatching(imitate=True)([seen], replace(KNOWN, batch_size=1, local_steps=2), Small(), generator(0, "lr"))


def test_searches_that_the_budget_ended_are_still_running() -> None:
    found = minimise(scripted([3, 2]), torch.zeros(1, 1, 3), SGD(2), chunk=1)
    assert found.status.item() == RUNNING


def test_the_cosine_gap_tells_directions_apart_that_float32_takes_for_the_same():
    rng = generator(0, "directions")
    one = {"a": torch.randn(3, 1009, generator=rng), "b": 1e-3 * torch.randn(3, 31, 7, generator=rng)}
    other = {name: 7 * (t + 1e-5 * t.abs().mean() * torch.randn(t.shape, generator=rng)) for name, t in one.items()}
    exact = CosineGap()({n: t.double() for n, t in one.items()}, {n: t.double() for n, t in other.items()})
    assert bool((exact < 1e-9).all())  # and 1 - 1e-9 is 1 in float32
    assert torch.allclose(CosineGap()(one, other).double(), exact, rtol=0.01)


# Several updates of the same images ---------------------------------------------------------------------------------------------


def of_rounds(model: nn.Module, batch: Batch, count: int, noise: float) -> Observation:
    """What a client sends whose images are the same in all rounds, at other weights each, with Gaussian noise."""
    previous = None
    for round in range(count):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=generator(0, "weights", round)))
        one = sent(model, [batch], len(batch[0]))
        rng = generator(0, "noise", round)
        noisy = pack({name: t + noise * torch.randn(t.shape, generator=rng) for name, t in one.update.items()})
        params = {name: t.clone() for name, t in one.params.items()}  # those of the model move on
        previous = replace(one, params=params, packets=noisy, round=round + 1, previous=previous, followed=True)
    assert previous is not None
    return previous


@pytest.mark.parametrize("restarts", [1, 8])  # 24 rows of three views fill registers, three alone do not
def test_the_gap_to_several_updates_is_the_mean_of_the_gaps_to_each(restarts: int) -> None:
    model, batch = Small(), (smooth(2), torch.tensor([3, 1]))
    last = of_rounds(model, batch, 3, 0.0)
    known = replace(KNOWN, same_images=True)
    attack = GradientMatching(labels="given", restarts=restarts)
    group = problems(attack, last, model, known, batch[1])
    point, none = smooth(2, "elsewhere").flatten()[None], torch.zeros(1, dtype=torch.int64)
    each = [problems(attack, one, model, KNOWN, batch[1]) for one in views(last, known)]
    assert len(each) == 3
    assert len({float(one.gaps(point, none)) for one in each}) == 3
    assert float(group.gaps(point, none)) == pytest.approx(sum(float(one.gaps(point, none)) for one in each) / 3, rel=1e-4)
    assert float(group.unit) == pytest.approx(sum(float(one.unit) for one in each) / 3)
    assert float(group.gaps(batch[0].flatten()[None], none) / group.unit) < 1e-9


def test_noise_averages_out_over_rounds_of_the_same_images() -> None:
    batch = (smooth(1), torch.tensor([3]))
    attack = GradientMatching(labels="given", optimizer=LBFGS(200), stop=Stop())
    scores = []
    for count in (1, 4, 16):
        model = Small()
        last = of_rounds(model, batch, count, 0.3)
        known = replace(KNOWN, same_images=True, labels=[batch[1]])
        (made,) = attack([last], known, model, generator(0, "attack"))
        scores.append(float(metrics.psnr_db(made.images, batch[0])))
    assert scores[0] + 2 < scores[1] < scores[2] - 2  # four times as many halve the error: 6 dB if nothing else is in the way


def test_victims_of_several_updates_are_the_same_alone_and_shared_among_workers() -> None:
    attack = GradientMatching(labels="analytic", optimizer=LBFGS(30), workers=1, record=10, dtype="float64")
    known = replace(KNOWN, same_images=True)
    model = Small()
    batches = [(smooth(1, f"image {i}"), torch.tensor([i])) for i in range(4)]
    seen = [replace(of_rounds(Small(), batch, 3 - i % 2, 0.1), client=i) for i, batch in enumerate(batches)]
    together = attack(seen, known, model, generator(0, "attack"))
    shared = replace(attack, workers=2)(seen, known, model, generator(0, "attack"))
    for one, other, victim in zip(together, shared, seen, strict=True):
        (alone,) = attack([victim], known, model, generator(0, "attack"))
        assert torch.allclose(one.images, other.images, atol=1e-5)
        assert torch.allclose(one.images, alone.images, atol=1e-5)
        assert one.trace is not None
        assert next(iter(one.trace.layers.values())).shape == one.trace.losses.shape


def test_noise_of_its_own_is_not_sought_in_several_updates_at_once() -> None:
    model = lenet(SHAPE, CLASSES, bottleneck=Precode(width=4), rng=generator(0, "network"))
    last = of_rounds(model, (smooth(1), torch.tensor([0])), 2, 0.0)
    attack = GradientMatching(labels="given", noise="sought")
    with pytest.raises(ValueError, match="each drew its own noise"):
        attack([last], replace(KNOWN, same_images=True, labels=[torch.tensor([0])]), model, generator(0, "attack"))
