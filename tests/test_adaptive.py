"""An attacker who knows the defense: what it holds candidates against, what it rehearses, and that it sees more."""

import math
import threading
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn

import attacks
from attacks import GradientMatching, Rehearsed, adapted, metrics
from attacks.evidence import believed, completed, views
from attacks.labels import labels_behind
from attacks.problems import Plan, Problems
from attacks.terms import CosineGap
from defenses import (
    DPSGD,
    Chain,
    Clip,
    DeepGradientCompression,
    DPFedAvg,
    ErrorFeedback,
    GaussianNoise,
    KMeansQuantization,
    NoDefense,
    Partial,
    RandomK,
    SignSGD,
    Soteria,
    StochasticQuantization,
    TopK,
    UniformQuantization,
)
from experiments import scoring
from experiments.config import compose
from experiments.runner import attack_again, attack_of, attackers, start, with_history
from fedsim.data import Dataset, load
from fedsim.defense import Belief, Defense, State, hooks_of
from fedsim.models import Default, lenet, mcmahan_cnn, mlp
from fedsim.observation import Knowledge, Observation
from fedsim.seeding import generator
from fedsim.setup import setup_of
from fedsim.training import Batch, local_update, split
from fedsim.updates import Update, norm
from fedsim.wire import Packets, pack, unpack

DATA = load("synthetic", train_size=64, test_size=64)
SMALL = load("synthetic", train_size=64, test_size=64, side=16)  # for searches of hundreds of evaluations


def belief(value: Tensor, low: float, high: float, weight: float) -> Belief:
    return Belief(value, torch.full_like(value, low), torch.full_like(value, high), torch.full_like(value, weight))


def far(candidate: Tensor, b: Belief) -> Tensor:
    return (candidate - completed({"x": candidate}, {"x": b})["x"]).square()


def test_what_is_known_is_what_a_candidate_is_held_against():
    value, candidate = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([3.0, -2.5, 7.0])
    assert torch.allclose(completed({"x": candidate}, {"x": Belief.exact(value)})["x"], value)


def test_within_bounds_alone_every_candidate_is_as_good():
    b = belief(torch.zeros(3), -1.0, 2.0, 0.0)
    assert torch.equal(far(torch.tensor([-1.0, 0.3, 2.0]), b), torch.zeros(3))
    assert torch.allclose(far(torch.tensor([-3.0, 2.5, 4.0]), b), torch.tensor([4.0, 0.25, 4.0]))  # squared distances to the bounds


def test_a_centre_counts_by_its_weight_and_its_cell_besides():
    b = belief(torch.zeros(2), -1.0, 1.0, 0.25)
    # Inside: 0.25 * 0.5^2. Outside, at 2: sqrt(0.25) * 2 to the centre and 1 to the cell, together 2, squared.
    assert torch.allclose(far(torch.tensor([0.5, 2.0]), b), torch.tensor([0.0625, 4.0]))


def test_the_distance_to_what_is_possible_is_differentiable():
    b = belief(torch.tensor([0.0, 0.0, 0.0]), -1.0, 1.0, 0.25)
    x = torch.tensor([0.5, 2.0, -3.0], dtype=torch.float64, requires_grad=True)
    double = Belief(*(t.double() for t in (b.value, b.low, b.high, b.weight)))
    assert torch.autograd.gradcheck(lambda x: (x - completed({"x": x}, {"x": double})["x"]).square(), x)


def victims(defense: Defense, count: int = 8, data: Dataset = DATA) -> tuple[nn.Module, list[Observation], Tensor, Knowledge]:
    """Clients with an image and a random network each, whose gradients go through `defense`."""
    images, labels = data.train.batch(torch.arange(count))
    seen = []
    for i in range(count):
        model = lenet(data.image_shape, 10, rng=generator(0, "network", i))
        params, buffers = split(model)
        update: Update = local_update(model, params, buffers, [(images[i : i + 1], labels[i : i + 1])], lr=1.0).update
        packets, _ = defense(pack(update), defense.init(update), generator(0, "defense", i))
        seen.append(Observation(params, packets, 1, client=i))
    return model, seen, images, Knowledge(data.image_shape, 10, lr=1.0, local_steps=1, public=data.test)


def decibels(found: list, images: Tensor) -> Tensor:
    return metrics.psnr_db(torch.cat([one.images for one in found]), images)


