"""Trackers: where else than into its own folder a run writes its numbers while it goes.

A tracker is a frozen dataclass that a configuration names, and `open` begins or goes on with what it keeps of one run. A point
(name, round) that is there already with the same value is not written again: a resumed run goes on in the same curves, without
doubled points. The packages are optional; they are imported when a tracker is opened, and missed when one is chosen.
"""

import contextlib
import importlib.util
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from fedsim.checks import whole
from fedsim.errors import FederationError
from fedsim.files import read_json, write_json

Config = dict[str, Any]


class Journal(Protocol):
    """What a tracker keeps of one run."""

    def numbers(self, round: int, values: Mapping[str, float]) -> None:
        """Writes the finite ones of these points of a round, as far as they are new; a curve has no place for the others."""
        ...

    def picture(self, round: int, name: str, image: Tensor) -> None:
        """Writes an image (C, H, W) in [0, 1], unless there is one of that name and round."""
        ...

    def close(self, finished: bool) -> None:
        """Ends the writing, of a run that came to its end or that was stopped."""
        ...


class Tracker(Protocol):
    """A choice of `tracker=`; `pictures` is how many thefts of a round and attacker it is shown, at most."""

    @property
    def pictures(self) -> int: ...

    def open(self, folder: Path, config: Config) -> Journal:
        """Begins to keep the run in `folder`, or goes on with it."""
        ...


@dataclass(frozen=True)
class TensorBoard:
    """Event files in the run's own folder: `tensorboard --logdir runs` shows all runs below `runs`."""

    pictures: int = 8

    def __post_init__(self) -> None:
        whole("tracker.pictures", self.pictures, 0)
        _installed("tensorboard")

    def open(self, folder: Path, config: Config) -> Journal:
        return _Events(folder / "tensorboard", config)


@dataclass(frozen=True)
class MLflow:
    """A run of MLflow, in an experiment.

    uri         of the store; None is $MLFLOW_TRACKING_URI, and without that mlflow.db beside the run's folder
    experiment  its name
    """

    uri: str | None = None
    experiment: str = "fedsim"
    pictures: int = 8

    def __post_init__(self) -> None:
        whole("tracker.pictures", self.pictures, 0)
        for name, value in (("uri", self.uri or "any"), ("experiment", self.experiment)):
            if not isinstance(value, str) or not value:
                raise ValueError(f"tracker.{name} must be a text, got {value!r}")
        _installed("mlflow")

    def open(self, folder: Path, config: Config) -> Journal:
        return _Run(self, folder, config)


def settings_of(config: Config) -> dict[str, str | int | float | bool]:
    """The leaves of a configuration by their dotted names, as hyper-parameters."""
    found: dict[str, str | int | float | bool] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= {f"{key}.{name}": of for name, of in settings_of(value).items()}
        else:
            found[key] = value if isinstance(value, str | int | float | bool) else json.dumps(value)
    return found


def _installed(package: str) -> None:
    """Raises ValueError where an optional package is not there."""
    if importlib.util.find_spec(package) is None:
        way_out = f"pip install -e '.[{package}]' in fedsim's clone, or leave tracker= out"
        raise ValueError(f"tracker={package} needs the package {package}: {way_out}")


