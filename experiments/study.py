"""Studies: grids of runs that answer a published question, one YAML file each in `experiments/conf/study`.

A study's folder holds one run's folder for each cell. Started again, it goes on where it stopped: finished cells are kept,
unfinished ones resumed, and cells that were added are run. A cell that fails is named in the end, and does not stop the others.
"""

import contextlib
import itertools
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import timedelta
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


def run(
    cells: dict[str, Config], base: Path, command: str, workers: int, most: int | None = None, seconds: float | None = None
) -> tuple[list[Path], dict[str, str]]:
    """Runs what is not finished of the cells, `workers` at a time: folders of those that are now, and why others failed.

    most     cells to run this time, at most
    seconds  after which no further cell is begun
    """
    from experiments.progress import console

    began = time.monotonic()
    todo = [name for name, config in cells.items() if not _finished(config, base / name)]
    kept, todo = [name for name in cells if name not in todo], todo[:most]
    if kept:
        console.print(f"  {len(kept)} of them finished already")
    failures: dict[str, str] = {}
    done: list[str] = []

    def tell(name: str, error: str | None) -> None:
        done.append(name)
        if error is not None:
            failures[name] = error
        left = timedelta(seconds=round((time.monotonic() - began) / len(done) * (len(todo) - len(done))))
        console.print(f"  {len(done)}/{len(todo)}  {name}" + (f": failed: {error}" if error else "") + f"  left {left}")

    def late() -> bool:
        return seconds is not None and time.monotonic() - began >= seconds

    waiting = iter(todo)
    if workers == 1:
        for name in waiting:
            if late():
                break
            tell(name, _cell(cells[name], base / name, command, quiet=False))
    else:
        # A fork would inherit torch's threads in an unknown state.
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:

            def begin(count: int) -> dict[Future[str | None], str]:
                names = [] if late() else itertools.islice(waiting, count)
                return {pool.submit(_cell, cells[name], base / name, command, quiet=True): name for name in names}

            running = begin(workers)
            while running:
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    name = running.pop(future)
                    try:
                        tell(name, future.result())
                    except BrokenProcessPool:
                        tell(name, "a process was killed, perhaps for memory: start again, with fewer --workers")
                        waiting = iter(())  # there is nobody left to run others
                running |= begin(len(ended))
    return [base / name for name in cells if name in {*kept, *done} - failures.keys()], failures


def _finished(config: Config, path: Path) -> bool:
    from experiments import runner
    from fedsim.run import RunFolder

    if not (path / "config.json").exists():
        return False
    try:
        folder = RunFolder.open(path)
        return folder.config == config and runner.finished(folder)
    except Exception:  # a damaged folder; running the cell says what is wrong with it, and is that cell's failure
        return False


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
            runner.resume(folder)
        except Exception as error:  # whatever it is, it is this cell's; its traceback is in the cell's log
            return f"{type(error).__name__}: {' '.join(str(error).split())}; see {path / 'log.txt'}"
    return None
