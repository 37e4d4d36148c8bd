"""Engines: where the apps run changes no bit of what they compute. Ray takes long to start and is started once."""

import os
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import Tensor
from worlds import FEDAVG, FEDSGD, MLP, TOPK_EF, assert_same, config, federate

from fedsim.engines.inline import Inline, InlineGrid
from fedsim.engines.ray import Ray
from fedsim.errors import FederationError
from fedsim.federation import Engine

HERE = Path(__file__).parent
SEEDED = {"_target_": "fedsim.secure_aggregation.Secure", "seeded": True}  # so that masked updates are the same as well
RUNS = {
    "FedAvg, FedAdam, a defense with a memory, a model that draws": {
        "federation": FEDAVG,
        "strategy": "FedAdam",
        "defense": TOPK_EF,
        "model": MLP | {"bottleneck": {"_target_": "fedsim.models.Precode", "width": 2}},
    },
    "FedSGD": {"federation": FEDSGD},
    "FedAvg, sums of masked updates": {"federation": FEDAVG, "aggregation": SEEDED},
    "FedSGD, random numbers": {"federation": FEDSGD, "defense": {"_target_": "defenses.GaussianNoise", "relative": 0.3}},
    "FedAvg, all that defenses do in training": {
        "federation": FEDAVG,
        "defense": {
            "_target_": "defenses.Chain",
            "parts": [
                {"_target_": "defenses.ATS", "policy": "random"},
                {"_target_": "defenses.MixUp"},
                {"_target_": "defenses.InstaHide", "k": 2, "largest": 0.7},
                {"_target_": "defenses.OutPost"},
                {"_target_": "defenses.Clip", "clip": 1.0},
            ],
        },
    },
    "FedAvg, private": {
        "rounds": 2,
        "federation": FEDAVG,
        "defense": {
            "_target_": "defenses.Chain",
            "parts": [
                {"_target_": "defenses.DPSGD", "clip": 1.0, "epsilon": 8.0},
                {"_target_": "defenses.DPFedAvg", "clip": 1.0, "noise_multiplier": 0.1},
            ],
        },
    },
}
MORTAL = {"federation": FEDSGD | {"per_round": 3}, "defense": TOPK_EF, "seed": 1}
RAY_RUNS = list(RUNS)[:3:2]  # both keep something on the client


def record_of(engine: Engine, made: dict, memory: Path) -> list[dict[str, Tensor]]:
    """The weights after each round, and the updates seen, in order."""
    left = federate(config(**made), engine, memory=memory)
    assert [report.failures for report in left.reports] == [0, 0, 0]
    return [checkpoint.tensors for checkpoint in left.checkpoints] + [one.update for one in left.seen]


def assert_same_record(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    # Rounds with the untrained model, and 3 clients in 2 rounds, with their sums where they are masked.
    assert len(found) == len(expected)
    assert len(found) in (3 + 6, 3 + 6 + 2)
    for mine, theirs in zip(found, expected, strict=True):
        assert_same(mine, theirs)


@pytest.mark.parametrize("made", RUNS.values(), ids=RUNS)
def test_two_workers_compute_what_one_does(made, tmp_path):
    assert_same_record(record_of(Inline(2), made, tmp_path / "two"), record_of(Inline(1), made, tmp_path / "one"))
    # What a defense remembers, and nothing else, is in its folder.
    assert (tmp_path / "two").exists() == ("defense" in made and made["defense"] is TOPK_EF)


def test_the_order_in_which_replies_arrive_changes_nothing(tmp_path, monkeypatch):
    expected = record_of(Inline(1), RUNS["FedSGD"], tmp_path)
    answers = InlineGrid.send_and_receive
    monkeypatch.setattr(InlineGrid, "send_and_receive", lambda grid, *asked, **rest: answers(grid, *asked, **rest)[::-1])
    assert_same_record(record_of(Inline(1), RUNS["FedSGD"], tmp_path), expected)


def python(code: str, *arguments: object) -> None:
    """Runs `code` in a process of its own, which can import what stands beside this file."""
    paths = os.pathsep.join(str(folder) for folder in (HERE, HERE.parent))
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


ON_RAY = """
import logging, os, signal, sys, pathlib, ray, torch, test_engines, worlds
from fedsim import federation
from fedsim.engines.ray import Ray
end, ray.shutdown = ray.shutdown, lambda: None  # Flower takes a Ray that runs already, and would end it after each run
folder = pathlib.Path(sys.argv[1])
cores = os.cpu_count() or 1
for name, cpus in zip(test_engines.RAY_RUNS, (max(1, cores // 2), cores)):  # two workers, then one: each imports torch anew
    torch.save(test_engines.record_of(Ray(cpus=cpus), test_engines.RUNS[name], folder / "memory" / name), folder / f"{name}.pt")

def mortal(config, memory=None, made=federation.client_app):  # whoever is to train client 1 first is killed
    def answer(message, context, app=made(config, memory)):
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 1 and not (folder / "dead").exists():
            (folder / "dead").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return app(message, context)
    return answer

federation.client_app = mortal
logging.getLogger("fedsim").addHandler(logging.FileHandler(folder / "log.txt"))
torch.save(test_engines.record_of(Ray(cpus=cores), test_engines.MORTAL, folder / "memory" / "mortal"), folder / "mortal.pt")
end()
"""


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory) -> Path:
    """What the runs on Ray left: it takes long to start."""
    pytest.importorskip("ray")
    folder = tmp_path_factory.mktemp("ray")
    # Ray's workers are nicer than all others: beside tests on every core they hardly run.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        python(ON_RAY, folder)
    return folder


