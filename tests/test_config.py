"""Configurations: every file composes and builds, and what cannot be meant is told in one line that names the nearest."""

import re

import pytest
import torch
from torch import nn

from experiments.config import GROUPS, ConfigError, build_checked, choices, compose, sweep
from experiments.naming import label
from experiments.runner import check_config
from fedsim.defense import Defense
from fedsim.setup import build

FILES = [(group, name) for group in GROUPS for name in choices(group)]


def ids(pairs: list[tuple[str, str]]) -> list[str]:
    return [f"{group}={name}" for group, name in pairs]


@pytest.mark.parametrize(("group", "name"), FILES, ids=ids(FILES))
def test_every_choice_composes_and_says_what_it_is_in_its_first_line(group, name):
    what = choices(group)[name]
    assert re.fullmatch(r"[A-Z].*\.", what), what
    config = compose([f"{group}={name}"])
    if "/" not in group:
        assert config["choices"][group] == name


BUILT = [(group, name) for group, name in FILES if group in ("partition", "federation", "defense", "attack", "engine")]


@pytest.mark.parametrize(("group", "name"), BUILT, ids=ids(BUILT))
def test_every_choice_builds(group, name):
    node = compose([f"{group}={name}"])[group]
    if (group, name) == ("attack", "none"):
        assert not node
        return
    if (group, name) == ("engine", "ray"):
        pytest.importorskip("ray")
    made = build_checked(group, node)
    assert callable(getattr(made, "run", made)) or group == "federation"
    if group == "defense":
        assert isinstance(made, Defense)


@pytest.mark.parametrize("name", choices("strategy"))
def test_every_strategy_builds_with_what_the_server_adds(name):
    shares = {
        "fraction_train": 0.5,
        "min_train_nodes": 5,
        "min_available_nodes": 10,
        "fraction_evaluate": 0.5,
        "min_evaluate_nodes": 1,
    }
    node = compose([f"strategy={name}"])["strategy"]
    made = build(node, **shares)
    for setting, value in {**node, **shares}.items():
        if setting != "_target_":
            assert getattr(made, setting) == value


INITIALIZED = [
    *([f"model={name}"] for name in choices("model")),
    *(["model=lenet", f"model/init={name}"] for name in choices("model/init")),
    *(
        [f"model={model}", f"model/bottleneck={name}"]
        for model in choices("model")
        for name in choices("model/bottleneck")
        if model != "bert_tiny" and not (name == "cvb" and ("mlp" in model))  # no sentences, no feature maps
    ),
]


@pytest.mark.parametrize("overrides", INITIALIZED, ids=" ".join)
def test_every_model_and_every_initialization_builds(overrides):
    node = compose(overrides)["model"]
    if overrides == ["model=bert_tiny"]:
        model = build(node, image_shape=(11,), num_classes=7, mean=None, std=None, rng=torch.Generator().manual_seed(0))
        assert model(torch.tensor([[0, 3, 6]])).shape == (1, 3, 7)
        return
    model = build(node, image_shape=(3, 16, 16), num_classes=7, mean=[0.5] * 3, std=[0.2] * 3, rng=torch.Generator().manual_seed(0))
    assert isinstance(model, nn.Module)
    output = model.eval()(torch.rand(2, 3, 16, 16))
    assert (output[0] if node.get("bottleneck") else output).shape == (2, 7)


def test_the_default_configuration_can_be_run():
    check_config(compose([]))


def test_choices_and_settings_are_what_was_asked_for():
    config = compose(["defense=topk", "defense.ratio=0.3", "rounds=7", "tap.clients=[1,3]", "tap.rounds=all"])
    assert config["defense"] == {"_target_": "defenses.TopK", "ratio": 0.3, "scope": "tensor"}
    assert config["rounds"] == 7
    assert config["tap"]["clients"] == [1, 3]
    assert config["choices"]["defense"] == "topk"


