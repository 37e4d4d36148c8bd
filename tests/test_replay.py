"""The command that makes a run again composes to the run's configuration."""

import shlex

import pytest

from experiments.config import compose
from experiments.deploy import configured
from experiments.replay import replay


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=5"],
        ["setting=dlg", "attack=idlg", "tap.clients=all", "defense=topk", "defense.ratio=0.3"],
        ["setting=quickstart", "data=cifar10", "defense=precode", "tap.rounds=[1,200]"],
        ["defense=gaussian", "defense.relative=null", "defense.variance=1e-4", "partition=dirichlet", "strategy=fedadam"],
        ["model=mcmahan_cnn", "model/init=xavier", "model.init.gain=2.0"],
        ["model/init=default"],
        ["defense._target_=mine.NoBias", "+defense.dimensions=2"],
        ["model=lenet_silu", "model/init=kaiming"],
        ["data=cifar10", "data.root=/data/a b", "federation=fedavg", "model=resnet20", "server=imprint", "attack=imprint"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_the_command_of_a_run_composes_to_its_configuration(overrides):
    config = compose(overrides)
    command = replay(config)
    assert command is not None
    assert compose(shlex.split(command)[2:]) == config


@pytest.mark.parametrize("nodes", [3, 7])
def test_the_command_of_a_deployment_deploys_it_again(nodes):
    config = configured(["defense=topk", "federation.per_round=3", "engine.timeout=60", "seed=2"], nodes)
    command = replay(config)
    assert command is not None
    deploy, option, number, *overrides = shlex.split(command)[1:]
    assert (deploy, option, number) == ("deploy", "--nodes", str(nodes))
    assert configured(overrides, nodes) == config


def test_there_is_no_command_that_would_leave_settings_of_another_class():
    config = compose(["model=lenet"])
    own = config["model"] | {"init": {"_target_": "mine.Weights", "a": 0.1}}
    assert replay(config | {"model": own}) is None
    more = config["model"] | {"init": {"_target_": "mine.Weights", "a": 0.1, "b": 0.2}}
    assert "model.init._target_=mine.Weights" in (replay(config | {"model": more}) or "")


def test_there_is_no_command_for_what_todays_choices_do_not_have():
    config = compose(["defense=topk"])
    assert replay(config | {"choices": config["choices"] | {"defense": "gone"}}) is None
    assert replay(config | {"defense": config["defense"] | {"gone": 1}}) is None
