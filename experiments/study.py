"""Studies: grids of runs that answer a published question, one YAML file each in `experiments/conf/study`.

A study's folder holds one run's folder for each cell. Started again, it goes on where it stopped: finished cells are kept,
unfinished ones resumed, and cells that were added are run. A cell that fails is named in the end, and does not stop the others.
"""

import contextlib
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.config import CONF, Config, cell_names, compose, sweep
from fedsim.checks import one_of

SIZES = ("quick", "full")


@dataclass(frozen=True)
class Study:
    """A grid as its file has it.

    about   what it asks, in a line
    common  settings of every cell
    sizes   further settings of a `quick` and of a `full` study
    sweeps  lists of settings, in which KEY=A,B stands for each value; every combination is a cell
    """

    name: str
    about: str
    common: list[str]
    sizes: dict[str, list[str]]
    sweeps: list[list[str]]

    def cells(self, size: str, overrides: Sequence[str] = ()) -> dict[str, Config]:
        """The configuration of every cell, by a name that no other has."""
        settings = self.common + self.sizes[one_of("size", size, SIZES)]
        configs = [compose(cell) for one in self.sweeps for cell in sweep([*settings, *one, *overrides])]
        return dict(zip(cell_names(configs), configs, strict=True))


def names() -> list[str]:
    """The studies there are."""
    return sorted(path.stem for path in (CONF / "study").glob("*.yaml"))


def load(name: str) -> Study:
    """The study called `name`. Raises ValueError for one that is not there."""
    from omegaconf import OmegaConf

    path = CONF / "study" / f"{one_of('study', name, names())}.yaml"
    about = path.read_text().splitlines()[0].lstrip("# ").strip()
    settings: Any = OmegaConf.to_container(OmegaConf.load(path))
    return Study(name, about, **settings)


def run(cells: dict[str, Config], base: Path, command: str, workers: int) -> tuple[list[Path], dict[str, str]]:
    """Runs what is not finished of the cells, `workers` at a time: folders of those that are now, and why others failed."""
    from experiments.progress import console

    failures: dict[str, str] = {}
    done: list[str] = []

    def tell(name: str, error: str | None) -> None:
        done.append(name)
        if error is not None:
            failures[name] = error
        console.print(f"  {len(done)}/{len(cells)}  {name}" + (f": failed: {error}" if error else ""))

    if workers == 1:
        for name, config in cells.items():
            tell(name, _cell(config, base / name, command, quiet=False))
    else:
        # A fork would inherit torch's threads in an unknown state.
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            started = {pool.submit(_cell, config, base / name, command, quiet=True): name for name, config in cells.items()}
            for future in as_completed(started):
                try:
                    tell(started[future], future.result())
                except BrokenProcessPool:
                    tell(started[future], "a process was killed, perhaps for memory: start again, with fewer --workers")
    return [base / name for name in cells if name not in failures], failures


def _cell(config: Config, path: Path, command: str, *, quiet: bool) -> str | None:
    """Runs, resumes or keeps one cell; what went wrong, or None."""
    from experiments import runner
    from fedsim.quiet import quiet as hush
    from fedsim.run import RunFolder

    hush()
    with contextlib.ExitStack() as stack:
        if quiet:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            if not (path / "config.json").exists():
                runner.start(config, path, command)
                return None
            folder = RunFolder.open(path)
            if folder.config != config:
                return f"{path} was made with other settings: take another -o FOLDER, or remove it"
            if not runner.finished(folder):
                runner.resume(folder)
        except Exception as error:  # whatever it is, it is this cell's; its traceback is in the cell's log
            return f"{type(error).__name__}: {' '.join(str(error).split())}; see {path / 'log.txt'}"
    return None
