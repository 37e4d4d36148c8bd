"""Studies: grids of runs that answer a published question, one YAML file each in `experiments/conf/study`.

A study's folder holds one run's folder for each cell. Started again, it goes on where it stopped: finished cells are kept,
unfinished ones resumed, and cells that were added are run; one that a study beside this one has is taken over. Cells that differ in
their attack alone are trained once, and attacks that know no defense are one program for all cells of equal shape. A cell that
fails does not stop the others: `cells.parquet` has a row for each that was run, with what went wrong.
"""

import contextlib
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.config import CONF, Config, compose, sweep
from experiments.naming import cell_names
from fedsim.checks import one_of
from fedsim.cores import SHARE, cores

if TYPE_CHECKING:
    from fedsim.run import RunFolder

SIZES = ("quick", "full")
CELLS = "cells.parquet"  # in a study's folder: a row for each cell that was run
ABOUT = "study.json"  # which study it is
VICTIMS = {"cpu": 16, "cuda": 1024}  # attacked as one program; lost at most when a study is killed

Outcome = dict[str, str | None]


@dataclass(frozen=True)
class Study:
    """A grid as its file has it.

    about    what it asks, in a line
    common   settings of every cell
    sweeps   lists of settings, in which KEY=A,B stands for each value; every combination is a cell
    sizes    settings of a `quick` and of a `full` study, in the place of those above that have the same key
    answers  rows of the published claims, in `experiments/claims.yaml`, that are held against what it measures
    """

    name: str
    about: str
    common: list[str]
    sizes: dict[str, list[str]]
    sweeps: list[list[str]]
    answers: Sequence[str] = ()

    def grid(self, size: str, overrides: Sequence[str] = ()) -> list[list[str]]:
        """The settings of every cell."""
        last = [*self.sizes[one_of("size", size, SIZES)], *overrides]
        # The last word on a setting is kept, in the place of the first.
        settings = [
            list({one.split("=", 1)[0]: one for one in [*self.common, *sweeping, *last]}.values()) for sweeping in self.sweeps
        ]
        return list({json.dumps(cell): cell for one in settings for cell in sweep(one)}.values())

    def cells(self, size: str, overrides: Sequence[str] = ()) -> dict[str, Config]:
        """The configuration of every cell, by a name that no other has."""
        found: dict[str, tuple[Config, list[str]]] = {}
        for cell in self.grid(size, overrides):
            config = compose(cell)
            found.setdefault(digest(config), (config, cell))  # an override can make two lists of settings say the same
        configs, cells = zip(*found.values(), strict=True)
        return dict(zip(cell_names(configs, cells), configs, strict=True))


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
    cells: dict[str, Config],
    base: Path,
    command: str,
    workers: int,
    most: int | None = None,
    seconds: float | None = None,
    discard: bool = False,
) -> tuple[list[Path], dict[str, str]]:
    """Runs what is not finished of the cells, `workers` lots at a time: folders of those that are now, and why others failed.

    most     cells to run this time, at most
    seconds  after which no further lot of cells is begun
    discard  keep the results of finished cells alone
    """
    from experiments.estimate import room
    from experiments.progress import console, size
    from fedsim.run import RunFolder

    began = time.monotonic()
    base.mkdir(parents=True, exist_ok=True)
    cells = _as_kept(cells, base)
    shared = _shared(cells, base)
    failed = _failed_before(cells, base)
    todo = [name for name, config in cells.items() if not _finished(config, base / name)]
    kept = [name for name in cells if name not in todo]
    todo = sorted(todo, key=failed.__contains__)[:most]  # what may fail again keeps nobody from his turn
    if kept:
        console.print(
            f"  {len(kept)} of them finished already" + (f", {shared} in other studies beside this one" if shared else "")
        )
    if discard:
        for name in kept:
            RunFolder(base / name).discard()
    elif (needed := room(cells[name] for name in todo)) > (free := shutil.disk_usage(base).free):
        console.print(
            f"  may fill up the disk: up to {size(needed)} to write and {size(free)} free in {base}; choose another place"
            " with -o FOLDER, or keep results alone with --discard",
            style="yellow",
            markup=False,
        )
    failures: dict[str, str] = {}
    done: list[str] = []

    def tell(outcome: Outcome, took: float) -> None:
        count = len(done) + len(outcome)  # of a lot, whose cells end together
        left = timedelta(seconds=round((time.monotonic() - began) / count * (len(todo) - count)))
        for name, error in outcome.items():
            if error is not None:
                failures[name] = error
            elif discard:
                RunFolder(base / name).discard()
        _note(base, {name: cells[name] for name in outcome}, outcome, took / len(outcome))
        for name, error in outcome.items():
            done.append(name)
            said = f": failed: {error}" if error else ""
            console.print(f"  {len(done)}/{len(todo)}  {name}{said}  left {left}", markup=False)

    def late() -> bool:
        return seconds is not None and time.monotonic() - began >= seconds

    waiting = iter(lots({name: cells[name] for name in todo}, workers))
    if workers == 1:
        for lot in waiting:
            if late():
                break
            tell(*_lot(lot, base, command, quiet=False))
    else:
        with processes(workers) as pool:

            def begin(count: int) -> dict[Future[tuple[Outcome, float]], list[str]]:
                found = {}
                for lot in [] if late() else itertools.islice(waiting, count):
                    try:
                        found[pool.submit(_lot, lot, base, command, quiet=True)] = list(lot)
                    except BrokenProcessPool:
                        lost(list(lot))
                        break
                return found

            def lost(members: list[str]) -> None:
                nonlocal waiting
                killed = "a process was killed, perhaps for memory: start again, with fewer --workers"
                tell(dict.fromkeys(members, killed), math.nan)
                waiting = iter(())  # there is nobody left to run others

            running = begin(workers)
            while running:
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    members = running.pop(future)
                    try:
                        tell(*future.result())
                    except BrokenProcessPool:
                        lost(members)
                running |= begin(len(ended))
    return [base / name for name in cells if name in {*kept, *done} - failures.keys()], failures


