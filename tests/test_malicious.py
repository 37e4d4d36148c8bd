"""The malicious server: what its imprint module catches, what the attack knows of its catch, and what clients notice of it."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from worlds import config, federate

import attacks
from attacks import metrics
from attacks.metrics import success_rates
from experiments import scoring, table
from experiments.card import card, obstacles
from experiments.config import ConfigError, compose
from experiments.naming import contender
from experiments.runner import attack_again, attack_of, check_config, resume, start
from experiments.summary import summarised
from fedsim import servers
from fedsim.data import Images
from fedsim.errors import FederationError
from fedsim.inspection import Inspection, exposure, parallel_rows
from fedsim.models import Imprinted, mcmahan_cnn, mlp, resnet18
from fedsim.observation import Attack, Knowledge, Observation, Reconstruction
from fedsim.run import RunFolder
from fedsim.seeding import generator
from fedsim.setup import setup_of
from fedsim.tap import Tap
from fedsim.training import local_update, split
from fedsim.wire import pack

torch.set_num_threads(1)

SHAPE, CLASSES = (2, 7, 5), 5
KNOWN = Knowledge(SHAPE, CLASSES)
VARIANTS = [(kind, measurement) for kind in ("relu", "hardtanh") for measurement in ("brightness", "random")]


def drawn(count: int, stream: str = "images") -> Images:
    """Images of 8 bits, each with a mean of its own around which its pixels lie."""
    rng = generator(0, stream)
    level = 0.3 + 0.4 * torch.rand(count, 1, 1, 1, generator=rng)
    pixels = (255 * (level + 0.2 * torch.rand(count, *SHAPE, generator=rng))).to(torch.uint8)
    return Images(pixels, torch.randint(CLASSES, (count,), generator=rng))


PUBLIC = drawn(20_000, "public")


def trapped(bins: int, kind: str = "relu", measurement: str = "brightness", **settings: float) -> Imprinted:
    base = mlp(SHAPE, CLASSES, hidden=(11,), activation="tanh", rng=generator(0, "base"))
    return servers.Imprint(bins, kind, measurement, **settings)(base, PUBLIC, generator(0, "server"))  # type: ignore[arg-type]


def seen_by(model: nn.Module, *batches: tuple[Tensor, Tensor], lr: float = 1.0) -> Observation:
    """What a client sends that takes one step for each batch."""
    params, buffers = split(model)
    update = local_update(model, params, buffers, batches, lr=lr).update
    return Observation(params, pack(update), sum(len(labels) for _, labels in batches), buffers=buffers)


def caught(found: Reconstruction, images: Tensor) -> Tensor:
    """(N,) whether each reconstruction is one of the true images, to an MSE of 1e-6."""
    errors = torch.cdist(found.images.flatten(1), images.flatten(1)).square() / images[0].numel()
    return errors.amin(1) < 1e-6


# The module and its reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "measurement"), VARIANTS)
def test_an_image_alone_in_its_bin_comes_back_with_its_label(kind, measurement):
    model = trapped(997, kind, measurement)
    images, labels = drawn(13).batch(torch.arange(13))
    (found,) = attacks.Imprint()([seen_by(model, (images, labels))], KNOWN, model, generator(0, "attack"))
    # 13 images in 997 bins: two share one with probability 13 * 12 / 2 / 997 < 8 %; in these draws none do.
    assert found.converged
    assert found.missed == 0
    order = metrics.align(found.images, images)
    assert metrics.mse(found.images[order], images).max() < 1e-9
    assert torch.equal(found.labels[order], labels)


@pytest.mark.parametrize("fit", ["empirical", "normal"])
def test_images_are_alone_as_often_as_chance_says(fit):
    bins, size, batches = 64, 32, 40
    model = trapped(bins, measurement="random", fit=fit)
    alone = 0
    for i in range(batches):
        images, labels = PUBLIC.batch(torch.randint(len(PUBLIC), (size,), generator=generator(i, "batch")))
        (found,) = attacks.Imprint()([seen_by(model, (images, labels))], KNOWN, model, generator(0, "attack"))
        alone += int(caught(found, images).sum())
    # (1 - 1/64)^31 = 0.614; 1,280 images, standard error sqrt(0.614 * 0.386 / 1280) = 0.0136.
    assert alone / (batches * size) == pytest.approx((1 - 1 / bins) ** (size - 1), abs=4 * 0.0136)


@pytest.mark.parametrize("levels", [255, 0], ids=["grid", "reproduction"])
@pytest.mark.parametrize("kind", ["relu", "hardtanh"])
def test_what_the_attack_vouches_for_is_true_and_nearly_all_of_it(kind, levels):
    model = trapped(61, kind)
    vouched = clean = right = 0
    for i in range(20):
        images, labels = PUBLIC.batch(torch.randint(len(PUBLIC), (31,), generator=generator(i, "batch")))
        (found,) = attacks.Imprint(levels)([seen_by(model, (images, labels))], KNOWN, model, generator(0, "attack"))
        good = caught(found, images)
        assert not (found.certain & ~good).any()
        assert found.loss == 1 - int(found.certain.sum()) / 31
        vouched += int((found.certain & good).sum())
        clean += int(good.sum())
        nearest = torch.cdist(found.images.flatten(1), images.flatten(1)).argmin(1)
        right += int((found.labels == labels[nearest])[found.certain].sum())
    assert clean > 20 * 31 * (1 - 1 / 61) ** 30 * 0.9
    assert vouched >= 0.95 * clean
    assert right >= 0.98 * vouched


def test_images_that_share_a_bin_come_back_as_one_that_is_not_vouched_for():
    model = trapped(7)
    images, labels = drawn(3).batch(torch.arange(3))
    # One brighter than all public images, and two that are as bright as each other.
    images = torch.stack([images[0].clamp(min=0.9), images[1] / 2, images[1].flip(-1) / 2])
    (found,) = attacks.Imprint(levels=0)([seen_by(model, (images, labels))], KNOWN, model, generator(0, "attack"))
    assert found.missed == 1
    assert found.certain.tolist() == [True, False]
    assert metrics.mse(found.images[:1], images[:1]).item() < 1e-9
    # The mean of the two with weights g(x) that add to 1: what is left after the first lies on the line to the second.
    gap, line = (found.images[1] - images[1]).flatten(), (images[2] - images[1]).flatten()
    assert found.images[1].min() > 0
    assert found.images[1].max() < 1  # not clamped
    assert nn.functional.cosine_similarity(gap, line, dim=0).abs() > 0.9999


def test_the_sum_of_many_clients_is_a_larger_batch():
    model, clients, size = trapped(997), 7, 11
    images, labels = drawn(clients * size).batch(torch.arange(clients * size))
    sent = [seen_by(model, batch) for batch in zip(images.split(size), labels.split(size), strict=True)]
    total = {name: sum(one.update[name] for one in sent) for name in sent[0].update}
    seen = Observation(sent[0].params, pack(total), clients * size)
    (found,) = attacks.Imprint()([seen], replace(KNOWN, lr=float(clients)), model, generator(0, "attack"))  # a sum, not a mean
    # 77 * (1 - 1/997)^76 = 71.3 are expected alone, with a deviation of at most sqrt(77 * 0.93 * 0.07) = 2.2.
    assert int(caught(found, images).sum()) >= 71.3 - 4 * 2.2
    assert int(found.certain.sum()) >= 0.95 * int(caught(found, images).sum())


def test_the_sparse_variant_survives_local_steps_and_the_dense_one_does_not():
    images, labels = drawn(32).batch(torch.arange(32))
    caught_after = {}
    for kind in ("relu", "hardtanh"):
        model = trapped(499, kind)
        for steps in (1, 16):
            batches = list(zip(images.split(32 // steps), labels.split(32 // steps), strict=True))
            known = replace(KNOWN, batch_size=32 // steps, local_steps=steps, lr=0.1)
            (found,) = attacks.Imprint()([seen_by(model, *batches, lr=0.1)], known, model, generator(0, "attack"))
            assert len(found.images) + found.missed == 32
            assert not (found.certain & ~caught(found, images)).any()
            caught_after[kind, steps] = int(caught(found, images).sum())
    assert caught_after["hardtanh", 16] == caught_after["hardtanh", 1] == caught_after["relu", 1] > 24
    assert caught_after["relu", 16] < caught_after["relu", 1] / 2


def test_the_base_model_still_gets_the_image():
    images, _ = drawn(17).batch(torch.arange(17))
    for kind, measurement in VARIANTS:
        with torch.no_grad():
            shift = (trapped(127, kind, measurement, strength=0.1).imprint(images) - images).abs().mean()
        # Units add up to about 1 each, times N(0, 0.1 / bins): at most a few tenths of 0.1.
        assert 0 < float(shift) < 0.15


def test_bins_have_a_width_where_all_public_images_measure_the_same():
    grey = Images(torch.full((50, *SHAPE), 128, dtype=torch.uint8), torch.zeros(50, dtype=torch.int64))
    grey.pixels[:3] = 0
    base = mlp(SHAPE, CLASSES, hidden=(3,))
    for kind in ("relu", "hardtanh"):
        weights = servers.Imprint(31, kind)(base, grey, generator(0)).imprint.state_dict()
        assert all(t.isfinite().all() for t in weights.values())
        assert (weights["measure.bias"] / weights["measure.weight"][:, 0]).diff().max() < 0  # edges ascend


def test_the_attack_keeps_the_contract():
    attack = attacks.Imprint()
    assert isinstance(attack, Attack)
    model = trapped(53)
    batches = [drawn(size, f"{size}").batch(torch.arange(size)) for size in (3, 1, 7)]
    seen = [seen_by(model, batch) for batch in batches]
    before = [{name: t.clone() for name, t in one.params.items()} for one in seen]
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    calls: list[tuple[int, int]] = []
    found = attack(seen, KNOWN, model, generator(0), report=lambda done, total: calls.append((done, total)))
    assert torch.equal(torch.get_rng_state(), state)
    assert calls == [(1, 3), (2, 3), (3, 3)]
    for one, (images, _), params, observed in zip(found, batches, before, seen, strict=True):
        assert len(one.images) + one.missed == len(images)
        assert one.images.shape[1:] == SHAPE
        assert one.labels.shape == one.certain.shape == one.images.shape[:1]
        assert one.starts.shape == (1, *one.images.shape)
        assert one.images.amin() >= 0
        assert one.images.amax() <= 1
        assert all(torch.equal(t, params[name]) for name, t in observed.params.items())
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())


def test_an_update_that_is_not_a_number_gives_nothing_and_says_so():
    model = trapped(53)
    seen = seen_by(model, drawn(3).batch(torch.arange(3)))
    broken = pack({name: torch.full_like(t, torch.nan) for name, t in seen.update.items()})
    (found,) = attacks.Imprint()([replace(seen, packets=broken)], KNOWN, model, generator(0))
    assert (len(found.images), found.missed, found.loss, found.converged) == (0, 3, 1.0, False)


def test_an_honest_model_has_nothing_to_read():
    model = mlp(SHAPE, CLASSES)
    with pytest.raises(ValueError, match="run with server=imprint"):
        attacks.Imprint()([seen_by(model, drawn(3).batch(torch.arange(3)))], KNOWN, model, generator(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: servers.Imprint(1), "server.bins must be a whole number >= 2, got 1"),
        (lambda: servers.Imprint(kind="rleu"), "did you mean 'relu'"),
        (lambda: servers.Imprint(measurement="hue"), "choices: brightness, random"),
        (lambda: servers.Imprint(fit="norm"), "did you mean 'normal'"),
        (lambda: servers.Imprint(strength=0), "server.strength must be a number > 0, got 0"),
        (lambda: attacks.Imprint(levels=-1), "levels must be a whole number >= 0, got -1"),
        (lambda: attacks.Imprint(tolerance=0), "tolerance must be a number > 0, got 0"),
        (lambda: Inspection("wran"), "did you mean 'warn'"),
        (lambda: Inspection(parallel=2), r"inspect.parallel must be a number in \(0, 1\], got 2"),
        (lambda: Inspection(dominance=0), "inspect.dominance must be a number > 0, got 0"),
        (lambda: Inspection(owned=-1), r"inspect.owned must be a number in \(0, 1\], got -1"),
    ],
)
def test_settings_are_checked_where_they_enter(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Scoring --------------------------------------------------------------------------------------------------------------------------

SMALL = ["data.train_size=60", "data.test_size=40", "federation.clients=3", "federation.per_round=3", "device=cpu"]
SMALL += ["engine.workers=1", "federation.batch_size=5", "model=mlp_2nn", "rounds=2", "tap.rounds=all", "tap.clients=2"]
TRAP = [*SMALL, "server=imprint", "server.bins=64", "attack=imprint", "inspect=warn"]


def test_what_the_attack_vouches_for_is_matched_before_its_guesses():
    # By least squares alone the exact copy of a would go to b, and the guess to a: 0.3^2 + 0.3^2 < 0 + 0.6^2.
    a, b, guess = (torch.full((1, 1, 1, 1), v) for v in (0.4, 0.7, 0.1))
    images, truth = torch.cat([guess, a]), torch.cat([a, b])
    assert dict(zip(*(t.tolist() for t in metrics.match(images, truth)), strict=True)) == {1: 1, 0: 0}
    found, places = scoring._matched(images, truth, torch.tensor([False, True]))
    assert dict(zip(found.tolist(), places.tolist(), strict=True)) == {1: 0, 0: 1}


def test_missed_images_are_rows_and_each_image_has_its_own_verdict():
    setup = setup_of(compose(SMALL))
    params, buffers = split(setup.model())
    images, labels = setup.truth(1, 0)
    update = local_update(setup.model(), params, buffers, [(images, labels)], lr=1).update
    seen = Observation(params, pack(update), 5, 1, 0, buffers)
    kept = torch.stack([images[3], 1 - images[1].round(), images[0]])
    certain = torch.tensor([True, False, True])
    made = Reconstruction(kept, labels[[3, 1, 0]], 0.4, False, kept[None], torch.tensor([0.4]), 1, 0.1, certain=certain, missed=2)
    rows = {row["image"]: row for row in scoring.leaks(setup, "some", [seen], [made])}
    assert sorted(rows) == [0, 1, 2, 3, 4]
    assert [rows[i]["verdict"] for i in (0, 3)] == ["stolen"] * 2
    assert [rows[i]["converged"] for i in range(5)] == [True, False, False, True, False]
    assert sum(row["reconstruction"] == -1 for row in rows.values()) == 2
    assert all(row["verdict"] == "not converged" and not row["label_right"] for row in rows.values() if row["reconstruction"] < 0)


def test_a_missed_image_is_no_theft_however_dark_it_was(monkeypatch):
    setup = setup_of(compose(SMALL))
    params, buffers = split(setup.model())
    images, labels = setup.truth(1, 0)
    dark = 0.1 * images
    update = local_update(setup.model(), params, buffers, [(dark, labels)], lr=1).update
    seen = Observation(params, pack(update), 5, 1, 0, buffers)
    one = torch.tensor([True])
    made = Reconstruction(dark[:1], labels[:1], 0.4, False, dark[None, :1], torch.tensor([0.4]), 1, 0.1, certain=one, missed=4)
    rows = scoring.compared(setup, seen, made, dark, labels)
    assert [row["verdict"] for row in rows] == ["stolen"] + 4 * ["not converged"]
    rates = success_rates(pd.DataFrame(rows))
    assert [(rate.passed, rate.n) for rate in rates.values()] == [(1, 5)] * len(rates)


# Federations ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def robbed(tmp_path_factory) -> RunFolder:
    """A run of a malicious server."""
    return start(compose(TRAP), tmp_path_factory.mktemp("runs") / "robbed", "a test")


def test_a_malicious_server_robs_a_federation_live_and_from_what_was_captured(robbed):
    leaks = robbed.leaks()
    assert len(leaks) == 2 * 2 * 5
    assert set(leaks["server"]) == {"imprint"}
    certain = leaks[leaks["converged"]]
    # 20 (1 - 1/64)^4 = 18.8 are expected alone.
    assert len(certain) >= 14
    assert certain["mse"].max() < 1e-6
    assert certain["label_right"].all()
    attack_again(robbed, attacks.Imprint(levels=0), "again")
    again = robbed.leaks().query("attack == 'again' and converged")
    assert len(again) >= 0.9 * len(certain)
    assert again["mse"].max() < 1e-6


def test_the_trap_is_set_anew_each_round_while_the_base_model_learns():
    made = config(server={"_target_": "fedsim.servers.Imprint", "bins": 11})
    left = federate(made, rounds=2)
    first, last = left.checkpoints[0].tensors, left.checkpoints[-1].tensors
    assert list(first) == list(last)
    for name, tensor in first.items():
        assert torch.equal(tensor, last[name]) == name.startswith("imprint."), name
        assert torch.equal(tensor, left.seen[0].params[name])


def test_an_honest_server_hands_out_the_very_model():
    model = mlp(SHAPE, CLASSES)
    assert servers.Honest()(model, PUBLIC, generator(0)) is model
    assert servers.Honest().pinned(model) == []
    honest = {"_target_": "fedsim.servers.Honest"}
    with_key, without = (federate(config(**more)).weights for more in ({"server": honest}, {}))
    assert all(torch.equal(t, without[name]) for name, t in with_key.items())


def test_results_of_the_two_servers_never_mix(robbed, tmp_path):
    honest = start(compose([*SMALL, "attack=idlg", "attack.evaluations=3", "inspect=off"]), tmp_path / "honest", "a test")
    assert set(honest.leaks()["server"]) == {"honest"}
    assert contender(honest.config) == "none"
    assert contender(robbed.config) == "none, server=imprint bins=64"
    shown = table.drawn(summarised([honest, robbed]))
    runs = {cell.rsplit(", ", 1)[0] for cell in shown.columns[0].cells if cell.startswith("none")}
    assert runs == {"none", "none, server=imprint bins=64"}


def test_the_card_says_in_plain_words_who_changes_the_model():
    malicious, honest = (dict(card(setup_of(compose(o)), Tap(), "imprint", "none")) for o in (TRAP, SMALL))
    assert malicious["attacker"].startswith("malicious: changes the model: puts a layer of 64 units in front of it")
    assert honest["attacker"].startswith("honest but curious")
    warned = dict(card(setup_of(compose([*SMALL, "inspect=warn"])), Tap(), "imprint", "none"))
    assert warned["clients"].endswith("and warn")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], []),
        (["server.bins=4"], ["server.bins=10"]),  # 5 images in 4 bins: (3/4)^4 = 32 %
        (["federation=fedavg", "federation.batch_size=5", "server.bins=512"], ["server.kind=hardtanh"]),
        (["federation=fedavg", "federation.batch_size=5", "server.bins=512", "server.kind=hardtanh"], []),
    ],
    ids=str,
)
def test_what_weakens_an_imprint_is_not_what_weakens_gradient_matching(overrides, expected):
    made = compose([*TRAP, *overrides])
    found = obstacles(setup_of(made), attack_of(made))
    assert len(found) == len(expected)
    assert all(cure in why for (_, why), cure in zip(found, expected, strict=True))


def test_the_attack_without_its_server_is_refused_before_anything_starts():
    with pytest.raises(ConfigError, match="add server=imprint"):
        check_config(compose([*SMALL, "attack=imprint"]))


def test_a_run_of_an_earlier_version_goes_on_with_an_honest_server(tmp_path):
    made = compose([*SMALL, "attack=none", "rounds=1"])
    for key in ("server", "inspect"):
        del made[key], made["choices"][key]
    check_config(made)
    assert setup_of(made).server == servers.Honest()
    assert contender(resume(start(made, tmp_path / "old", "a test")).config) == "none"


# Inspection -----------------------------------------------------------------------------------------------------------------------

CIFAR = (3, 32, 32)
HONEST = {
    "mlp": lambda: mlp(CIFAR, 10, hidden=(200, 200)),
    "mcmahan_cnn": lambda: mcmahan_cnn(CIFAR, 10),
    "resnet18": lambda: resnet18(CIFAR, 10, norm="group"),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_models_hold_no_trap(name):
    model = HONEST[name]()
    params, buffers = split(model)
    images = torch.rand(4, *CIFAR, generator=generator(0, "images"))
    found = Inspection()(model, params, buffers, images, torch.tensor([3, 1, 4, 1]))
    assert not [one for one in found if one.trap]
    assert max(parallel_rows(model, params).values()) < 0.1


@pytest.mark.parametrize(("kind", "measurement"), VARIANTS)
def test_every_imprint_is_found(kind, measurement):
    model = trapped(23, kind, measurement)
    params, buffers = split(model)
    found = Inspection()(model, params, buffers)  # before any image is touched
    assert {one.layer for one in found} == {"imprint.measure.weight", "imprint.spread.weight"}
    assert all(one.trap and one.value == 1.0 for one in found)
    assert Inspection("off")(model, params, buffers) == []


@pytest.mark.parametrize("unused", [False, True])
def test_a_model_without_a_linear_layer_that_tells_of_images_is_inspected_all_the_same(unused):
    layers = [nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = Aside(*layers) if unused else nn.Sequential(*layers)
    params, buffers = split(model)
    images = torch.rand(4, *CIFAR, generator=generator(0, "images"))
    assert Inspection()(model, params, buffers, images, torch.tensor([3, 1, 4, 1])) == []
    assert exposure(model, params, buffers, images, torch.tensor([3, 1, 4, 1])) == {}


class Aside(nn.Sequential):
    """A network with a linear layer whose outputs nobody looks at."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.aside = nn.Linear(10, 3)

    def forward(self, images: Tensor) -> Tensor:
        for layer in list(self)[:3]:
            images = layer(images)
        self.aside(images)
        return images


