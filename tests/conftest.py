"""What every test relies on: nothing is fetched, one thread, and caches in a folder that goes away with the session."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsim.quiet import quiet

# These are read when packages are imported, and so are set before any test file is.
quiet()
_home = tempfile.TemporaryDirectory(prefix="fedsim-tests-")
os.environ["FEDSIM_CACHE"] = str(Path(_home.name, "cache"))
os.environ["MPLCONFIGDIR"] = str(Path(_home.name, "matplotlib"))
os.environ["FLWR_HOME"] = str(Path(_home.name, "flower"))
os.environ["MPLBACKEND"] = "Agg"

import torch  # noqa: E402

torch.set_num_threads(1)  # numbers must not depend on the number of cores


# Files that take longest; begun last, one of them would keep a single worker busy when the others have nothing left.
LONGEST = ["deployment", "study", "cli", "adaptive", "docs", "faults", "engines", "config", "matching", "run", "claims", "report"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if gone := [name for name in LONGEST if not Path(__file__).with_name(f"test_{name}.py").is_file()]:
        raise pytest.UsageError(f"LONGEST in tests/conftest.py names files that are not there: {', '.join(gone)}")
    place = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_unconfigure() -> None:
    _home.cleanup()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A test that changes the number of threads changes it for itself only."""
    yield
    torch.set_num_threads(1)
