"""A run's folder: everything a run was made from, saw and found, readable at any moment.

    config.json, environment.json   what was asked for; versions, device and command it ran with
    partition.safetensors           indices of each client's images
    rounds.parquet, leaks.parquet   one row for each round; one for each image an attack went for
    observations/round_00005/       broadcast.safetensors, and client_00003.safetensors for each client listened to, sum.safetensors
    reconstructions/dlg/            round_00005.safetensors, what an attack made of them, and how it got there if it recorded that
    checkpoint.safetensors          weights and the strategy's memory after the last finished round
    before/                         the checkpoint and the tables as they were one writing earlier
    attacks.json                    settings of attacks that were made after the run
    clients/                        the clients' own: memories of stateful defenses, and what their inspections found
    figures/, log.txt

All files are written whole or not at all, and the checkpoint comes last in a round: rows and files beyond it belong to a round that
was interrupted, and are dropped when the run is resumed. What is read again is sealed (`fedsim/files.py`): where a checkpoint or a
table is damaged, `RunFolder.mend` goes back to the one before. Nothing in a folder is unpickled, no link in it is followed, and
what its configuration names is built only if it is one of the project's own classes.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from fedsim.federation import Checkpoint
from fedsim.files import Damaged, is_begun, is_name, read_json, read_table, read_tensors, write_json, write_table, write_tensors
from fedsim.observation import SUM, Observation, Reconstruction, Trace
from fedsim.setup import DRAWN, Setup, check_targets, setup_of
from fedsim.wire import from_bytes, to_bytes

CHECKPOINT, ROUNDS, LEAKS, BEFORE = "checkpoint.safetensors", "rounds.parquet", "leaks.parquet", "before"
ATTACKS = "attacks.json"
BEGUN = "begun"  # marks a folder that is being made: what is in it is ours
DISCARDED = "discarded"  # marks a finished run that only keeps its results
FOLDERS, FILES = ("observations", "clients"), ("partition.safetensors", ROUNDS, CHECKPOINT)  # what does not depend on an attack


class RunError(ValueError):
    """A folder that cannot be used as asked; the message is one line."""


class RunFolder:
    """The folder of one run, at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any], environment: Mapping[str, Any]) -> "RunFolder":
        """A new folder. Raises RunError when there is a run in it already, or anything else."""
        folder = cls(path)
        with folder._made(config, environment):
            pass
        return folder

    @contextlib.contextmanager
    def _made(self, config: Mapping[str, Any], environment: Mapping[str, Any]) -> Iterator[None]:
        """Inside, the folder is empty and this process alone makes a run of it; one that was killed in here is made anew."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.check_free()  # a lock is a file as well, and belongs in no folder of others
            with self.held():
                self.check_free()
                (self.path / BEGUN).touch()
                for name in set(os.listdir(self.path)) - {".lock", BEGUN}:  # left by who was killed
                    left = self.path / name
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
                yield
                write_json(self.path / "environment.json", environment)
                write_json(self.path / "config.json", config)
                (self.path / BEGUN).unlink()
        except OSError as error:
            raise RunError(f"cannot write to {self.path}: {error.strerror}; choose another folder with out=") from None

    def check_free(self) -> None:
        """Raises RunError where a new run would find a run already, or anything else."""
        if (self.path / "config.json").exists():
            raise RunError(f"{self.path} holds a run already: resume it with --resume {self.path}, or choose another name=")
        if self.path.is_dir() and not (self.path / BEGUN).exists() and (others := sorted(set(os.listdir(self.path)) - {".lock"})):
            raise RunError(f"{self.path} is not empty, it holds {others[0]}: choose another name=")

    @classmethod
    def branch(cls, source: "RunFolder", path: Path, config: Mapping[str, Any], environment: Mapping[str, Any]) -> "RunFolder":
        """A new folder with what another run learned and saw, and nothing of its attacks. Raises RunError as `create`."""
        folder = cls(path)
        with folder._made(config, environment):
            for name in (*FOLDERS, *FILES):
                if (source.path / name).exists():
                    copied(source.path / name, path / name)
        return folder

    @classmethod
    def copy(cls, source: "RunFolder", path: Path) -> "RunFolder":
        """A new folder with all that another run's holds. Raises RunError as `create`."""
        folder, environment = cls(path), source.path / "environment.json"
        with folder._made(source.config, _read(read_json, environment)):
            for file in sorted(source.path.iterdir()):
                if file.name not in (".lock", "config.json", environment.name):
                    copied(file, path / file.name)
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """An existing folder. Raises RunError when it holds no run, or a link."""
        if not (path / "config.json").is_file():
            raise RunError(f"{path} is not a run's folder: it has no config.json")
        check_no_links(path)
        return cls(path)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else changes the folder meanwhile. Raises RunError where somebody does; one who was killed holds nothing."""
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(f"another process is at work in {self.path}: wait for it, or stop it") from None
        try:
            yield
        finally:
            lock.release()

    @property
    def config(self) -> dict[str, Any]:
        """What was asked for. Raises RunError when it is damaged, or would build what is not the project's own."""
        path = self.path / "config.json"
        try:
            config = read_json(path)
            check_targets(config)
        except ValueError as error:
            raise RunError(str(error) if isinstance(error, Damaged) else f"{path}: {error}") from None
        return config

    def setup(self) -> Setup:
        """The setup of the run's configuration. Raises RunError where its data or shards are not those that the run began with."""
        setup, path = setup_of(self.config), self.path / "environment.json"
        told = _read(read_json, path).get("data") if path.exists() else None  # folders of earlier versions do not tell
        if told not in (None, setup.dataset.fingerprint):
            data = setup.config["data"]
            if data["name"] in DRAWN and not data.get("root"):
                now, way_out = "this version of fedsim draws", f"take the version in {path}"
            else:
                now, way_out = f"{data.get('root') or '$FEDSIM_DATA'} holds now", "name what it had with data.root or $FEDSIM_DATA"
            raise RunError(f"{self.path} was run on other data than {now}: {way_out}")
        with contextlib.suppress(Damaged):  # or not there: made again by who goes on with the run
            kept = list(read_tensors(self.path / "partition.safetensors")[0].values())
            if len(kept) != len(setup.shards) or not all(map(torch.equal, kept, setup.shards)):
                way_out = f"take the partition that it was run with, and flwr-datasets, numpy and torch as in {path}"
                raise RunError(f"{self.path} was run on other shards of its data than are dealt now: {way_out}")
        return setup

    def attacks_made(self) -> dict[str, Any]:
        """By name, the attacks that were made after the run: their settings (`attack`), and the `overrides` that asked for them."""
        path = self.path / ATTACKS
        return dict(_read(read_json, path)) if path.exists() else {}

    def note_attack(self, name: str, attack: Mapping[str, Any], overrides: Sequence[str]) -> None:
        """Writes down what `attacks_made` tells."""
        made = self.attacks_made() | {name: {"attack": attack, "overrides": list(overrides)}}
        write_json(self.path / ATTACKS, made)

    @property
    def discarded(self) -> bool:
        """Whether the run is finished and only keeps its results."""
        return (self.path / DISCARDED).exists()

    def discard(self) -> None:
        """Drops what a finished run would only be attacked again with: what was captured, checkpoints, what clients remember."""
        (self.path / DISCARDED).touch()
        for name in ("observations", BEFORE):
            if (self.path / name).exists():
                shutil.rmtree(self.path / name)
        for path in (self.path / CHECKPOINT, *(self.path / "clients").glob("*/round_*.safetensors")):
            path.unlink(missing_ok=True)

    @property
    def pictured(self) -> bool:
        """Whether what attacks made is here; a run whose results alone came from another machine has its tables without it."""
        return (self.path / "reconstructions").is_dir()

    # Tables.

    def rounds(self) -> pd.DataFrame:
        """One row for each finished round, round 0 the untrained model; empty before the first."""
        return self._table("rounds")

    def leaks(self) -> pd.DataFrame:
        """One row for each image an attack went for; empty when none did."""
        return self._table("leaks")

    def findings(self) -> pd.DataFrame:
        """One row for each finding of a client's inspection, in the order of rounds and clients; empty when there is none."""
        files = sorted((self.path / "clients").glob("*/findings_*.json"), key=lambda path: (_number(path), path))
        found = [_read(read_json, path) for path in files]
        return pd.DataFrame([row for one in found for row in (one if isinstance(one, list) else one["rows"])])  # earlier versions

    def _table(self, name: str) -> pd.DataFrame:
        path = self.path / f"{name}.parquet"
        return _read(read_table, path) if path.exists() else pd.DataFrame()

    def add(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends `rows` to the table `name`, in place of earlier rows of the same round (and the same attack, if it has one)."""
        if not rows:
            return
        new = pd.DataFrame(rows)
        old = self._table(name)
        if len(old):
            keys = [key for key in ("round", "attack") if key in new]
            again = pd.MultiIndex.from_frame(old[keys]).isin(pd.MultiIndex.from_frame(new[keys]))
            kept = old[~again]
            # Concatenating an empty table would decide the dtypes of the new one.
            new = pd.concat([kept, new], ignore_index=True) if len(kept) else new
        path = self.path / f"{name}.parquet"
        write_table(path, new, self._before(path))

    # What was seen.

    def save_partition(self, shards: Sequence[Tensor]) -> None:
        """Saves the indices of each client's images."""
        shape = {f"client_{i:05d}": shard.contiguous() for i, shard in enumerate(shards)}
        _save(self.path / "partition.safetensors", shape)

    def save_observations(self, seen: Sequence[Observation]) -> None:
        """Saves what was seen in one round; the broadcast, which all its clients share, once."""
        folder = self._observations(seen[0].round)
        broadcast = _named(params=seen[0].params, buffers=seen[0].buffers)
        _save(folder / "broadcast.safetensors", broadcast)
        for one in seen:
            packets = {name: torch.frombuffer(bytearray(to_bytes(p)), dtype=torch.uint8) for name, p in one.packets.items()}
            order = json.dumps(list(one.packets))
            _save(
                folder / f"{_sender(one.client)}.safetensors",
                _named(packets=packets, sent_buffers=one.sent_buffers),
                {"num_examples": str(one.num_examples), "round": str(one.round), "client": str(one.client), "order": order}
                | {"summed": json.dumps(one.summed), "masked": json.dumps(one.masked)},
            )

    def observed_rounds(self) -> list[int]:
        """Rounds something was seen in, in order."""
        return sorted(_number(path) for path in (self.path / "observations").glob("round_*"))

    def saw(self, round: int, client: int) -> bool:
        """Whether `client` was listened to in `round`."""
        return (self._observations(round) / f"{_sender(client)}.safetensors").exists()

    def observations(self, round: int, client: int | None = None) -> list[Observation]:
        """What was seen in `round`, in the order of clients, a sum last; of one client alone if one is named.

        Raises RunError naming a file that is damaged.
        """
        folder = self._observations(round)
        shared, _ = _load(folder / "broadcast.safetensors")
        seen = []
        every = (*sorted(folder.glob("client_*.safetensors")), *folder.glob(f"{_sender(SUM)}.safetensors"))
        for path in every if client is None else (folder / f"{_sender(client)}.safetensors",):
            tensors, about = _load(path)
            packets, params = _group(tensors, "packets"), _group(shared, "params")
            try:
                order = json.loads(about["order"])  # tensor files keep none, and a sum over layers depends on it
                seen.append(
                    Observation(
                        params={name: params[name] for name in order},
                        packets={name: from_bytes(packets[name].numpy().tobytes()) for name in order},
                        num_examples=int(about["num_examples"]),
                        round=int(about["round"]),
                        client=int(about["client"]),
                        buffers=_group(shared, "buffers"),
                        sent_buffers=_group(tensors, "sent_buffers"),
                        summed=tuple(json.loads(about.get("summed", "[]"))),  # earlier versions knew neither
                        masked=json.loads(about.get("masked", "false")),
                    )
                )
            except (KeyError, ValueError) as error:
                raise RunError(f"{path} is damaged ({error}): delete it, or capture the round again") from None
        return seen

    def save_reconstructions(self, attack: str, seen: Sequence[Observation], found: Sequence[Reconstruction]) -> None:
        """Saves what `attack` made of what was seen in one round, with its traces."""
        path = self._reconstructions(attack, seen[0].round)
        tensors: dict[str, Tensor] = {}
        about: dict[str, str] = {}
        for one, made in zip(seen, found, strict=True):
            name = _sender(one.client)
            tensors |= {f"{name}/images": made.images, f"{name}/labels": made.labels, f"{name}/losses": made.losses}
            if made.certain is not None:
                tensors[f"{name}/certain"] = made.certain
            if made.trace is not None:
                tensors |= {f"{name}/trace/{key}": t.clone() for key, t in trace_tensors(made.trace).items()}
                about[name] = json.dumps(list(made.trace.layers))  # tensor files do not keep the order of layers
        _save(path, tensors, about)

    def reconstructions(self, attack: str, round: int) -> dict[int, Tensor]:
        """Images (B, C, H, W) that `attack` made in `round`, by client, those of the sum under SUM."""
        tensors, _ = _load(self._reconstructions(attack, round), lambda name: name.count("/") == 1 and name.endswith("/images"))
        return {_client(name): t for name, t in tensors.items()}

    def traces(self, attack: str, round: int) -> dict[int, Trace]:
        """How `attack` got to its reconstructions of `round`, by client; empty when it recorded nothing."""
        tensors, about = _load(self._reconstructions(attack, round), lambda name: "/trace/" in name)
        return {
            _client(name): trace_of(_group(tensors, f"{name}/trace"), json.loads(layers)) for name, layers in sorted(about.items())
        }

    def _observations(self, round: int) -> Path:
        return self.path / "observations" / f"round_{round:05d}"

    def _reconstructions(self, attack: str, round: int) -> Path:
        if not is_name(attack):
            raise RunError(f"an attack is named by a folder of its own in reconstructions/, and {attack!r} is none")
        return self.path / "reconstructions" / attack / f"round_{round:05d}.safetensors"

    def _before(self, path: Path) -> Path:
        return self.path / BEFORE / path.name

    # Going on.

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Marks a round as finished."""
        strategy = {name: torch.from_numpy(np.ascontiguousarray(a)).reshape(a.shape) for name, a in checkpoint.arrays.items()}
        about = {"round": str(checkpoint.round), "numbers": json.dumps(checkpoint.numbers)}
        path = self.path / CHECKPOINT
        write_tensors(path, _named(model=checkpoint.tensors, strategy=strategy), about, self._before(path))

    def checkpoint(self) -> Checkpoint | None:
        """The last finished round, or None before the first. Raises RunError when it is damaged; `mend` finds the one before."""
        path = self.path / CHECKPOINT
        return _checkpoint_in(path) if path.exists() else None

    def mend(self) -> list[str]:
        """Goes back to the last good state where a file is damaged; what it did, a line for each.

        A round is done again if its checkpoint, its rows, or what a client remembers of it is damaged. Rows of attacks may be
        missing afterwards: what was captured is still there to be attacked. Raises RunError where no earlier state is left.
        """
        said = []
        if (shards := self.path / "partition.safetensors").exists() and (flaw := _flaw(read_tensors, shards)):
            shards.unlink()
            said.append(f"{flaw}: it is made again")
        if flaw := self._flaw_of(LEAKS, read_table):
            said.append(f"{flaw}: the run's own attacks are repeated where rows are lost, those of `fedsim attack` are not")
            if leaks := self._versions(LEAKS, read_table):
                os.replace(leaks[0][0], self.path / LEAKS)
            else:
                (self.path / LEAKS).unlink(missing_ok=True)
        checkpoints, tables = self._versions(CHECKPOINT, _checkpoint_in), self._versions(ROUNDS, read_table)
        if not checkpoints and not (self.path / CHECKPOINT).exists():  # nothing was ever finished: all begins again
            if flaw := self._flaw_of(ROUNDS, read_table):
                said.append(f"{flaw}: the run begins again")
                (self.path / ROUNDS).unlink(missing_ok=True)
            return said
        named = [flaw for name, read in ((CHECKPOINT, _checkpoint_in), (ROUNDS, read_table)) if (flaw := self._flaw_of(name, read))]
        for checkpoint, state in checkpoints:
            forgotten = [flaw for file in self._remembered(state.round) if (flaw := _flaw(read_tensors, file))]
            named += forgotten
            table = next((file for file, rows in tables if int(rows["round"].max()) >= state.round), None)
            if not forgotten and (table or not self._flaw_of(ROUNDS, read_table)):
                said += [f"{flaw}: going on from round {state.round}" for flaw in dict.fromkeys(named)]
                for name, file in ((CHECKPOINT, checkpoint), (ROUNDS, table)):
                    if file not in (None, self.path / name):
                        os.replace(file, self.path / name)
                return said
        raise RunError(f"{'; '.join(dict.fromkeys(named))}: no earlier state is left that the run could go on from")

    def _versions(self, name: str, read: Callable[[Path], Any]) -> list[tuple[Path, Any]]:
        """The file `name` and the one before it, as far as they can be read, newest first."""
        paths = (self.path / name, self._before(self.path / name))
        return [(path, read(path)) for path in paths if path.exists() and not _flaw(read, path)]

    def _flaw_of(self, name: str, read: Callable[[Path], Any]) -> str | None:
        path = self.path / name
        if not path.exists():  # killed between two renames
            return f"{path} is missing" if self._before(path).exists() else None
        return _flaw(read, path)

    def _remembered(self, round: int) -> Iterator[Path]:
        """The file that each client would go on from after `round`."""
        for folder in (self.path / "clients").glob("client_*"):
            if files := sorted(path for path in folder.glob("round_*.safetensors") if _number(path) <= round):
                yield files[-1]

    def rewind(self, round: int) -> None:
        """Drops what was written after `round` was finished, and temporary files that a killed process left."""
        (self.path / DISCARDED).unlink(missing_ok=True)
        for path in self.path.rglob(".*.*"):
            if is_begun(path):
                path.unlink()
        for name in ("rounds", "leaks"):
            table = self._table(name)
            if len(table) and (table["round"] > round).any():
                kept = table[table["round"] <= round]
                write_table(self.path / f"{name}.parquet", kept)
        for path in (self.path / "observations").glob("round_*"):
            if _number(path) > round:
                shutil.rmtree(path)
        for path in (self.path / "reconstructions").glob("*/round_*.safetensors"):
            if _number(path) > round:
                path.unlink()
        for path in (*(self.path / "clients").glob("*/round_*.safetensors"), *(self.path / "clients").glob("*/findings_*.json")):
            if _number(path) > round:
                path.unlink()


def on_device(seen: Observation, device: torch.device) -> Observation:
    """The same observation with its tensors on `device`."""

    def moved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.to(device) for name, t in tensors.items()}

    packets = {
        name: replace(p, values=p.values.to(device), support=None if p.support is None else p.support.to(device))
        for name, p in seen.packets.items()
    }
    return replace(
        seen,
        params=moved(seen.params),
        packets=packets,
        buffers=moved(seen.buffers),
        sent_buffers=moved(seen.sent_buffers),
        previous=None if seen.previous is None else on_device(seen.previous, device),
    )


def trace_tensors(trace: Trace) -> dict[str, Tensor]:
    """A trace as named tensors: evaluations, losses, images, and layers/NAME for each parameter."""
    return {"evaluations": trace.evaluations, "losses": trace.losses, "images": trace.images} | _named(layers=trace.layers)


def trace_of(tensors: Mapping[str, Tensor], layers: Sequence[str]) -> Trace:
    """The trace of which `trace_tensors` made these tensors, with its layers in this order."""
    gaps = {name: tensors[f"layers/{name}"] for name in layers}
    return Trace(tensors["evaluations"], tensors["losses"], tensors["images"], gaps)


def _sender(client: int) -> str:
    """What is written of a client, or of a sum, bears this name."""
    return "sum" if client == SUM else f"client_{client:05d}"


def _client(name: str) -> int:
    """The client of a name that starts as `_sender` made it."""
    return SUM if name.startswith("sum") else int(name.removeprefix("client_").partition("/")[0])


def _number(path: Path) -> int:
    return int(path.stem.rsplit("_", 1)[1])


def _named(**groups: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{group}/{name}": t for group, tensors in groups.items() for name, t in tensors.items()}


def _group(tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{group}/"): t for name, t in tensors.items() if name.startswith(f"{group}/")}


def _save(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    write_tensors(path, tensors, about or {})


def _load(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> tuple[dict[str, Tensor], dict[str, str]]:
    return _read(lambda at: read_tensors(at, wanted), path)


def _read(read: Callable[[Path], Any], path: Path) -> Any:
    """What `read` makes of a file; a damaged one is told as an error of its run."""
    try:
        return read(path)
    except Damaged as error:
        raise RunError(str(error)) from None


def _flaw(read: Callable[[Path], Any], path: Path) -> str | None:
    """Why a file cannot be read, if it cannot."""
    try:
        read(path)
    except (Damaged, RunError) as error:
        return str(error)
    return None


def _checkpoint_in(path: Path) -> Checkpoint:
    tensors, about = _load(path)
    arrays = {name: t.numpy() for name, t in _group(tensors, "strategy").items()}
    try:
        return Checkpoint(int(about["round"]), _group(tensors, "model"), arrays, json.loads(about["numbers"]))
    except (KeyError, ValueError) as error:
        raise RunError(f"{path} is damaged (it is no checkpoint: {type(error).__name__} {error})") from None


def copied(source: Path, target: Path) -> None:
    """Makes `target` what `source` is, a file or a folder. Files that are replaced and never written into, as a log is, are shared
    where the file system can."""
    for file in [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file()):
        made = target / file.relative_to(source) if source.is_dir() else target
        made.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            if file.suffix in (".safetensors", ".parquet"):
                os.link(file, made)
                continue
        shutil.copyfile(file, made)


def check_no_links(folder: Path) -> None:
    """Raises RunError for a symbolic link in `folder`: what is written into the folder would arrive elsewhere."""
    for where, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if os.path.islink(path := os.path.join(where, name)):
                raise RunError(f"{path} is a link, and a run writes into its own folder only: put there what the link names")


def iterate(folders: Iterable[Path]) -> list[RunFolder]:
    """All runs at or directly below `folders`, in order. Raises RunError for a folder without any."""
    found = []
    for folder in folders:
        inside = [folder] if (folder / "config.json").is_file() else sorted(p.parent for p in folder.glob("*/config.json"))
        if (plan := folder / "multirun.json").is_file():
            asked = list(_read(read_json, plan)["cells"])  # the order they were asked for in
            inside.sort(key=lambda path: asked.index(path.name) if path.name in asked else len(asked))
        if not inside:
            raise RunError(f"{folder} holds no run: neither it nor a folder in it has a config.json")
        found += [RunFolder.open(path) for path in inside]
    return found
