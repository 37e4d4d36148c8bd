"""From mixtures back to images: what soft labels tell, what is solved for, and what nobody can tell."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import attacks
from attacks import Escalation, Rehearsed, TotalVariation, Undone, Unmixed, Where, adapted, metrics
from attacks.evidence import views
from attacks.unmixing import unmixed
from defenses import ATS, Chain, ErrorFeedback, GaussianNoise, InstaHide, MixUp, NoDefense, TopK
from defenses.base import Untouched
from defenses.mixing import mixed
from fedsim.data import load
from fedsim.defense import Defense, hooks_of
from fedsim.models import lenet, mlp
from fedsim.observation import Knowledge, Observation
from fedsim.seeding import generator
from fedsim.training import Batch, local_update, probabilities, split
from fedsim.wire import pack

DATA = load("synthetic", train_size=64, test_size=64)
KNOWN = Knowledge(DATA.image_shape, 10, lr=1.0, local_steps=1, public=DATA.test)


@dataclass(frozen=True)
class Fixed(Untouched):
    """Mixes by weights of the test's own."""

    weights: tuple[tuple[float, ...], ...]

    reflects: ClassVar[bool] = False

    def batch(self, images: Tensor, labels: Tensor, classes: int, rng: torch.Generator) -> Batch:
        mixture = self.mixture(len(images), rng)
        return mixed(mixture, images), mixed(mixture, probabilities(labels, classes))

    def mixture(self, size: int, rng: torch.Generator) -> Tensor:
        return torch.tensor(self.weights)


def undone(defense: MixUp | InstaHide | Fixed, images: Tensor, labels: Sequence[int], rounds: int = 1) -> tuple[Tensor, Tensor]:
    """What exact mixtures of some rounds say of the images, and the labels."""
    rng = generator(0, "mixtures")
    sent = [defense.batch(images, torch.tensor(labels), 10, rng) for _ in range(rounds)]
    orders = [torch.randperm(len(images), generator=generator(i, "order")) for i in range(rounds)]  # a gradient tells none
    z, q = ([batch[part][order] for batch, order in zip(sent, orders, strict=True)] for part in (0, 1))
    return unmixed(defense, z, q, generator(0, "undoing"), KNOWN)


def decibels(made: Tensor, images: Tensor) -> Tensor:
    i, j = metrics.match(made, images)
    return metrics.psnr_db(made[i], images[j])


def photographs(count: int) -> Tensor:
    return DATA.train.batch(torch.arange(count))[0]


CYCLE = Fixed(((0.7, 0.3, 0.0), (0.0, 0.7, 0.3), (0.3, 0.0, 0.7)))


def test_labels_of_different_classes_tell_the_mixture():
    images = photographs(3)
    made, labels = undone(CYCLE, images, (7, 2, 5))
    assert sorted(labels.tolist()) == [2, 5, 7]
    assert bool((decibels(made, images) > 35).all())  # the error that is allowed for costs some of an exact mixture


@pytest.mark.parametrize("labels", [(3, 3, 8, 1), (3, 3, 8, 8), (4, 4, 4, 4)], ids=str)
def test_labels_that_repeat_leave_the_choice_to_the_images(labels):
    images, defense = photographs(4), MixUp()
    mixture, _ = defense.batch(images, torch.tensor(labels), 10, generator(0, "mixtures"))
    assert float(decibels(mixture, images).min()) < 20
    made, found = undone(defense, images, labels)
    assert sorted(found.tolist()) == sorted(labels)
    assert bool((decibels(made, images) > 30).all())


def test_two_images_mixed_half_and_half_cannot_be_told_apart():
    images, defense = photographs(2), Fixed(((0.5, 0.5), (0.5, 0.5)))
    made, _ = undone(defense, images, (1, 6))
    assert torch.allclose(made, images.mean(0).expand_as(images), atol=1e-3)
    assert bool(undone(defense, images, (1, 1))[0].isfinite().all())


def test_another_round_tells_what_one_left_in_doubt():
    images = photographs(2)
    noise = 0.02 * torch.randn((2, *images.shape), generator=generator(0, "noise"))
    weights = torch.tensor([[0.55, 0.45], [0.45, 0.55]]), torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    labels = probabilities(torch.tensor([1, 6]), 10)
    z = [mixed(w, images) + e for w, e in zip(weights, noise, strict=True)]
    q = [mixed(w, labels) for w in weights]
    one, other, both = (
        decibels(unmixed(MixUp(), z[part], q[part], generator(0, "undoing"), KNOWN)[0], images).mean()
        for part in (slice(0, 1), slice(1, 2), slice(0, 2))
    )
    assert float(both) > float(other) > float(one) + 3


