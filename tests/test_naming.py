"""What runs are called among others: never two of different settings by one name."""

import pytest

from experiments.config import compose, usual
from experiments.naming import conditions, contenders, named, without_defense
from experiments.naming import contender as alone

QUICK = ["setting=quickstart", "data=synthetic"]


def called(*several: list[str]) -> list[str]:
    return contenders([compose([*QUICK, *overrides]) for overrides in several])


def test_runs_that_defenses_tell_apart_have_short_names():
    assert called(["defense=none"], ["defense=topk", "defense.ratio=0.1"]) == ["none", "topk ratio=0.1 scope=tensor"]


def test_seeds_attackers_attacks_and_taps_do_not_tell_runs_apart():
    found = called(["seed=0"], ["seed=1", "attacker=adaptive"], ["attack=idlg", "attack.restarts=4"], ["tap.every=7"])
    assert set(found) == {"none"}


def test_what_changes_no_result_does_not_tell_runs_apart():
    found = called([], ["engine=ray"], ["engine.workers=1", "evaluate.every=null"], ["data.root=/elsewhere", "attack.record=5"])
    assert set(found) == {"none"}


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        (["federation.lr=0.1"], ["federation.lr=0.2"], ["none, lr=0.1", "none, lr=0.2"]),
        (["model=lenet"], ["model=mcmahan_cnn"], ["none, model=lenet", "none, model=mcmahan_cnn"]),
        (["data=synthetic"], ["data=cifar10"], ["none, data=synthetic", "none, data=cifar10"]),
        (["model/init=xavier"], ["model/init=kaiming"], ["none, init=Xavier", "none, init=Kaiming"]),
        (["attack=idlg"], ["attack=idlg", "attack.restarts=4"], ["none, restarts=3", "none, restarts=4"]),
        (["rounds=3"], ["rounds=4", "federation.batch_size=2"], ["none, rounds=3 batch_size=1", "none, rounds=4 batch_size=2"]),
    ],
)
def test_a_setting_that_differs_is_in_the_name(first, second, names):
    found = called(first, second)
    assert [set(name.replace(",", "").split()) for name in found] == [set(name.replace(",", "").split()) for name in names]


def test_a_class_in_a_choice_s_place_is_what_was_chosen():
    plain, own = compose([]), compose(["defense._target_=mine.NoBias", "+defense.dimensions=2"])
    trap = compose(["server._target_=mine.Trap"])
    assert own["choices"]["defense"] == "mine.NoBias"
    assert [without_defense(one) for one in (plain, own)] == [True, False]
    assert contenders([plain, own, trap]) == ["none", "mine.NoBias dimensions=2", "none, server=mine.Trap"]
    search = compose(["attack._target_=attacks.idlg"])
    assert named(search["choices"]["attack"], {"_target_": "attacks.idlg"}, usual("attack", "attacks.idlg")) == "attacks.idlg"


def test_what_came_with_a_choice_is_not_told_beside_it_unless_it_differs_within_the_choice():
    assert called(["partition=iid"], ["partition=dirichlet"]) == ["none, partition=iid", "none, partition=dirichlet"]
    uneven = [["partition=dirichlet", f"partition.alpha={alpha}"] for alpha in (0.1, 0.3)]
    found = called(["partition=iid"], *uneven)
    assert found == ["none, partition=iid", "none, partition=dirichlet alpha=0.1", "none, partition=dirichlet alpha=0.3"]


def test_a_setting_is_told_of_all_runs_that_have_it():
    found = called(["federation.lr=0.1"], ["federation.lr=0.2"], ["defense=topk", "federation.lr=0.2"])
    assert found == ["none, lr=0.1", "none, lr=0.2", "topk ratio=0.1 scope=tensor, lr=0.2"]


def test_what_defenses_were_tried_under_is_told_where_it_was_not_the_same():
    found = called(["rounds=3"], ["defense=topk", "rounds=4"], ["defense=clip", "rounds=4"])
    assert found == ["none, rounds=3", "topk ratio=0.1 scope=tensor, rounds=4", "clip clip=1.0, rounds=4"]


def test_two_names_differ_wherever_what_is_trained_does():
    tried = [[f"federation.batch_size={size}", f"model={model}"] for size in (1, 2) for model in ("lenet", "mlp_2nn")]
    tried += [["defense=precode"], ["model/bottleneck=precode"], ["aggregation=secure", "federation.batch_size=2"]]
    configs = [compose([*QUICK, *overrides]) for overrides in tried]
    names = contenders(configs)
    assert len(set(names)) == len({(alone(config), conditions(config)) for config in configs})
