"""Any configuration either runs one round or stops at once with one line that names the setting.

Choices of all groups and values of their fields are drawn, bad ones among them. `python tests/test_fuzz.py SECONDS [SEED]` goes on
for so long with others than the test has, and prints what it found.
"""

import contextlib
import functools
import io
import random
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import runner
from experiments.config import GROUPS, choices, compose
from fedsim.errors import FederationError

# Ray and MLflow take long to start, the other datasets are not everywhere, and a setting is made of the other groups' choices.
FIXED = {"engine": ["inline"], "data": ["synthetic", "synthetic", "text"], "setting": ["none"]}
FIXED["tracker"] = ["none", "tensorboard"]
LARGE = ("resnet18", "resnet20", "resnet20_dlg")  # they run like the others, and for long
SMALL = ["data.train_size=24", "data.test_size=40", "federation.clients=3", "federation.per_round=2", "federation.batch_size=2"]
SMALL += ["rounds=1", "tap.every=1", "tap.clients=1", "device=cpu", "engine.workers=1", "out=nowhere"]
BUDGET = {"restarts": 1, "evaluations": 2, "iterations": 2, "steps": 2, "draws": 40, "latents": 4, "starts": 1, "centroids": 3}
VALUES = ["0", "1", "2", "3", "7", "-1", "-3", "0.5", "-0.5", "1.5", "1e-9", ".nan", ".inf", "true", "false", "null", "abc", "''"]
VALUES += ["[]", "[1]", "[a]", "[-1,0.5]", "{}", "{a:1}"]
DEFECTS = r"(Type|Key|Index|Attribute|Assertion|Runtime|ZeroDivision|NotImplemented|Overflow)Error"
NOT_A_SETTING = ("out", "name", "engine.workers", "rounds")


def leaves(node: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """The settings below a node of a configuration, by their dotted names."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key not in ("choices", "_target_"):
                yield from leaves(value, f"{at}.{key}" if at else key)
    elif isinstance(node, list) and any(isinstance(value, dict) for value in node):
        for i, value in enumerate(node):
            yield from leaves(value, f"{at}.{i}")
    else:
        yield at, node


@functools.cache
def names(group: str) -> list[str]:
    return FIXED.get(group) or [name for name in choices(group) if name not in LARGE]


def drawn(chance: random.Random) -> list[str]:
    """Overrides of a tiny run: up to five choices, and up to three settings."""
    groups = chance.sample([group for group in GROUPS if group not in ("engine", "setting")], chance.randint(0, 5))
    chosen = [f"{group}={chance.choice(names(group))}" for group in groups]
    small = [*SMALL, *([] if "data=text" in chosen else ["data.side=16"])]
    try:
        config = compose([*chosen, *small])
    except ValueError:
        return [*chosen, *small]
    found = dict(leaves(config))
    small += [f"attack.{name}={value}" for name, value in BUDGET.items() if f"attack.{name}" in found]
    fields = [name for name in found if name not in NOT_A_SETTING]
    return [*chosen, *small, *(f"{name}={chance.choice(VALUES)}" for name in chance.sample(fields, chance.randint(0, 3)))]


def outcome(overrides: list[str], folder: Path) -> str:
    """ "ran", or why it was refused. Raises what is a defect: any other error, or a line that names nothing that was asked for."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            config = compose(overrides)
            runner.check_config(config)
            runner.start(config, folder, "a test")
        return "ran"
    except (ValueError, FederationError) as error:
        said = str(error)
    own = [override for override in overrides if override not in SMALL]
    words = {word.lower() for override in own for word in re.split(r"[._/=]", override) if len(word) > 2}
    if not said or "\n" in said or re.search(DEFECTS, said) or not any(word in said.lower() for word in words):
        raise AssertionError(f"no line that names a setting: {said!r}")
    return said


@settings(max_examples=40, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False))
def test_any_configuration_runs_or_is_refused_in_one_line_that_names_the_setting(chance):
    overrides = drawn(chance)
    with tempfile.TemporaryDirectory() as folder:
        outcome(overrides, Path(folder, "run"))


def search(seconds: float, seed: int) -> None:
    """Prints each kind of defect once, with what led to it."""
    until, kinds, found = time.monotonic() + seconds, Counter[str](), Counter[str]()
    while time.monotonic() < until:
        overrides = drawn(random.Random(seed))
        with tempfile.TemporaryDirectory() as folder:
            try:
                kinds["ran" if outcome(overrides, Path(folder, "run")) == "ran" else "refused"] += 1
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                kind = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
                kind += f": {' '.join(str(error).split())[:160]}"
                kinds["defect"] += 1
                found[kind] += 1
                if found[kind] == 1:
                    asked = [one for one in overrides if one not in SMALL]
                    print(f"seed {seed}: {kind}\n    {' '.join(asked)}", flush=True)
        seed += 1
    print(f"{sum(kinds.values())} configurations: {dict(kinds)}; the next seed is {seed}")


if __name__ == "__main__":
    search(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