@pytest.mark.parametrize("defense", [TopK(0.7), UniformQuantization(16), Chain((TopK(0.7), StochasticQuantization(120)))], ids=repr)
def test_who_knows_the_defense_sees_more(defense):
    model, seen, images, known = victims(defense, 4, SMALL)
    attack = replace(attacks.idlg(evaluations=400), stop=attacks.Stop())
    naive = decibels(attack(seen, known, model, generator(0, "attack")), images)
    knowing = decibels(attack(seen, replace(known, defense=defense), model, generator(0, "attack")), images)
    assert bool((knowing > naive).all())


def test_nothing_changes_for_who_knows_that_there_is_no_defense():
    model, seen, _, known = victims(NoDefense(), 2)
    attack = attacks.idlg(evaluations=20)
    for one, other in zip(
        attack(seen, known, model, generator(0, "attack")),
        attack(seen, replace(known, defense=NoDefense()), model, generator(0, "attack")),
        strict=True,
    ):
        assert one.loss == other.loss
        assert torch.equal(one.images, other.images)


def test_what_a_defense_leaves_as_it_is_is_matched_as_it_is():
    coarse = UniformQuantization(16)
    for defense, told in ((NoDefense(), 0), (Partial(coarse, ["features.0."]), 2), (coarse, 8)):
        model, seen, _, known = victims(defense, 2)
        attack = attacks.idlg()
        group = Problems.of(seen, Plan.of(seen[0], known, False), replace(known, defense=defense), model, attack)
        assert len(group.beliefs) == told


def test_how_short_an_update_was_clipped_changes_nothing_for_a_gap_of_directions():
    model, (one, *_), images, known = victims(NoDefense(), 1)
    gaps = []
    for share in (0.5, 5e-4):
        defense = Clip(share * float(norm(one.update)))
        packets, _ = defense(one.packets, {}, generator(0, "defense"))
        seen, told = [replace(one, packets=packets)], replace(known, defense=defense)
        group = Problems.of(seen, Plan.of(seen[0], told, False), told, model, attacks.cosine_lbfgs())
        group.labels = torch.tensor([[7]])
        gaps.append(group.gaps(torch.rand(1, images[0].numel(), generator=generator(0, "point")), torch.tensor([0])))
    assert float(gaps[1]) == pytest.approx(float(gaps[0]), rel=1e-4)


SPARSE = [Chain((Clip(0.1), TopK(0.05))), Chain((TopK(0.05), Clip(0.1))), DeepGradientCompression(0.05, warmup=0)]


@pytest.mark.parametrize("defense", SPARSE, ids=repr)
def test_the_truth_explains_a_part_of_a_clipped_update(defense):
    """Its length is that of the part: a candidate that was brought to it as a whole would be too short where it counts."""
    model, (one,), images, known = victims(defense, 1)
    seen, told = [replace(one, followed=True)], replace(known, defense=defense)
    group = Problems.of(seen, Plan.of(seen[0], told, False), told, model, attacks.cosine_lbfgs())
    group.labels = DATA.train.batch(torch.tensor([0]))[1][None]
    noise = torch.rand(1, images[0].numel(), generator=generator(0, "point"))
    truth, other = (float(group.gaps(point, torch.tensor([0]))) for point in (images[0].flatten()[None], noise))
    assert truth < 1e-6
    assert other > 1e-3


def test_who_knows_of_clipping_steals_no_less_by_a_gap_of_directions():
    defense = Clip(0.1)  # of gradients about 50 times as long
    model, seen, images, known = victims(defense, data=SMALL)
    attack = attacks.cosine_lbfgs(evaluations=300)
    naive = decibels(attack(seen, known, model, generator(0, "attack")), images)
    knowing = decibels(attack(seen, replace(known, defense=defense), model, generator(0, "attack")), images)
    assert float(knowing.median()) > float(naive.median()) - 1


def test_a_rehearsal_chooses_the_weight_of_the_prior_by_the_noise():
    attack = attacks.idlg(evaluations=150)
    chosen = {}
    for defense in (UniformQuantization(2**16), GaussianNoise(relative=1.0)):
        model, seen, _, known = victims(defense, 2, SMALL)
        knowing = replace(adapted(attack, model, defense), rehearsals=4)
        made = knowing(seen, replace(known, defense=defense), model, generator(0, "attack"))
        assert len({one.attack for one in made}) == 1  # of one round
        chosen[defense] = float(made[0].attack.removeprefix("tv="))
    quiet, loud = chosen.values()
    assert quiet < loud