def test_rows_are_parallel_whatever_their_length_and_sign():
    layer = nn.Sequential(nn.Linear(13, 20))
    rng = generator(0, "rows")
    weight = torch.randn(20, 13, generator=rng)
    weight[:15] = torch.randn(15, 1, generator=rng) * weight[0]
    assert parallel_rows(layer, {"0.weight": weight})["0.weight"] == 0.75
    weight[15:18] = 0  # these measure nothing
    assert parallel_rows(layer, {"0.weight": weight})["0.weight"] == pytest.approx(0.9)


def test_exposure_is_that_of_the_single_gradients():
    model = mlp((1, 3, 5), 5, hidden=(7,), rng=generator(0, "model"))
    params, buffers = split(model)
    rng = generator(0, "batch")
    images, labels = torch.rand(6, 1, 3, 5, generator=rng), torch.randint(5, (6,), generator=rng)
    images[0] = 20  # its gradient outweighs the others'
    found = exposure(model, params, buffers, images, labels, ratio=3.0)
    single = [local_update(model, params, buffers, [(x[None], y[None])], lr=1).update for x, y in zip(images, labels, strict=True)]
    for name, (dominance, owned) in found.items():
        g = torch.stack([one[name] for one in single]).double()  # (B, U, D)
        rest = g.sum(0) - g
        assert dominance == pytest.approx(float((g.flatten(1).norm(dim=1) / rest.flatten(1).norm(dim=1)).max()), rel=1e-4)
        rows = (g.norm(dim=2) > 0) & (g.norm(dim=2) >= 3 * rest.norm(dim=2))
        assert owned == pytest.approx(float(rows.any(1).float().mean()))
    assert 0 < found["features.1.weight"][1] < 1


