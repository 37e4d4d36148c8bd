"""Faults: files that were damaged, disks that are full, processes that are killed, and folders that mean harm.

What happens is in docs/faults.md; here is that it does. Runs are of five rounds with a defense, a strategy and an attacker that all
remember or leave something, so whatever could be lost is there to be lost.
"""

import ast
import errno
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from test_run import OVERRIDES, assert_same_folder, go
from worlds import assert_same

from experiments import cli, runner
from experiments.config import CONF, compose
from fedsim import client, files
from fedsim.files import Damaged, read_json, read_table, read_tensors, write_json, write_table, write_tensors
from fedsim.records import reply_of
from fedsim.run import RunError, RunFolder, iterate
from fedsim.setup import check_targets

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> RunFolder:
    """The run that nothing happened to."""
    return runner.start(compose(OVERRIDES), tmp_path_factory.mktemp("runs") / "unbroken", "a test")


@pytest.fixture
def copied(unbroken, tmp_path) -> Path:
    return Path(shutil.copytree(unbroken.path, tmp_path / "run"))


# A changed byte -------------------------------------------------------------------------------------------------------------------

TENSORS = {"a": torch.arange(7.0), "b/c": torch.tensor([3, 1])}
TABLE = pd.DataFrame({"round": [0, 1, 2], "loss": [0.5, None, 0.25], "attack": ["dlg", "idlg", "dlg"]})
KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], str]]] = {
    "tensors": (
        lambda path: write_tensors(path, TENSORS, {"round": "3"}),
        lambda path: str([sorted((name, str(of)) for name, of in part.items()) for part in read_tensors(path)]),
    ),
    "table": (lambda path: write_table(path, TABLE), lambda path: read_table(path).to_json()),
    "json": (lambda path: write_json(path, {"rounds": 3, "name": "ä"}), lambda path: str(read_json(path))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_found_wherever_it_is_and_its_file_named(kind, tmp_path):
    write, read = KINDS[kind]
    path = tmp_path / "file"
    write(path)
    whole, content = path.read_bytes(), read(path)
    seal = whole.index(b"fedsim-sha256:")
    for at in range(0, len(whole), 5 if kind == "table" else 1):
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        if seal <= at < seal + len(b"fedsim-sha256:"):
            assert _content(read, path) in (content, None)  # a seal that is none: all that it sealed is as it was
        else:
            with pytest.raises(Damaged, match="damaged") as error:
                read(path)
            assert str(path) in str(error.value)
            assert "\n" not in str(error.value)


def _content(read: Callable[[Path], str], path: Path) -> str | None:
    try:
        return read(path)
    except Damaged:
        return None


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_is_found_whatever_its_length(kind, tmp_path):
    write, read = KINDS[kind]
    path = tmp_path / "file"
    write(path)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(Damaged, match="damaged"):
            read(path)


def test_files_of_earlier_versions_bear_no_seal_and_are_read(tmp_path):
    save_file(TENSORS, tmp_path / "tensors", {"round": "3"})
    TABLE.to_parquet(tmp_path / "table", index=False)
    (tmp_path / "json").write_text('{"rounds": 3}')
    tensors, about = read_tensors(tmp_path / "tensors")
    assert_same(tensors, TENSORS)
    assert about == {"round": "3"}
    pd.testing.assert_frame_equal(read_table(tmp_path / "table"), TABLE)
    assert read_json(tmp_path / "json") == {"rounds": 3}


def test_a_table_comes_back_with_its_types(tmp_path):
    write_table(tmp_path / "table", TABLE)
    pd.testing.assert_frame_equal(read_table(tmp_path / "table"), TABLE)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "a flipped bit in the checkpoint": {"checkpoint.safetensors": flipped},
    "half a checkpoint": {"checkpoint.safetensors": halved},
    "no checkpoint, killed between two renames": {"checkpoint.safetensors": Path.unlink},
    "a flipped bit in the rows of rounds": {"rounds.parquet": flipped},
    "half the rows of leaks": {"leaks.parquet": halved},
    "no rows of leaks that can be read": {"leaks.parquet": flipped, "before/leaks.parquet": flipped},
    "a flipped bit in what a client remembers": {"clients/client_*/round_000005.safetensors": flipped},
    "all at once": {"checkpoint.safetensors": flipped, "rounds.parquet": halved, "leaks.parquet": flipped, "partition.*": flipped},
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_run_goes_on_from_its_last_good_state_to_the_same_end(damage, unbroken, copied):
    hit = [(min(copied.glob(pattern)), harm) for pattern, harm in damage.items()]
    for path, harm in hit:
        harm(path)
    folder = RunFolder.open(copied)
    if any((path.parent.name != "client_*" and path.suffix in (".parquet",)) or "checkpoint" in path.name for path, _ in hit):
        assert not runner.finished(folder)
    runner.resume(folder)
    assert runner.finished(folder)
    assert_same_folder(folder, unbroken)
    log = (copied / "log.txt").read_text()
    for path, harm in hit:
        if path.parent.name != "before":
            assert f"{path} is {'missing' if harm is Path.unlink else 'damaged'}" in log


def test_a_run_whose_first_round_was_never_finished_begins_again(unbroken, copied):
    for name in ("checkpoint.safetensors", "before/checkpoint.safetensors", "before/rounds.parquet", "before/leaks.parquet"):
        (copied / name).unlink()
    for name in ("rounds.parquet", "leaks.parquet"):
        halved(copied / name)
    folder = RunFolder.open(copied)
    runner.resume(folder)
    assert_same_folder(folder, unbroken)


def test_a_run_without_any_good_state_says_which_files_are_damaged_and_is_left_alone(copied, capsys):
    for path in (copied / "checkpoint.safetensors", copied / "before" / "checkpoint.safetensors"):
        flipped(path)
    before = contents(copied)
    assert cli.main(["run", "--resume", str(copied)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{copied / 'checkpoint.safetensors'} is damaged" in said
    assert "no earlier state is left" in said
    assert contents(copied) == before


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_damaged_configuration_is_named_and_one_changed_on_purpose_is_read(copied, capsys):
    path = copied / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"rounds": 5', '"rounds": 6'))
    assert cli.main(["run", "--resume", str(copied)]) == 2
    said = capsys.readouterr().err
    assert f"{path} is damaged (its checksum is not that of its bytes); if it was changed on purpose, delete its line" in said
    path.write_text("\n".join(line for line in path.read_text().splitlines() if '"checksum"' not in line))
    assert RunFolder.open(copied).config["rounds"] == 6


# Disks ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk of 8 MiB that may be filled, and made read-only."""
    path = tmp_path / "disk"
    path.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", path]
    if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("nobody but root can make a disk of its own")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def free(disk: Path) -> int:
    left = os.statvfs(disk)
    return left.f_bavail * left.f_frsize


def test_a_full_disk_stops_a_run_with_one_line_and_it_goes_on_when_there_is_room(disk, unbroken, capsys):
    with open(disk / "ballast", "wb") as ballast:
        ballast.write(bytes(free(disk) - 1_200_000))  # room for two rounds or three
    assert cli.main(["run", *OVERRIDES, f"out={disk}", "name=run"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("stopped: [Errno 28] No space left on device: ")
    assert said.endswith("what was finished is kept, and `fedsim run --resume FOLDER` goes on from there\n")
    folder = RunFolder.open(disk / "run")
    checkpoint = folder.checkpoint()
    assert checkpoint is not None
    assert 1 <= checkpoint.round < 5
    assert not list((disk / "run").rglob(".*.*"))  # nothing half written is left
    (disk / "ballast").unlink()
    runner.resume(folder)
    assert_same_folder(folder, unbroken)


@pytest.mark.parametrize("call", [23, 64])
def test_a_disk_that_fails_as_a_file_is_flushed_stops_the_run_and_it_goes_on_to_the_same_end(call, unbroken, tmp_path, monkeypatch):
    """Every file of a run passes here; file systems that allocate late tell that they are full only now."""
    calls, flush = [], os.fsync

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(handle)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*/run/") as error:
            runner.start(compose(OVERRIDES), tmp_path / "run", "a test")
    assert error.value.errno == errno.ENOSPC
    assert not list((tmp_path / "run").rglob(".*.*"))
    folder = RunFolder.open(tmp_path / "run")
    runner.resume(folder)
    assert_same_folder(folder, unbroken)


def test_a_read_only_folder_is_told_in_one_line_and_left_as_it_is(disk, unbroken, capsys):
    path = Path(shutil.copytree(unbroken.path, disk / "run"))
    (path / "checkpoint.safetensors").unlink()
    (path / "before" / "checkpoint.safetensors").rename(path / "checkpoint.safetensors")  # its last round is left to do
    before = contents(path)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for words in (["run", "--resume", str(path)], ["run", *OVERRIDES, f"out={disk}", "name=other"]):
        assert cli.main(words) in (1, 2)
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        assert "Read-only file system" in said
        assert str(disk) in said
    assert contents(path) == before
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    folder = RunFolder.open(path)
    runner.resume(folder)
    assert_same_folder(folder, unbroken)


# Killed ---------------------------------------------------------------------------------------------------------------------------


PRELOAD = ["test_faults", "experiments.runner", "attacks", "defenses", "datasets", "flwr_datasets.partitioner"]


def go_and_tell(path: Path, begun: "multiprocessing.synchronize.Event") -> None:  # type: ignore[name-defined]
    begun.set()
    go(path)


def test_a_run_that_is_killed_twenty_times_ends_as_one_never_stopped(unbroken, tmp_path):
    """SIGKILL at seeded random moments of a live process, one life after the other.

    Processes are forked from one that has imported all there is to import, which takes longer than a run. A run that ends in spite
    of it all is compared, and another is begun.
    """
    chance, context = random.Random(0), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    kills, runs, window = 0, [tmp_path / "0"], 1.0
    while kills < 20:
        begun = context.Event()
        process = context.Process(target=go_and_tell, args=(runs[-1], begun))
        process.start()
        assert begun.wait(120)
        process.join(chance.uniform(0, window))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            window *= 1 if (runs[-1] / "config.json").exists() else 1.5  # on a busy machine a life is longer
        else:
            assert process.exitcode == 0
            runs.append(tmp_path / str(len(runs)))
        process.close()
    if (runs[-1] / "config.json").exists():
        runner.resume(RunFolder.open(runs[-1]))
    for path in runs:
        if (path / "config.json").exists():
            assert_same_folder(RunFolder.open(path), unbroken)
    assert (runs[0] / "config.json").exists()


# Folders that mean harm -----------------------------------------------------------------------------------------------------------


class Evil:
    """What runs code where it is unpickled: it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.mark,)


def pickled_table(mark: Path) -> bytes:
    """A parquet file whose column is of a type that pyarrow once unpickled (CVE-2023-47248)."""
    about = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickle.dumps(Evil(mark))}
    table = pa.table({"round": pa.array([1, 2])})
    made = pa.BufferOutputStream()
    pq.write_table(table.cast(pa.schema([pa.field("round", pa.int64(), metadata=about)])), made)
    return made.getvalue().to_pybytes()


def zipped(mark: Path) -> bytes:
    """What `torch.save` makes."""
    import io

    made = io.BytesIO()
    torch.save({"model/w": Evil(mark)}, made)
    return made.getvalue()


HARMFUL = {
    "a pickled checkpoint": ("checkpoint.safetensors", lambda mark: pickle.dumps(Evil(mark))),
    "a checkpoint of torch.save": ("checkpoint.safetensors", zipped),
    "a pickled observation": ("observations/round_00005/client_*.safetensors", lambda mark: pickle.dumps(Evil(mark))),
    "a table of a pickled type": ("rounds.parquet", pickled_table),
    "a pickled table": ("leaks.parquet", lambda mark: pickle.dumps(Evil(mark))),
    "a configuration that names another program": (
        "config.json",
        lambda mark: json.dumps({"rounds": 5, "tap": {"_target_": "os.mkdir", "path": str(mark)}}).encode(),
    ),
}


@pytest.mark.parametrize(("pattern", "made"), HARMFUL.values(), ids=HARMFUL)
def test_nothing_in_a_run_s_folder_can_run_code(pattern, made, copied, tmp_path, capsys):
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(Evil(mark)))
    mark.rmdir()  # the pickle does what it is said to do
    path = min(copied.glob(pattern))
    path.write_bytes(made(mark))
    folder = RunFolder.open(copied)
    for read in (folder.checkpoint, folder.rounds, folder.leaks, lambda: folder.observations(5), lambda: folder.config):
        try:
            read()
        except RunError as error:
            assert str(path) in str(error)  # noqa: PT017
    if path.name == "config.json":
        assert cli.main(["run", "--resume", str(copied)]) == 2
        assert "_target_ 'os.mkdir' is of none of attacks, defenses" in capsys.readouterr().err
    assert not mark.exists()


NOT_OURS = ["os.system", "builtins.eval", "fedsim.run.shutil.rmtree", "fedsim.files.write_bytes", "attacks.metrics.torch.load"]


@pytest.mark.parametrize("name", [*NOT_OURS, "fedsimple.X"])
def test_a_configuration_on_disk_builds_the_project_s_own_classes_only(name):
    with pytest.raises(ValueError, match="_target_"):
        check_targets({"rounds": 3, "defense": {"parts": [{"_target_": name}]}})


def test_a_package_of_the_user_s_own_is_built_from_where_it_is_named(monkeypatch):
    made = {"model": {"_target_": "worlds.normed"}}
    with pytest.raises(ValueError, match="if it is yours, name its package in FEDSIM_PACKAGES"):
        check_targets(made)
    monkeypatch.setenv("FEDSIM_PACKAGES", "others, worlds")
    check_targets(made)


def test_every_choice_there_is_may_be_built():
    from omegaconf import OmegaConf

    files_of = sorted(path for path in CONF.rglob("*.yaml") if path.parent.name not in ("setting", "study"))
    assert len(files_of) > 100
    for path in files_of:
        check_targets(OmegaConf.to_container(OmegaConf.load(path)))


LINKS = ["checkpoint.safetensors", "log.txt", "observations", "clients", "figures"]


@pytest.mark.parametrize("name", LINKS)
def test_a_link_in_a_folder_is_not_followed(name, copied, tmp_path):
    outside = tmp_path / "outside"
    inside = copied / name
    if inside.exists():
        shutil.move(inside, outside)
    else:
        outside.mkdir()
    inside.symlink_to(outside)
    before = contents(outside) if outside.is_dir() else {outside: outside.read_bytes()}
    for use in (RunFolder.open, lambda path: iterate([path]), lambda path: iterate([path.parent])):
        with pytest.raises(RunError, match=f"{name} is a link, and a run writes into its own folder only"):
            use(copied)
    assert (contents(outside) if outside.is_dir() else {outside: outside.read_bytes()}) == before


@pytest.mark.parametrize("name", ["../../other", "..", "/tmp/other", "a/b", ""])
def test_an_attack_is_no_way_out_of_its_folder(name, unbroken, copied):
    seen = unbroken.observations(5)
    with pytest.raises(RunError, match="an attack is named by a folder of its own"):
        RunFolder.open(copied).save_reconstructions(name, seen, [])


def test_a_multirun_s_cells_stay_in_its_folder(tmp_path, capsys):
    write_json(tmp_path / "plan" / "multirun.json", {"command": "", "cells": {"../other": {"rounds": 1}}})
    assert cli.main(["run", "--resume", str(tmp_path / "plan")]) == 2
    assert "'../other' is not the name of a folder in" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


LOADERS = ("torch.load", "torch.hub.load", "np.load", "numpy.load", "pd.read_pickle")


def test_no_module_unpickles():
    """CIFAR's own files are pickles, which torchvision opens once their checksums are right: tests/test_data.py."""
    packages = ("fedsim", "attacks", "defenses", "experiments")
    for path in sorted(path for package in packages for path in (REPOSITORY / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"} & names, path
            if isinstance(node, ast.Call) and (called := ast.unparse(node.func)) in LOADERS:
                assert called == "torch.load", path
                assert {word.arg: ast.unparse(word.value) for word in node.keywords}["weights_only"] == "True", path


# Clients that fail ----------------------------------------------------------------------------------------------------------------


def test_a_round_without_a_valid_reply_stops_the_run_and_keeps_what_was_finished(unbroken, tmp_path, monkeypatch, capsys):
    asked = []

    def failing(*about):
        asked.append(about[-1])
        if len(asked) > 6:  # from the third round on
            raise ArithmeticError("out of numbers")
        return reply_of(*about)

    with monkeypatch.context() as patch:
        patch.setattr(client, "reply_of", failing)
        assert cli.main(["run", *OVERRIDES, f"out={tmp_path}", "name=run"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert (
        "round 3: none of the 3 chosen clients sent an update: client 2: ArithmeticError: out of numbers; what was finished" in said
    )
    folder = RunFolder.open(tmp_path / "run")
    checkpoint = folder.checkpoint()
    assert checkpoint is not None
    assert checkpoint.round == 2
    runner.resume(folder)
    assert_same_folder(folder, unbroken)


def test_what_a_client_failed_to_send_is_not_taken_for_never_sent(tmp_path, monkeypatch):
    """Its error feedback holds what was left out, which an attacker who follows the client must not count on."""
    calls = []

    def failing(*about):
        calls.append(about[-1])
        if about[-1] == 1 and calls.count(1) == 2:  # client 1, in round 2
            raise ArithmeticError("out of numbers")
        return reply_of(*about)

    monkeypatch.setattr(client, "reply_of", failing)
    small = [
        "data.train_size=41",
        "data.test_size=64",
        "federation.clients=3",
        "federation.per_round=3",
        "rounds=4",
        "defense=topk_ef",
    ]
    tap = ["tap.every=1", "tap.clients=all", "tap.when=later", "attack=idlg", "engine.workers=1"]
    folder = runner.start(compose([*small, *tap]), tmp_path / "run", "a test")
    assert list(folder.rounds()["left_out"]) == ["", "", "1", "", ""]
    assert list(folder.rounds()["failures"]) == [0, 0, 1, 0, 0]
    setup = runner.setup_of(folder.config)
    followed = {
        round: {one.client: one.followed for one in runner.with_history(setup, folder, folder.observations(round))}
        for round in (1, 2, 3, 4)
    }
    assert followed == {
        1: {0: True, 1: True, 2: True},
        2: {0: True, 2: True},
        3: {0: True, 1: False, 2: True},
        4: {0: True, 1: True, 2: True},  # since round 3, nothing was missed
    }