def test_an_attacker_who_explains_all_that_noise_leaves_to_explain_has_converged():
    defense = StochasticQuantization(240)
    model, seen, images, known = victims(defense, 2, SMALL)
    attack = attacks.idlg(evaluations=400)
    naive = attack(seen, known, model, generator(0, "attack"))
    knowing = replace(adapted(attack, model, defense), rehearsals=2)
    made = knowing(seen, replace(known, defense=defense), model, generator(0, "attack"))
    assert not any(one.converged for one in naive)  # rounding leaves a gap far above the tolerance
    assert all(one.converged for one in made)
    assert bool((decibels(made, images) > 20).all())
    short = replace(attack, optimizer=replace(attack.optimizer, evaluations=3))
    unfinished = adapted(short, model, defense)(seen, replace(known, defense=defense), model, generator(0, "attack"))
    assert not any(one.converged for one in unfinished)


class Halved:
    """A user's own defense: it does not say what it leaves possible."""

    def init(self, like: Update) -> State:
        return {}

    def __call__(self, packets: Packets, state: State, rng: torch.Generator) -> tuple[Packets, State]:
        return {name: replace(p, values=p.values / 2) for name, p in packets.items()}, state


@pytest.mark.parametrize("evaluations", [1, 10])
def test_a_search_that_has_hardly_begun_has_not_converged_however_well_it_explains_noise(evaluations):
    defense = GaussianNoise(relative=0.3)
    model, seen, _, known = victims(defense, 2, SMALL)
    attack = adapted(attacks.cosine_lbfgs(evaluations=evaluations), model, defense)
    made = attack(seen, replace(known, defense=defense), model, generator(0, "attack"))
    assert not any(one.converged for one in made)


class Lost(GradientMatching):
    """Explains everything, by images that are no numbers."""

    def __call__(self, *args, **more):
        return [replace(one, images=one.images * math.nan, loss=0.0, converged=False) for one in super().__call__(*args, **more)]


def test_a_variant_whose_rehearsals_end_in_no_numbers_is_not_chosen_unless_all_do():
    defense = UniformQuantization(16)
    model, seen, _, known = victims(defense, 2, SMALL)
    known, fine = replace(known, defense=defense), attacks.idlg(evaluations=5)
    lost = Lost(**{field.name: getattr(fine, field.name) for field in fields(fine)})
    for variants, chosen in (({"lost": lost, "fine": fine}, "fine"), ({"lost": lost, "again": lost}, "lost")):
        made = Rehearsed(variants, rehearsals=2)(seen, known, model, generator(0, "attack"))
        assert [one.attack for one in made] == [chosen] * 2
        assert not any(one.converged for one in made)


def test_behind_a_defense_that_nobody_can_explain_no_search_has_converged():
    defense = Halved()
    model, seen, _, known = victims(defense, 2, SMALL)
    attack = adapted(attacks.dlg(evaluations=30, restarts=1), model, defense)
    assert isinstance(attack, Rehearsed)
    attack = replace(attack, rehearsals=2)
    for of in (defense, Chain((defense, TopK(0.9)))):
        made = attack(seen, replace(known, defense=of), model, generator(0, "attack"))
        assert not any(one.converged for one in made)


def test_what_explains_an_update_no_better_than_noise_has_not_converged_and_the_noise_is_the_same_for_all():
    model, (one, *_), images, known = victims(NoDefense(), 1)
    # Of one class, which every image is of: no loss, and no gradient.
    lone = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 1))
    params = split(lone)[0]
    mute = replace(one, params=params, packets=pack({name: torch.zeros_like(t) for name, t in params.items()}))
    for attack in (attacks.dlg(evaluations=3), attacks.idlg(evaluations=3), attacks.cosine_lbfgs(evaluations=3)):
        (found,) = attack([mute], replace(known, num_classes=1), lone, generator(0, "attack"))
        assert found.loss == 0
        assert not found.converged
    model, seen, images, known = victims(NoDefense(), 3)
    attack = replace(attacks.cosine_lbfgs(), tolerance=1e9)  # so that noise decides
    together = Problems.of(seen, Plan.of(seen[0], known, False), known, model, attack)
    together.labels = torch.tensor([[1], [2], [3]])
    points = torch.zeros(3, images[0].numel())
    alone = together.take(torch.tensor([2]), threading.Event())
    assert torch.allclose(alone.enough(points[2:], 8), together.enough(points, 8)[2:], rtol=1e-5)


