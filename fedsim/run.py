"""A run's folder: everything a run was made from, saw and found, readable at any moment.

    config.json, environment.json   what was asked for; versions, device and command it ran with
    partition.safetensors           indices of each client's images
    rounds.parquet, leaks.parquet   one row for each round; one for each image an attack went for
    observations/round_00005/       broadcast.safetensors, and client_00003.safetensors for each client listened to, sum.safetensors
    reconstructions/dlg/            round_00005.safetensors, what an attack made of them, and how it got there if it recorded that
    checkpoint.safetensors          weights and the strategy's memory after the last finished round
    clients/                        the clients' own: memories of stateful defenses, and what their inspections found
    figures/, log.txt

All files are written whole or not at all, and the checkpoint comes last in a round: rows and files beyond it belong to a round that
was interrupted, and are dropped when the run is resumed.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedsim.federation import Checkpoint
from fedsim.files import write_bytes, write_with
from fedsim.observation import SUM, Observation, Reconstruction, Trace
from fedsim.wire import from_bytes, to_bytes


class RunError(ValueError):
    """A folder that cannot be used as asked; the message is one line."""


class RunFolder:
    """The folder of one run, at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any], environment: Mapping[str, Any]) -> "RunFolder":
        """A new folder. Raises RunError when there is a run in it already."""
        if (path / "config.json").exists():
            raise RunError(f"{path} holds a run already: resume it with --resume {path}, or choose another name=")
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_bytes(path / "environment.json", _json(environment))
            write_bytes(path / "config.json", _json(config))
        except OSError as error:
            raise RunError(f"cannot write to {path}: {error.strerror}; choose another folder with out=") from None
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """An existing folder. Raises RunError when it holds no run."""
        if not (path / "config.json").is_file():
            raise RunError(f"{path} is not a run's folder: it has no config.json")
        return cls(path)

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.path / "config.json").read_text())

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
        return pd.DataFrame([row for path in files for row in json.loads(path.read_text())])

    def _table(self, name: str) -> pd.DataFrame:
        path = self.path / f"{name}.parquet"
        return pd.read_parquet(path) if path.exists() else pd.DataFrame()

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
        write_with(self.path / f"{name}.parquet", lambda file: new.to_parquet(file, index=False))

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
            packets = _group(tensors, "packets")
            try:
                seen.append(
                    Observation(
                        params=_group(shared, "params"),
                        packets={name: from_bytes(packets[name].numpy().tobytes()) for name in json.loads(about["order"])},
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
        _save(self._reconstructions(attack, seen[0].round), tensors, about)

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
        return self.path / "reconstructions" / attack / f"round_{round:05d}.safetensors"

    # Going on.

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Marks a round as finished."""
        strategy = {name: torch.from_numpy(np.ascontiguousarray(a)).reshape(a.shape) for name, a in checkpoint.arrays.items()}
        about = {"round": str(checkpoint.round), "numbers": json.dumps(checkpoint.numbers)}
        _save(self.path / "checkpoint.safetensors", _named(model=checkpoint.tensors, strategy=strategy), about)

    def checkpoint(self) -> Checkpoint | None:
        """The last finished round, or None before the first."""
        path = self.path / "checkpoint.safetensors"
        if not path.exists():
            return None
        tensors, about = _load(path)
        arrays = {name: t.numpy() for name, t in _group(tensors, "strategy").items()}
        return Checkpoint(int(about["round"]), _group(tensors, "model"), arrays, json.loads(about["numbers"]))

    def rewind(self, round: int) -> None:
        """Drops what was written after `round` was finished, and temporary files that a killed process left."""
        for path in self.path.rglob(".*.*"):
            if path.is_file():
                path.unlink()
        for name in ("rounds", "leaks"):
            table = self._table(name)
            if len(table) and (table["round"] > round).any():
                kept = table[table["round"] <= round]
                write_with(self.path / f"{name}.parquet", lambda file, kept=kept: kept.to_parquet(file, index=False))  # type: ignore[misc]
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


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _sender(client: int) -> str:
    """What is written of a client, or of a sum, bears this name."""
    return "sum" if client == SUM else f"client_{client:05d}"


def _client(name: str) -> int:
    """The client of a name that starts as `_sender` made it."""
    return SUM if name.startswith("sum") else int(name[7:12])


def _number(path: Path) -> int:
    return int(path.stem.rsplit("_", 1)[1])


def _named(**groups: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{group}/{name}": t for group, tensors in groups.items() for name, t in tensors.items()}


def _group(tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{group}/"): t for name, t in tensors.items() if name.startswith(f"{group}/")}


def _save(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_with(path, lambda name: save_file(contiguous, name, dict(about or {})))


def _load(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if wanted(name)]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} is damaged or missing ({error})") from None


def iterate(folders: Iterable[Path]) -> list[RunFolder]:
    """All runs at or directly below `folders`, in order. Raises RunError for a folder without any."""
    found = []
    for folder in folders:
        inside = [folder] if (folder / "config.json").is_file() else sorted(p.parent for p in folder.glob("*/config.json"))
        if (plan := folder / "multirun.json").is_file():
            asked = list(json.loads(plan.read_text())["cells"])  # the order they were asked for in
            inside.sort(key=lambda path: asked.index(path.name) if path.name in asked else len(asked))
        if not inside:
            raise RunError(f"{folder} holds no run: neither it nor a folder in it has a config.json")
        found += [RunFolder(path) for path in inside]
    return found
