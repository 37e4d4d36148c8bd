"""The documents are right: their steps work when followed, their code runs, and the imports point where they say."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_data import write_parquet

from experiments.cli import main

ROOT = Path(__file__).parent.parent
PACKAGES = ("fedsim", "attacks", "defenses", "experiments", "tests")
BLOCK = re.compile(r'```\w+ title="([^"]+)"(?: place="([^"]+)")?\n(.*?)```', re.DOTALL)


def run(folder: Path, *command: str, **environment: str) -> str:
    """What a command prints that runs in `folder`, on the code there."""
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def follow(page: str, folder: Path) -> None:
    """A copy of the project in `folder`, with the steps of a page taken."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    steps = BLOCK.findall((ROOT / "docs" / page).read_text())
    assert len(steps) == 4, f"{page} has {len(steps)} steps"
    for name, place, code in steps:
        path = folder / name
        if not place:
            assert not path.exists(), f"{name} is in the project already: give {page} another example"
            path.write_text(code)
            continue
        before = path.read_text()
        if place == "append":
            path.write_text(before + code)
        else:
            mark = place.removeprefix("after: ") + "\n"
            assert before.count(mark) == 1, f"{name} has {before.count(mark)} lines {mark!r}"
            path.write_text(before.replace(mark, mark + code))


SMALL = ("rounds=1", "data.train_size=40", "data.test_size=10", "federation.clients=2", "federation.per_round=2", "tap.clients=1")


@pytest.mark.parametrize(
    ("page", "tests", "choice", "kind", "line"),
    [
        ("adding-a-defense.md", ("tests/test_defenses.py", "-k", "NoBias"), "defense=no_bias", "defenses", "Sends no biases"),
        (
            "adding-an-attack.md",
            ("tests/test_attacks.py", "-k", "contract and Adam and grey"),
            "attack=patient",
            "attacks",
            "Cosine gap by plain Adam",
        ),
    ],
)
def test_following_the_page_adds_it_everywhere(page, tests, choice, kind, line, tmp_path):
    follow(page, tmp_path)
    passed = run(tmp_path, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests)
    assert re.search(r"[1-9]\d* passed", passed), passed
    assert line in run(tmp_path, sys.executable, "-m", "experiments.cli", "list", kind)
    budget = "attack.iterations=3" if choice == "attack=patient" else "attack.evaluations=3"
    run(tmp_path, sys.executable, "-m", "experiments.cli", "run", choice, budget, *SMALL, f"out={tmp_path}", "name=new")
    assert (tmp_path / "new" / "leaks.parquet").exists()


def test_each_benchmark_starts_as_it_says():
    scripts = [f"benchmarks/{path.name}" for path in ROOT.glob("benchmarks/*.py")]
    scripts = [script for script in scripts if "peer_" not in script]  # those run in a peer's environment
    start = "import contextlib, runpy, sys\n"
    start += "for script in sys.argv[1:]:\n sys.path[0], sys.argv = 'benchmarks', [script, '--help']\n"
    start += " with contextlib.suppress(SystemExit):\n  runpy.run_path(script, run_name='__main__')"
    said = run(ROOT, sys.executable, "-c", start, *scripts)
    assert [script for script in scripts if f"python {script}" not in said] == []


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("fedsim", {"fedsim"}),
        ("attacks", {"attacks", "fedsim"}),
        ("defenses", {"defenses", "fedsim"}),
        ("experiments", {"experiments", "attacks", "fedsim"}),
    ],
)
def test_imports_point_one_way(package, allowed):
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            ours = {name.split(".")[0] for name in names} & set(PACKAGES)
            assert ours <= allowed, f"{path.relative_to(ROOT)} imports {sorted(ours - allowed)}"


def test_only_the_named_files_import_flower():
    users = {
        str(path.relative_to(ROOT / "fedsim"))
        for path in (ROOT / "fedsim").rglob("*.py")
        if re.search(r"^\s*(from|import) flwr\b", path.read_text(), re.MULTILINE)
    }
    carrying = {"client.py", "cohort.py", "server.py", "secure_rounds.py", "records.py", "federation.py"}
    assert users == {*carrying, "engines/deployment.py", "engines/inline.py", "engines/ray.py"}


# The code of the README and of the tutorial.


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def test_every_test_that_the_faults_are_told_by_is_there():
    told = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "faults.md").read_text()))
    there = {name for path in (ROOT / "tests").glob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}
    assert len(told) > 20
    assert not told - there - {path.stem for path in (ROOT / "tests").glob("test_*.py")}


def test_every_fenced_block_is_of_a_language_that_is_run():
    for page in ("README.md", "docs/tutorial.md"):
        found = set(re.findall(r"^```(.+)$", (ROOT / page).read_text(), re.MULTILINE))
        assert found <= {"python", "sh", "text"}, page  # text is what was printed


