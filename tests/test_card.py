"""The threat-model card names every condition that defeats the attack, and what would lift it."""

import pytest

from attacks import GradientMatching
from experiments.card import card, defended, obstacles
from experiments.config import compose
from experiments.naming import label
from experiments.runner import attack_of
from experiments.scoring import is_told_labels
from fedsim.setup import setup_of
from fedsim.tap import Tap

SMALL = ["data.train_size=60", "data.test_size=10", "federation.clients=3", "federation.per_round=3"]
LOCAL = ["federation=fedavg", "federation.batch_size=4"]  # 20 images a client: 5 steps an epoch


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], []),
        (["federation.batch_size=2"], ["weak federation.batch_size=1"]),
        (["federation.batch_size=9"], ["hopeless federation.batch_size=1"]),
        ([*LOCAL, "attack=fedavg"], ["weak federation.batch_size=1"]),
        (LOCAL, ["weak attack=fedavg", "weak federation.batch_size=1"]),
        ([*LOCAL, "federation.epochs=2"], ["hopeless attack=fedavg", "weak federation.batch_size=1"]),
        (
            [*LOCAL, "federation.momentum=0.9", "federation.weight_decay=0.1"],
            [
                "weak attack=fedavg",
                "weak federation.momentum=0",
                "weak federation.batch_size=1",
            ],
        ),
        (["model=mlp_2nn", "model.activation=tanh", "model.dropout=0.5"], ["hopeless model.dropout=0"]),
        (["model=mlp_2nn", "model.activation=tanh", "model.dropout=0.5", "federation.train_mode=false"], []),
        (["model=mcmahan_cnn", "model.activation=tanh", "model.norm=batch"], ["weak federation.train_mode=false"]),
        ([*LOCAL, "federation.momentum=0.9", "federation.weight_decay=0.1", "attack=fedavg"], ["weak federation.batch_size=1"]),
        (["model=lenet", "model.activation=relu"], ["weak model.activation=sigmoid"]),
        (["model=lenet", "model.activation=relu", "attack=cosine_lbfgs"], ["weak model.activation=sigmoid"]),
        (["model=lenet", "model.activation=relu", "attack=inverting_gradients"], []),
    ],
    ids=lambda value: " ".join(value) or "nothing",
)
def test_each_obstacle_is_graded_and_comes_with_its_cure(overrides, expected):
    config = compose([*SMALL, *overrides])
    found = obstacles(setup_of(config), attack_of(config))
    assert [grade for grade, _ in found] == [line.split()[0] for line in expected]
    for (_, why), line in zip(found, expected, strict=True):
        assert line.split()[1] in why


def test_the_card_tells_one_gradient_from_local_training():
    gradient = dict(card(setup_of(compose(SMALL)), Tap(), "dlg", "none"))
    local = dict(card(setup_of(compose([*SMALL, *LOCAL])), Tap(clients=[0, 2]), "dlg", "none"))
    assert gradient["local steps"] == "told: 1"
    assert gradient["learning rate"].startswith("not needed")
    assert gradient["labels"] == local["labels"] == "not told"
    assert local["local steps"] == "told: 5"
    assert local["batch size"] == "told: 4 a step, out of 20 images"
    assert local["taps"] == "every 5 rounds, clients [0, 2]"


def test_no_step_has_more_images_than_a_client():
    lines = dict(card(setup_of(compose([*SMALL, "federation.batch_size=1000"])), Tap(), "dlg", "none"))
    assert lines["batch size"] == "told: 20, all that a client has (federation.batch_size=1000)"


@pytest.mark.parametrize(("name", "units"), [("dpsgd", "20 examples of the smallest shard"), ("dp_fedavg", "3 clients")])
def test_a_delta_that_promises_nothing_is_named(name, units, recwarn, caplog):
    private = [*SMALL, f"defense={name}", "rounds=1"]
    small, large = (
        dict(card(setup_of(compose([*private, f"defense.delta={delta}"])), Tap(), "dlg", name)) for delta in (1e-5, 0.4)
    )
    assert "delta" not in small
    assert f"one of the {units} away" in large["delta"] or f"one of {units} away" in large["delta"]
    assert not caplog.records  # of an order for which the library has no number
    assert not recwarn


def test_an_attack_that_is_told_the_labels_is_said_to_be():
    for name in ("cosine_adam", "gias"):
        for told, says in ((True, "told: the true ones"), (False, "not told")):
            attack = attack_of(compose([*SMALL, f"attack={name}", f"attack.told={str(told).lower()}"]))
            lines = dict(card(setup_of(compose(SMALL)), Tap(), name, "none", given=is_told_labels(attack)))
            assert lines["labels"] == says
    assert is_told_labels(GradientMatching(init=GradientMatching(labels="given")))


def test_a_defense_of_ones_own_is_a_defense():
    plain, own = (setup_of(compose([*SMALL, *more])) for more in ([], ["defense._target_=defenses.SignSGD"]))
    assert [defended(setup.config["choices"], setup.model) for setup in (plain, own)] == [False, True]
    says = [dict(card(setup, Tap(), "dlg", label(setup.config), [True]))["the defense"] for setup in (plain, own)]
    assert says[0] == "there is none"
    assert says[1].startswith("told")


def test_what_clients_say_of_their_own_images_is_on_the_card():
    scored = [*SMALL, "evaluate.clients=true"]
    assert "scores" not in dict(card(setup_of(compose(SMALL)), Tap(), "dlg", "none"))
    assert dict(card(setup_of(compose(scored)), Tap(), "dlg", "none"))["scores"].startswith(
        "seen, unprotected: each client's accuracy"
    )
    private = dict(card(setup_of(compose([*scored, "defense=dpsgd", "rounds=1"])), Tap(), "dlg", "dpsgd"))
    assert "each client's accuracy and loss on all its own examples" in private["not covered"]
    assert "refuses" not in private["not covered"]
    refusing = dict(card(setup_of(compose([*SMALL, "defense=dpsgd", "rounds=1", "inspect=refuse"])), Tap(), "dlg", "dpsgd"))
    assert "whether a client refuses" in refusing["not covered"]


def test_shards_of_different_size_are_told_as_a_range():
    config = compose([*SMALL, *LOCAL, "partition=size_skewed"])
    # 60 images in proportion 1 : 2 : 3, the last client taking what rounding leaves: 10, 20, 30, and 8 steps of 4.
    lines = dict(card(setup_of(config), Tap(), "dlg", "none"))
    assert lines["batch size"] == "told: 4 a step, out of 10 to 30 images"
    assert lines["local steps"] == "told: 8"


@pytest.mark.parametrize(
    ("overrides", "tap", "told", "expected"),
    [
        (["defense=topk_ef"], Tap(), [True], ["not used"]),
        (["defense=topk_ef"], Tap(every=1, clients="all"), [False, True], ["used"]),
        (["defense=topk_ef"], Tap(every=1, clients="all"), [False], []),
        (["defense=topk", "federation.batch_size=21"], Tap(), [True], ["held together"]),  # of 20 images
        (["defense=topk", "federation.batch_size=20"], Tap(), [True], []),
    ],
)
def test_what_other_rounds_tell_is_told(overrides, tap, told, expected):
    lines = card(setup_of(compose([*SMALL, *overrides])), tap, "dlg", "", told)
    assert [says.split(":")[0].split(" with")[0] for what, says in lines if what == "other rounds"] == expected