def test_where_every_image_explains_what_was_seen_no_search_has_converged():
    """PyTorch's own first weights let hardly anything of an image through to the gradient."""
    model, defense = lenet(DATA.image_shape, 10, init=Default()), Clip(1e6)
    params, buffers = split(model)
    batches = [DATA.train.batch(torch.tensor([i])) for i in range(2)]
    seen = [
        Observation(params, pack(local_update(model, params, buffers, [batch], lr=1.0).update), 1, client=i)
        for i, batch in enumerate(batches)
    ]
    known = Knowledge(DATA.image_shape, 10, lr=1.0, local_steps=1, public=DATA.test)
    knowing = replace(adapted(attacks.cosine_lbfgs(evaluations=20), model, defense), rehearsals=2, evaluations=20)
    for attack in (attacks.cosine_lbfgs(evaluations=20), knowing, attacks.gias(latents=16, evaluations=20)):
        found = attack(seen, replace(known, defense=defense), model, generator(0, "attack"))
        assert all(one.loss < 1e-4 for one in found)
        assert bool((decibels(found, torch.cat([x for x, _ in batches])) < 20).all())
        assert not any(one.converged for one in found)


def test_the_gap_of_the_truth_leaves_global_chance_alone_and_does_not_depend_on_it():
    layers = [nn.Conv2d(3, 5, 5, stride=4), nn.Sigmoid(), nn.Flatten(), nn.Dropout(0.3)]
    model = nn.Sequential(*layers, nn.Linear(245, 10)).train()
    params, buffers = split(model)
    update = local_update(model, params, buffers, [DATA.train.batch(torch.tensor([0]))], lr=1.0).update
    defense = GaussianNoise(relative=0.05)
    known = Knowledge(DATA.image_shape, 10, lr=1.0, local_steps=1, public=DATA.test, defense=defense)
    attack = replace(adapted(attacks.idlg(evaluations=3), model, defense), rehearsals=2, evaluations=3)
    gaps = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            stage = attack._stage([Observation(params, pack(update), 1)], known, model, 0)
            gaps.append(attack._gap_of_truth(stage, known, model, next(iter(attack.variants.values())), 0))
            assert torch.equal(torch.get_rng_state(), before)
    assert gaps[0] == gaps[1] > 0


def test_rehearsals_go_through_defenses_that_act_in_training():
    defense = DPSGD(clip=1.0, noise_multiplier=1e-3)
    model, seen, _, known = victims(NoDefense(), 1)
    rehearsed = adapted(attacks.idlg(evaluations=5), model, defense)
    assert isinstance(rehearsed, Rehearsed)
    x, y = DATA.test.batch(torch.tensor([3]))
    played = rehearsed._played(seen[0], [(x, y)], replace(known, defense=defense), model, 0, 0)
    assert float(torch.cat([t.flatten() for t in played.update.values()]).norm()) < 1.5  # of a gradient of norm 20 and more
    assert float(torch.cat([t.flatten() for t in seen[0].update.values()]).norm()) > 5


def test_what_a_defense_says_of_its_zeros_stands():
    # Soteria's zeros are sent like any other entry, and say nothing of the gradient; signs say which half, not how much.
    defense = Soteria(0.5)
    images, labels = DATA.train.batch(torch.arange(1))
    model = lenet(DATA.image_shape, 10, rng=generator(0, "network"))
    params, buffers = split(model)
    hooks = hooks_of(defense, 10, 0, 1, 0)
    update = local_update(model, params, buffers, [(images, labels)], lr=1.0, hooks=hooks).update
    known = Knowledge(DATA.image_shape, 10, lr=1.0, local_steps=1, defense=defense)
    told = believed(Observation(params, pack(update), 1), known)
    pruned = (update["head.weight"] == 0).all(0)
    assert int(pruned.sum()) == 384  # half of 768
    assert not told["head.weight"].weight[:, pruned].any()
    assert bool((told["head.weight"].weight[:, ~pruned] == 1).all())
    coarse = Chain((defense, UniformQuantization(16)))
    packets, _ = coarse(pack(update), {}, generator(0, "defense"))
    plain = local_update(model, params, buffers, [(images, labels)], lr=1.0).update["head.weight"]
    told = believed(Observation(params, packets, 1), replace(known, defense=coarse))["head.weight"]
    assert bool((told.low <= plain + 1e-5).all())  # though no level of a quantizer is 0
    assert bool((plain - 1e-5 <= told.high).all())
    packets, _ = SignSGD()(pack(update), {}, generator(0, "defense"))
    signs = believed(Observation(params, packets, 1), replace(known, defense=SignSGD()))
    assert not any(b.weight.any() for b in signs.values())


@pytest.mark.parametrize("defense", [RandomK(0.1), GaussianNoise(variance=1.0)], ids=repr)
def test_labels_that_the_bias_does_not_tell_are_read_off_the_whole_head(defense):
    model, seen, _, known = victims(defense, 24)
    truth = DATA.train.labels[:24]
    naive, knowing = (
        torch.cat([labels_behind([one], who, model, 1) for one in seen]) for who in (known, replace(known, defense=defense))
    )
    assert int((naive == truth).sum()) < 12
    assert int((knowing == truth).sum()) >= 22