def pythons_of(page: str, folder: Path) -> str:
    """What the Python blocks of a page print, as one program in `folder`."""
    assert blocks(page, "python")
    (folder / "page.py").write_text("\n".join(blocks(page, "python")))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    printed = subprocess.run([sys.executable, "page.py"], cwd=folder, env=env, capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    return printed.stdout


def test_the_python_of_the_readme_runs(tmp_path):
    assert "dB" in pythons_of("README.md", tmp_path)


def test_the_tutorial_ends_in_a_verdict_and_a_picture(tmp_path):
    printed = pythons_of("docs/tutorial.md", tmp_path).splitlines()
    (told,) = blocks("docs/tutorial.md", "text")
    # How many the naive attacker gets despite quantization is a matter of luck, and of the machine's rounding.
    luck = re.compile(r"(?<=levels=16\): it leaks; stolen: naive ).*(?=, adaptive)")
    assert [luck.sub("", line) for line in printed] == [luck.sub("", line) for line in told.splitlines()]
    with Image.open(tmp_path / "leak.png") as picture:
        assert picture.size == (8 * 34 + 2, 5 * 34 + 2)  # eight images a row: the originals, and two rows for each of two defenses


# What is added to a line of the README so that it takes seconds: fewer rounds, clients, images and evaluations. Lines that need
# what an earlier line made find it under the README's own names, which are given here.
FEW = ["data.train_size=20", "data.test_size=10", "federation.clients=2", "federation.per_round=2", "tap.clients=1"]
BRIEF = [*FEW, "rounds=1", "tap.rounds=[1]", "attack.evaluations=3"]
SHORTER = {
    "fedsim run federation=fedsgd defense=topk": [*BRIEF, "attacker=naive", "name=NAME"],
    "fedsim run -m setting=quickstart defense=none,topk,topk_ef": [*BRIEF, "attacker=naive", "name=OTHER"],
    "fedsim run -m setting=quickstart defense=none,precode": [*BRIEF, "attacker=naive"],
    "fedsim run --resume": [],
    "fedsim attack runs/NAME attack=idlg attacker=both": ["attack.evaluations=3", "attack.restarts=1"],
    "fedsim attack runs/NAME attack=idlg": ["attack.evaluations=3", "attack.restarts=1"],
    "fedsim study defenses-vs-dlg": [*BRIEF, "attacker=naive", "--workers", "1", "--max-cells", "1"],
    "fedsim invert": ["attack.evaluations=3"],
    "fedsim run setting=text": [*FEW, "rounds=1", "tap.rounds=[1]"],
    "fedsim run server=imprint": [*FEW, "data.train_size=70"],
    "fedsim run aggregation=secure": ["data.train_size=20", "data.test_size=10", "rounds=1", "attack.evaluations=3"],
    "fedsim plot": [],
    "fedsim table": [],
    "fedsim report": [],
    "fedsim leaderboard": [],
    "fedsim verify": [],
    "fedsim list": [],
    "fedsim doctor": [],
}
NOT_RUN = {
    "git clone": "the copy that is tested is cloned already",
    "make run": "it sets up .venv anew and runs for ten minutes; its command is the second of SHORTER with other defenses",
    "make test": "it would run this test",
    "make lint": "it runs no code of the project",
    "fedsim deploy": "tests/test_deployment.py starts a SuperLink and SuperNodes, with keys and ports of its own",
    "fedsim run tracker=": "tests/test_tracking.py does it with both trackers, and reads back what they wrote",
}


def key_of(line: str) -> str:
    """The entry of a line in SHORTER or NOT_RUN, the longest that it begins with."""
    found = [key for key in (*SHORTER, *NOT_RUN) if line.startswith(key)]
    assert found, f"{line!r} of the README is neither run nor left out for a reason: add it to SHORTER or to NOT_RUN"
    return max(found, key=len)


def test_the_commands_of_the_readme_run(tmp_path, monkeypatch, capsys):
    lines = [line.partition("  #")[0].strip() for block in blocks("README.md", "sh") for line in block.splitlines()]
    keys = [key_of(line) for line in lines if line]
    assert set(keys) == {*SHORTER, *NOT_RUN}, "an entry that no line of the README has"
    write_parquet(tmp_path / "data" / "cifar10")
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (48, 40), (200, 90, 30)).save("me.jpg")
    for line, key in zip(filter(None, lines), keys, strict=True):
        if key in SHORTER:
            words = [*shlex.split(line)[1:], *SHORTER[key]]
            assert main(words) == 0, f"{shlex.join(words)}\n{capsys.readouterr().err}"
    for left in ("runs/NAME/leaks.parquet", "figures/accuracy.png", "report.html", "LEADERBOARD.md"):
        assert (tmp_path / left).stat().st_size > 0