@pytest.mark.parametrize("defense", [InstaHide(k=1), InstaHide(k=2, largest=0.9)], ids=repr)
def test_reflected_pixels_leave_their_distance_from_grey(defense):
    images = photographs(2)
    (made, _), (z, _) = (
        undone(defense, images, (1, 6), 2),
        defense.batch(images, torch.tensor([1, 6]), 10, generator(0, "mixtures")),
    )
    far, true, mixture = ((2 * t - 1).abs() for t in (made, images, z))
    assert bool((decibels(far, true) > 30).all())
    if defense.k > 1:
        assert bool((decibels(mixture, true) < 20).all())


def test_mixtures_of_two_images_tell_on_which_side_of_grey_they_lie():
    bright, dark = 0.55 + 0.4 * photographs(2)[0], 0.45 * photographs(2)[1]
    images = torch.stack([bright, dark])
    made, _ = undone(InstaHide(k=2, largest=0.9), images, (1, 6), 4)
    assert max(float(decibels(one, images).min()) for one in (made, 1 - made)) > 30  # nothing tells them from their negatives


def test_what_a_defense_did_to_images_is_undone_from_the_last_on():
    model = lenet(DATA.image_shape, 10, rng=generator(0, "network"))

    def stages(defense: Defense) -> list[object]:
        attack, found = adapted(attacks.idlg(), model, defense), []
        while isinstance(attack, Undone | Unmixed):
            found.append(attack.transform if isinstance(attack, Undone) else attack.mixing)
            attack = attack.attack
        assert isinstance(attack, Rehearsed)
        return found

    assert stages(Chain((MixUp(), ATS(), TopK(0.5)))) == [MixUp(), ATS()]
    assert stages(Chain((ATS(), MixUp()))) == [ATS(), MixUp()]
    # What is reflected may be its negative, of which the transformation is not to be undone.
    assert stages(ErrorFeedback(Chain((ATS(), InstaHide(), TopK(0.5))))) == [InstaHide()]
    assert [stages(one) for one in (NoDefense(), Chain((TopK(0.5),)))] == [[], []]


def test_a_known_policy_is_run_backwards():
    images = photographs(16)
    for defense in (ATS("3-1-7"), ATS(), ATS("29-13-12"), ATS("10-2")):
        sent, _ = defense.batch(images, torch.zeros(16, dtype=torch.int64), 10, generator(0, "transforms"))
        before, after = (metrics.psnr_db(made, images) for made in (sent, defense.undone(sent)))
        assert float((after - before).mean()) > 3, defense
    random, _ = ATS("random").batch(images, torch.zeros(16, dtype=torch.int64), 10, generator(0, "transforms"))
    assert torch.equal(ATS("random").undone(random), random)


def victims(
    defense: Defense, count: int, images: int, build: Callable[..., torch.nn.Module] | None = None
) -> tuple[torch.nn.Module, list[Observation], list[Tensor]]:
    """Clients with images and a random network each, that train as the defense says."""
    seen, truth = [], []
    for i in range(count):
        chance = generator(0, "network", i)
        model = build(chance) if build else lenet(DATA.image_shape, 10, rng=chance)
        params, buffers = split(model)
        x, _ = DATA.train.batch(torch.arange(images) + images * i)
        y = torch.arange(images) + i
        hooks = hooks_of(defense, 10, 0, 1, i)
        update = local_update(model, params, buffers, [(x, y)], lr=1.0, hooks=hooks).update
        seen.append(Observation(params, pack(update), images, client=i))
        truth.append(x)
    return model, seen, truth


@pytest.mark.parametrize("defense", [MixUp(), InstaHide(), ATS(), Chain((MixUp(), TopK(0.5)))], ids=repr)
def test_a_rehearsal_is_held_against_what_was_trained_on(defense):
    model, seen, _ = victims(defense, 1, 2)
    known = replace(KNOWN, defense=defense)
    attack = adapted(attacks.idlg(evaluations=5), model, defense)
    rehearsed = attack.attack if isinstance(attack, Undone | Unmixed) else attack
    assert isinstance(rehearsed, Rehearsed)
    variant = next(iter(rehearsed.variants.values()))
    stage = replace(rehearsed, rehearsals=2)._stage(seen, known, model, 0)
    assert rehearsed._gap_of_truth(stage, known, model, variant, 0) < 1e-6


def test_who_knows_of_mixing_looks_for_soft_labels_and_undoes_it():
    model = lenet(DATA.image_shape, 10, rng=generator(0, "network"))
    for defense in (MixUp(), InstaHide(), Chain((MixUp(), GaussianNoise(relative=0.1)))):
        attack = adapted(attacks.idlg(), model, defense)
        assert isinstance(attack, Unmixed)
        assert isinstance(attack.attack, Rehearsed)
        for variant in attack.attack.variants.values():
            assert variant.labels == "joint"
            (prior,) = (one for one in variant.priors if isinstance(one, TotalVariation))
            assert prior.reflected == (defense == InstaHide())
    assert adapted(attacks.Analytic(), model, MixUp()) == Unmixed(attacks.Analytic(), MixUp())
    assert adapted(attacks.Analytic(), model, TopK(0.5)) is None


