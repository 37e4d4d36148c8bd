"""The same rounds by pfl-research (Granqvist et al. 2024, Apple), in its in-process simulation: one of the ways of `federation.py`.

It wants an older dp-accounting than fedsim, for parts that are not used here: `pip install --no-deps pfl prv-accountant`.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import AbstractDataset
from pfl.data.federated_dataset import FederatedDatasetBase
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor

from fedsim.cores import one_thread
from fedsim.setup import Config, setup_of


class Shard(AbstractDataset):
    """One client's images, in the batches that a fedsim client would take in this round."""

    def __init__(self, setup: Any, client: int) -> None:
        self._setup, self._client, self._round = setup, client, 0

    raw_data = property(lambda self: self._setup.shards[self._client])
    user_id = property(lambda self: str(self._client))
    metadata = property(lambda self: {})
    train_kwargs = property(lambda self: {})
    eval_kwargs = property(lambda self: {})

    def __len__(self) -> int:
        return len(self.raw_data)

    def split(self, *_: object) -> Any:
        raise NotImplementedError

    def get_worker_partition(self) -> "Shard":
        return self

    def iter(self, batch_size: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of its next round."""
        self._round += 1
        for index in self._setup.protocol.batches(self.raw_data, self._setup.seed, self._round, self._client):
            yield self._setup.batch(index)


class Shards(FederatedDatasetBase):
    """All clients, all of them in every round."""

    def __init__(self, setup: Any) -> None:
        super().__init__()
        self._shards = [Shard(setup, client) for client in range(len(setup.shards))]

    def __next__(self) -> Any:
        raise NotImplementedError

    def get_cohort(self, cohort_size: int) -> list[tuple[Shard, int]]:
        """Every client, with a seed."""
        return [(shard, 0) for shard in self._shards]


class Averaging(FederatedAveraging):
    """Federated averaging that does not measure clients' losses in the first round, as no other way does."""

    def get_next_central_contexts(self, *args: Any, **kwargs: Any) -> Any:
        """Contexts without an evaluation."""
        contexts, model, metrics = super().get_next_central_contexts(*args, **kwargs)
        return contexts and tuple(dataclasses.replace(one, do_evaluation=False) for one in contexts), model, metrics


def run(config: Config, rounds: int, report: Callable[[float, dict[str, Tensor]], None]) -> None:
    """Runs `rounds` rounds and tells `report` of each its seconds and the weights it ended with."""
    one_thread()
    setup = setup_of(config)
    network = setup.model()
    network.loss = lambda images, labels: torch.nn.functional.cross_entropy(network(images), labels)  # type: ignore[assignment]
    network.metrics = lambda *_: {}  # type: ignore[assignment]
    model = PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), lr=1.0))

    class Told(TrainingProcessCallback):
        began = time.perf_counter()

        def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Metrics]:
            weights = {name: p.detach().clone() for name, p in network.named_parameters()}
            report(time.perf_counter() - self.began, weights)
            self.began = time.perf_counter()
            return False, Metrics()

    epoch = NNTrainHyperParams(
        local_num_epochs=1, local_learning_rate=setup.protocol.lr, local_batch_size=config["federation"]["batch_size"]
    )
    clients = len(setup.shards)
    whole = NNAlgorithmParams(
        central_num_iterations=rounds, evaluation_frequency=rounds + 1, train_cohort_size=clients, val_cohort_size=0
    )
    np.random.seed(setup.seed)
    backend = SimulatedBackend(Shards(setup), val_data=None, postprocessors=[WeightByDatapoints()])  # type: ignore[arg-type]
    Averaging().run(whole, backend, model, epoch, callbacks=[Told()], send_metrics_to_platform=False)
