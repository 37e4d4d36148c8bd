"""Studies: their files are right, and a study goes on where it stopped."""

import errno
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import claims, guard, runner, study
from experiments.cli import main
from experiments.config import compose, sweep
from experiments.estimate import _evaluations, room
from experiments.runner import attack_of, check_config
from experiments.summary import summarised
from fedsim.files import read_json, read_table, write_json, write_table
from fedsim.run import RunFolder, iterate
from fedsim.setup import setup_of

TINY = """# Two defenses.
common: [data.train_size=40, data.test_size=20, federation.clients=2, federation.per_round=2, rounds=1, tap.when=end]
sizes:
  quick: [attack=cosine_lbfgs, attack.evaluations=4, attacker=naive]
  full: [attack=idlg, attack.evaluations=4]
sweeps:
  - [defense=none]
  - [defense=uniform, "defense.levels=4,16"]
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "tiny.yaml").write_text(TINY)
    monkeypatch.setattr(study, "CONF", tmp_path)
    return tmp_path


@pytest.mark.parametrize("size", study.SIZES)
@pytest.mark.parametrize("name", study.names())
def test_every_study_there_is_can_be_run(name, size, monkeypatch):
    chosen = study.load(name)
    assert chosen.about
    # Of a large grid some cells: what is wrong with one setting is wrong with all cells that have it.
    some = lambda lists: lists[:: max(1, len(lists) - 1)]  # noqa: E731
    monkeypatch.setattr(study, "sweep", lambda settings: some(sweep(settings)))
    cells = chosen.cells(size, [] if any("text" in one for one in chosen.common) else ["data=synthetic"])
    for config in cells.values():
        check_config(config)
    assert len({repr(config) for config in cells.values()}) == len(cells)


def test_every_study_lists_the_claims_that_it_answers():
    asked = {name: study.load(name).answers for name in study.names()}
    found = {name: list(dict.fromkeys(claim.row for claim in claims.load() if claim.study == name)) for name in asked}
    assert {name: list(rows) for name, rows in asked.items()} == found
    assert sum(map(bool, found.values())) > 20


def test_a_study_is_run_once_and_a_changed_one_stands_beside_it(tiny, capsys):
    out = tiny / "out"
    assert main(["study", "tiny", "-o", str(out)]) == 0
    names = ["none_cosine_lbfgs_seed=0", "uniform_levels=16_cosine_lbfgs_seed=0", "uniform_levels=4_cosine_lbfgs_seed=0"]
    assert sorted(path.parent.name for path in out.glob("*/config.json")) == names
    said = capsys.readouterr().out
    assert "uniform levels=16" in said
    assert re.findall(r"\d/3(?=  \S+_seed=0)", said) == ["1/3", "2/3", "3/3"]
    before = {name: (out / name / "leaks.parquet").stat().st_mtime_ns for name in names}
    (out / names[1] / "leaks.parquet").unlink()
    assert main(["study", "tiny", "-o", str(out)]) == 0
    after = {name: (out / name / "leaks.parquet").stat().st_mtime_ns for name in names}
    assert [name for name in names if before[name] != after[name]] == [names[1]]
    rows = read_table(out / study.CELLS)
    for _ in range(2):
        assert main(["study", "tiny", "rounds=2", "-o", str(out)]) == 0
        longer = {path.parent.name for path in out.glob("*/config.json")} - set(names)
        assert {name.rpartition("_")[0] for name in longer} == set(names)
        assert len(longer) == 3
    assert {RunFolder(out / name).config["rounds"] for name in longer} == {2}
    assert {name: (out / name / "leaks.parquet").stat().st_mtime_ns for name in names} == after
    capsys.readouterr()
    assert main(["study", "tiny", "-o", str(out)]) == 0
    assert "3 of them finished already" in capsys.readouterr().out
    now = read_table(out / study.CELLS)
    assert now[now["cell"].isin(names)].reset_index(drop=True).equals(rows)
    assert set(now["cell"]) == longer | set(names)


def test_a_cell_that_fails_each_time_keeps_no_other_from_its_turn(tiny, capsys, monkeypatch):
    start = runner.start

    def broken(config, *arguments, **more):
        if config["choices"]["defense"] == "none":
            raise ValueError("it never works")
        return start(config, *arguments, **more)

    monkeypatch.setattr(runner, "start", broken)
    out = tiny / "out"
    codes = [main(["study", "tiny", "--max-cells", "1", "-o", str(out)]) for _ in range(4)]
    assert codes == [1, 0, 0, 1]
    assert len(list(out.glob("*/leaks.parquet"))) == 2


def test_cells_in_processes_of_their_own_give_the_same(tiny):
    alone, shared = tiny / "alone", tiny / "shared"
    assert main(["study", "tiny", "-o", str(alone)]) == 0
    assert main(["study", "tiny", "--workers", "2", "-o", str(shared)]) == 0
    for path in alone.glob("*/leaks.parquet"):
        one, other = (RunFolder.open(folder / path.parent.name).leaks().drop(columns="seconds") for folder in (alone, shared))
        assert one.equals(other)


def test_processes_of_a_study_end_with_it(tmp_path):
    endless = ["data=synthetic", "data.side=64", "attack.evaluations=1000000"]  # for what waits until it is done would end as well
    command = [sys.executable, "-m", "experiments.cli", "study", "dlg-batch", *endless, "--workers", "2", "-o", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as ours:
        while not list(tmp_path.glob("*/log.txt")):
            assert ours.poll() is None
            time.sleep(0.1)
        began = guard.family({ours.pid})
        ours.kill()
    assert len(began) >= 3
    end = time.monotonic() + 60
    while began & guard.processes():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_cell_that_fails_is_named_and_the_others_are_run(tiny, capsys, monkeypatch):
    begin = study._trained

    def unlucky(config, path, *rest, **more):
        if "levels=4" in path.name:
            raise ValueError("no [luck] in [/x]")
        return begin(config, path, *rest, **more)

    monkeypatch.setattr(study, "_trained", unlucky)
    assert main(["study", "tiny", "-o", str(tiny / "out")]) == 1
    assert "failed: uniform_levels=4_cosine_lbfgs_seed=0: ValueError: no [luck] in [/x]" in (said := capsys.readouterr()).err
    assert "failed: ValueError: no [luck] in [/x]" in " ".join(said.out.split())
    assert len(list((tiny / "out").glob("*/leaks.parquet"))) == 2
    rows = read_table(tiny / "out" / study.CELLS).set_index("cell")["failed"]
    assert "no [luck] in [/x]" in rows["uniform_levels=4_cosine_lbfgs_seed=0"]
    assert rows.isna().sum() == 2


def test_a_damaged_table_of_cells_is_set_aside(tiny, capsys):
    (tiny / "out").mkdir()
    (tiny / "out" / study.CELLS).write_bytes(b"PAR1 not quite")
    assert main(["study", "tiny", "-o", str(tiny / "out")]) == 0
    assert "set aside as cells.parquet.damaged, a new one is begun" in " ".join(capsys.readouterr().out.split())
    assert (tiny / "out" / "cells.parquet.damaged").read_bytes() == b"PAR1 not quite"
    assert len(read_table(tiny / "out" / study.CELLS)) == 3


def test_processes_that_are_killed_between_two_cells_are_rows_and_no_crash(tiny, capsys, monkeypatch):
    note = study._note

    def killing(base, cells, outcome, seconds):
        for process in multiprocessing.active_children():  # while one lot is written down, the others' processes go
            process.kill()
            process.join()
        note(base, cells, outcome, seconds)

    monkeypatch.setattr(study, "_note", killing)
    monkeypatch.setattr(study, "VICTIMS", {"cpu": 1, "cuda": 1})  # a lot for each cell
    assert main(["study", "tiny", "--workers", "2", "-o", str(tiny / "out")]) == 1
    rows = read_table(tiny / "out" / study.CELLS)
    assert 1 <= rows["failed"].isna().sum() < 3
    assert all("a process was killed, perhaps for memory" in why for why in rows["failed"].dropna())
    monkeypatch.undo()
    monkeypatch.setattr(study, "CONF", tiny)
    assert main(["study", "tiny", "--workers", "2", "-o", str(tiny / "out")]) == 0


def test_two_lists_that_an_override_makes_one_are_one(tiny):
    chosen = replace(study.load("tiny"), sweeps=[[], ["attacker=naive,adaptive"]])
    assert len(chosen.cells("quick", ["attacker=adaptive"])) == 1
    assert len(chosen.grid("quick", ["attacker=adaptive"])) == 2


def test_a_cell_that_two_studies_have_counts_once(tiny, capsys):
    for name in ("one", "other"):
        assert main(["study", "tiny", "-o", str(tiny / name)]) == 0
    one, other = (iterate([tiny / name]) for name in ("one", "other"))
    assert study.distinct([*one, *other]) == one
    capsys.readouterr()
    told = []
    for folders in ([tiny / "one"], [tiny / "one", tiny / "other"]):
        assert main(["table", *map(str, folders), "--format", "csv"]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]
    runner.attack_again(other[0], runner.attack_of(other[0].config | {"attack": other[0].config["attack"]}), "later")
    assert study.distinct([*one, *other]) == [*one, other[0]]  # it was attacked by others, too


def test_a_defect_in_one_cell_is_that_cell_s(tiny, capsys, monkeypatch):
    begin = runner.start

    def broken(config, path, command, **more):
        if "levels=16" in path.name:
            raise RuntimeError("out of memory")
        return begin(config, path, command, **more)

    monkeypatch.setattr(runner, "start", broken)
    assert main(["study", "tiny", "-o", str(tiny / "out")]) == 1
    assert "RuntimeError: out of memory; see" in capsys.readouterr().err
    assert len(list((tiny / "out").glob("*/leaks.parquet"))) == 2


def test_a_damaged_cell_is_that_cell_s(tiny, capsys):
    out = tiny / "out"
    assert main(["study", "tiny", "-o", str(out)]) == 0
    (out / "uniform_levels=16_cosine_lbfgs_seed=0" / "config.json").write_text("{")
    (out / "none_cosine_lbfgs_seed=0" / "leaks.parquet").unlink()
    assert main(["study", "tiny", "-o", str(out)]) == 1
    assert "failed: uniform_levels=16_cosine_lbfgs_seed=0: RunError" in capsys.readouterr().err
    assert (out / "none_cosine_lbfgs_seed=0" / "leaks.parquet").exists()


def test_cells_that_settings_do_not_tell_apart_have_folders_of_their_own(tiny):
    chosen = study.load("tiny")
    twice = replace(chosen, sweeps=[["defense=none"], ["defense=none", "rounds=2"]])
    cells = twice.cells("quick")
    assert [config["rounds"] for config in cells.values()] == [1, 2]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_study_can_be_done_in_parts(workers, tiny, capsys):
    out = tiny / "out"
    command = ["study", "tiny", "--workers", str(workers), "-o", str(out)]
    assert main([*command, "--max-cells", "1"]) == 0
    assert "2 cells are left: the same command goes on" in capsys.readouterr().out
    assert len(list(out.glob("*/leaks.parquet"))) == 1
    assert main([*command, "--budget", "0.0001s"]) == 0
    said = capsys.readouterr().out
    assert "1 of them finished already" in said
    assert "2 cells are left" in said
    assert main([*command, "--budget", "1h"]) == 0
    assert "left: the same" not in capsys.readouterr().out
    assert len(list(out.glob("*/leaks.parquet"))) == 3


@pytest.mark.parametrize("budget", ["30", "m", "-3m", "0s", "nanh", "infh", "1d"])
def test_a_budget_that_is_no_time_is_told(budget, tiny, capsys):
    with pytest.raises(SystemExit):
        main(["study", "tiny", f"--budget={budget}"])
    assert f"such as 30m, not '{budget}'" in capsys.readouterr().err


@pytest.mark.parametrize("seeds", ["0,-1", "-1,0"])
def test_a_bad_seed_among_others_stops_a_study_before_it_begins(seeds, tiny, capsys):
    assert main(["study", "tiny", f"seed={seeds}", "-o", str(tiny / "out")]) != 0
    assert "seed must be a whole number >= 0, got -1" in capsys.readouterr().err
    assert not (tiny / "out").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tiny", "out=elsewhere"], "out= is of one run: a study takes -o FOLDER"),
        (["tiny", "name=mine"], "name= is of one run"),
        (["tiny", "seed=7", "--seeds", "2"], "seed= and --seeds both say which seeds"),
        (["--full"], "--full is of which study? choices: "),
    ],
)
def test_what_a_study_would_not_heed_is_refused(words, told, tiny, capsys):
    assert main(["study", *words]) == 2
    said = capsys.readouterr()
    assert told in said.err
    assert said.out == ""


def test_a_dry_run_names_the_cells_and_does_nothing(tiny, capsys):
    assert main(["study", "tiny", "--dry-run", "--full", "seed=0,1", "-o", str(tiny / "out")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"6 cells, about [0-9:]+ on one core, up to [0-9.]+ MB on disk", said[-1])
    assert said[0] == "none_idlg_seed=0"
    assert main(["study", "tiny", "--dry-run", "seed=0,1", "-o", str(tiny / "out")]) == 0
    assert capsys.readouterr().out.endswith(" MB on disk; --full: 6 cells\n")
    assert not (tiny / "out").exists()


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("federation.clients=0", "clients must be a whole number >= 1, got 0"),
        ("federation.batch_size=0", "batch_size must be a whole number >= 1, got 0"),
        ("rounds=x", "rounds must be a whole number >= 1, got 'x'"),
        ("rounds=-3", "rounds must be a whole number >= 1, got -3"),
        ("seed=a", "seed must be a whole number >= 0, got 'a'"),
        ("device=foo", "device 'foo' is not usable here"),
    ],
)
def test_a_dry_run_says_what_could_not_be_run(setting, told, tiny, capsys):
    assert main(["study", "tiny", "--dry-run", setting]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert told in said.err


def test_the_time_of_an_attack_is_that_of_all_searches_within_it():
    naive = ["attacker=naive", "attack.evaluations=1000", "attack.restarts=2"]
    assert _evaluations(compose(["attack=dlg", *naive])) == 2000
    assert _evaluations(compose(["attack=analytic", "attacker=naive"])) == 0
    tried = attack_of(compose(["attack=strongest"])).attacks.values()
    searches = [one for one in (getattr(each, "attack", each) for each in tried) if hasattr(one, "optimizer")]
    assert len(searches) > 1
    every = sum(one.optimizer.evaluations * one.restarts for one in searches)
    assert _evaluations(compose(["attack=strongest", "attacker=naive"])) == every
    gias = attack_of(compose(["attack=gias"])).matching
    assert _evaluations(compose(["attack=gias", "attacker=naive"])) == gias.optimizer.evaluations * gias.restarts
    words = ["setting=text", "attack=dlg_text", "attacker=naive", "attack.iterations=1000", "attack.restarts=1"]
    assert _evaluations(compose([*words, "attack.told=true"])) * 2 == _evaluations(compose(words)) == 2000


def test_a_dry_run_needs_no_data(tiny, capsys, monkeypatch):
    monkeypatch.delenv("FEDSIM_DATA", raising=False)
    assert main(["study", "tiny", "--dry-run", "data=cifar10", f"data.root={tiny}"]) == 0
    assert "3 cells, about" in capsys.readouterr().out
    assert main(["study", "tiny", "data=cifar10", f"data.root={tiny}"]) == 2


def test_an_unknown_study_is_named_with_those_there_are(tiny, capsys):
    assert main(["study", "tyni"]) == 2
    assert "tiny" in capsys.readouterr().err
    assert main(["study"]) == 0
    assert "Two defenses" in capsys.readouterr().out


def test_cells_that_differ_in_their_attack_are_trained_once_and_attacked_as_if_alone(tiny, monkeypatch):
    chosen = study.load("tiny")
    sweeps = [["defense=none,topk", "seed=0,1", "attack=cosine_lbfgs,idlg", "attack.evaluations=8"]]
    cells = replace(chosen, sweeps=sweeps, sizes={"quick": ["attacker=naive", "model=lenet_silu"]}).cells("quick")
    trained = []
    begin = runner.start

    def counted(config, path, *rest, **more):
        trained.append(path.name)
        return begin(config, path, *rest, **more)

    monkeypatch.setattr(runner, "start", counted)
    paths, failures = study.run(cells, tiny / "out", "a test", 1)
    assert not failures
    assert len(paths) == 8
    assert len(trained) == 4
    monkeypatch.undo()
    for name, config in cells.items():
        alone = runner.start(config, tiny / "alone" / name, "a test")
        one, other = (folder.leaks() for folder in (alone, RunFolder.open(tiny / "out" / name)))
        keys = ["attack", "round", "client", "image"]
        one, other = (table.sort_values(keys).reset_index(drop=True) for table in (one, other))
        assert one[[*keys, "label_found"]].equals(other[[*keys, "label_found"]])
        assert (
            one["psnr_db"] - other["psnr_db"]
        ).abs().max() < 0.5  # what eight evaluations make of sums that are rounded otherwise
        assert alone.rounds()["accuracy"].equals(RunFolder.open(tiny / "out" / name).rounds()["accuracy"])


def test_a_study_can_keep_its_results_alone(tiny, capsys):
    out = tiny / "out"
    assert main(["study", "tiny", "-o", str(out), "--max-cells", "1"]) == 0  # finished before, and discarded all the same
    assert main(["study", "tiny", "-o", str(out), "--discard"]) == 0
    folders = [RunFolder.open(path.parent) for path in out.glob("*/config.json")]
    assert len(folders) == 3
    for folder in folders:
        assert len(folder.leaks())
        assert len(folder.rounds())
        assert not list(folder.path.glob("observations")) + list(folder.path.glob("**/checkpoint.safetensors"))
        assert list(folder.path.glob("reconstructions/*/*.safetensors"))
    assert main(["study", "tiny", "-o", str(out), "--discard"]) == 0
    assert "3 of them finished already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--discard"):
        runner.attack_again(folders[0], runner.attack_of(folders[0].config), "idlg")
    assert main(["plot", str(out)]) == 0
    (folders[0].path / "leaks.parquet").write_bytes(b"damaged")  # nothing is left to mend it with: the cell is run again
    assert main(["study", "tiny", "-o", str(out)]) == 0
    assert not folders[0].discarded
    assert folders[0].observed_rounds()
    assert len(folders[0].leaks())


def test_a_study_says_before_that_the_disk_is_too_small(tiny, capsys, monkeypatch):
    monkeypatch.setattr(study.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e5))
    assert main(["study", "tiny", "-o", str(tiny / "out"), "--max-cells", "1"]) == 0
    assert "may fill up the disk" in " ".join(capsys.readouterr().out.split())
    cells = study.load("tiny").cells("quick")
    kept = sum(path.stat().st_size for path in (tiny / "out").rglob("*.safetensors"))
    assert kept == pytest.approx(room([next(iter(cells.values()))]), rel=0.25)
    assert main(["study", "tiny", "-o", str(tiny / "out"), "--discard"]) == 0
    assert "disk" not in capsys.readouterr().out


def test_lots_hold_cells_of_one_shape_and_keep_trainings_together(tiny):
    chosen = study.load("tiny")
    more = ["tap.clients=all", "federation.clients=5", "federation.per_round=5", "defense=none,uniform,topk,fp16,clip"]
    cells = replace(chosen, sweeps=[[*more, "attack=cosine_lbfgs,idlg"]], sizes={"quick": []}).cells("quick")
    lots = study.lots(cells)
    assert [name for lot in lots for name in lot] != []
    assert sorted(name for lot in lots for name in lot) == sorted(cells)
    assert [len(lot) for lot in lots] == [6, 4]  # three defenses of five victims are fifteen, four would be too many
    for lot in lots:
        assert {config["choices"]["attack"] for config in lot.values()} == {"cosine_lbfgs", "idlg"}
    assert [len(lot) for lot in study.lots(cells, workers=2)] == [4, 4, 2]  # 13 victims for each, of 25


def test_cells_that_attack_nobody_are_lots_of_their_own():
    cells = study.load("optml-accuracy").cells("quick", [])
    assert [list(lot) for lot in study.lots(cells)] == [[name] for name in cells]


def test_cells_of_a_large_network_are_no_faster_together_on_a_cpu(tiny):
    more = ["device=cpu", "defense=none,uniform,fp16", "attack=cosine_lbfgs,idlg"]
    chosen = replace(study.load("tiny"), sweeps=[[*more, "model=lenet,mcmahan_cnn"]], sizes={"quick": []})
    lots = study.lots(chosen.cells("quick"))
    found = [({config["choices"]["model"] for config in lot.values()}, len(lot)) for lot in lots]
    # Two attacks of one training stay together.
    assert sorted(found, key=str) == [({"lenet"}, 6), *[({"mcmahan_cnn"}, 2)] * 3]


def test_cells_that_one_defense_has_several_of_are_told_apart_by_what_differs(tiny):
    chosen = replace(study.load("tiny"), sweeps=[["seed=0,1", "federation.batch_size=1,2", "attack.evaluations=5"]])
    paths, failures = study.run(chosen.cells("quick"), tiny / "out", "a test", 1)
    assert not failures
    told = summarised([RunFolder(path) for path in paths])
    rows = {row[0]: dict(zip(told.columns, row, strict=True)) for row in told.rows}
    assert list(rows) == ["none, batch_size=1", "none, batch_size=2"]
    for row, images in zip(rows.values(), (4, 8), strict=True):
        assert f"/{images}," in row["stolen"]


def test_a_cell_that_a_study_beside_has_is_taken_over_and_goes_ways_of_its_own(tiny, monkeypatch, capsys):
    assert main(["study", "tiny", "-o", str(tiny / "one")]) == 0
    monkeypatch.setattr(runner, "start", None)  # nothing is trained again
    assert main(["study", "tiny", "-o", str(tiny / "other")]) == 0
    assert "3 of them finished already, 3 in other studies beside this one" in capsys.readouterr().out
    name = "none_cosine_lbfgs_seed=0"
    mine, theirs = (RunFolder.open(tiny / folder / name) for folder in ("other", "one"))
    assert mine.leaks().equals(theirs.leaks())
    log = (theirs.path / "log.txt").read_bytes()
    assert main(["attack", str(mine.path), "attack=idlg", "attack.evaluations=2", "attacker=naive"]) == 0
    assert len(mine.leaks()) > len(theirs.leaks())
    assert (theirs.path / "log.txt").read_bytes() == log
    (tiny / "one" / study.CELLS).write_bytes(b"PAR1")
    monkeypatch.undo()
    monkeypatch.setattr(study, "CONF", tiny)
    assert main(["study", "tiny", "-o", str(tiny / "third"), "seed=1"]) == 0
    assert "nothing is taken over from there" in capsys.readouterr().out


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=["killed", "full"])
def test_a_cell_of_which_a_part_was_taken_over_is_not_finished(fault, tiny, monkeypatch):
    assert main(["study", "tiny", "-o", str(tiny / "one")]) == 0
    copyfile = shutil.copyfile

    def link(source, target):
        raise OSError(errno.EXDEV, "on another disk")

    def copied(source, target):
        if Path(source).name == "leaks.parquet":
            raise fault
        copyfile(source, target)

    monkeypatch.setattr("fedsim.run.os.link", link)
    monkeypatch.setattr("fedsim.run.shutil.copyfile", copied)
    main(["study", "tiny", "-o", str(tiny / "other")])
    monkeypatch.undo()
    monkeypatch.setattr(study, "CONF", tiny)
    assert main(["study", "tiny", "-o", str(tiny / "other")]) == 0
    for folder in iterate([tiny / "one"]):
        mine = RunFolder.open(tiny / "other" / folder.path.name)
        assert mine.rounds().drop(columns="seconds").equals(folder.rounds().drop(columns="seconds"))
        assert mine.leaks().drop(columns="seconds").equals(folder.leaks().drop(columns="seconds"))


def test_a_cell_keeps_its_folder_in_a_grid_that_names_it_otherwise(tiny, monkeypatch, capsys):
    out = tiny / "out"
    assert main(["study", "tiny", "--max-cells", "2", "-o", str(out)]) == 0
    begun = read_table(out / study.CELLS)
    (out / begun["cell"][1] / "leaks.parquet").unlink()  # as if killed
    trained = []
    begin = runner.start
    monkeypatch.setattr(
        runner, "start", lambda config, path, *rest, **more: trained.append(path) or begin(config, path, *rest, **more)
    )
    assert main(["study", "tiny", "rounds=1,2", "-o", str(out)]) == 0
    assert "1 of them finished already" in capsys.readouterr().out
    assert len(trained) == 4
    assert {path.parent.name for path in out.glob("*/leaks.parquet")} == {*begun["cell"], *(path.name for path in trained)}
    assert main(["study", "tiny", "rounds=2", "-o", str(out)]) == 0
    assert "3 of them finished already" in capsys.readouterr().out
    assert len(trained) == 4


def test_two_cells_of_one_grid_never_share_a_folder(tiny):
    one, other, _ = study.load("tiny").cells("quick").values()
    assert not study.run({"first": other}, tiny / "out", "a test", 1)[1]
    paths, failures = study.run({"first": one, "second": other}, tiny / "out", "a test", 1)
    assert not failures
    assert [RunFolder(path).config for path in paths] == [one, other]
    assert paths[1].name == "first" != paths[0].name


def test_a_study_s_folder_says_which_it_is(tiny):
    assert main(["study", "tiny", "--seeds", "2", "--max-cells", "1", "-o", str(tiny / "out")]) == 0
    about = read_json(tiny / "out" / study.ABOUT)
    assert (about["study"], about["size"], about["overrides"]) == ("tiny", "quick", ["seed=0,1"])


def test_a_folder_of_another_study_is_refused(tiny, capsys):
    out = tiny / "out"
    assert main(["study", "tiny", "--max-cells", "1", "-o", str(out)]) == 0
    (tiny / "study" / "other.yaml").write_text(TINY)
    capsys.readouterr()
    assert main(["study", "other", "-o", str(out)]) == 2
    assert capsys.readouterr().err == f"error: {out} is the folder of the study tiny: name another for other\n"
    assert read_json(out / study.ABOUT)["study"] == "tiny"


def test_cells_of_an_earlier_trial_are_left_out_of_verdicts_and_named(tiny):
    out = tiny / "out"
    assert main(["study", "tiny", "seed=1", "--max-cells", "2", "-o", str(out)]) == 0
    assert main(["study", "tiny", "--max-cells", "2", "-o", str(out)]) == 0
    cells, wanted, told = claims.measured(out, iterate([out]))
    assert [cell.config["seed"] for cell in cells] == [0, 0]
    assert wanted == list(study.load("tiny").cells("quick").values())
    trial = "none_cosine_lbfgs_seed=1, uniform_levels=4_cosine_lbfgs_seed=1"
    left_out = f"left out, as no cells of tiny as it was last asked for: {trial}"
    assert told == [left_out, "of tiny 2 of 3 cells are finished"]
    config = cells[0].config
    del config["tracker"], config["choices"]["tracker"], config["attack"]["record"]  # as if they had been added since
    write_json(cells[0].path / "config.json", config)
    assert [cell.path for cell in claims.measured(out, iterate([out]))[0]] == [cell.path for cell in cells]


def test_a_cell_that_was_killed_between_its_two_attackers_is_not_finished(tiny):
    out = tiny / "out"
    assert main(["study", "tiny", "defense=uniform", "attacker=both", "--max-cells", "1", "-o", str(out)]) == 0
    (cell,) = iterate([out])
    leaks = cell.leaks()
    assert set(leaks["attacker"]) == {"naive", "adaptive"}
    write_table(cell.path / "leaks.parquet", leaks[leaks["attacker"] == "naive"])
    assert "of tiny 0 of 2 cells are finished" in claims.measured(out, [cell])[2]
    write_table(cell.path / "leaks.parquet", leaks)
    assert "of tiny 1 of 2 cells are finished" in claims.measured(out, [cell])[2]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"naive"}),
        (["attacker=adaptive"], {"adaptive"}),
        (["defense=topk"], {"naive", "adaptive"}),
        (["defense=topk", "attacker=naive"], {"naive"}),
        (["defense=topk", "attack=analytic", "model=mlp_2nn"], {"naive"}),
        (["defense=precode"], {"naive", "adaptive"}),
        (["defense=precode", "attack=precode_aware"], {"adaptive"}),
        (["aggregation=secure"], {"naive", "adaptive"}),
        (["setting=text", "defense=topk"], {"naive"}),
        (["attack=none"], set()),
    ],
    ids=lambda told: " ".join(told) if isinstance(told, list) else "",
)
def test_who_attacks_a_run_is_known_without_its_data(overrides, expected):
    config = compose([*overrides, "data.train_size=100", "data.test_size=10"])
    setup = setup_of(config)
    assert runner.who_attacks(config) == {"adaptive" if one.adaptive else "naive" for one in runner._attackers(setup, config)}
    assert runner.who_attacks(config) == expected


def test_an_attack_that_fails_together_is_made_one_by_one(tiny, capsys, monkeypatch):
    def broken(folders):
        raise MemoryError

    monkeypatch.setattr(runner, "attack_together", broken)
    assert main(["study", "tiny", "-o", str(tiny / "out")]) == 0
    assert "attacked one by one: MemoryError" in capsys.readouterr().out
    assert len(list((tiny / "out").glob("*/leaks.parquet"))) == 3


def test_cells_are_jobs_of_a_launcher_of_hydra_s(tmp_path):
    settings = [
        *("data.train_size=40", "data.test_size=20", "federation.clients=2", "federation.per_round=2"),
        "data=synthetic",
        "seed=0",
    ]
    listed = ",".join(f'"{one}"' for one in [*settings, "attack.evaluations=2"])

    def launched(cells):
        command = [sys.executable, "-m", "experiments.launch", "--multirun", "name=resolution", f"cell={cells}", "out=there"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [*command, f"settings=[{listed}]"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    assert launched("0,2").returncode == 0
    rows = read_table(tmp_path / "there" / study.CELLS)
    assert rows["failed"].isna().tolist() == [True, True]
    beyond = launched("3")  # there are as many cells as sizes of images
    assert beyond.returncode
    assert "cell of resolution in its quick size must be a whole number in 0..2, got 3" in beyond.stderr
    assert "ValueError: cell of resolution in its quick size must be a whole number in 0..2, got 1.5" in launched("1.5").stderr


def test_the_settings_of_a_job_are_written_as_its_file_shows():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (shown,) = re.findall(r"such as (.+)", (ROOT / "experiments" / "conf" / "launch.yaml").read_text())
    (settings,) = OverridesParser.create().parse_overrides(shlex.split(shown))
    assert list(map(str, settings.value())) == ["data=synthetic"]


ROOT = Path(study.__file__).parent.parent