class _Events:
    """Event files in `path`; numbers are float32 there."""

    def __init__(self, path: Path, config: Config) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._points: dict[tuple[str, int], float] = {}
        self._pictures: set[tuple[str, int]] = set()
        described = False
        if path.exists():
            kept = EventAccumulator(str(path), {"scalars": 0, "images": 0}).Reload()
            tags = kept.Tags()
            self._points = {(name, event.step): event.value for name in tags["scalars"] for event in kept.Scalars(name)}
            self._pictures = {(name, event.step) for name in tags["images"] for event in kept.Images(name)}
            with contextlib.suppress(KeyError):  # stopped before it was described
                described = bool(kept.PluginTagToContent("hparams"))
        self._writer = SummaryWriter(str(path))
        if not described:
            for summary in hparams(settings_of(config), {"accuracy": 0.0, "loss": 0.0}):  # of the metrics it takes the names
                self._writer._get_file_writer().add_summary(summary)
            self._writer.flush()

    def numbers(self, round: int, values: Mapping[str, float]) -> None:
        import numpy as np

        for name, value in values.items():
            if math.isfinite(value) and self._points.get((name, round)) != np.float32(value):
                self._points[name, round] = float(np.float32(value))
                self._writer.add_scalar(name, value, round)
        self._writer.flush()

    def picture(self, round: int, name: str, image: Tensor) -> None:
        if (name, round) not in self._pictures:
            self._pictures.add((name, round))
            self._writer.add_image(name, image, round)
            self._writer.flush()

    def close(self, finished: bool) -> None:
        self._writer.close()


class _Run:
    """A run of MLflow, whose number is in the run's folder, in mlflow.json."""

    def __init__(self, tracker: MLflow, folder: Path, config: Config) -> None:
        # Read when mlflow is imported; a server that is not there would be asked for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of each table that it creates
        beside = folder.parent.resolve()
        own = f"sqlite:///{beside / 'mlflow.db'}"
        named = folder / "mlflow.json"
        kept = read_json(named) if named.exists() else None
        self.uri = kept["uri"] if kept else tracker.uri or os.environ.get("MLFLOW_TRACKING_URI") or own
        self._points: dict[tuple[str, int], float] = {}
        self._pictures: set[str] = set()
        with self._told():
            self._client = client = MlflowClient(self.uri)
            if kept:
                self.run = kept["run"]
                client.update_run(self.run, status="RUNNING")
                self._read()
                return
            place = (beside / "mlartifacts").as_uri() if self.uri == own else None
            experiment = _experiment(client, tracker.experiment, place)
            self.run = client.create_run(experiment, run_name=folder.name).info.run_id
            params = [Param(name, str(value)) for name, value in settings_of(config).items()]
            for first in range(0, len(params), 100):  # as many as one call takes
                client.log_batch(self.run, params=params[first : first + 100])
        write_json(named, {"uri": self.uri, "run": self.run})

    def _read(self) -> None:
        """What is there already."""
        for name in self._client.get_run(self.run).data.metrics:
            history = self._client.get_metric_history(self.run, name)
            self._points |= {(name, point.step): point.value for point in sorted(history, key=lambda point: point.timestamp)}
        left = [artifact.path for artifact in self._client.list_artifacts(self.run)]
        while left:
            below = self._client.list_artifacts(self.run, left.pop())
            left += [artifact.path for artifact in below if artifact.is_dir]
            self._pictures |= {artifact.path for artifact in below if not artifact.is_dir}

    def numbers(self, round: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        new = {name: v for name, v in values.items() if math.isfinite(v) and self._points.get((name, round)) != v}
        if new:
            now = int(1000 * time.time())
            with self._told():
                self._client.log_batch(self.run, [Metric(name, float(value), now, round) for name, value in new.items()])
            self._points |= {(name, round): value for name, value in new.items()}

    def picture(self, round: int, name: str, image: Tensor) -> None:
        path = f"{name}/round_{round:05d}.png"
        if path not in self._pictures:
            pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
            with self._told():
                self._client.log_image(self.run, pixels, path)
            self._pictures.add(path)

    def close(self, finished: bool) -> None:
        with self._told():
            self._client.set_terminated(self.run, "FINISHED" if finished else "FAILED")

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What goes wrong at the store, in a line."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            raise FederationError(f"tracker=mlflow, at {self.uri}: {' '.join(str(error).split())[:300]}") from error


def _experiment(client: Any, name: str, place: str | None) -> str:
    """The number of the experiment called `name`, which is made where there is none, with its artifacts in `place`."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=place)
        except MlflowException:  # another run of the same study has just made it
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return found.experiment_id