LABELS = [
    ([], "none"),
    (["defense=topk", "defense.ratio=0.3"], "topk ratio=0.3 scope=tensor"),
    (["defense=gaussian"], "gaussian relative=0.3"),
    (["defense=topk_ef"], "topk_ef ratio=0.1"),
    (["defense=topk_stochastic", "defense.parts.1.levels=4"], "topk_stochastic ratio=0.1 levels=4"),
    (["defense=precode", "model.bottleneck.width=64"], "precode width=64 beta=0.001"),
    (["model/bottleneck=dropout"], "none, bottleneck=dropout p=0.5"),
    (["defense=topk", "model/bottleneck=cvb"], "topk ratio=0.1 scope=tensor, bottleneck=cvb kernel=3 beta=0.001 after=1"),
    (["defense=ppp"], "ppp prefixes=features. relative=0.1, bottleneck=precode width=256 beta=0.001"),
    (["model=bert_tiny", "data=text"], "none"),
]


@pytest.mark.parametrize(("overrides", "expected"), LABELS, ids=[expected for _, expected in LABELS])
def test_a_label_is_the_choice_and_its_settings(overrides, expected):
    assert label(compose(overrides)) == expected


def test_a_defense_in_the_model_is_a_choice_among_the_others():
    cells = [compose(cell) for cell in sweep(["setting=quickstart", "defense=none,topk,precode"])]
    assert [label(config) for config in cells] == ["none", "topk ratio=0.1 scope=tensor", "precode width=256 beta=0.001"]
    assert [bool(config["model"]["bottleneck"]) for config in cells] == [False, False, True]
    assert cells[2]["defense"] == cells[0]["defense"]


@pytest.mark.parametrize("folder", ["~/data", "/tmp/d(1)", "/tmp/it's", "~/it's [here] {there}", "/plain/one", "with some space"])
def test_a_folder_is_taken_as_it_was_typed(folder):
    for key in ("data.root", "out", "name"):
        alone, swept = compose([f"{key}={folder}"]), [compose(one) for one in sweep([f"{key}={folder}", "seed=1,2"])]
        for config in (alone, *swept):
            assert (config["data"]["root"] if key == "data.root" else config[key]) == folder
        assert [config["seed"] for config in swept] == [1, 2]
    quoted = compose(["data.root='~/data, the second'"])
    assert quoted["data"]["root"] == "~/data, the second"


def test_a_sweep_is_the_product_of_all_lists():
    cells = sweep(["defense=none,topk", "seed=0,1", "tap.clients=[1,2]"])
    assert cells == [[f"defense={d}", f"seed={s}", "tap.clients=[1,2]"] for d in ("none", "topk") for s in (0, 1)]


