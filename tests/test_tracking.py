"""Trackers, with the real packages: what they keep is what the run's own tables say, each point once."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_cli import fedsim

from experiments import runner
from experiments.config import compose
from experiments.naming import conditions
from experiments.tracking import CURVES
from fedsim.files import read_json
from fedsim.run import RunFolder
from fedsim.setup import setup_of
from fedsim.tracking import settings_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning"),  # mlflow's use of SQLAlchemy 2.1
    pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning"),
]
SMALL = ["data.train_size=41", "data.test_size=13", "federation.clients=3", "federation.per_round=2", "rounds=3", "device=cpu"]
SMALL += ["engine.workers=1", "tap.every=null", "tap.rounds=[1,3]", "tap.clients=2", "model=lenet_silu", "evaluate.every=2"]
SMALL += ["attack=cosine_lbfgs", "attack.evaluations=4", "attacker=both", "defense=uniform"]
Points = dict[tuple[str, int], list[float]]


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "images": 0}).Reload()


def client(folder: Path) -> tuple[Any, str]:
    """The store beside a run's folder, and the number of its run there."""
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{folder.parent / 'mlflow.db'}"), read_json(folder / "mlflow.json")["run"]


def points_in(kind: str, folder: Path) -> Points:
    """All values that were written of each name and round."""
    found: Points = {}
    if kind == "tensorboard":
        kept = events(folder)
        written = ((name, event) for name in kept.Tags()["scalars"] for event in kept.Scalars(name))
    else:
        store, run = client(folder)
        written = ((name, point) for name in store.get_run(run).data.metrics for point in store.get_metric_history(run, name))
    for name, point in written:
        found.setdefault((name, point.step), []).append(point.value)
    return found


def points_of(folder: RunFolder) -> Points:
    """What a tracker has to know of a run, worked out from its tables row by row."""
    found: Points = {}
    for row in folder.rounds().to_dict("records"):
        told = {name: row[column] for column, name in CURVES.items() if column in row and row[column] is not None}
        found |= {(name, row["round"]): [value] for name, value in told.items() if np.isfinite(value)}
    leaks = folder.leaks()
    for attack, round in {*zip(leaks["attack"], leaks["round"], strict=True)}:
        of = leaks[(leaks["attack"] == attack) & (leaks["round"] == round)]
        attack = attack.replace("=", ":")
        found[f"stolen/{attack}", round] = [sum(of["verdict"] == "stolen") / len(of)]
        found[f"psnr_db/{attack}", round] = [float(np.median(of["psnr_db"]))]
    return found


def assert_same_points(found: Points, expected: Points) -> None:
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=1e-6), key  # one value each; TensorBoard's are float32