def test_ray_computes_what_this_process_does(on_ray, tmp_path):
    for name in RAY_RUNS:
        assert_same_record(torch.load(on_ray / f"{name}.pt"), record_of(Inline(1), RUNS[name], tmp_path / name))
    assert list((on_ray / "memory").rglob("round_000002.safetensors"))


def test_a_worker_of_ray_that_is_killed_in_mid_round_is_replaced_and_changes_no_bit(on_ray, tmp_path):
    """Nobody was left out, for `record_of` asks that; and the log says that it happened."""
    assert (on_ray / "dead").exists()
    assert_same_record(torch.load(on_ray / "mortal.pt"), record_of(Inline(1), MORTAL, tmp_path))
    assert (on_ray / "log.txt").read_text().splitlines() == [
        "round 1: a worker was killed; another took its place, and did again what it was at"
    ]


def test_the_inline_engine_imports_no_ray():
    python("import sys, worlds; worlds.federate(worlds.config()); sys.exit('ray' in sys.modules)")


@pytest.mark.parametrize(
    ("engine", "settings", "message"),
    [
        (Inline, {"workers": 0}, "engine.workers must be a whole number >= 1, got 0"),
        (Ray, {"cpus": 0}, "engine.cpus must be a number > 0, got 0"),
        (Ray, {"gpus": -0.5}, "engine.gpus must be a number >= 0, got -0.5"),
    ],
)
def test_a_wrong_setting_of_an_engine_is_named(engine, settings, message):
    with pytest.raises(ValueError, match=message):
        engine(**settings)


def test_without_ray_the_way_out_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="take engine=inline"):
        Ray()


def test_flower_still_has_the_private_names_that_the_inline_engine_relies_on():
    release = f"flwr {version('flwr')} moved it: mend fedsim/engines/inline.py and fedsim/records.py, or pin flwr<1.42"
    try:
        from flwr.app import Context, Error, Message, RecordDict
        from flwr.common.constant import ErrorCode
        from flwr.supercore.run import Run
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError as error:
        pytest.fail(f"{error}; {release}")
    run = Run.create_empty(7)
    assert run.run_id == 7, release
    assert all(hasattr(type(TaskIdentity), name) for name in ("run_id", "node_id", "task_id")), release
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 1
    message = Message(RecordDict(), 2, "train", ttl=None, group_id="1")
    assert "_message_id" in message.metadata.__dict__, release
    assert "_content" in message.__dict__, release
    reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "why"), reply_to=message)
    assert reply.has_error(), release
    assert reply.error.reason == "why", release
    assert Context(7, 1, {}, RecordDict(), {}).run_id == 7, release


def test_an_address_at_which_no_cluster_is_is_told_in_one_line():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"  # bound, and nobody listens
    with pytest.raises(FederationError, match=rf"no Ray cluster at engine\.address={address} .*: start one with `ray start --head"):
        federate(config(), Ray(address=address))
    with pytest.raises(ValueError, match=r"engine\.address must be HOST:PORT of a Ray cluster, got 'somewhere'"):
        Ray(address="somewhere")
