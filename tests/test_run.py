"""A run's folder: what is saved comes back, and a run that was killed ends as if it never had been."""

import contextlib
import multiprocessing
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from worlds import NORMED, TOPK_EF, assert_same, config, federate

from attacks import dlg
from experiments import runner
from experiments.config import compose
from fedsim.federation import Checkpoint
from fedsim.files import read_json, write_json
from fedsim.observation import Observation, Reconstruction, Trace
from fedsim.run import RunError, RunFolder, iterate
from fedsim.wire import to_bytes

# A defense with a memory, a strategy with a memory, and an attack in every round: whatever can be forgotten is there.
OVERRIDES = [
    "defense=topk_ef",
    "attacker=naive",
    "strategy=fedadam",
    "attack=idlg",
    "attack.restarts=1",
    "attack.evaluations=30",
    "rounds=5",
]
OVERRIDES += ["tap.every=1", "tap.clients=2", "federation.clients=5", "federation.per_round=3"]
OVERRIDES += ["data.train_size=53", "data.test_size=17", "engine.workers=2", "device=cpu"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> RunFolder:
    """The run that nobody stopped."""
    return runner.start(compose(OVERRIDES), tmp_path_factory.mktemp("runs") / "unbroken", "a test")


def go(path: Path) -> None:
    """Starts the run at `path`, or goes on with it; runs in a process of its own."""
    torch.set_num_threads(1)
    if (path / "config.json").exists():
        runner.resume(RunFolder.open(path))
    else:
        runner.start(compose(OVERRIDES), path, "a test")


def forked() -> multiprocessing.context.ForkServerContext:
    """Where processes come from that have imported all that takes long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.runner", "attacks", "defenses", "datasets", "flwr_datasets.partitioner"])
    return context


def kill_at(path: Path, pattern: str, delay: float) -> None:
    """Runs `go` and kills it `delay` seconds after a file like `pattern` appeared."""
    process = forked().Process(target=go, args=(path,))
    process.start()
    until = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < until and not list(path.glob(pattern)):
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it had ended before"
    process.close()


def tensors(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every tensor of every file below `path`, by file."""
    from safetensors.torch import load_file

    return {str(file.relative_to(path)): load_file(file) for file in sorted(path.rglob("[!.]*.safetensors"))}


def assert_same_folder(found: RunFolder, expected: RunFolder) -> None:
    for table in ("rounds", "leaks"):
        mine, theirs = (getattr(folder, table)().drop(columns="seconds") for folder in (found, expected))
        pd.testing.assert_frame_equal(mine, theirs, check_exact=True)
    mine, theirs = tensors(found.path), tensors(expected.path)
    assert list(mine) == list(theirs)
    for name, saved in theirs.items():
        assert_same(mine[name], saved)


MOMENTS = {
    "as the folder appears": [("config.json", 0.0)],
    "while listening, then while clients train": [
        ("observations/round_00001/broadcast.safetensors", 0.0),
        ("clients/client_*/round_000003.*", 0.0),
    ],
    "before the leaks are written": [("reconstructions/idlg/round_00003.safetensors", 0.0)],
    "at random moments of three rounds": [(f"observations/round_{r:05d}", random.Random(r).uniform(0, 0.3)) for r in (1, 2, 4)],
}


@pytest.mark.parametrize("moments", MOMENTS.values(), ids=MOMENTS)
def test_a_killed_run_goes_on_to_the_end_of_one_never_stopped(moments, unbroken, tmp_path):
    for pattern, delay in moments:
        kill_at(tmp_path / "run", pattern, delay)
    folder = RunFolder.open(tmp_path / "run")
    runner.resume(folder)
    assert runner.finished(folder)
    assert_same_folder(folder, unbroken)


@pytest.mark.parametrize("write", ["save_observations", "save_reconstructions", "add", "save_checkpoint"])
def test_a_run_that_failed_to_write_goes_on_to_the_same_end(write, unbroken, tmp_path, monkeypatch):
    """The disk is full at the third call of each kind: every order of two writes has a moment between them."""
    calls, written = [], getattr(RunFolder, write)

    def full(folder, *arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return written(folder, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, write, full)
        with pytest.raises(OSError, match="No space left"):
            runner.start(compose(OVERRIDES), tmp_path / "run", "a test")
    folder = RunFolder.open(tmp_path / "run")
    runner.resume(folder)
    assert_same_folder(folder, unbroken)


def test_the_run_that_is_compared_with_did_all_its_rounds_and_attacks(unbroken):
    assert list(unbroken.rounds()["round"]) == [0, 1, 2, 3, 4, 5]
    assert list(unbroken.leaks()["round"]) == [r for r in (1, 2, 3, 4, 5) for _ in range(2)]
    checkpoint = unbroken.checkpoint()
    assert checkpoint is not None
    assert checkpoint.arrays  # Adam's moments
    assert unbroken.observed_rounds() == [1, 2, 3, 4, 5]
    assert (unbroken.path / "clients").exists()


def test_going_on_with_a_finished_run_does_nothing(unbroken):
    before = {path: path.stat().st_mtime_ns for path in unbroken.path.rglob("*") if path.is_file() and path.name != "log.txt"}
    assert runner.finished(unbroken)
    runner.resume(unbroken)
    assert {path: path.stat().st_mtime_ns for path in before} == before


# The folder -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", {"rounds": 3}, {"command": "a test"})


@pytest.fixture(scope="module")
def seen() -> list[Observation]:
    """Sparse packets and BatchNorm statistics, of 3 clients in 2 rounds."""
    return federate(config(model=NORMED, defense=TOPK_EF["inner"])).seen


def save(folder: RunFolder, seen: list[Observation]) -> None:
    for round in (1, 2):
        folder.save_observations([one for one in seen if one.round == round])


def test_observations_come_back_from_disk_as_they_were_seen(folder, seen):
    save(folder, seen)
    assert folder.observed_rounds() == [1, 2]
    found = [one for round in (1, 2) for one in folder.observations(round)]
    assert len(found) == len(seen) == 6
    for mine, theirs in zip(found, seen, strict=True):
        assert (mine.round, mine.client, mine.num_examples) == (theirs.round, theirs.client, theirs.num_examples)
        assert {name: to_bytes(p) for name, p in mine.packets.items()} == {name: to_bytes(p) for name, p in theirs.packets.items()}
        assert list(mine.packets) == list(theirs.packets) == list(mine.params)  # attacks take layers in order
        for group in ("params", "buffers", "sent_buffers"):
            assert_same(*(dict(sorted(getattr(one, group).items())) for one in (mine, theirs)))


DAMAGE = {
    "truncated": ("client_*", lambda data: data[: len(data) // 2]),
    "empty": ("client_*", lambda data: b""),
    "not a tensor file": ("client_*", lambda data: bytes(len(data))),
    "truncated broadcast": ("broadcast*", lambda data: data[:-1]),
}


@pytest.mark.parametrize(("pattern", "damage"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_observation_is_named(folder, seen, pattern, damage):
    save(folder, seen)
    path = min((folder.path / "observations" / "round_00001").glob(pattern))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RunError) as error:
        folder.observations(1)
    assert str(path) in str(error.value)
    assert len(folder.observations(2)) == 3


def test_a_packet_that_is_no_packet_names_its_file(folder, seen):
    from safetensors.torch import load_file, save_file

    save(folder, seen)
    path = min((folder.path / "observations" / "round_00001").glob("client_*"))
    found = load_file(path)
    found["packets/0.weight"] = found["packets/0.weight"][:-1]
    save_file(found, path, {"num_examples": "2", "round": "1", "client": "0", "order": '["0.weight"]'})
    with pytest.raises(RunError, match=rf"{path.name} is damaged \(.*\): delete it, or capture the round again"):
        folder.observations(1)


def test_rewinding_drops_what_came_later(folder, seen):
    save(folder, seen)
    folder.add("rounds", [{"round": i, "accuracy": 0.1 * i} for i in range(3)])
    folder.add("leaks", [{"round": i, "attack": "dlg", "mse": 0.1} for i in (1, 1, 2)])
    later = folder.path / "clients" / "client_00003" / "round_000002.safetensors"
    later.parent.mkdir(parents=True)
    later.touch()
    folder.rewind(1)
    assert list(folder.rounds()["round"]) == [0, 1]
    assert list(folder.leaks()["round"]) == [1, 1]
    assert folder.observed_rounds() == [1]
    assert not later.exists()
    own = [folder.path / name for name in (".env.local", ".pre-commit-config.yaml", "clients/.eslintrc.json", ".rounds.parquet")]
    begun = folder.path / "clients" / ".round_000001.safetensors.ab12_xyz.safetensors"
    for path in (*own, begun):
        path.touch()
    folder.rewind(-1)
    assert all(path.exists() for path in own)  # whoever put them there
    assert not begun.exists()
    assert len(folder.rounds()) == len(folder.leaks()) == len(folder.observed_rounds()) == 0


def test_rows_take_the_place_of_rows_of_the_same_round_and_attack(folder):
    folder.add("leaks", [{"round": 1, "attack": "dlg", "mse": 0.1}, {"round": 1, "attack": "dlg", "mse": 0.2}])
    folder.add("leaks", [{"round": 1, "attack": "idlg", "mse": 0.3}, {"round": 2, "attack": "dlg", "mse": 0.4}])
    folder.add("leaks", [{"round": 1, "attack": "dlg", "mse": 0.5}])
    folder.add("leaks", [])
    assert sorted(folder.leaks()["mse"]) == [0.3, 0.4, 0.5]


def reconstructed(trace: Trace | None) -> Reconstruction:
    """A made-up reconstruction of 2 images."""
    images = torch.rand(2, 3, 5, 7)
    return Reconstruction(images, torch.tensor([3, 1]), 0.5, True, images[None], torch.tensor([0.5]), 30, 0.1, trace)


def test_traces_come_back_as_they_were_recorded_and_go_with_their_reconstruction(folder, seen):
    first = [one for one in seen if one.round == 1]
    layers = {name: torch.rand(11) for name in ("z.weight", "a.weight", "m/bias")}  # in the order of the network, not the alphabet
    trace = Trace(torch.arange(11) * 10, torch.rand(11), torch.randn(11, 2, 3, 5, 7), layers)
    made = [reconstructed(trace), reconstructed(None), reconstructed(trace)]
    folder.save_reconstructions("dlg", first, made)
    found = folder.traces("dlg", 1)
    assert list(found) == [first[0].client, first[2].client]  # the second recorded none
    for mine in found.values():
        assert list(mine.layers) == list(layers)
        assert_same({"images": mine.images, "losses": mine.losses}, {"images": trace.images, "losses": trace.losses})
        assert mine.evaluations.tolist() == list(range(0, 110, 10))
        assert_same(mine.layers, layers)
    assert {client: tuple(t.shape) for client, t in folder.reconstructions("dlg", 1).items()} == {
        one.client: (2, 3, 5, 7) for one in first
    }
    # Attacked again without recording: what was recorded of the other attack must not stand beside it.
    folder.save_reconstructions("dlg", first, [reconstructed(None) for _ in first])
    assert folder.traces("dlg", 1) == {}


def test_a_checkpoint_comes_back_as_it_was_saved(folder):
    assert folder.checkpoint() is None
    arrays = {"m_t:dict:000000:w": np.arange(6.0).reshape(2, 3), "s:array:000000:": np.array(0.5)}
    saved = Checkpoint(7, {"w": torch.randn(3, 5), "n": torch.tensor(3)}, arrays, {"eta": 0.1, "server_opt": True, "n": 3})
    folder.save_checkpoint(saved)
    found = folder.checkpoint()
    assert found is not None
    assert_same(dict(sorted(found.tensors.items())), dict(sorted(saved.tensors.items())))
    assert (found.round, found.numbers) == (7, saved.numbers)
    for name, array in arrays.items():
        assert found.arrays[name].dtype == array.dtype
        assert np.array_equal(found.arrays[name], array)
        assert found.arrays[name].shape == array.shape


def _begins(path: Path, seed: int) -> None:
    small = ["data.train_size=41", "data.test_size=13", "rounds=1", "attack=none", "tap.every=null", "device=cpu"]
    with contextlib.suppress(RunError):
        runner.start(compose([*small, "federation.clients=3", "federation.per_round=2", f"seed={seed}"]), path, f"seed {seed}")


def test_of_two_runs_that_begin_in_one_folder_one_is_made_and_whole(tmp_path):
    for trial in range(4):
        path = tmp_path / str(trial)
        both = [forked().Process(target=_begins, args=(path, seed)) for seed in (0, 1)]
        for one in both:
            one.start()
        for one in both:
            one.join()
        folder = RunFolder.open(path)
        seed = folder.config["seed"]
        assert read_json(path / "environment.json")["command"] == f"seed {seed}"
        plain = tmp_path / f"{trial} alone"
        _begins(plain, seed)
        assert folder.checkpoint() is not None
        assert_same(folder.checkpoint().tensors, RunFolder.open(plain).checkpoint().tensors)


def test_a_folder_with_anything_in_it_is_no_new_one_and_left_as_it_is(tmp_path):
    (tmp_path / "rounds.parquet").write_text("mine")
    with pytest.raises(RunError, match=r"is not empty, it holds rounds.parquet: choose another name="):
        RunFolder.create(tmp_path, {"seed": 0}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["rounds.parquet"]


def test_a_folder_that_somebody_was_killed_in_as_he_made_it_is_made_anew(tmp_path, monkeypatch):
    def killed(path: Path, value: object) -> None:
        if path.name == "config.json":
            raise KeyboardInterrupt
        write_json(path, value)

    with monkeypatch.context() as patch:
        patch.setattr("fedsim.run.write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            RunFolder.create(tmp_path / "run", {"seed": 0}, {})
    assert (tmp_path / "run" / "environment.json").exists()
    assert RunFolder.create(tmp_path / "run", {"seed": 1}, {}).path == tmp_path / "run"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "config.json", "environment.json"]


def test_nothing_of_a_copy_that_was_killed_is_in_the_run_that_is_made_in_its_place(unbroken, tmp_path, monkeypatch):
    def killed(path: Path, value: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedsim.run.write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            RunFolder.branch(unbroken, tmp_path / "run", {"seed": 0}, {})
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()
    assert RunFolder.create(tmp_path / "run", {"seed": 1}, {}).checkpoint() is None


def test_a_run_without_its_rounds_is_not_finished(unbroken, tmp_path):
    copy = RunFolder(shutil.copytree(unbroken.path, tmp_path / "copy"))
    assert runner.finished(copy)
    (copy.path / "rounds.parquet").unlink()
    assert not runner.finished(copy)
    copy.discard()
    assert not runner.finished(copy)


def test_a_folder_that_holds_a_run_is_not_written_over(folder):
    with pytest.raises(RunError, match="holds a run already: resume it with --resume"):
        RunFolder.create(folder.path, {"rounds": 7}, {})
    assert folder.config == {"rounds": 3}


def test_other_data_than_a_run_was_made_from_is_noticed(tmp_path):
    config = compose(["data.train_size=41", "data.test_size=13", "rounds=1", "attack=none"])
    folder = runner.start(config, tmp_path / "run", "a test")
    assert folder.setup() is not None
    images = folder.setup().dataset
    about = read_json(folder.path / "environment.json")
    assert about["data"] == images.fingerprint
    turned = replace(images, train=images.train.take(torch.arange(41).flip(0)))  # the same images in another order
    write_json(folder.path / "environment.json", about | {"data": turned.fingerprint})
    for use in (RunFolder.setup, runner.resume, lambda folder: runner.attack_again(folder, dlg(evaluations=1), "dlg")):
        with pytest.raises(RunError, match="was run on other data than this version of fedsim draws: take the version in"):
            use(folder)
    (folder.path / "environment.json").unlink()  # which earlier versions did not write so
    assert folder.setup() is not None


def test_other_shards_than_a_run_was_made_with_are_noticed(tmp_path):
    config = compose(
        ["data.train_size=41", "data.test_size=13", "federation.clients=3", "federation.per_round=2", "rounds=1", "attack=none"]
    )
    folder = runner.start(config, tmp_path / "run", "a test")
    shards = folder.setup().shards
    for others in (shards[::-1], shards[:2], [shards[0], shards[1], shards[2][:-1]]):
        folder.save_partition(others)
        for use in (RunFolder.setup, runner.resume, lambda folder: runner.attack_again(folder, dlg(evaluations=1), "dlg")):
            with pytest.raises(
                RunError, match="was run on other shards of its data than are dealt now: take the partition that it"
            ):
                use(folder)
    folder.save_partition(shards)
    assert folder.setup() is not None


def test_a_folder_without_a_run_says_so(tmp_path):
    for look in (RunFolder.open, lambda path: iterate([path])):
        with pytest.raises(RunError, match=r"config\.json"):
            look(tmp_path)
