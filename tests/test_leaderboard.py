"""The leaderboard: who stands where follows from the runs' tables, and what was left out is named."""

import re
import shutil
from pathlib import Path

import pytest
from test_cli import fedsim

from attacks.metrics import Rate
from experiments import leaderboard, runner
from experiments.config import compose
from experiments.statistics import Difference
from fedsim.files import read_json, read_table, write_json, write_table
from fedsim.run import RunFolder

SMALL = ["data.train_size=41", "data.test_size=13", "federation.clients=3", "federation.per_round=2", "rounds=2", "device=cpu"]
SMALL += ["engine.workers=1", "tap.every=null", "tap.rounds=[1,2]", "tap.clients=2", "model=lenet_silu"]
SMALL += ["attack=cosine_lbfgs", "attack.evaluations=4", "attack.restarts=1", "attacker=both"]
# Accuracy in the end by seed, and how many of the 4 victims of each seed the naive and the adaptive attacker steal from.
STORY = {
    "none": ((0.50, 0.52, 0.51), (4, None)),
    "uniform": ((0.50, 0.52, 0.52), (0, 4)),  # -> loses nothing: +0.3 points on average, and protects against the naive one only
    "topk": ((0.50, 0.52, 0.51), (1, 1)),  # -> loses nothing, 3 of 12 by either
    "sign": ((0.47, 0.49, 0.48), (0, 0)),  # -> loses 3 points to the digit
    "clip": ((0.30, 0.33, 0.33), (0, 0)),  # -> loses 19 points on average, 17.1 at least: 19 - 2.92 * 1.15 / sqrt(3)
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run of each defense as it came out of the machine."""
    out = tmp_path_factory.mktemp("made")
    for name in STORY:
        runner.start(compose([*SMALL, f"defense={name}"]), out / name, "fedsim a test")
    return out


@pytest.fixture
def study(made, tmp_path) -> Path:
    """Three seeds of each, with the accuracies and verdicts of the story in their tables."""
    out = tmp_path / "study"
    for name, (accuracies, thefts) in STORY.items():
        for seed, accuracy in enumerate(accuracies):
            path = out / f"{name}_{seed}"
            shutil.copytree(made / name, path)
            config = read_json(path / "config.json")
            write_json(path / "config.json", config | {"seed": seed})
            rounds, leaks = read_table(path / "rounds.parquet"), read_table(path / "leaks.parquet")
            write_table(path / "rounds.parquet", rounds.assign(accuracy=accuracy))
            verdicts = leaks["verdict"].copy()
            for attacker, count in zip(("naive", "adaptive"), thefts, strict=True):
                of = leaks.index[leaks["attacker"] == attacker]
                assert len(of) == (0 if count is None else 4)
                verdicts[of] = ["stolen"] * (count or 0) + ["not stolen"] * (len(of) - (count or 0))
            scores = [0.02 if verdict == "stolen" else 0.2 for verdict in verdicts]
            write_table(path / "leaks.parquet", leaks.assign(verdict=verdicts, mse=scores))
    return out


def sections(page: str) -> dict[str, dict[str, list[str]]]:
    """Group -> defense -> cells, in the order of the page."""
    found: dict[str, dict[str, list[str]]] = {}
    for block in page.split("### ")[1:]:
        rows = [re.split(r" (?<!\\)\| ", line[2:-2]) for line in block.splitlines() if line.startswith("| ")]
        found[block.splitlines()[0]] = {row[0]: row[1:] for row in rows[2:]}
    return found


def test_defenses_stand_in_the_order_of_their_strongest_attacker_among_those_that_cost_as_much(study, tmp_path, capsys):
    assert fedsim("leaderboard", study, "-o", tmp_path / "board.md") == 0
    assert "4 defenses" in capsys.readouterr().out
    page = (tmp_path / "board.md").read_text()
    groups = sections(page)
    none, few, many = leaderboard.GROUPS[:3]
    names = {group: [re.match(r"\d+\. (\w+)", name)[1] for name in rows] for group, rows in groups.items()}  # type: ignore[index]
    assert names == {none: ["topk", "uniform"], few: ["sign"], many: ["clip"]}
    topk, uniform = groups[none].values()
    assert uniform[:4] == [r"cosine\_lbfgs, adaptive", str(Rate(12, 12)), "0/12", "protects only against the naive attacker"]
    assert topk[1:4] == [str(Rate(3, 12)), "3/12", "fewer thefts than without a defense, by both attackers"]
    assert "Protect only against the naive attacker: uniform" in page
    for baseline in ("a grey card", "the mean image", "its mean colour", "none"):
        assert f"\n| {baseline} |" in page


def test_the_page_says_what_it_was_made_with(study, tmp_path):
    assert fedsim("leaderboard", study, "-o", tmp_path / "board.md") == 0
    page = (tmp_path / "board.md").read_text()
    environment = read_json(study / "none_0" / "environment.json")
    said = [f"torch {environment['packages']['torch']}", f"{environment['cores']} cores", environment["python"], "`fedsim a test`"]
    said += ["evaluations=4", "seeds: 0, 1, 2", "2 clients in rounds 1, 2", f"Made by `fedsim leaderboard {study}"]
    for one in said:
        assert one in page, one


def test_a_run_that_did_not_come_to_its_end_is_counted_nowhere_and_named(study, tmp_path):
    path = study / "topk_1" / "rounds.parquet"
    write_table(path, read_table(path).query("round < 2"))
    assert fedsim("leaderboard", study, "-o", tmp_path / "board.md") == 0
    page = (tmp_path / "board.md").read_text()
    assert "Not finished, and counted nowhere: topk_1 (round 1 of 2)." in page
    (cells,) = (row for rows in sections(page).values() for name, row in rows.items() if "topk" in name)
    assert cells[1] == str(Rate(2, 8))
    assert cells[3].endswith("; 1 of 3 runs did not finish")


def test_nothing_is_ranked_across_conditions_and_one_seed_is_no_comparison(made, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(made / "topk", other)
    config = read_json(other / "config.json")
    config["federation"]["lr"] = 0.7
    write_json(other / "config.json", config)
    folders = [RunFolder(path) for path in (made / "none", made / "topk", other)]
    assert leaderboard.write(folders, tmp_path / "b.md", "a test") == 2
    parts = (tmp_path / "b.md").read_text().split("\n## ")[1:]
    assert len(parts) == 2
    for part in parts:
        assert list(sections(part)) == [leaderboard.GROUPS[4]]
    assert "no run without a defense, attacked alike, to compare with" in parts[1]


def test_runs_that_nobody_attacked_are_told_in_one_line(made, tmp_path, capsys):
    shutil.copytree(made / "none", tmp_path / "alone")
    (tmp_path / "alone" / "leaks.parquet").unlink()
    assert fedsim("leaderboard", tmp_path / "alone", "-o", tmp_path / "board.md") == 2
    said = capsys.readouterr().err
    assert "nothing to rank" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "board.md").exists()


@pytest.mark.parametrize(
    ("low", "high", "group"),
    [(-0.019, 0.01, 0), (0.03, 0.06, 0), (-0.021, 0.01, 1), (-0.049, -0.03, 1), (-0.08, -0.051, 2), (-0.08, -0.049, 3)],
)
def test_a_group_is_what_the_whole_interval_shows(low, high, group):
    assert leaderboard.group_of(Difference((low + high) / 2, low, high, 3, 0.02, 1.0, 1.0)) == group
    assert leaderboard.group_of(None) == 4