def test_clients_that_warn_train_on_and_their_findings_are_in_the_run(robbed):
    found = robbed.findings()
    # 3 clients in 2 rounds, two layers of the module.
    assert len(found[found["check"] == "parallel rows"]) == 3 * 2 * 2
    assert set(found.loc[found["trap"], "layer"]) == {"imprint.measure.weight", "imprint.spread.weight"}
    assert not found["refused"].any()
    assert "inspection: 100% of the units of imprint.measure.weight" in (robbed.path / "log.txt").read_text()
    assert "3 clients found parallel rows, first in round 1" in table.drawn(summarised([robbed])).caption
    robbed_again = RunFolder(robbed.path)
    assert sorted(robbed_again.findings()["round"].unique()) == [1, 2]


def test_clients_that_refuse_send_nothing(tmp_path):
    with pytest.raises(
        FederationError, match=r"none of the 3 chosen clients sent an update: client 0: Refused: client 0 refuses: 100% of the"
    ):
        start(compose([*TRAP, "inspect=refuse"]), tmp_path / "refused", "a test")
    folder = RunFolder(tmp_path / "refused")
    assert len(folder.leaks()) == 0
    assert set(folder.findings()["client"]) == {0, 1, 2}
    assert folder.findings()["refused"].all()
    folder.rewind(0)
    assert len(folder.findings()) == 0


def test_a_leak_of_an_honest_model_is_warned_of_and_not_refused(tmp_path):
    # A ReLU layer of 200 units lets 5 images own most units: the client is told, and trains.
    folder = start(compose([*SMALL, "attack=none", "inspect=refuse", "rounds=1"]), tmp_path / "honest", "a test")
    assert set(folder.findings()["check"]) == {"owned units"}
    assert not folder.findings()["refused"].any()
    assert list(folder.rounds()["failures"]) == [0, 0]
    assert json.loads((tmp_path / "honest" / "config.json").read_text())["choices"]["inspect"] == "refuse"
