"""The `fedsim` command as its users meet it: what it prints, what it writes, and what its exit code is."""

import csv
import importlib.util
import io
import json
import math
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_config import WRONG

from experiments import cli, doctor, invert
from experiments.canvas import FORMATS
from experiments.config import compose
from experiments.runner import resume
from fedsim.data import load
from fedsim.models import lenet
from fedsim.run import RunError, RunFolder, iterate
from fedsim.training import local_update

REPOSITORY = Path(__file__).parent.parent
TINY = ["data.train_size=41", "data.test_size=13", "federation.clients=3", "federation.per_round=2", "rounds=2", "device=cpu"]
TINY += ["engine.workers=1", "tap.every=2", "tap.rounds=[]", "attack.evaluations=20", "attack.restarts=1"]


def fedsim(*words: object) -> int:
    try:
        return cli.main([str(word) for word in words])
    except SystemExit as stop:  # argparse
        return int(stop.code or 0)


def figures(folder: Path) -> set[str]:
    """Kinds of figures drawn, each as PNG and as SVG; those of one attack are named after it."""
    drawn = {suffix: {path.stem for path in folder.glob(f"*{suffix}")} for suffix in (".png", ".svg")}
    assert drawn[".png"] == drawn[".svg"]
    return {name.removesuffix("_dlg").removesuffix("_idlg") for name in drawn[".png"]}


