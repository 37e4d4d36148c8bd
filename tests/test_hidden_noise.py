"""Attackers who know that a model draws: what they match, what they look for, and that it works."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import attacks
from attacks import LBFGS, Adam, GradientMatching, metrics
from attacks.hidden_noise import as_buffers, hidden_noises, in_front_of_noise, sampled
from attacks.problems import Plan, Problems
from experiments.cli import main
from fedsim.models import Classifier, ConvolutionalBottleneck, Dropout, Precode, Xavier, lenet, mcmahan_cnn, mlp_2nn
from fedsim.observation import Knowledge, Observation
from fedsim.run import RunFolder
from fedsim.seeding import generator
from fedsim.training import local_update, split
from fedsim.wire import pack

torch.set_num_threads(1)

SHAPE, CLASSES = (2, 8, 8), 5
BOTTLENECKS = [Precode(width=7), ConvolutionalBottleneck(channels=3), Dropout(0.4)]
every_bottleneck = pytest.mark.parametrize("bottleneck", BOTTLENECKS, ids=repr)


def net(bottleneck: object = None, seed: int = 0) -> Classifier:
    rng = generator(seed, "net")
    return lenet(SHAPE, CLASSES, activation="silu", init=Xavier(gain=1.5), bottleneck=bottleneck, rng=rng)  # type: ignore[arg-type]


def smooth(count: int) -> Tensor:
    """Images of low frequency, (count, 2, 8, 8) in [0, 1]."""
    coarse = torch.rand(count, 2, 3, 3, generator=generator(0, "images"))
    return nn.functional.interpolate(coarse, size=SHAPE[1:], mode="bilinear", align_corners=True)


def victim(model: nn.Module, count: int = 1) -> tuple[Observation, Tensor, Tensor, dict[str, Tensor]]:
    """What a client sends, its images and labels, and what its modules drew."""
    images, labels = smooth(count), torch.arange(count) % CLASSES
    noises = hidden_noises(model)
    drawn = sampled(noises, 1, count, generator(0, "client"))
    noise = {name: t[0] for name, t in as_buffers(noises, drawn, count).items()}
    params, buffers = split(model)
    update = local_update(model, params, {**buffers, **noise}, [(images, labels)], lr=1.0).update
    return Observation(params, pack(update), count, buffers=buffers), images, labels, noise


def problems(attack: GradientMatching, model: nn.Module, seen: Observation, known: Knowledge) -> Problems:
    group = Problems.of([seen], Plan.of(seen, known, False), known, model, attack)
    group.labels = None if known.labels is None else torch.stack(list(known.labels))
    return group


@every_bottleneck
@pytest.mark.parametrize("labels", ["joint", "given"])
def test_the_images_and_the_draw_explain_the_gradient_exactly(bottleneck, labels):
    model = net(bottleneck)
    seen, images, truth, noise = victim(model, 3)
    known = Knowledge(SHAPE, CLASSES, labels=[truth] if labels == "given" else None)
    group = problems(GradientMatching(noise="sought", labels=labels), model, seen, known)
    logits = [] if labels == "given" else [100 * nn.functional.one_hot(truth, CLASSES).float().flatten()]
    point = torch.cat([images.flatten(), *logits, *(t.flatten() for t in noise.values())])[None]
    share = group.gaps(point, torch.tensor([0])) / group.unit
    assert share.item() < 1e-10
    # Another draw does not explain it.
    point[:, -1] += 1
    assert group.gaps(point, torch.tensor([0])) / group.unit > 1e-8


@every_bottleneck
def test_without_the_draw_the_images_do_not_explain_the_gradient(bottleneck):
    model = net(bottleneck)
    seen, images, labels, _ = victim(model, 3)
    known = Knowledge(SHAPE, CLASSES, labels=[labels])
    group = problems(GradientMatching(labels="given"), model, seen, known)
    torch.manual_seed(0)
    assert group.gaps(images.flatten()[None], torch.tensor([0])) / group.unit > 0.01


def test_who_does_not_know_of_the_penalty_explains_less():
    model = net(Precode(width=7, beta=0.1))
    seen, images, labels, noise = victim(model)
    known = Knowledge(SHAPE, CLASSES, labels=[labels])
    point = torch.cat([images.flatten(), *(t.flatten() for t in noise.values())])[None]
    shares = []
    for penalty in (True, False):
        group = problems(GradientMatching(noise="sought", labels="given", penalty=penalty), model, seen, known)
        shares.append(float(group.gaps(point, torch.tensor([0])) / group.unit))
    assert shares[0] < 1e-10
    assert shares[1] > 1e-4


IN_FRONT = [
    (lambda: net(Precode(width=7)), ["features.0", "features.2", "features.4"]),
    (lambda: net(ConvolutionalBottleneck()), ["features.0"]),
    (lambda: net(Dropout(0.4, after=2)), ["features.0", "features.2"]),
    (lambda: net(), ["features.0", "features.2", "features.4", "head"]),
    (lambda: net(Precode(width=7)).eval(), ["features.0", "features.2", "features.4", "bottleneck", "head"]),
    (lambda: mlp_2nn(SHAPE, CLASSES, dropout=0.5), ["features.1"]),  # dropout follows the first of its layers
    (lambda: mcmahan_cnn(SHAPE, CLASSES, norm="batch", bottleneck=Precode(width=7)), ["features."]),
]


@pytest.mark.parametrize(
    ("build", "expected"), IN_FRONT, ids=["precode", "cvb", "after 2", "none", "eval", "dropout", "batch norm"]
)
def test_the_layers_in_front_of_the_first_draw_are_found(build, expected):
    model = build()
    params, buffers = split(model)
    state, kept = torch.get_rng_state(), {name: t.clone() for name, t in buffers.items()}
    found = in_front_of_noise(model, params, buffers, SHAPE)
    assert found == [name for name in params if name.startswith(tuple(expected))]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffers[name], t) for name, t in kept.items())


def test_a_model_that_draws_at_once_leaves_nothing_to_match():
    model = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(128, CLASSES))
    with pytest.raises(ValueError, match='Sequential draws before its first layer with weights; take noise="sought"'):
        in_front_of_noise(model, *split(model), SHAPE)


def test_gradients_behind_the_draw_are_not_looked_at():
    model = net(Precode(width=7))
    seen, _, labels, _ = victim(model)
    known = Knowledge(SHAPE, CLASSES, labels=[labels])
    false = {n: torch.randn_like(t) if n.startswith(("bottleneck", "head")) else t for n, t in seen.update.items()}
    attack = attacks.precode_ignore(iterations=10, told=True)
    one, other = (attack([s], known, model, generator(0, "a"))[0] for s in (seen, replace(seen, packets=pack(false))))
    assert torch.equal(one.images, other.images)
    assert one.loss == other.loss


@pytest.mark.parametrize("attack", [attacks.dlg(evaluations=20), attacks.inverting_gradients(iterations=20)], ids=["dlg", "ig"])
def test_looking_for_a_draw_changes_nothing_where_nothing_is_drawn(attack):
    model = net()
    seen, *_ = victim(model, 2)
    known = Knowledge(SHAPE, CLASSES)
    plain, seeking = (replace(attack, noise=n)([seen], known, model, generator(0, "a"))[0] for n in ("drawn", "sought"))
    assert torch.equal(plain.images, seeking.images)
    assert plain.loss == seeking.loss


@pytest.mark.parametrize("bottleneck", [Precode(width=7), Dropout(0.4)], ids=repr)
def test_who_looks_for_the_draw_steals_the_image_and_who_draws_anew_does_not(bottleneck):
    models = [net(bottleneck, seed) for seed in range(2)]
    seen, images = zip(*(victim(model)[:2] for model in models), strict=True)
    known = Knowledge(SHAPE, CLASSES)
    seen = [replace(one, client=i) for i, one in enumerate(seen)]
    aware = attacks.precode_aware(restarts=3, evaluations=400, tv=1e-5)(seen, known, models[0], generator(0, "a"))
    naive = attacks.cosine_lbfgs(restarts=3, evaluations=400, tv=1e-5)(seen, known, models[0], generator(0, "a"))
    for one, blind, image in zip(aware, naive, images, strict=True):
        assert one.converged
        assert metrics.psnr_db(one.images, image).item() > 30  # an error of 3 % of the range
        assert not blind.converged
        assert metrics.psnr_db(blind.images, image).item() < metrics.psnr_db(one.images, image).item() - 6


def test_the_strongest_attack_knows_that_a_model_draws():
    model = net(Precode(width=7))
    seen, image, label, _ = victim(model)
    (found,) = attacks.strongest(evaluations=600)([seen], Knowledge(SHAPE, CLASSES), model, generator(0, "a"))
    assert found.converged
    assert found.labels.tolist() == label.tolist()
    assert metrics.psnr_db(found.images, image).item() > 20


def test_every_unknown_belongs_to_one_image():
    model = net(Precode(width=7))
    seen, *_ = victim(model, 3)
    attack = GradientMatching(noise="sought", update="round_robin")
    blocks = problems(attack, model, seen, Knowledge(SHAPE, CLASSES)).blocks()
    assert blocks.shape == (3, 3 * (128 + CLASSES + 7))  # pixels, label logits, codes
    assert bool((blocks.sum(0) == 1).all())
    assert blocks.sum(1).tolist() == [128 + CLASSES + 7] * 3
    (found,) = replace(attack, optimizer=LBFGS(20), turn=5)([seen], Knowledge(SHAPE, CLASSES), model, generator(0, "a"))
    assert found.images.shape == (3, *SHAPE)


def test_the_box_is_for_pixels_and_not_for_noise():
    model = net(Precode(width=7))
    seen, _, labels, _ = victim(model)
    attack = GradientMatching(noise="sought", optimizer=Adam(1), box=True, labels="given")
    group = problems(attack, model, seen, Knowledge(SHAPE, CLASSES, labels=[labels]))
    clamped = group.clamp(torch.full((1, 128 + 7), 3.0))
    assert bool((clamped[:, :128] == 1).all())
    assert bool((clamped[:, 128:] == 3).all())


def test_a_draw_of_each_local_step_is_not_looked_for():
    model = net(Precode(width=7))
    seen, *_ = victim(model, 4)
    known = Knowledge(SHAPE, CLASSES, batch_size=2, local_steps=2, lr=0.1)
    with pytest.raises(ValueError, match="each local step draws noise of its own"):
        replace(attacks.fedavg(evaluations=5), noise="sought")([seen], known, model, generator(0, "a"))


@pytest.mark.parametrize(("field", "value"), [("noise", "guessed"), ("matched", "some")])
def test_a_choice_that_is_none_is_named_with_the_others(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*, got '{value}'"):
        GradientMatching(**{field: value})


@pytest.mark.parametrize("defense", ["precode", "cvb", "dropout"])
def test_a_run_with_a_defense_in_the_model_is_attacked_and_scored_against_the_client_s_own_draw(defense, tmp_path):
    few = ["rounds=1", "data.train_size=20", "data.test_size=10", "federation.clients=2", "federation.per_round=2", "tap.clients=2"]
    attack = ["attack=precode_aware", "attack.evaluations=3", "attack.restarts=1"]
    assert main(["run", *few, *attack, f"defense={defense}", "model=lenet_silu", f"out={tmp_path}", "name=run"]) == 0
    leaks = RunFolder.open(tmp_path / "run").leaks()
    assert len(leaks) == 2
    assert bool((leaks["update_error"] == 0).all())  # the scorer draws what the client drew
    assert bool(leaks["feature_distance"].notna().all())