HIDING = [
    KMeansQuantization(16),
    TopK(0.8),
    GaussianNoise(variance=0.01),
    RandomK(0.1),
    ErrorFeedback(SignSGD()),
]


def behind(defense: Defense, batch_size: int, network: int, classes: int = 10) -> tuple[nn.Module, Observation, Tensor, Knowledge]:
    """A client of a network whose features are as often below zero as above: their mean over images says nothing."""
    normalised: dict = {"mean": DATA.mean, "std": DATA.std}
    model = mlp(DATA.image_shape, classes, hidden=(64,), activation="tanh", **normalised, rng=generator(0, "network", network))
    images, labels = DATA.train.batch(torch.randint(64, (batch_size,), generator=generator(0, "batch", network)))
    labels = labels if classes == 10 else torch.randint(classes, (batch_size,), generator=generator(0, "labels", network))
    params, buffers = split(model)
    update = local_update(model, params, buffers, [(images, labels)], lr=1.0).update
    packets, _ = defense(pack(update), defense.init(update), generator(0, "defense", network))
    known = Knowledge(DATA.image_shape, classes, lr=1.0, local_steps=1, public=DATA.test)
    return model, Observation(params, packets, batch_size), labels, known


def labels_right(defense: Defense, batch_size: int, networks: int, classes: int = 10) -> tuple[int, int]:
    """How many labels somebody who does not know the defense gets right, and somebody who does."""
    right = {None: 0, defense: 0}
    for i in range(networks):
        model, seen, labels, known = behind(defense, batch_size, i, classes)
        counts = labels.bincount(minlength=classes)
        for who in right:
            found = labels_behind([seen], replace(known, defense=who), model, batch_size)
            right[who] += int(torch.minimum(found.bincount(minlength=classes), counts).sum())
    return right[None], right[defense]


@pytest.mark.parametrize("defense", HIDING, ids=repr)
def test_the_label_is_the_one_under_which_some_public_image_explains_the_head(defense):
    naive, knowing = labels_right(defense, 1, 24)
    assert knowing >= max(22, naive)


def test_the_label_is_found_among_many_classes():
    _, knowing = labels_right(RandomK(0.1), 1, 24, classes=100)
    assert knowing >= 22


@pytest.mark.parametrize("defense", HIDING, ids=repr)
def test_labels_of_a_batch_are_counted_no_worse_by_who_knows_the_defense(defense):
    naive, knowing = labels_right(defense, 16, 12)
    assert knowing >= 0.95 * naive


def test_a_head_without_a_bias_is_asked_as_well():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.Tanh())
        model = nn.Sequential(features, nn.Linear(64, 10, bias=False))
    with torch.no_grad():
        features[1].bias.copy_(-features[1].weight.sum(1) / 2)  # features of grey are 0
    params, buffers = split(model)
    defense, right = RandomK(0.3), {None: 0, RandomK(0.3): 0}
    known = Knowledge(DATA.image_shape, 10, lr=1.0, local_steps=1, public=DATA.test)
    for i in range(24):
        images, labels = DATA.train.batch(torch.tensor([i]))
        update = local_update(model, params, buffers, [(images, labels)], lr=1.0).update
        packets, _ = defense(pack(update), {}, generator(0, "defense", i))
        for told in right:
            right[told] += int(labels_behind([Observation(params, packets, 1)], replace(known, defense=told), model, 1) == labels)
    assert right[None] < 16
    assert right[defense] >= 20


def test_labels_of_a_batch_are_counted_through_what_was_left_out():
    defense, (images, labels) = RandomK(0.1), DATA.train.batch(torch.arange(16))
    known = Knowledge(DATA.image_shape, 10, lr=1.0, local_steps=1)
    right = {None: 0, defense: 0}
    for i in range(6):
        model = lenet(DATA.image_shape, 10, rng=generator(0, "network", i))
        params, buffers = split(model)
        update = local_update(model, params, buffers, [(images, labels)], lr=1.0).update
        packets, _ = defense(pack(update), {}, generator(0, "defense", i))
        for told in right:
            found = labels_behind([Observation(params, packets, 16)], replace(known, defense=told), model, 16)
            assert torch.equal(found, found.sort().values)
            right[told] += int(torch.minimum(torch.bincount(found, minlength=10), torch.bincount(labels, minlength=10)).sum())
        exact = [Observation(params, pack(update), 16)]  # the bias is all that is asked where it is known
        asked = [labels_behind(exact, replace(known, defense=told), model, 16) for told in (None, NoDefense())]
        assert torch.equal(*asked)
    assert right[None] < 0.6 * 6 * 16
    assert right[defense] > 0.85 * 6 * 16


