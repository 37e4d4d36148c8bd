"""A run's ingredients, built from its configuration: the same on the server, on every client, and in every worker process.

A configuration is a plain nested dict (what `config.json` in a run's folder holds). Whatever is a choice names its class under
`_target_`, so what is built here needs no list of what there is.
"""

import functools
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.data import Corpus, Dataset, load
from fedsim.defense import Defense, Exposure, Private
from fedsim.exposure import exposures
from fedsim.inspection import Inspection
from fedsim.protocols import Protocol
from fedsim.secure_aggregation import Plain, Secure
from fedsim.seeding import generator, global_stream
from fedsim.servers import Honest, Server

Config = dict[str, Any]


def build(node: Mapping[str, Any], **more: Any) -> Any:
    """What a configuration node's `_target_` makes of the node's other entries and of `more`."""
    from hydra.utils import instantiate

    return instantiate(dict(node), _convert_="all", **more)


# Where a configuration that was found on disk may take its classes from, and where its functions. Packages of the user's own are
# named in $FEDSIM_PACKAGES.
CLASSES = ("attacks", "defenses", "fedsim", "flwr.serverapp.strategy")
FUNCTIONS = ("attacks", "defenses", "fedsim.models")


def check_targets(node: Any) -> None:
    """Raises ValueError for a `_target_` that is none of the project's own choices: building another could run any code."""
    if isinstance(node, dict):
        if "_target_" in node:
            own = (name.strip() for name in os.environ.get("FEDSIM_PACKAGES", "").split(","))
            _check_target(str(node["_target_"]), tuple(filter(None, own)))
        for value in node.values():
            check_targets(value)
    elif isinstance(node, list):
        for value in node:
            check_targets(value)


@functools.lru_cache
def _check_target(name: str, own: tuple[str, ...]) -> None:
    from hydra.utils import get_object

    told = f"_target_ {name!r} is of none of {', '.join(CLASSES)}: if it is yours, name its package in FEDSIM_PACKAGES"
    if not _below(name, (*CLASSES, *own)):
        raise ValueError(told)
    try:
        made = get_object(name)
    except Exception as error:  # what hydra makes of a name that is not there
        raise ValueError(f"_target_ {name!r} cannot be found: {' '.join(str(error).split())}") from None
    if not _below(getattr(made, "__module__", ""), (*(CLASSES if isinstance(made, type) else FUNCTIONS), *own)):
        raise ValueError(told)


def _below(name: str, packages: Sequence[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@dataclass(frozen=True, eq=False)
class Setup:
    """What a configuration stands for.

    dataset   training and test images, or sentences
    shards    indices of each client's training examples
    protocol  FedSGD or FedAvg
    defense   what clients do to an update before they send it
    server    who hands out the model: an honest server, or one that changes it
    inspection  what clients look for in it
    aggregation  whether the server sees updates, or their sum
    """

    config: Config
    seed: int
    dataset: Dataset | Corpus
    shards: list[Tensor]
    protocol: Protocol
    defense: Defense
    device: torch.device
    server: Server = Honest()
    inspection: Inspection = Inspection("off")
    aggregation: Plain | Secure = Plain()

    def model(self) -> nn.Module:
        """A new model as the server first broadcasts it, on the run's device, in the mode clients train in."""
        with global_stream:
            model = build(
                self.config["model"],
                image_shape=self.dataset.image_shape,
                num_classes=self.dataset.num_classes,
                mean=self.dataset.mean,
                std=self.dataset.std,
                rng=generator(self.seed, "init"),
            )
            model = self.server(model, self.dataset.test, generator(self.seed, "server"))
        model.to(self.device).train(self.protocol.train_mode)
        return model

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The training images and labels at `index`, on the run's device; of a corpus, masked tokens and what they hide."""
        images, labels = self.dataset.train.batch(index)
        return images.to(self.device), labels.to(self.device)

    def exposures(self, rounds: int) -> tuple[Exposure, ...]:
        """How often `rounds` rounds use the data of the most exposed clients."""
        return exposures(self.protocol, [len(shard) for shard in self.shards], self.seed, rounds)

    def examples(self, round: int, client: int) -> Tensor:
        """Places in the training set that `client` computed its update of `round` from, each once, in the order of first use."""
        index = torch.cat(self.protocol.batches(self.shards[client], self.seed, round, client))
        return torch.tensor(list(dict.fromkeys(index.tolist())))

    def truth(self, round: int, *clients: int) -> tuple[Tensor, Tensor]:
        """The images and labels that `clients` computed their updates of `round` from, one client's behind the other's."""
        return self.batch(torch.cat([self.examples(round, client) for client in clients]))


def planned(defense: Defense, exposures: Sequence[Exposure]) -> Defense:
    """The defense with the noise that its target epsilon, if it has one, takes when it is applied so often."""
    return defense.planned(exposures) if isinstance(defense, Private) else defense


def device_of(name: str) -> torch.device:
    """`auto` is the GPU if there is one; anything else is a torch device name. Raises ValueError for one that is not there.

    From then on a GPU computes as a CPU does: in whole float32, and the same bits each time.
    """
    if not isinstance(name, str):
        raise ValueError(f"device must be a name, such as auto or cpu, got {name!r}")
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type == "cuda":
            _as_exact_as_a_cpu()
        torch.empty(0, device=device)
        if device.type == "meta":
            raise ValueError("its tensors hold no numbers")
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"device {name!r} is not usable here, take device=auto or device=cpu: {str(error).splitlines()[0]}"
        ) from None
    return device


def _as_exact_as_a_cpu() -> None:
    """Convolutions in float32, where PyTorch's default on a GPU is TF32 with its 10 bits, and sums in one order if it has a way.

    An attack looks for images whose update is the one it saw, up to float32's last digits; TF32 has half of them.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # no result depends on it


def setup_of(config: Config) -> Setup:
    """The setup of a configuration. Built once in each process, however many clients ask for it."""
    return _setup_of(json.dumps(config, sort_keys=True))


DRAWN = ("synthetic", "text")  # data that are another for another seed


# A worker serves one run after the other; two, so that a comparison of runs does not load its data again each time.
@functools.lru_cache(maxsize=2)
def _setup_of(text: str) -> Setup:
    config = json.loads(text)
    data = config["data"]
    drawn = data["name"] in DRAWN or data.get("train_size") is not None or data.get("test_size") is not None
    dataset = _dataset_of(json.dumps(data, sort_keys=True), config["seed"] if drawn else 0)
    protocol = build(config["federation"])
    shards = build(config["partition"])(dataset.train.labels, protocol.clients, config["seed"])
    defense = build(config["defense"])
    if "rounds" in config:
        defense = planned(defense, exposures(protocol, [len(shard) for shard in shards], config["seed"], config["rounds"]))
    return Setup(
        config,
        config["seed"],
        dataset,
        shards,
        protocol,
        defense,
        device_of(config.get("device", "auto")),
        # Folders of earlier versions have none of these.
        build(config["server"]) if "server" in config else Honest(),
        build(config["inspect"]) if "inspect" in config else Inspection("off"),
        build(config["aggregation"]) if "aggregation" in config else Plain(),
    )


@functools.lru_cache(maxsize=1)
def _dataset_of(text: str, seed: int) -> Dataset | Corpus:
    return load(**json.loads(text), seed=seed)


_local = threading.local()


def model_of(setup: Setup) -> nn.Module:
    """This thread's model of `setup`; training is functional, so its weights are never read."""
    if getattr(_local, "setup", None) is not setup:
        _local.setup, _local.model = setup, setup.model()
    return _local.model