@pytest.fixture(scope="module", params=["tensorboard", "mlflow"])
def resumed(request, tmp_path_factory) -> tuple[str, RunFolder]:
    """A run whose disk was full after its second round, and that went on."""
    path, calls, written = tmp_path_factory.mktemp(request.param) / "run", [], RunFolder.save_checkpoint

    def full(folder: RunFolder, *arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 4:  # rounds 0, 1 and 2 are finished, round 3 has left its rows
            raise OSError(28, "No space left on device")
        written(folder, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "save_checkpoint", full)
        with pytest.raises(OSError, match="No space left"):
            runner.start(compose([*SMALL, f"tracker={request.param}"]), path, "a test")
    if request.param == "mlflow":
        store, run = client(path)
        assert store.get_run(run).info.status == "FAILED"
    return request.param, runner.resume(RunFolder.open(path))


def test_a_resumed_run_has_each_point_of_its_tables_once(resumed):
    kind, folder = resumed
    expected = points_of(folder)
    assert {round for _, round in expected} == {0, 1, 2, 3}
    assert {f"stolen/cosine_lbfgs{who}" for who in ("", "_adaptive")} <= {name for name, _ in expected}
    assert_same_points(points_in(kind, folder.path), expected)
    if kind == "mlflow":
        store, run = client(folder.path)
        assert store.get_run(run).info.status == "FINISHED"
        assert len(store.search_runs(["1"])) == 1


def test_points_that_a_killed_process_did_not_write_are_added_from_the_tables(resumed):
    kind, folder = resumed
    expected = points_in(kind, folder.path)
    if kind == "tensorboard":
        for path in sorted((folder.path / "tensorboard").iterdir())[1:]:  # what was written after the resumption
            path.unlink()
        assert points_in(kind, folder.path).keys() < expected.keys()
    runner.resume(folder)
    assert_same_points(points_in(kind, folder.path), expected)


def test_the_configuration_is_there_as_hyper_parameters(resumed):
    kind, folder = resumed
    expected = settings_of(folder.config)
    assert expected["defense.levels"] == 16
    assert expected["tap.rounds"] == "[1, 3]"
    if kind == "mlflow":
        store, run = client(folder.path)
        assert store.get_run(run).data.params == {name: str(value) for name, value in expected.items()}
        return
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    written = events(folder.path).PluginTagToContent("hparams")["_hparams_/session_start_info"]
    found = HParamsPluginData.FromString(written).session_start_info.hparams
    assert set(found) == set(expected)
    assert found["defense.levels"].number_value == 16
    assert found["choices.defense"].string_value == "uniform"


@pytest.mark.parametrize("attack", ["cosine_lbfgs", "cosine_lbfgs_adaptive"])
def test_pictures_show_originals_above_thefts(resumed, attack):
    kind, folder = resumed
    if kind == "tensorboard":
        kept = events(folder.path)
        images = {event.step: event.encoded_image_string for event in kept.Images(f"pictures/{attack}")}
        assert len(kept.Images(f"pictures/{attack}")) == 2
    else:
        store, run = client(folder.path)
        files = [artifact.path for artifact in store.list_artifacts(run, f"pictures/{attack}")]
        images = {int(path[-9:-4]): Path(store.download_artifacts(run, path)).read_bytes() for path in files}
    assert sorted(images) == [1, 3]
    pixels = np.asarray(Image.open(io.BytesIO(images[3])).convert("RGB"), float) / 255
    leaks = folder.leaks().query("attack == @attack and round == 3")
    assert pixels.shape == (2 * 98 + 2, len(leaks) * 98 + 2, 3)  # 32 pixels three times as large, 2 between
    made = folder.reconstructions(attack, 3)
    for i, leak in enumerate(leaks.to_dict("records")):
        truth = setup_of(folder.config).truth(3, leak["client"])[0][leak["image"]]
        for row, image in enumerate((truth, made[leak["client"]][leak["reconstruction"]].clamp(0, 1))):
            tile = pixels[2 + 98 * row : 98 * (row + 1) : 3, 2 + 98 * i : 98 * (i + 1) : 3]
            assert np.abs(tile - image.permute(1, 2, 0).numpy()).max() < 1.01 / 255


def test_an_attack_that_is_made_later_is_added(resumed, capsys):
    kind, folder = resumed
    assert fedsim("attack", folder.path, "attack=idlg", "attack.evaluations=3", "attack.restarts=1", "attacker=naive") == 0
    expected = points_of(folder)
    assert ("stolen/idlg_restarts:1_evaluations:3", 3) in expected
    assert_same_points(points_in(kind, folder.path), expected)


@pytest.mark.parametrize("kind", ["tensorboard", "mlflow"])
def test_a_missing_package_is_one_line_before_anything_starts(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, kind, None)
    assert fedsim("run", *SMALL, f"tracker={kind}", f"out={tmp_path}") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert f"pip install -e '.[{kind}]'" in said.err
    assert said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_is_not_there_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert fedsim("run", *SMALL, "tracker=mlflow", "tracker.uri='http://127.0.0.1:9'", f"out={tmp_path}") == 1
    said = capsys.readouterr().err
    assert said.startswith("stopped: tracker=mlflow, at http://127.0.0.1:9: ")
    assert said.count("\n") == 1


def test_a_run_of_an_earlier_version_names_no_tracker_and_goes_on(tmp_path):
    config = compose([*(one for one in SMALL if not one.startswith("attack")), "attack=none", "rounds=1"])
    without = {key: value for key, value in config.items() if key != "tracker"}
    without["choices"] = {key: value for key, value in config["choices"].items() if key != "tracker"}
    runner.check_config(without)
    folder = runner.start(without, tmp_path / "old", "a test")
    assert runner.finished(runner.resume(folder))
    assert fedsim("run", "--resume", folder.path) == 0
    assert not (folder.path / "tensorboard").exists()


def test_a_tracker_changes_no_result(resumed, tmp_path):
    _, folder = resumed
    plain = compose(SMALL)
    assert conditions(plain) == conditions(folder.config)
    untracked = runner.start(plain, tmp_path / "plain", "a test")
    assert json.loads(untracked.rounds().drop(columns="seconds").to_json()) == json.loads(
        folder.rounds().drop(columns="seconds").to_json()
    )
