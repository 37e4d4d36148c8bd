"""The documents are right: their steps work when followed, their code runs, and the imports point where they say."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_the_python_of_the_readme_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    (tmp_path / "readme.py").write_text("\n".join(blocks))
    printed = subprocess.run(
        [sys.executable, "readme.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert printed.returncode == 0, printed.stderr
    assert "dB" in printed.stdout
