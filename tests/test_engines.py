"""Engines: where the apps run changes no bit of what they compute. Ray takes 15 s to start and is started once."""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from worlds import FEDAVG, FEDSGD, TOPK_EF, assert_same, config, federate

from fedsim.engines.inline import Inline
from fedsim.engines.ray import Ray

RUNS = {
    "FedAvg, FedAdam, a defense with a memory": {"federation": FEDAVG, "strategy": "FedAdam", "defense": TOPK_EF},
    "FedSGD": {"federation": FEDSGD},
    "FedSGD, random numbers": {"federation": FEDSGD, "defense": {"_target_": "defenses.GaussianNoise", "relative": 0.3}},
}


def assert_same_run(engine, other, made, tmp_path) -> None:
    one = federate(config(**made), engine, memory=tmp_path / "one")
    two = federate(config(**made), other, memory=tmp_path / "two")
    assert [c.round for c in one.checkpoints] == [c.round for c in two.checkpoints] == [0, 1, 2]
    for mine, theirs in zip(one.checkpoints, two.checkpoints, strict=True):
        assert_same(mine.tensors, theirs.tensors)
    for mine, theirs in zip(one.seen, two.seen, strict=True):
        assert (mine.round, mine.client, mine.num_examples) == (theirs.round, theirs.client, theirs.num_examples)
        assert_same(mine.update, theirs.update)
    memories = [
        sorted(p.relative_to(folder) for p in folder.rglob("*.safetensors")) for folder in (tmp_path / "one", tmp_path / "two")
    ]
    assert memories[0] == memories[1]
    assert bool(memories[0]) == (made.get("defense") is TOPK_EF)


@pytest.mark.parametrize("made", RUNS.values(), ids=RUNS)
def test_two_workers_compute_what_one_does(made, tmp_path):
    assert_same_run(Inline(1), Inline(2), made, tmp_path)


@pytest.fixture(scope="module")
def one_ray() -> Iterator[None]:
    """One Ray for all runs: Flower takes one that runs already, and would end it after each run."""
    ray = pytest.importorskip("ray")
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # Flower lengthens it for Ray's workers; put back at the end
    end = ray.shutdown
    patch.setattr(ray, "shutdown", lambda: None)
    yield
    patch.undo()
    end()


@pytest.mark.usefixtures("one_ray")
@pytest.mark.parametrize("made", list(RUNS.values())[:2], ids=list(RUNS)[:2])
def test_ray_computes_what_this_process_does(made, tmp_path):
    assert_same_run(Ray(), Inline(1), made, tmp_path)


def test_the_inline_engine_imports_no_ray():
    code = "import worlds, sys; worlds.federate(worlds.config()); sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)})


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
    release = f"flwr {version('flwr')} moved it: mend fedsim/engines/inline.py and fedsim/server.py, or pin flwr<1.42"
    try:
        from flwr.app import Context, Error, Message, RecordDict
        from flwr.common.constant import ErrorCode
        from flwr.supercore.run import Run
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError as error:
        pytest.fail(f"{error}; {release}")
    run = Run.create_empty(7)
    assert run.run_id == 7, release
    assert {"run_id", "node_id", "task_id"} <= set(dir(TaskIdentity)), release
    before = TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 1
    try:
        message = Message(RecordDict(), 2, "train", ttl=None, group_id="1")
        assert "_message_id" in message.metadata.__dict__, release
        assert "_content" in message.__dict__, release
        reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "why"), reply_to=message)
        assert reply.has_error(), release
        assert reply.error.reason == "why", release
        assert Context(7, 1, {}, RecordDict(), {}).run_id == 7, release
    finally:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = before