def test_a_length_that_a_defense_hides_is_rehearsed_without():
    model = lenet(DATA.image_shape, 10, rng=generator(0, "network"))

    def cosines(defense: Defense, attack: attacks.GradientMatching = attacks.idlg()) -> int:
        rehearsed = adapted(attack, model, defense)
        assert isinstance(rehearsed, Rehearsed)
        return sum(isinstance(one.gap, CosineGap) for one in rehearsed.variants.values())

    hiding = Clip(1.0), DPSGD(1.0, 0.1), DPFedAvg(1.0, 0.1), SignSGD(), ErrorFeedback(Chain((Clip(1.0), TopK(0.5))))
    assert [cosines(defense) for defense in hiding] == [3] * 5
    assert [cosines(defense) for defense in (NoDefense(), UniformQuantization(16), Chain((TopK(0.5),)))] == [0] * 3
    assert cosines(Clip(1.0), attacks.cosine_lbfgs()) == len(adapted(attacks.cosine_lbfgs(), model, NoDefense()).variants)


def test_clipping_stops_nobody_who_knows_of_it():
    defense = Clip(0.1)  # of gradients about 50 times as long
    model, seen, images, known = victims(defense, 2, SMALL)
    attack = attacks.idlg(evaluations=300)
    naive = decibels(attack(seen, known, model, generator(0, "attack")), images)
    knowing = replace(adapted(attack, model, defense), rehearsals=2)
    made = knowing(seen, replace(known, defense=defense), model, generator(0, "attack"))
    assert all(one.attack.startswith("cosine ") for one in made)
    assert float(naive.max()) < 15
    assert float((decibels(made, images) - naive).min()) > 5


def test_the_finer_of_two_lattices_is_trusted_more():
    packets, _ = UniformQuantization(16)(
        pack({"a": torch.linspace(0, 1, 53), "b": torch.linspace(0, 10, 53)}), {}, generator(0, "x")
    )
    told = believed(Observation({}, packets, 1), Knowledge(DATA.image_shape, 10, defense=UniformQuantization(16)))
    # The weight of a cell is 1 / (1 + width^2 / typical), and the second tensor's are ten times as wide.
    fine, coarse = (told[name].weight[26] for name in "ab")
    assert float((1 / coarse - 1) / (1 / fine - 1)) == pytest.approx(100, rel=0.01)
    assert 0.9 < float(fine) < 1


def test_a_victim_s_reconstruction_does_not_depend_on_other_rounds():
    defense = StochasticQuantization(16)
    model, seen, _, known = victims(defense, 2)
    seen[1] = replace(seen[1], round=2)
    attack, known = adapted(attacks.idlg(evaluations=10), model, defense), replace(known, defense=defense)
    assert attack([], known, model, generator(0, "attack")) == []
    both = attack(seen, known, model, generator(0, "attack"))
    alone = [attack([one], known, model, generator(0, "attack"))[0] for one in seen]
    for one, other in zip(both, alone, strict=True):
        assert one.attack == other.attack
        assert torch.allclose(one.images, other.images, atol=1e-3)


def test_a_rehearsal_says_what_it_lacks():
    model, seen, _, known = victims(NoDefense(), 1)
    attack = adapted(attacks.idlg(evaluations=5), model, NoDefense())
    with pytest.raises(ValueError, match=r"needs known\.defense"):
        attack(seen, known, model, generator(0, "attack"))
    with pytest.raises(ValueError, match=r"needs known\.public, 1 or more images"):
        attack(seen, replace(known, defense=NoDefense(), public=None), model, generator(0, "attack"))
    four = replace(seen[0], num_examples=4)
    with pytest.raises(ValueError, match=r"needs known\.public, 4 or more images"):
        attack([four], replace(known, defense=NoDefense(), public=DATA.test.take(torch.arange(3))), model, generator(0, "attack"))


def test_a_rehearsal_of_a_client_with_a_memory_has_a_past():
    defense = ErrorFeedback(TopK(0.2))
    model, seen, _, known = victims(defense, 1)
    known = replace(known, defense=defense)
    rehearsed = adapted(attacks.idlg(evaluations=5), model, defense)
    assert isinstance(rehearsed, Rehearsed)
    batches = [DATA.test.batch(torch.tensor([i])) for i in range(3)]

    def norm(packets: Packets) -> float:
        return float(torch.cat([t.flatten() for t in unpack(packets).values()]).norm()) if packets else 0.0

    def played(one: Observation, those: list[Batch] = batches) -> Observation:
        return rehearsed._played(one, those, known, model, 0, 0)

    earlier = replace(seen[0], followed=True)
    first, late = played(earlier), played(replace(seen[0], round=5))
    assert first.before == {}
    assert late.before is None
    assert norm(late.packets) > 1.5 * norm(first.packets)  # what four rounds left out comes on top of it
    second = played(replace(seen[0], round=2, previous=earlier, followed=True))
    assert second.previous is not None
    assert torch.equal(second.previous.update["head.bias"], played(earlier, batches[1:]).update["head.bias"])  # another image