def test_each_attack_of_an_escalation_is_adapted():
    model = lenet(DATA.image_shape, 10, rng=generator(0, "network"))
    strongest = attacks.strongest()
    knowing = adapted(strongest, model, TopK(0.5))
    assert isinstance(knowing, Escalation)
    *exact, rehearsed = knowing.attacks.values()
    searches = {name: one for name, one in strongest.attacks.items() if isinstance(one, Where)}
    assert exact == [one for name, one in strongest.attacks.items() if name not in searches]
    assert isinstance(rehearsed, Rehearsed)
    for name, search in searches.items():
        alone = adapted(search.attack, model, TopK(0.5))
        assert isinstance(alone, Rehearsed)
        for way, variant in alone.variants.items():
            assert rehearsed.variants[f"{name} {way}"] == Where(variant, search.smooth)
    assert len(rehearsed.variants) == 3 * len(searches)
    assert isinstance(adapted(strongest, model, MixUp()), Unmixed)


@pytest.mark.parametrize(("activation", "names"), [("sigmoid", {"dlg", "cosine_lbfgs"}), ("relu", {"inverting_gradients"})])
def test_what_is_rehearsed_of_an_escalation_is_for_networks_of_this_kind_and_the_best_of_all_its_searches(activation, names):
    build = partial(lenet, DATA.image_shape, 10, activation=activation)
    model, seen, _ = victims(TopK(0.5), 1, 1, build=lambda rng: build(rng=rng))
    knowing = adapted(attacks.strongest(restarts=1, evaluations=4, iterations=4, draws=10), model, TopK(0.5))
    assert isinstance(knowing, Escalation)
    (*_, rehearsed) = knowing.attacks.values()
    assert isinstance(rehearsed, Rehearsed)
    told = replace(KNOWN, defense=TopK(0.5))
    assert {name.split()[0] for name in rehearsed._fitting(seen[0], told, model)} == names
    (found,) = knowing(seen, told, model, generator(0, "attack"))
    assert found.attack.split()[0] in names | {"analytic", "rgap", "spear"}


def test_messages_of_changed_images_are_no_views_of_the_same():
    first = Observation({}, {}, 2)
    second, known = replace(first, round=2, previous=first), replace(KNOWN, same_images=True)
    assert [len(views(second, replace(known, defense=one))) for one in (None, TopK(0.5), ATS(), MixUp())] == [2, 2, 1, 1]


def test_mixing_stops_nobody_who_finds_the_mixtures_exactly():
    defense = Fixed(((0.7, 0.3), (0.3, 0.7)))
    model, seen, truth = victims(defense, 3, 2, build=lambda rng: mlp(DATA.image_shape, 10, hidden=(1024,), rng=rng))
    naive, knowing = attacks.Analytic(), adapted(attacks.Analytic(), model, defense)
    assert isinstance(knowing, Unmixed)
    before = naive(seen, KNOWN, model, generator(0, "attack"))
    after = knowing(seen, replace(KNOWN, defense=defense), model, generator(0, "attack"))
    for i, (old, new, x) in enumerate(zip(before, after, truth, strict=True)):
        assert old.converged
        assert float((decibels(new.images, x) - decibels(old.images, x)).min()) > 10
        assert sorted(new.labels.tolist()) == [i, i + 1]
        assert torch.equal(new.starts[0], new.images)
        assert new.attack == "undone"


def test_updates_of_several_steps_are_left_as_they_are():
    defense = Fixed(((0.75, 0.25), (0.25, 0.75)))
    model, seen, _ = victims(defense, 1, 2)
    matching = replace(attacks.idlg(evaluations=3), labels="joint")
    several = replace(KNOWN, defense=defense, local_steps=2, lr=0.1)
    (alone,) = matching(seen, several, model, generator(0, "attack"))
    for attack in (Unmixed(matching, defense), Undone(matching, ATS())):
        assert torch.equal(attack(seen, several, model, generator(0, "attack"))[0].images, alone.images)
    with pytest.raises(ValueError, match="draws must be >= 1, got 0"):
        Unmixed(matching, defense, draws=0)


def test_what_was_transformed_and_then_mixed_is_unmixed_and_then_transformed_back():
    defense = Chain((ATS("0"), Fixed(((0.7, 0.3), (0.3, 0.7)))))  # inverts
    model, seen, truth = victims(defense, 2, 2, build=lambda rng: mlp(DATA.image_shape, 10, hidden=(1024,), rng=rng))
    found = adapted(attacks.Analytic(), model, defense)(seen, replace(KNOWN, defense=defense), model, generator(0, "attack"))
    for one, x in zip(found, truth, strict=True):
        assert float(decibels(one.images, x).min()) > 25
