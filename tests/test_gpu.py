"""On a GPU every defense sends, every network learns and every attack finds what it does on a CPU, up to rounding."""

import math
import os
from pathlib import Path

import pytest
import torch
from torch.nn.functional import conv2d
from worlds import assert_same

from experiments import runner
from experiments.config import choices, compose
from fedsim.run import RunFolder
from fedsim.setup import device_of
from fedsim.updates import relative_error

GPU = os.environ.get("FEDSIM_TEST_GPU", "cuda")  # `cpu` tries the tests themselves where there is no GPU

if GPU == "cuda" and not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

SMALL = ["data.train_size=64", "data.test_size=48", "federation.clients=4", "federation.per_round=2", "rounds=2"]
HEARD = ["tap.every=null", "tap.rounds=[2]", "tap.clients=all", "tap.when=end", "evaluate.every=null"]
TEXT = ["data=text", "model=bert_tiny", "federation.batch_size=2"]
SHORT = {"evaluations": 30, "iterations": 30, "steps": 30, "restarts": 1, "draws": 5000, "starts": 4}
IN_NEED = {  # what a choice asks of the rest of the run
    "analytic": ["model=mlp_2nn"],
    "bag_of_tokens": TEXT,
    "dager": TEXT,
    "dlg_text": TEXT,
    "tag": TEXT,
    "fedavg": ["federation=fedavg", "federation.clients=4", "federation.per_round=2", "federation.batch_size=2"],
    "gradinversion": ["model=resnet20", "model.norm=batch", "federation.train_mode=false"],
    "imprint": ["server=imprint", "federation.batch_size=4"],
    "precode_aware": ["model/bottleneck=precode"],
    "precode_ignore": ["model/bottleneck=precode"],
    "precode_naive": ["model/bottleneck=precode"],
    "rgap": ["model=lenet"],
    "spear": ["model=mlp_2nn", "federation.batch_size=4"],
    "dp_fedavg": ["federation=fedavg", "federation.clients=4", "federation.per_round=2"],
}
EXACT = ("analytic", "bag_of_tokens", "dager", "imprint", "rgap", "spear")


def go(folder: Path, device: str, *overrides: str) -> RunFolder:
    """A run of two rounds whose second is listened to."""
    config = compose([*SMALL, *HEARD, *overrides, f"device={device}"])
    return runner.start(config, folder / f"run {len(list(folder.glob('run *')))}", "a test")


def shortened(attack: str) -> list[str]:
    """The attack, with a search that takes seconds."""
    own = compose([f"attack={attack}"])["attack"]
    return [f"attack={attack}", *(f"attack.{key}={value}" for key, value in SHORT.items() if key in own)]


@pytest.mark.parametrize("defense", choices("defense"))
def test_a_defense_sends_what_it_sends_on_a_cpu_and_both_attackers_get_through(defense, tmp_path):
    overrides = [f"defense={defense}", "attacker=both", *shortened("cosine_adam"), *IN_NEED.get(defense, [])]
    there, here = (go(tmp_path, device, *overrides) for device in (GPU, "cpu"))
    draws = here.config["choices"]["model/bottleneck"] != "none"  # the model itself, from the device's own stream
    for seen, expected in zip(there.observations(2), here.observations(2), strict=True):
        assert relative_error(seen.update, expected.update) < (math.inf if draws else 1e-3)
    assert there.leaks()[["attack", "client"]].equals(here.leaks()[["attack", "client"]])
    assert there.leaks()["psnr_db"].notna().all()


@pytest.mark.parametrize("attack", [name for name in choices("attack") if name != "none"])
def test_an_attack_finds_what_it_finds_on_a_cpu(attack, tmp_path):
    overrides = [*shortened(attack), "attacker=naive", *IN_NEED.get(attack, [])]
    there, here = (go(tmp_path, device, *overrides) for device in (GPU, "cpu"))
    (name,) = set(there.leaks()["attack"]) | set(here.leaks()["attack"])
    found, expected = (folder.reconstructions(name, 2) for folder in (there, here))
    assert found.keys() == expected.keys()
    for client in found:
        assert found[client].shape == expected[client].shape
        assert found[client].isfinite().all()
        if attack in EXACT:
            assert (found[client].float() - expected[client].float()).abs().max() < 0.01


@pytest.mark.parametrize("model", choices("model"))
def test_a_network_learns_what_it_learns_on_a_cpu_alone_or_together(model, tmp_path):
    own = TEXT if model == "bert_tiny" else [f"model={model}"]
    weights = []
    for device in (GPU, "cpu"):
        for together in (True, False):
            overrides = [*own, "attack=none", f"engine.vectorized={together}", "federation.train_mode=false"]
            checkpoint = go(tmp_path / str(together), device, *overrides).checkpoint()
            assert checkpoint is not None
            weights.append({name: t for name, t in checkpoint.tensors.items() if t.is_floating_point()})
    for found in weights[:-1]:
        assert relative_error(found, weights[-1]) < 1e-4


@pytest.mark.parametrize(
    "overrides",
    [
        ["aggregation=secure"],
        ["aggregation=secure", "federation=fedavg", "federation.clients=4", "federation.per_round=2", "defense=clip"],
        ["strategy=fedadam"],
        ["strategy=fedmedian"],
        ["inspect=refuse"],
        ["partition=dirichlet"],
        ["evaluate.every=1", "evaluate.clients=true"],
    ],
    ids=" ".join,
)
def test_the_rest_of_a_federation_works_there_as_well(overrides, tmp_path):
    there, here = (go(tmp_path, device, *overrides, *shortened("idlg")) for device in (GPU, "cpu"))
    found, expected = there.checkpoint(), here.checkpoint()
    assert found is not None
    assert expected is not None
    assert relative_error(found.tensors, expected.tensors) < 1e-4


@pytest.mark.parametrize("attack", ["dlg", "cosine_adam", "gias", "gradinversion", "fedavg", "tag"])
def test_the_same_seed_gives_the_same_bits(attack, tmp_path):
    overrides = [*shortened(attack), *IN_NEED.get(attack, [])]
    first, second = (go(tmp_path / name, GPU, *overrides) for name in "ab")
    (name,) = set(first.leaks()["attack"])
    for client, image in first.reconstructions(name, 2).items():
        assert torch.equal(image, second.reconstructions(name, 2)[client])
    for one, other in zip(first.observations(2), second.observations(2), strict=True):
        assert_same(other.update, one.update)


def test_convolutions_have_all_of_float32():
    device = device_of(GPU)
    x, weight = torch.rand(4, 64, 16, 16, dtype=torch.float64), torch.rand(64, 64, 3, 3, dtype=torch.float64)
    whole = conv2d(x, weight)
    found = conv2d(x.float().to(device), weight.float().to(device)).double().cpu()
    assert (found - whole).norm() / whole.norm() < 1e-5