def test_who_follows_a_client_with_a_memory_sees_more():
    # Of the second message of clients whose images are others each time.
    defense, model = ErrorFeedback(TopK(0.5)), lenet(SMALL.image_shape, 10, rng=generator(0, "network"))
    params, buffers = split(model)
    seen, images = [], []
    for i in range(8):
        previous, state = None, None
        for round in (1, 2):
            x, y = SMALL.train.batch(torch.tensor([2 * i + round]))
            update = local_update(model, params, buffers, [(x, y)], lr=1.0).update
            packets, state = defense(pack(update), state or defense.init(update), generator(0, "unused"))
            previous = Observation(params, packets, 1, round, i, previous=previous, followed=True)
        seen.append(previous)
        images.append(x)
    known = Knowledge(SMALL.image_shape, 10, lr=1.0, local_steps=1, public=SMALL.test, defense=defense)
    attack = replace(attacks.idlg(evaluations=300, tv=1e-3), stop=attacks.Stop())
    alone = [replace(one, previous=None, followed=False) for one in seen]
    blind, following = (decibels(attack(those, known, model, generator(0, "attack")), torch.cat(images)) for those in (alone, seen))
    assert following.mean() > blind.mean() + 1


def test_a_run_follows_whom_it_listens_to(tmp_path):
    small = ["data.train_size=4", "data.test_size=64", "federation.clients=4", "federation.per_round=4", "federation.batch_size=2"]
    tap = ["tap.rounds=all", "tap.clients=[1,2]", "tap.when=later", "rounds=3", "attack=idlg", "attack.evaluations=5"]
    folder = start(compose([*small, *tap, "defense=topk_ef"]), tmp_path / "ef", "a test")
    setup = setup_of(folder.config)
    assert scoring.knowledge(setup, 1).same_images  # each has one image where two were asked for
    (one, _) = with_history(setup, folder, folder.observations(3))
    assert [view.round for view in (one, one.previous, one.previous.previous)] == [3, 2, 1]
    assert one.before is one.previous.packets
    assert one.previous.previous.before == {}
    for round in (1, 2, 3):
        (seen, _) = with_history(setup, folder, folder.observations(round))
        assert len(views(seen, scoring.knowledge(setup, 1))) == round
        assert len(views(seen, scoring.knowledge(setup, 2))) == 1
    attack_again(folder, attack_of(folder.config), "idlg", "both")
    assert set(folder.leaks()["attack"]) == {"idlg", "idlg_adaptive"}


def test_what_was_missed_is_not_taken_for_known(tmp_path):
    small = ["data.train_size=40", "data.test_size=64", "federation.clients=4", "federation.per_round=4", "rounds=4"]
    tap = ["tap.rounds=[1,3]", "tap.every=null", "tap.clients=all", "tap.when=later", "attack=idlg"]
    folder = start(compose([*small, *tap, "defense=topk_ef"]), tmp_path / "ef", "a test")
    setup = setup_of(folder.config)
    first, third = (with_history(setup, folder, folder.observations(round))[0] for round in (1, 3))
    assert first.before == {}
    assert third.before is None
    assert third.previous is None
    stateless = setup_of({**folder.config, **compose([*small, *tap, "defense=uniform"])})
    assert with_history(stateless, folder, folder.observations(3))[0].previous is None


def test_updates_of_a_model_that_draws_are_not_held_together(tmp_path):
    small = ["data.train_size=2", "data.test_size=16", "federation.clients=2", "federation.per_round=2", "federation.batch_size=2"]
    tap = ["tap.every=1", "tap.clients=all", "tap.when=end", "rounds=2", "attack=idlg", "attack.evaluations=2", "defense=precode"]
    folder = start(compose([*small, *tap, "model.bottleneck.width=4"]), tmp_path / "run", "a test")
    assert set(folder.leaks()["attack"]) == {"idlg", "idlg_adaptive"}  # each round drew its own noise
    assert len(folder.leaks()) == 8