def processes(workers: int) -> ProcessPoolExecutor:
    """Processes that share this one's cores, and end with it."""
    # A fork would inherit torch's threads in an unknown state; one of a server, the environment that the server began in.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_settle, initargs=(workers,))


def _settle(workers: int) -> None:
    """Takes this process's share of the cores, and ends it as soon as the study that started it has ended, in whatever way."""
    os.environ[SHARE] = str(max(1, cores() // workers))
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _as_kept(cells: dict[str, Config], base: Path) -> dict[str, Config]:
    """The cells by the names of their folders: one begun in a larger or smaller grid, which named it otherwise, keeps it, and none
    is called as one of other settings, whose folder and whose row it would take."""
    from experiments.progress import console
    from fedsim.run import RunError, RunFolder

    wanted, kept, others = {digest(config) for config in cells.values()}, dict[str, str](), set[str]()
    for path in sorted(base.glob("*/config.json")):
        with contextlib.suppress(RunError):  # damaged; the cell of this name will say so
            if (found := digest(RunFolder(path.parent).config)) not in wanted:
                others.add(path.parent.name)
            elif kept.get(found) not in cells:
                kept[found] = path.parent.name
    taken, named = others | set(kept.values()), {}
    for name, config in cells.items():
        hashed = digest(config)
        named[kept.get(hashed) or (f"{name}_{hashed}" if name in taken else name)] = config
    if beside := others & cells.keys():
        console.print(f"  folders of these names that have other settings and are left alone: {len(beside)}")
    return named


def _failed_before(cells: Mapping[str, Config], base: Path) -> set[str]:
    """Which of the cells failed when they were last run."""
    from fedsim.files import Damaged, read_table

    try:
        rows = read_table(base / CELLS) if (base / CELLS).exists() else None
    except Damaged:  # `_note` says so and sets it aside
        return set()
    failed = set() if rows is None else set(rows.loc[rows["failed"].notna(), "hash"])
    return {name for name, config in cells.items() if digest(config) in failed}


def _shared(cells: dict[str, Config], base: Path) -> int:
    """Takes over what studies in folders beside this one have finished with the very same configuration; how many cells."""
    from experiments.progress import console
    from fedsim.files import Damaged, read_table
    from fedsim.run import RunError, RunFolder

    wanted = {digest(config): name for name, config in cells.items() if not (base / name / "config.json").exists()}
    found = 0
    for path in sorted(base.parent.glob(f"*/{CELLS}")) if wanted else ():
        try:
            rows = read_table(path)
        except Damaged as error:  # another study's
            console.print(f"  {error}: nothing is taken over from there", style="yellow", markup=False)
            continue
        for cell, hashed in rows.loc[rows["failed"].isna(), ["cell", "hash"]].itertuples(index=False):
            there = path.parent / cell
            if hashed in wanted and path.parent != base and (there / "config.json").is_file():
                try:
                    RunFolder.copy(RunFolder.open(there), base / wanted[hashed])
                except RunError as error:  # the cell is run as if nobody had it
                    console.print(f"  {error}: {cell} is not taken over", style="yellow", markup=False)
                    continue
                del wanted[hashed]
                found += 1
    return found


def lots(cells: dict[str, Config], workers: int = 1) -> list[dict[str, Config]]:
    """The cells in lots that are run by one process, each in the order of the grid.

    In a lot are those that learn the same, and with them as many of the same shape as make a program of a good size, but no
    more than leaves every worker a share; those that attack nobody are alone. On a CPU the victims of a large network are no faster
    together, and alone less is lost when a study is killed.
    """
    from attacks.problems import SMALL
    from experiments.estimate import parameters
    from fedsim.setup import device_of

    shapes = {name: _shape(config) for name, config in cells.items()}
    victims = {name: victims_of(config) for name, config in cells.items()}
    of_shape: Counter[str] = Counter()
    for name, shape in shapes.items():
        of_shape[shape] += victims[name]

    def most(name: str) -> int:
        device = device_of(cells[name]["device"]).type
        good = VICTIMS[device] if device != "cpu" or parameters(cells[name]) <= SMALL else 1
        return min(good, math.ceil(of_shape[shapes[name]] / workers))

    families: dict[str, list[str]] = defaultdict(list)
    for name, config in cells.items():
        families[training(config)].append(name)
    made: list[dict[str, Config]] = []
    filled: dict[str, tuple[int, dict[str, Config]]] = {}  # by shape: victims, and the lot they are in
    for members in families.values():
        for name in members:
            if victims[name] and shapes[name] in filled and filled[shapes[name]][0] + victims[name] <= most(name):
                lot = filled[shapes[name]][1]
                break
        else:
            lot = {}
            made.append(lot)
        lot |= {name: cells[name] for name in members}
        for name in members:
            there = filled.get(shapes[name])
            filled[shapes[name]] = (victims[name] + (there[0] if there and there[1] is lot else 0), lot)
    return made


def training(config: Config) -> str:
    """What a run learns and shows depends on: its configuration without the attack, and without its name."""
    choices = {key: value for key, value in config["choices"].items() if key not in ("attack", "setting")}
    left_out = ("attack", "attacker", "name", "out", "choices")
    return json.dumps({key: value for key, value in config.items() if key not in left_out} | {"choices": choices}, sort_keys=True)


def _shape(config: Config) -> str:
    """What runs have in common whose victims can be one program: all but seed, defense, first weights and length."""
    kept = ("data", "federation", "strategy", "server", "aggregation", "attack", "attacker", "device")
    model = {key: value for key, value in config["model"].items() if key != "init"}
    return json.dumps({key: config[key] for key in kept} | {"model": model}, sort_keys=True)


def victims_of(config: Config) -> int:
    """How many observations the attacks of a run are given."""
    return sum(heard(config))


def heard(config: Config) -> list[int]:
    """How many clients are listened to in each round."""
    from experiments.config import build_checked

    tap, clients = build_checked("tap", config["tap"]), range(config["federation"]["per_round"])
    return [len(tap.choose(0, round, clients)) for round in range(1, config["rounds"] + 1)]


def _note(base: Path, cells: dict[str, Config], outcome: Outcome, seconds: float) -> None:
    """Adds a row for each cell to the study's table, in the place of what was said of it before."""
    import pandas as pd
    from filelock import FileLock

    from experiments.progress import console
    from fedsim.files import Damaged, read_table, write_table

    rows = pd.DataFrame(
        [
            {"cell": name, "hash": digest(config), "failed": outcome[name], "seconds": seconds, "ended": time.strftime("%FT%T%z")}
            for name, config in cells.items()
        ]
    ).astype({"failed": object})
    path = base / CELLS
    with FileLock(base / ".cells.lock"):  # jobs of a cluster write to one table
        try:
            old = read_table(path) if path.exists() else None
        except Damaged as error:  # the cells say themselves what is finished
            aside = path.with_name(f"{CELLS}.damaged")
            path.replace(aside)
            console.print(f"  {error}: set aside as {aside.name}, a new one is begun", style="yellow", markup=False)
            old = None
        if old is not None:
            rows = pd.concat([old[~old["cell"].isin(rows["cell"])], rows], ignore_index=True)
        write_table(path, rows)


def digest(config: Config) -> str:
    """A hash of a whole configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def check_own(name: str, base: Path) -> None:
    """Raises ValueError where the folder `base` is another study's than `name`."""
    from fedsim.files import read_json

    if (base / ABOUT).is_file() and (other := read_json(base / ABOUT)["study"]) != name:
        raise ValueError(f"{base} is the folder of the study {other}: name another for {name}")


def wanted(base: Path) -> list[Config]:
    """The configurations of all cells that the study in the folder `base` was last asked for."""
    from fedsim.files import read_json

    about = read_json(base / ABOUT)
    return list(load(about["study"]).cells(about["size"], about["overrides"]).values())


def cells_among(folders: Sequence["RunFolder"], configs: Sequence[Config]) -> list["RunFolder"]:
    """Those of the folders that are of these configurations, one for each. A setting that an earlier version did not write down
    may be what it is."""
    left = {digest(config): config for config in configs}
    kept = [folder.path for folder in folders if left.pop(digest(folder.config), None)]
    for folder in folders:
        if folder.path not in kept and (like := next((key for key, of in left.items() if _says(of, folder.config)), None)):
            kept.append(folder.path)
            del left[like]
    return [folder for folder in folders if folder.path in kept]


def _says(config: Any, earlier: Any) -> bool:
    """Whether a configuration says all that an earlier one does."""
    if isinstance(config, dict) and isinstance(earlier, dict):
        return all(key in config and _says(config[key], value) for key, value in earlier.items())
    if isinstance(config, list) and isinstance(earlier, list):
        return len(config) == len(earlier) and all(map(_says, config, earlier))
    return bool(config == earlier)


def distinct(folders: Sequence["RunFolder"]) -> list["RunFolder"]:
    """These runs without those that an earlier one is the same as, as are cells that one study took over from another.

    What counts victims takes each once. A run that was attacked by others later is not the same.
    """
    found: dict[tuple[str, ...], RunFolder] = {}
    for folder in folders:
        leaks = folder.leaks()
        found.setdefault((digest(folder.config), *(sorted(leaks["attack"].unique()) if len(leaks) else ())), folder)
    return list(found.values())


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


def _lot(cells: dict[str, Config], base: Path, command: str, *, quiet: bool) -> tuple[Outcome, float]:
    """Trains what is not trained of some cells and attacks them together: what went wrong of each, or None; and the seconds."""
    from experiments import runner
    from fedsim.quiet import quiet as hush
    from fedsim.run import RunFolder

    hush()
    began = time.monotonic()
    outcome: Outcome = dict.fromkeys(cells)
    with contextlib.ExitStack() as stack:
        if quiet:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        alone = len(cells) == 1
        trained: dict[str, RunFolder] = {}
        ready: dict[str, RunFolder] = {}
        for name, config in cells.items():
            with _failing(outcome, name, base):
                ready[name] = _trained(config, base / name, command, trained.get(training(config)), attack=alone)
                trained.setdefault(training(config), ready[name])
        by_shape: dict[str, list[str]] = defaultdict(list)
        for name in () if alone else ready:
            by_shape[_shape(cells[name])].append(name)
        for members in by_shape.values():
            try:
                runner.attack_together([ready[name] for name in members])
            except Exception as error:  # of one of them, or for want of memory: each by itself, the others are not held up
                print(f"  attacked one by one: {type(error).__name__}: {' '.join(str(error).split())}")
                for name in members:
                    with _failing(outcome, name, base):
                        runner.resume(ready[name])
    return outcome, time.monotonic() - began


def _trained(config: Config, path: Path, command: str, twin: Any, *, attack: bool) -> Any:
    """The folder of a cell whose rounds are done, perhaps by its `twin`; and its attacks, if asked for."""
    from experiments import runner
    from fedsim.run import RunError, RunFolder

    if not (path / "config.json").exists():
        return runner.branch(twin, config, path, command) if twin else runner.start(config, path, command, attack=attack)
    folder = RunFolder.open(path)
    if folder.config != config:
        raise RunError(f"{path} was made with other settings: take another -o FOLDER, or remove it")
    return runner.resume(folder, attack=attack)


@contextlib.contextmanager
def _failing(outcome: Outcome, name: str, base: Path) -> Iterator[None]:
    """Whatever goes wrong inside is this cell's; its traceback is in the cell's log."""
    try:
        yield
    except Exception as error:
        outcome[name] = f"{type(error).__name__}: {' '.join(str(error).split())}; see {base / name / 'log.txt'}"
