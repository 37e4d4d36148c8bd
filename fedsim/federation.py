"""One run of a federation: the ServerApp, what it reports after each round, and how it goes on from a checkpoint."""

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedsim.checks import whole
from fedsim.client import client_app
from fedsim.cohort import cohort_of
from fedsim.cores import cores, one_thread
from fedsim.engines.inline import Inline
from fedsim.observation import Observation
from fedsim.records import arrays_of, tensors_of
from fedsim.secure_aggregation import Secure
from fedsim.secure_rounds import SecureStrategy, check_averages
from fedsim.server import (
    CheckedStrategy,
    EavesdroppingStrategy,
    MeteredStrategy,
    PinningStrategy,
    SeededStrategy,
    UpdateStrategy,
    nodes_by_client,
    restore_strategy,
    strategy_state,
)
from fedsim.setup import Setup, build, model_of
from fedsim.training import evaluate, predictions, split


class Engine(Protocol):
    """Where the two apps run."""

    def run(self, server: ServerApp, client: ClientApp, clients: int, device: str) -> None: ...


@dataclass(frozen=True)
class Evaluation:
    """The global model's accuracy on the test set every `every`-th round and after the last; `clients` adds each client's own.

    None is for runs whose accuracy nobody asks for: the test set is left alone.
    """

    every: int | None = 1
    clients: bool = False

    def __post_init__(self) -> None:
        if self.every is not None:
            whole("evaluate.every", self.every)
        if not isinstance(self.clients, bool):
            raise ValueError(f"evaluate.clients must be true or false, got {self.clients!r}")


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on after `round`: the weights, and what the strategy remembers."""

    round: int
    tensors: dict[str, Tensor]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Round:
    """What a finished round left; round 0 is the untrained model.

    accuracy, loss      of the global model on the test set, None in rounds without evaluation
    train_loss          mean over the chosen clients, weighted by their examples
    client_accuracy     mean accuracy on the clients' own shards, None unless asked for
    failures            clients that were asked and sent no update of this model; left_out names them, as in "2 5"
    bytes_up            payload of all updates that were taken, as packed, and of keys and shares where there are any
    bytes_up_dense      the same updates at 4 bytes an entry
    bytes_down          payload of all broadcasts for training, not of those for clients' own evaluation
    seconds             wall time of the round, its attacks and evaluation included
    """

    round: int
    accuracy: float | None
    loss: float | None
    train_loss: float | None
    client_accuracy: float | None
    clients: int
    failures: int
    bytes_up: int
    bytes_up_dense: int
    bytes_down: int
    seconds: float
    left_out: str = ""


def run(
    setup: Setup,
    engine: Engine,
    *,
    rounds: int,
    choose: Callable[[int, list[int]], Sequence[int]],
    listen: Callable[[list[Observation]], None],
    finished: Callable[[Round, Checkpoint], None],
    start: Checkpoint | None = None,
    evaluation: Evaluation | None = None,
    memory: Path | None = None,
) -> None:
    """Runs `rounds` rounds on `engine`, those of `start` counted in. `finished` is called once after each, and before the first."""
    if memory is not None and setup.defense.init(split(setup.model())[0]):  # by which clients know that they share it
        memory.mkdir(parents=True, exist_ok=True)
    server = server_app(setup, rounds, choose, listen, finished, start, evaluation or Evaluation())
    folder, clients, device = None if memory is None else str(memory), setup.protocol.clients, str(setup.device)
    cohort, _ = cohort_of(setup, engine.vectorized, engine.chunk) if isinstance(engine, Inline) else (None, "")
    if isinstance(engine, Inline) and cohort is not None:
        engine.run(server, client_app(setup.config, folder, cohort.take), clients, device, cohort.train)
    else:
        engine.run(server, client_app(setup.config, folder), clients, device)


def server_app(
    setup: Setup,
    rounds: int,
    choose: Callable[[int, list[int]], Sequence[int]],
    listen: Callable[[list[Observation]], None],
    finished: Callable[[Round, Checkpoint], None],
    start: Checkpoint | None,
    evaluation: Evaluation,
) -> ServerApp:
    """The Flower ServerApp of a run."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        one_thread()  # torch would wait for all cores, some of which are busy with clients
        model = setup.model()
        params, buffers = split(model)
        protocol, seed = setup.protocol, setup.seed
        inner = build(
            setup.config["strategy"],
            fraction_train=protocol.per_round / protocol.clients,
            min_train_nodes=protocol.per_round,
            min_available_nodes=protocol.clients,
            fraction_evaluate=1.0 if evaluation.clients else 0.0,
            min_evaluate_nodes=1,
        )
        if isinstance(setup.aggregation, Secure):
            check_averages(inner)
        after = 0
        initial = {**params, **buffers}
        if start is not None:
            after = start.round
            initial = {name: start.tensors[name] for name in initial}
            restore_strategy(inner, start.arrays, start.numbers)
        updates = UpdateStrategy(inner, tuple(buffers), protocol.server_scale)
        pinned = {name: params[name] for name in setup.server.pinned(model)}
        aggregating: Strategy = PinningStrategy(EavesdroppingStrategy(updates, choose, listen, tuple(buffers)), pinned)
        nodes, bits = nodes_by_client(grid, protocol.clients), None
        if isinstance(setup.aggregation, Secure):
            bits, run = setup.aggregation.bits, context.run_id
            aggregating = SecureStrategy(aggregating, setup.aggregation, nodes, protocol.per_round, run, tuple(buffers))
        metered = MeteredStrategy(aggregating)
        strategy = SeededStrategy(CheckedStrategy(metered, nodes, tuple(buffers), bits), seed, nodes, after)
        dense = sum(4 * t.numel() for t in params.values()) + sum(t.numel() * t.element_size() for t in buffers.values())
        clock = time.perf_counter()

        def evaluate_round(local_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            nonlocal clock
            number = local_round + after
            if local_round == 0 and start is not None:
                return None  # that round was finished before the run was interrupted
            accuracy = loss = None
            tensors = tensors_of(arrays)
            if evaluation.every is not None and (number % evaluation.every == 0 or number == rounds):
                accuracy, loss = _evaluate(setup, {name: t.to(setup.device) for name, t in tensors.items()}, pool)
            left_out = set(metered.left_out)
            report = Round(
                round=number,
                accuracy=accuracy,
                loss=loss,
                train_loss=_metric(metered.train_metrics, "train-loss"),
                client_accuracy=_metric(metered.evaluate_metrics, "accuracy"),
                clients=metered.replies,
                failures=metered.failures,
                bytes_up=metered.bytes_up,
                bytes_up_dense=dense * metered.replies,
                bytes_down=metered.bytes_down,
                seconds=time.perf_counter() - clock,
                left_out=" ".join(str(client) for client, node in enumerate(nodes) if node in left_out),
            )
            finished(report, Checkpoint(number, tensors, *strategy_state(inner)))
            clock = time.perf_counter()
            return None

        workers = cores() if setup.device.type == "cpu" else 1
        with ThreadPoolExecutor(workers, thread_name_prefix="evaluate", initializer=one_thread) as pool:
            strategy.start(grid, arrays_of(initial), num_rounds=rounds - after, evaluate_fn=evaluate_round, timeout=math.inf)

    return app


def _metric(record: MetricRecord | None, name: str) -> float | None:
    return None if record is None or name not in record else float(record[name])  # type: ignore[arg-type]


def _evaluate(setup: Setup, tensors: dict[str, Tensor], pool: ThreadPoolExecutor) -> tuple[float, float]:
    """Accuracy and loss on the test set, its batches spread over the threads of `pool` and summed in order."""

    def one(part: tuple[Tensor, Tensor]) -> tuple[float, float, int]:
        images, labels = (t.to(setup.device) for t in part)
        return *evaluate(model_of(setup), tensors, {}, [(images, labels)]), predictions(labels)

    parts = list(pool.map(one, setup.dataset.test.batches(500)))
    total = sum(n for _, _, n in parts)
    return sum(a * n for a, _, n in parts) / total, sum(loss * n for _, loss, n in parts) / total