# (overrides, what the message holds): unknown names and settings are found as the configuration is composed, values before a run.
WRONG = [
    (["attack=dgl"], "unknown attack 'dgl': did you mean 'dlg'? choices: "),
    (["model/init=xaver"], "unknown model/init 'xaver': did you mean 'xavier'? choices: "),
    (["defence=topk"], "unknown setting 'defence': did you mean 'defense'?"),
    (["defense.ration=1"], "unknown setting 'defense.ration': defense has no settings"),
    (["defense=topk", "defense.ration=1"], "unknown setting 'defense.ration': did you mean 'ratio'?"),
    (["defense=topk_stochastic", "defense.parts.1.level=4"], "unknown setting 'defense.parts.1.level': did you mean 'levels'?"),
    (["defense=topk", "defense.ratio=2"], "ratio must be a number in (0, 1], got 2"),
    (["defense=none,topk"], "add -m"),
    (["seed=0,1"], "-m"),
    (["rounds"], "'rounds' is not a setting"),
    (["name=.."], "name=.. is no name of a folder: say with out= where it goes"),
    (["name=a/b"], "name=a/b is no name of a folder"),
    (
        ["rounds=1", "tap.every=null", "tap.rounds=[50]"],
        "tap.rounds=[50] come after the last round, rounds=1: nobody is listened to",
    ),
    (["rounds=4", "tap.rounds=null"], "tap.every=5 come after the last round, rounds=4: nobody is listened to"),
    (["tap.clients=[]"], "tap.clients=[] listens to nobody"),
    (["data=cifar10", "data.root=123"], "data.root must be a folder, got 123"),
    (["device=meta"], "device 'meta' is not usable here, take device=auto or device=cpu: its tensors hold no numbers"),
    (["strategy=bulyan", "federation.per_round=6"], "num_malicious_nodes=1 takes 7 clients a round (4 f + 3), and federation"),
    (["strategy=krum", "strategy.num_malicious_nodes=1.5"], "strategy.num_malicious_nodes must be a whole number >= 0, got 1.5"),
    (["strategy=multikrum", "strategy.num_nodes_to_select=0"], "strategy.num_nodes_to_select must be a whole number >= 1, got 0"),
    (["partition=by_class", "partition.classes_per_client=1.5"], "classes_per_client must be a whole number >= 1, got 1.5"),
    (["engine=ray", "engine.cpus=4096"], "engine.cpus=4096 is what one client takes, and this machine has "),
    (["tap.clients=[0,99]"], "tap.clients names client 99, and of federation.clients="),
    (["defense=dpsgd", "model=resnet18", "model.norm=batch"], "DPSGD needs each example's own gradient, and "),
    (["partition=dirichlet", "partition.min_size=0"], "partition.min_size must be a whole number >= 1, got 0"),
    (["rounds=0"], "rounds must be a whole number >= 1, got 0"),
    (["rounds=abc"], "rounds must be a whole number >= 1, got 'abc'"),
    (["rounds=2.5"], "rounds must be a whole number >= 1, got 2.5"),
    (["seed=-1"], "seed must be a whole number >= 0, got -1"),
    (["device=tpu"], "device 'tpu' is not usable here, take device=auto or device=cpu"),
    (["device=cuda:99"], "device 'cuda:99' is not usable here"),
    (["tap.when=lvie"], "unknown tap.when 'lvie': did you mean 'live'?"),
    (["tap.every=0"], "tap.every must be a whole number >= 1, got 0"),
    (["evaluate.every=0"], "evaluate.every must be a whole number >= 1, got 0"),
    (["evaluate.clients=perhaps"], "evaluate.clients must be true or false, got 'perhaps'"),
    (["federation.per_round=11"], "federation.per_round=11 are more than federation.clients=10: add federation.per_round=10"),
    (["federation.lr=fast"], "federation.lr must be a number, got 'fast'"),
    (["federation=fedavg", "federation.momentum=-0.1"], "federation.momentum must be a number in [0, 1], got -0.1"),
    (["federation=fedavg", "federation.train_mode=2"], "federation.train_mode must be true or false, got 2"),
    (["data=cifar10", "data.root=/nonexistent"], "/nonexistent"),
    (["data.train_size=0"], "data.train_size must be a whole number >= 1, got 0"),
    (["data.test_size=many"], "data.test_size must be a whole number >= 1, got 'many'"),
    (["model.activation=sigmoyd"], "unknown activation 'sigmoyd': did you mean 'sigmoid'?"),
    (["data.name={}"], "unknown dataset {}: choices: synthetic, cifar10,"),
    (["model=mcmahan_cnn", "model.dropout=2"], "dropout"),
    (["model/bottleneck=precod"], "unknown model/bottleneck 'precod': did you mean 'precode'?"),
    (["defense=precode", "model.bottleneck.width=0"], "width must be a whole number >= 1, got 0"),
    (["defense=precode", "model.bottleneck.after=4"], "bottleneck.after must be a whole number in 1..3, got 4"),
    (["defense=precode", "model.bottleneck.after=0"], "after must be a whole number >= 1, got 0"),
    (["defense=cvb", "model.bottleneck.kernel=4"], "kernel must be odd, so that feature maps keep their size, got 4"),
    (["defense=cvb", "model=precode_mlp"], "a convolutional bottleneck needs feature maps, and these have shape (1024,): set"),
    (["defense=dropout", "model.bottleneck.p=1"], "p must lie in [0, 1), got 1"),
    (["defense=precode", "model=bert_tiny"], "defense=precode stands in the model, and this one has no place for it: take model="),
    (["defense=ppp", "defense.prefixes=[]"], "prefixes must be a list of at least one beginning of a name"),
    (["data.side=7"], "data.side must be a whole number in 8..512, got 7"),
    (["data.side=big"], "data.side must be a whole number in 8..512, got 'big'"),
    (["data.side=8"], "data.side must be at least 11, SSIM's window, for an attack to be scored, got 8"),
    (["device=[]"], "device must be a name, such as auto or cpu, got []"),
    (
        ["model=bert_tiny", "model/bottleneck=dropout"],
        "model/bottleneck=dropout stands in the model, and this one has no",
    ),
    (["model.convs=1"], "convs must be at least 2, got 1"),
    (["model=resnet18", "model.norm=bach"], "unknown norm 'bach': did you mean 'batch'?"),
    (["model/init=uniform", "model.init.a=x"], "model.init.a must be a number, got 'x'"),
    (["partition=dirichlet", "partition.alpha=-1"], "alpha must be > 0, got -1"),
    (["partition=dirichlet", "partition.alpha=x"], "partition.alpha must be a number, got 'x'"),
    (["partition=size_skewed", "partition.kind=liner"], "did you mean 'linear'?"),
    (["strategy=fedadam", "strategy.eta=x"], "strategy.eta must be a number, got 'x'"),
    (["model.convs=2.5"], "model.convs must be a whole number, got 2.5"),
    (["strategy=fedadam", "strategy.beta_1=1.5"], "strategy.beta_1 must be below 1, got 1.5"),
    (["strategy=fedyogi", "strategy.tau=0"], "strategy.tau must be a number > 0, got 0"),
    (["strategy=fedprox", "strategy.proximal_mu=-1"], "strategy.proximal_mu must be a number >= 0, got -1"),
    (["attack=analytic"], "attack=analytic does not fit model=lenet: no linear layer with a bias sees the image first"),
    (["attack=spear", "model=resnet18"], "attack=spear does not fit model=resnet18: no linear layer with a bias sees the"),
    (["attack=rgap", "defense=precode"], "attack=rgap does not fit model=lenet: R-GAP needs a plain fedsim.models.Classifier"),
    (["strategy=krum", "strategy.num_malicious_nodes=few"], "strategy.num_malicious_nodes must be a number, got 'few'"),
    (["attack.restarts=0"], "restarts must be"),
    (["federation.lr=0.1("], "'federation.lr=0.1(' cannot be read as a setting: put its value in quotes of its own, as in"),
    (["attack.evaluations=x"], "attack.evaluations must be a number, got 'x'"),
    (["engine.workers=0"], "engine.workers must be a whole number >= 1, got 0"),
    (["defense._target_=defenses.TopQ"], "defenses.TopQ"),
    (["model.init=he"], "model.init holds settings, got 'he': choose with model/init=he"),
    (["model.bottleneck=x"], "model.bottleneck holds settings, got 'x': choose with model/bottleneck=x"),
    (["model=resnet18", "data.side=8", "attack=none"], "model=resnet18 fails on 1 of (3, 8, 8): Expected more than 1 value"),
    (["defense=dp_fedavg", "defense.delta=1"], "delta=1 promises nothing: take less than one over the number of examples"),
    (["data.train_size=7"], "data.train_size=7 examples are too few for federation.clients=10"),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG, ids=[" ".join(overrides) for overrides, _ in WRONG])
def test_what_cannot_be_meant_is_told_in_one_line(overrides, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        check_config(compose(overrides))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_attack_s_class_is_found_by_name_only():
    with pytest.raises(ConfigError, match="unknown setting 'restart': did you mean 'restarts'"):
        build_checked("attack", {"_target_": "attacks.dlg", "restart": 3})