def python(code: str, path: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[str]:
    """`code` in a process of its own, with `path` before everything else that can be imported."""
    search = os.pathsep.join([str(path), str(REPOSITORY)])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": search} | environment,
        timeout=120,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of 2 rounds whose 2 clients of round 2 were attacked with dlg."""
    out = tmp_path_factory.mktemp("runs")
    assert fedsim("run", *TINY, f"out={out}", "name=one") == 0
    return out / "one"


def test_a_run_leaves_its_tables_its_figures_and_what_it_was_made_from(run):
    folder = RunFolder.open(run)
    assert list(folder.rounds()["round"]) == [0, 1, 2]
    assert set(folder.leaks()["attack"]) == {"dlg"}
    assert len(folder.leaks()) == 2
    assert folder.config["choices"]["defense"] == "none"
    for name in ("environment.json", "partition.safetensors", "checkpoint.safetensors", "log.txt"):
        assert (run / name).stat().st_size > 0
    assert {"accuracy", "leak", "pictures", "partition"} <= figures(run / "figures")


def test_another_attack_adds_rows_and_keeps_the_old(run, capsys):
    before = RunFolder(run).leaks()
    old = before[before["attack"] == "dlg"].reset_index(drop=True)
    assert fedsim("attack", run, "attack=idlg", "attack.evaluations=20", "attack.restarts=1") == 0
    after = RunFolder(run).leaks()
    pd.testing.assert_frame_equal(after[after["attack"] == "dlg"].reset_index(drop=True), old)
    assert (after["attack"] == "idlg_restarts=1_evaluations=20").sum() == 2  # that is not how it comes
    assert "idlg_restarts=1" in capsys.readouterr().out
    assert fedsim("attack", run, "attack=dlg", "attack.evaluations=7") == 0  # nor is this the run's own
    after = RunFolder(run).leaks()
    pd.testing.assert_frame_equal(after[after["attack"] == "dlg"].reset_index(drop=True), old)
    assert after["attack"].str.startswith("dlg_").sum() == len(old)
    assert fedsim("attack", run) == 0  # the run's own: as it was
    again = RunFolder(run).leaks()
    assert set(again["attack"]) == set(after["attack"])
    assert list(again.loc[again["attack"] == "dlg", "psnr_db"]) == list(old["psnr_db"])
    assert fedsim("attack", run, "attack=none") == 2
    assert fedsim("attack", run, "defense=topk") == 2
    assert "'defense=topk' is not a setting of an attack" in capsys.readouterr().err
    assert len(RunFolder(run).leaks()) == len(after)


def test_two_processes_do_not_change_one_folder(run, capsys):
    folder, told = RunFolder(run), f"another process is at work in {run}: wait for it, or stop it"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with folder.held():
        assert fedsim("attack", run, "attack=idlg", "attack.evaluations=2") != 0
        assert told in capsys.readouterr().err
        with pytest.raises(RunError, match=re.escape(told)):
            resume(folder)
    assert {path: path.read_bytes() for path in before} == before


def test_plot_draws_into_the_folder_it_is_given(run, tmp_path, capsys):
    assert fedsim("plot", run, "-o", tmp_path / "figures") == 0
    assert {"accuracy", "leak", "pictures", "partition"} <= figures(tmp_path / "figures")
    assert str(tmp_path / "figures" / "accuracy.png") in capsys.readouterr().out.replace("\n", "")


def test_figures_for_a_paper_are_pdf_with_truetype_and_the_same_each_time(run, tmp_path):
    drawn = []
    for name in ("one", "two"):
        assert fedsim("plot", run, "-o", tmp_path / name, "--format", "pdf") == 0
        files = {path.relative_to(tmp_path / name): path.read_bytes() for path in sorted((tmp_path / name).rglob("*.*"))}
        assert {"accuracy.pdf", "leak_dlg.pdf", "partition.pdf"} <= {str(path) for path in files}
        assert {path.suffix for path in files if "traces" not in str(path)} == {".pdf"}
        assert {data[:5] for path, data in files.items() if path.suffix == ".pdf"} == {b"%PDF-"}
        drawn.append(files)
    assert drawn[0] == drawn[1]
    assert b"/Type3" not in b"".join(drawn[0].values())
    assert fedsim("plot", run, "-o", tmp_path / "all", "--format", "svg,pdf,png") == 0
    kinds = [{path.stem for path in (tmp_path / "all").glob(f"*.{form}")} for form in FORMATS]
    assert kinds[0] == kinds[1] == kinds[2] != set()


def test_plot_draws_how_the_worst_and_the_median_leak_came_about_where_that_was_recorded(run, tmp_path):
    assert fedsim("plot", run, "-o", tmp_path / "none") == 0
    assert not list((tmp_path / "none").glob("traces_*"))
    assert fedsim("attack", run, "attack=idlg", "attack.evaluations=30", "attack.restarts=1", "attack.record=10") == 0
    leaks, attack = RunFolder(run).leaks(), "idlg_restarts=1_evaluations=30"
    assert fedsim("plot", run, "-o", tmp_path / "some") == 0
    drawn = sorted(path.name for path in (tmp_path / "some" / f"traces_{attack}").iterdir())
    # Of two leaks the median is the lower one, which is the worst as well.
    worst = leaks[leaks["attack"] == attack].sort_values("mse").iloc[0]
    assert drawn == [f"one_round_00002_client_{worst['client']:05d}_image_{worst['image']}"]
    files = {path.name for path in (tmp_path / "some" / f"traces_{attack}" / drawn[0]).iterdir()}
    assert files == {"panels.png", "panels.svg", "layers.png", "layers.svg", "animation.gif", "animation.webp"}


def test_a_run_that_leaves_the_test_set_alone_has_leaks_and_no_accuracy(tmp_path, capsys):
    run = tmp_path / "run"
    assert fedsim("run", *TINY, "attack=idlg", "evaluate.every=null", f"out={tmp_path}", "name=run") == 0
    assert fedsim("attack", run, "attack.evaluations=7") == 0  # of the run's own kind
    assert set(RunFolder(run).leaks()["attack"]) == {"idlg", "idlg_evaluations=7"}
    assert RunFolder(run).rounds()["accuracy"].isna().all()
    assert "accuracy" not in {path.stem for path in (run / "figures").glob("*.png")}
    capsys.readouterr()
    assert fedsim("table", run, "--format", "csv") == 0
    (row, *_) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (row["accuracy"], row["victims"], row["attack"]) == ("", "2", "idlg")
    assert fedsim("report", run, "-o", tmp_path / "report.html") == 0
    assert "NaN" not in (tmp_path / "report.html").read_text()


def test_resuming_a_finished_run_says_so(run, capsys):
    before = (run / "checkpoint.safetensors").stat().st_mtime_ns
    assert fedsim("run", "--resume", run) == 0
    assert "is finished: all 2 rounds are there" in capsys.readouterr().out
    assert (run / "checkpoint.safetensors").stat().st_mtime_ns == before
    assert fedsim("run", "--resume", run, "rounds=3") == 2
    assert "leave out rounds=3" in capsys.readouterr().err


def test_the_same_name_twice_is_refused(run, capsys):
    capsys.readouterr()
    assert fedsim("run", *TINY, f"out={run.parent}", "name=one") == 2
    said = capsys.readouterr()
    assert "holds a run already: resume it with --resume" in said.err
    assert said.out == ""  # and no card of a run that is not to be


def test_a_sweep_is_a_folder_of_runs_and_their_comparison(tmp_path, capsys):
    words = ["run", "-m", *TINY, f"out={tmp_path}", "name=all", "defense=none,topk", "seed=0,1"]
    assert fedsim(*words) == 0
    folders = sorted(path.parent.name for path in (tmp_path / "all").glob("*/config.json"))
    assert folders == [
        "none_dlg_seed=0",
        "none_dlg_seed=1",
        "topk_ratio=0.1_scope=tensor_dlg_seed=0",
        "topk_ratio=0.1_scope=tensor_dlg_seed=1",
    ]
    assert {"accuracy", "leak", "accuracy_against_leak"} <= figures(tmp_path / "all" / "figures")
    assert "topk ratio=0.1" in capsys.readouterr().out
    assert fedsim(*words) == 2
    assert "exists already" in capsys.readouterr().err
    # A cell that is gone is made again, the others are left alone.
    kept = tmp_path / "all" / folders[0] / "checkpoint.safetensors"
    before = kept.stat().st_mtime_ns
    for path in sorted((tmp_path / "all" / folders[3]).rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert fedsim("run", "--resume", tmp_path / "all") == 0
    assert (tmp_path / "all" / folders[3] / "checkpoint.safetensors").exists()
    assert kept.stat().st_mtime_ns == before


def test_a_run_of_a_sweep_that_cannot_be_stops_no_other(tmp_path, capsys):
    words = ["engine.vectorized=true", "tap.every=null", "defense=none,dpsgd,fp16"]
    assert fedsim("run", "-m", *TINY, *words, f"out={tmp_path}", "name=all") == 1
    said = capsys.readouterr()
    assert "failed: dpsgd" in said.err
    assert "engine.vectorized=True is not possible" in said.err
    done = {path.parent.name.split("_")[0] for path in (tmp_path / "all").glob("*/checkpoint.safetensors")}
    assert done == {"none", "fp16"}
    assert "fp16" in said.out
    assert fedsim("run", "--resume", tmp_path / "all") == 1
    assert fedsim("attack", tmp_path / "all", "attack=dlg", "attack.evaluations=1") == 2  # nobody was listened to
    assert "no run in it has captured anything to attack" in capsys.readouterr().err


def test_numbers_are_names_too(tmp_path):
    assert fedsim("run", *TINY, f"out={tmp_path}", "name=2024") == 0
    assert RunFolder.open(tmp_path / "2024").config["name"] == "2024"


@pytest.mark.parametrize(("overrides", "message"), WRONG, ids=[" ".join(overrides) for overrides, _ in WRONG])
def test_bad_input_is_one_line_and_exit_code_2_and_nothing_is_written(overrides, message, tmp_path, capsys):
    assert fedsim("run", *overrides, f"out={tmp_path}") == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert not said.out
    assert list(tmp_path.iterdir()) == []


# One picture ----------------------------------------------------------------------------------------------------------------------

THEFT = ["attack=idlg", "attack.evaluations=50", "attack.restarts=1", "attack.record=10", "data.train_size=41", "data.test_size=13"]
THEFT += ["device=cpu", "seed=3", "federation.clients=3", "federation.per_round=1"]


@pytest.fixture(scope="module")
def photograph(tmp_path_factory) -> Path:
    """A wide picture, 140x40: its middle is green, the left is red, the right blue."""
    picture = Image.new("RGB", (140, 40), (0, 255, 0))
    picture.paste((255, 0, 0), (0, 0, 20, 40))
    picture.paste((0, 0, 255), (120, 0, 140, 40))
    path = tmp_path_factory.mktemp("photographs") / "me.png"
    picture.save(path)
    return path


def test_an_own_picture_is_stolen_and_all_there_is_to_see_of_it_is_written(photograph, tmp_path, capsys):
    out = tmp_path / "theft"
    assert fedsim("invert", "--image", photograph, "--label", 4, "model=lenet", *THEFT, "defense=uniform", "--mp4", "-o", out) == 0
    said = capsys.readouterr().out
    assert "idlg on lenet, defense uniform" in said
    assert "its mean colour" in said
    for name in ("original", "reconstruction", "comparison", "panels", "layers", "kernels", "surfaces"):
        with Image.open(out / f"{name}.png") as file:
            assert file.size == (32, 32) if name in ("original", "reconstruction") else file.width > 300
    for suffix in (".gif", ".webp"):
        with Image.open(out / f"animation{suffix}") as file:
            assert file.n_frames == 6  # the first of 50 evaluations, each 10th after it, the last
    assert (out / "animation.mp4").stat().st_size > 0

    about = json.loads((out / "metrics.json").read_text())
    (scores,) = about["scores"]
    assert scores["label"] == 4
    assert set(about["bars"]) == {"MSE < 0.03", "> 20 dB", "SSIM ≥ 0.6"}
    # Green all over: its mean colour is the picture itself, and an exact copy has no finite PSNR.
    assert scores["mean_colour_mse"] < 1e-12
    assert scores["mean_colour_psnr_db"] == "inf"
    assert about["config"]["seed"] == 3
    assert about["environment"]["packages"]["torch"] == version("torch")

    tensors = load_file(out / "theft.safetensors")
    assert tensors["image"].shape == (1, 3, 32, 32)
    assert tensors["image"].mean((0, 2, 3)).tolist() == [0, 1, 0]
    history = pd.read_parquet(out / "history.parquet")
    assert history["evaluations"].tolist() == tensors["trace/evaluations"].tolist() == [1, 11, 21, 31, 41, 50]
    assert history["gap/head.bias"].tolist() == tensors["trace/layers/head.bias"].tolist()
    assert history["mse"].iloc[-1] == pytest.approx(scores["mse"])


def test_the_gradient_that_is_kept_is_that_of_the_picture_at_the_parameters_that_are_kept(tmp_path):
    out = tmp_path / "theft"
    assert fedsim("invert", "--index", 25, "model=lenet", *THEFT, "defense=topk", "defense.ratio=0.1", "-o", out) == 0
    tensors = load_file(out / "theft.safetensors")

    def group(name: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}

    data = load("synthetic", train_size=41, test_size=13, seed=3)
    image, label = data.train.batch(torch.tensor([25]))
    assert torch.equal(tensors["image"], image)
    assert torch.equal(tensors["label"], label)
    model = lenet(data.image_shape, data.num_classes, mean=data.mean, std=data.std)
    true = local_update(model, group("params"), group("buffers"), [(image, label)], lr=1.0).update
    for name, gradient in group("gradient").items():
        assert torch.allclose(gradient, true[name], rtol=1e-4, atol=1e-6)  # summed in another order
        kept = group("sent")[name] != 0
        assert kept.sum() == math.ceil(0.1 * kept.numel())  # what top-k let out of it
        assert torch.equal(group("sent")[name][kept], gradient[kept])


@pytest.mark.parametrize(("defense", "who"), [("uniform", "adaptive"), ("none", "adaptive"), ("none", "both")])
def test_a_theft_by_somebody_who_knows_the_defense(defense, who, tmp_path):
    out = tmp_path / "theft"
    assert fedsim("invert", "--index", 25, "model=lenet", *THEFT, f"defense={defense}", f"attacker={who}", "-o", out) == 0
    about = json.loads((out / "metrics.json").read_text())
    assert about["attacker"] == ("adaptive" if who == "adaptive" else "naive")  # one theft is drawn
    assert about["found_by"].startswith("tv=") is (who == "adaptive")
    assert (out / "layers.png").exists()


@pytest.mark.parametrize("victim", [["--image", "me.png"], ["--index", 25]], ids=["picture", "training image"])
def test_who_is_told_the_label_is_told_the_one_that_was_trained_on(victim, photograph, tmp_path):
    victim = [photograph if word == "me.png" else word for word in victim]
    attack = ["attack=cosine_adam", "attack.iterations=2", "attack.told=true", "data.train_size=41", "data.test_size=13"]
    assert fedsim("invert", *victim, "--label", 4, "model=lenet", *attack, "-o", tmp_path / "theft") == 0
    assert load_file(tmp_path / "theft" / "theft.safetensors")["label_found"].tolist() == [4]


def test_a_trace_of_about_a_hundred_moments_is_asked_for_where_nothing_is_said():
    config = compose(["attack=dlg", "attack.evaluations=4000"])
    assert invert.completed(config, None)["attack"]["record"] == 40
    assert invert.completed(compose(["attack=inverting_gradients", "attack.iterations=30"]), None)["attack"]["record"] == 1
    assert invert.completed(compose(["attack=dlg", "attack.record=7"]), None)["attack"]["record"] == 7
    assert config["attack"]["record"] == 0  # the argument is left as it was
    sizes = [invert.completed(config, path)["data"]["train_size"] for path in (None, Path("me.jpg"))]
    assert sizes == [None, 1000]


def test_without_a_trace_the_command_says_what_is_not_drawn(photograph, tmp_path, capsys):
    # An attack that does not know how to record: its configuration has no such setting.
    config = compose([*THEFT, "attack.evaluations=3", "federation=fedavg", "federation.epochs=2"])
    del config["attack"]["record"]
    theft, files = invert.invert(config, tmp_path / "theft", "a test", path=photograph)
    assert theft.made.trace is None
    assert [path.name for path in files] == [
        *("original.png", "reconstruction.png", "comparison.png", "kernels.png", "surfaces.png", "metrics.json"),
    ]
    assert not (tmp_path / "theft" / "history.parquet").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image", "/nonexistent.jpg"], "there is no file /nonexistent.jpg"),
        (["--image", __file__], "test_cli.py is not an image that Pillow reads"),
        (["--image", str(REPOSITORY)], f"{REPOSITORY} cannot be read: Is a directory"),
        (["--index", "41"], "--index (a training image of synthetic) must be a whole number in 0..40, got 41"),
        (["--index", "-1"], "in 0..40, got -1"),
        (["--index", "3", "--label", "10"], "--label (a class of synthetic) must be a whole number in 0..9, got 10"),
        (["--index", "3", "attack=dgl"], "unknown attack 'dgl': did you mean 'dlg'?"),
        (["--index", "3", "attack=none"], "attack=none attacks nothing"),
        (["--index", "3", "--image", "me.jpg"], "not allowed with argument"),
        ([], "one of the arguments --image --index is required"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_a_picture_that_cannot_be_stolen_is_told(words, message, tmp_path, capsys):
    overrides = [word for word in THEFT[1:] if not any("attack=none" in other for other in words) or not word.startswith("attack.")]
    assert fedsim("invert", *overrides, *words, "-o", tmp_path / "theft") == 2
    said = capsys.readouterr()
    assert message in said.err
    assert not said.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["metrics.json", "original.png"])
def test_a_folder_that_holds_anything_is_not_stolen_into(name, tmp_path, capsys):
    (tmp_path / name).write_text("{}")
    assert fedsim("invert", "--index", "3", *THEFT, "-o", tmp_path) == 2
    assert f"is not empty, it holds {name}: name a new folder with -o" in capsys.readouterr().err
    assert fedsim("invert", "--index", "3", *THEFT, "-o", tmp_path / name) == 2
    assert f"{name} is a file: name a new folder with -o" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "{}"


def test_a_folder_is_one_theft_s_alone_from_its_beginning(tmp_path, capsys, monkeypatch):
    steal, said = invert.steal, []

    def stolen(*arguments, **more):
        said.append((fedsim("invert", "--index", 4, *THEFT, "-o", tmp_path / "theft"), capsys.readouterr().err))
        return steal(*arguments, **more)

    monkeypatch.setattr(invert, "steal", stolen)
    assert fedsim("invert", "--index", 3, *THEFT, "-o", tmp_path / "theft") == 0
    assert said == [(2, f"error: another process steals into {tmp_path / 'theft'}: name a new folder with -o\n")]
    assert json.loads((tmp_path / "theft" / "metrics.json").read_text())["victim"]["index"] == 3
    assert not (tmp_path / "theft" / ".lock").exists()


def test_a_theft_that_cannot_be_written_or_is_stopped_leaves_nothing(tmp_path, capsys, monkeypatch):
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(invert, "steal", stopped)
    (tmp_path / "file").touch()
    assert fedsim("invert", "--index", 3, *THEFT, "-o", tmp_path / "file" / "theft") == 2
    assert f"cannot write to {tmp_path / 'file' / 'theft'}: Not a directory; name another folder with -o" in capsys.readouterr().err
    for where in (["-o", tmp_path / "a" / "b"], [f"out={tmp_path / 'c'}"]):
        assert fedsim("invert", "--index", 3, *THEFT, *where) == 130
        assert capsys.readouterr().err == "\nstopped\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_thefts_of_one_second_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda *_: "now")
    for _ in range(2):
        assert fedsim("invert", "--index", 3, *THEFT, f"out={tmp_path}") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"now_invert-idlg", "now_invert-idlg_again2"}


def test_images_too_small_to_be_scored_are_not_attacked_later_either(tmp_path, capsys):
    small = ["data.side=8", "attack=none", "tap.every=null", "tap.rounds=[1]", f"out={tmp_path}", "name=small"]
    assert fedsim("run", *(word for word in TINY if not word.startswith(("attack.", "tap."))), *small) == 0
    assert fedsim("attack", tmp_path / "small", "attack=idlg") == 2
    assert "data.side must be at least 11, SSIM's window, for an attack to be scored, got 8" in capsys.readouterr().err
    assert not (tmp_path / "small" / "leaks.parquet").exists()


def test_pixels_of_sixteen_bits_are_read_and_those_without_a_white_refused(tmp_path):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    read = invert.read(tmp_path / "deep.png", (1, 16, 16))
    assert torch.allclose(read[0], torch.from_numpy(ramp / 65535).float(), atol=0.5 / 255 + 1e-6)
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match=r"float\.tiff has F pixels, whose white is not known: save it with 8 or 16 bits"):
        invert.read(tmp_path / "float.tiff", (1, 16, 16))


def test_a_theft_is_one_of_the_model_that_a_malicious_server_sends(tmp_path):
    malicious = ["model=lenet", "server=imprint", "server.bins=16", "attack=imprint", "data=synthetic", "data.train_size=41"]
    assert fedsim("invert", "--index", 3, *malicious, "-o", tmp_path / "theft") == 0
    (row,) = json.loads((tmp_path / "theft" / "metrics.json").read_text())["scores"]
    assert row["mse"] < 1e-6


@pytest.mark.parametrize("more", [[], ["-m"]])
def test_two_runs_without_a_name_that_begin_at_once_have_a_folder_each(more, tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda form, *when: "now")
    words = [*(word for word in TINY if not word.startswith("attack")), "attack=none", "rounds=1", f"out={tmp_path}"]
    for seed in (1, 2, 3):
        assert fedsim("run", *more, *words, f"seed={seed}") == 0
    name = "now_compare" if more else "now_none-none"
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, f"{name}_again2", f"{name}_again3"]
    assert sorted(folder.config["seed"] for folder in iterate(list(tmp_path.iterdir()))) == [1, 2, 3]


def test_runs_have_a_folder_to_be_in(capsys):
    assert fedsim("run", *TINY, "out=null") == 2
    assert "out must be a folder, got None" in capsys.readouterr().err


def test_a_picture_is_cropped_at_its_centre_turned_as_its_camera_says_and_laid_on_white(photograph, tmp_path):
    green = invert.read(photograph, (3, 13, 13))
    assert green.shape == (3, 13, 13)
    assert green.mean((1, 2)).tolist() == [0, 1, 0]
    wide = invert.read(photograph, (3, 8, 28))  # of this aspect: nothing is cropped
    assert wide[:, 4, [0, 14, 27]].T.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    grey = invert.read(photograph, (1, 13, 13))
    # ITU-R 601's luma of green is 0.587, as Pillow has it: 150 of 255
    assert grey.unique().tolist() == pytest.approx([150 / 255])
    with Image.open(photograph) as file:
        turned = Image.Exif()
        turned[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise to see it
        file.save(tmp_path / "turned.png", exif=turned)
    tall = invert.read(tmp_path / "turned.png", (3, 28, 8))
    assert tall[:, [0, 14, 27], 4].T.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    Image.new("RGBA", (7, 5), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert invert.read(tmp_path / "clear.png", (3, 5, 5)).unique().tolist() == [1]


WORDS = [
    (["run", "--resum", "x"], "config.json"),  # argparse takes a prefix
    (["run", "--frobnicate"], "unrecognized arguments: --frobnicate"),
    (["rum"], "invalid choice"),
    (["plot", "/nonexistent"], "holds no run"),
    (["plot", "/nonexistent", "--format", "png,pfd"], "'pfd': did you mean 'pdf'?"),
    (["attack", "/nonexistent"], "holds no run"),
    (["run", "--resume", "/nonexistent"], "is not a run's folder"),
    (["list", "defences"], "did you mean 'defenses'?"),
    (["attack", "/nonexistent", "attack=idlg", "attacker=adaptve"], "unknown attacker 'adaptve': did you mean 'adaptive'?"),
]


@pytest.mark.parametrize(("words", "message"), WORDS, ids=[" ".join(words) for words, _ in WORDS])
def test_a_command_that_cannot_be_meant_is_told(words, message, capsys):
    assert fedsim(*words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "some"),
    [
        ("defenses", ["none", "topk", "topk_ef"]),
        ("attacks", ["dlg", "idlg"]),
        ("models", ["lenet", "resnet18"]),
        ("datasets", ["cifar10", "synthetic"]),
        ("strategies", ["fedavg", "krum"]),
        ("engines", ["inline", "ray"]),
    ],
)
def test_list_explains_the_choices_of_a_kind(kind, some, capsys):
    assert fedsim("list", kind) == 0
    out = capsys.readouterr().out
    rows = dict(line.split(maxsplit=1) for line in out.splitlines()[1:])
    assert set(some) <= set(rows)
    assert all(text.endswith(".") for text in rows.values())


def test_show_config_prints_and_runs_nothing(tmp_path, capsys):
    assert fedsim("run", "--show-config", "defense=topk", f"out={tmp_path}") == 0
    assert "ratio: 0.1" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


HELP = """
import sys
from experiments.cli import main
try:
    main(["--help"])
except SystemExit as stop:
    assert not stop.code
heavy = {"torch", "hydra", "omegaconf", "flwr", "numpy", "matplotlib", "ray"} & set(sys.modules)
sys.exit(str(heavy) if heavy else 0)
"""


def test_help_waits_for_neither_torch_nor_hydra():
    done = python(HELP)
    assert done.returncode == 0, done.stderr
    assert "fedsim run -m" in done.stdout


def test_the_doctor_finds_a_sound_installation_sound(capsys):
    assert fedsim("doctor") == 0
    said = capsys.readouterr().out
    assert "FAIL" not in said
    for part in ("python", "torch", "torchvision", "flower", "ray", "data", "disk", "offline"):
        assert f" {part} " in said


def test_the_doctor_goes_on_where_a_check_breaks(monkeypatch, capsys):
    def broken() -> doctor.Finding:
        raise ImportError("libcuda is\nelsewhere")

    monkeypatch.setattr(doctor, "_cuda", broken)
    assert fedsim("doctor") == 1
    lines = capsys.readouterr().out.splitlines()
    assert "FAIL  cuda         ImportError: libcuda is elsewhere" in lines
    assert any("disk" in line for line in lines)


def test_the_doctor_names_the_cure_of_a_broken_torchvision(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")\n')
    done = python("from experiments.cli import main; raise SystemExit(main(['doctor']))", tmp_path)
    assert done.returncode == 1
    assert not done.stderr
    line, cure = next(
        (line, after) for line, after in zip(done.stdout.splitlines(), done.stdout.splitlines()[1:], strict=False) if "FAIL" in line
    )
    assert "operator torchvision::nms does not exist" in line
    assert "pip install --force-reinstall torch torchvision" in cure


def test_the_doctor_misses_what_scores_are_made_by(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "kornia" else find(name))
    assert fedsim("doctor") == 1
    assert "FAIL  kornia       not installed: what an attack finds is not scored" in capsys.readouterr().out


def test_a_federation_that_cannot_go_on_is_one_line_and_says_how_to_resume(tmp_path, capsys, monkeypatch):
    # Every client's training fails; the class is reached by its name, as a user's own defense would be.
    monkeypatch.setattr("defenses.NoDefense.__call__", lambda *_: (_ for _ in ()).throw(MemoryError("no more memory")))
    arguments = [
        "rounds=1",
        "attack=none",
        "data.train_size=20",
        "data.test_size=10",
        "federation.clients=2",
        "federation.per_round=2",
    ]
    assert cli.main(["run", *arguments, f"out={tmp_path}", "name=failing"]) == 1
    stopped = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.startswith(
        "stopped: round 1: none of the 2 chosen clients sent an update: client 0: MemoryError: no more memory"
    )
    assert "--resume" in stopped
    assert "Traceback" in (tmp_path / "failing" / "log.txt").read_text()