def test_updates_of_a_model_that_draws_are_not_held_together_for_the_sake_of_a_memory_either(tmp_path):
    small = ["data.train_size=2", "data.test_size=16", "federation.clients=2", "federation.per_round=2", "federation.batch_size=2"]
    tap = ["tap.rounds=all", "tap.clients=all", "tap.when=end", "rounds=2", "attack=idlg", "attack.evaluations=2"]
    config = compose([*small, *tap, "defense=topk_ef", "model/bottleneck=precode", "model.bottleneck.width=4"])
    assert len(start(config, tmp_path / "run", "a test").leaks()) == 8


def test_several_local_steps_of_a_model_that_draws_are_attacked_by_who_knows_that_it_does(tmp_path):
    small = ["data.train_size=4", "data.test_size=16", "federation.clients=2", "federation.per_round=2", "federation.batch_size=1"]
    tap = ["federation=fedavg", "tap.clients=1", "tap.when=end", "rounds=1", "attack=fedavg", "attack.evaluations=2"]
    config = compose([*tap, *small, "defense=precode", "model=lenet_silu", "model.bottleneck.width=4"])
    leaks = start(config, tmp_path / "run", "a test").leaks()
    assert list(leaks["attacker"]) == ["naive"] * 2 + ["adaptive"] * 2


def test_a_rehearsal_sends_the_statistics_that_a_victim_sends():
    model = mcmahan_cnn((3, 32, 32), 10, norm="batch", rng=generator(0, "init")).train()
    params, buffers = split(model)
    image, label = DATA.train.batch(torch.tensor([0]))
    trained = local_update(model, params, buffers, [(image, label)], lr=1.0)
    defense = UniformQuantization(16)
    packets, _ = defense(pack(trained.update), {}, generator(0, "defense"))
    seen = Observation(params, packets, 1, buffers=buffers, sent_buffers=trained.buffers)
    known = Knowledge((3, 32, 32), 10, lr=1.0, local_steps=1, batch_size=1, public=DATA.test, defense=defense)
    stage = Rehearsed({"": GradientMatching()}, rehearsals=2)._stage([seen], known, model, 0)
    for one, (x, y) in zip(stage.played, stage.truth, strict=True):
        own = local_update(model, params, buffers, [(x, y)], lr=1.0).buffers
        assert one.sent_buffers.keys() == own.keys()
        assert all(torch.equal(t, own[name]) for name, t in one.sent_buffers.items())
    (played, _) = Rehearsed({"": GradientMatching()}, rehearsals=2)._stage([replace(seen, sent_buffers={})], known, model, 0).played
    assert played.sent_buffers == {}


@pytest.mark.parametrize(("who", "told"), [("naive", False), ("adaptive", True), ("both", True)])
def test_who_looks_behind_the_noise_of_a_model_is_told_the_rest_of_the_defense_only_if_asked_for(who, told):
    setup = setup_of(compose(["data.train_size=10", "data.test_size=10", "model/bottleneck=precode", "defense=topk"]))
    (one,) = attackers(setup, attacks.precode_aware(), "precode_aware", who)
    assert (one.adaptive, one.told) == (True, told)


def test_a_run_attacks_as_both_and_none_has_nothing_to_know(tmp_path):
    small = ["data.train_size=64", "data.test_size=64", "federation.clients=2", "federation.per_round=2", "rounds=1"]
    attack = ["attack=cosine_lbfgs", "attack.evaluations=20", "tap.when=end"]
    folder = start(compose([*small, *attack, "defense=uniform"]), tmp_path / "uniform", "a test")
    leaks = folder.leaks()
    assert list(leaks["attacker"]) == ["naive"] * 2 + ["adaptive"] * 2
    assert list(leaks["attack"]) == ["cosine_lbfgs"] * 2 + ["cosine_lbfgs_adaptive"] * 2
    assert leaks["found_by"].str.startswith("tv=").tolist() == [False, False, True, True]
    naive, adaptive = (leaks[leaks["attacker"] == who].reset_index() for who in ("naive", "adaptive"))
    assert naive[["round", "client", "image"]].equals(adaptive[["round", "client", "image"]])
    undefended = start(compose([*small, *attack]), tmp_path / "none", "a test")
    assert set(undefended.leaks()["attacker"]) == {"naive"}
    rehearsed = start(compose([*small, *attack, "attacker=adaptive"]), tmp_path / "rehearsed", "a test")
    assert set(rehearsed.leaks()["attacker"]) == {"adaptive"}
    alone = start(compose([*small, *attack, "defense=uniform", "attacker=adaptive"]), tmp_path / "alone", "a test")
    assert set(alone.leaks()["attacker"]) == {"adaptive"}
