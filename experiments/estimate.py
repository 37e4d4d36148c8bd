"""About how long runs take, from the time of a few gradients, and how much they keep: what a study's dry run says."""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from attacks.text import TextMatching
from experiments.config import Config, build_checked
from experiments.study import heard, training, victims_of
from fedsim.cores import on_one_thread
from fedsim.data import image_shape
from fedsim.data.text import LENGTH, VOCABULARY
from fedsim.training import IGNORED, local_update, split

TWICE = 2.5  # differentiating a gradient once more, in gradients
FORWARD = 0.3  # a test image, in gradients
REHEARSED = 8 * 3  # public victims times variants of an attacker who knows the defense
TEST, SHARD = 10_000, 50_000  # images of CIFAR-10


def seconds(configs: Iterable[Config]) -> float:
    """Of all these runs, one after the other on one core; trainings that they share count once. Loading data is left out."""
    total, trained = 0.0, set[str]()
    for config in configs:
        federation, data = config["federation"], config["data"]
        clients, batch = federation["per_round"], federation["batch_size"]
        shard = (data.get("train_size") or SHARD) / federation["clients"]
        steps = federation.get("steps") or federation.get("epochs", 0) * math.ceil(shard / batch) or 1
        gradient = _gradient(_key(config), min(batch, math.ceil(shard)))
        if (key := training(config)) not in trained:
            trained.add(key)
            every = build_checked("evaluate", config["evaluate"]).every
            tested = (config["rounds"] // every + 1) * (data.get("test_size") or TEST) if every else 0
            one = _gradient(_key(config), 32) / 32
            total += config["rounds"] * clients * steps * gradient + tested * FORWARD * one
        total += victims_of(config) * _evaluations(config) * TWICE * gradient * steps
    return total


def room(configs: Iterable[Config]) -> float:
    """Bytes of what all these runs keep, at most: updates that a defense packs are smaller. Trainings they share count once."""
    total, trained = 0.0, set[str]()
    for config in configs:
        if (key := training(config)) not in trained:
            trained.add(key)
            clients = heard(config)
            kept = sum(clients) + sum(map(bool, clients)) + 2  # updates, broadcasts, the last two checkpoints
            total += 4 * parameters(config) * kept
    return total


def _evaluations(config: Config) -> float:
    """Of one victim's search, by all attackers of the run; 0 for attacks that compute rather than search."""
    attack: Any = build_checked("attack", config["attack"]) if config["attack"] else None
    searches = _searches(attack)
    every = sum(evaluations * restarts for evaluations, restarts in searches)
    knowing = every + REHEARSED * sum(min(500, evaluations) for evaluations, _ in searches) / max(1, victims_of(config))
    none = config["choices"]["defense"] == "none"
    naive = 0 if config["attacker"] == "adaptive" else every
    return naive + (0 if config["attacker"] == "naive" or (config["attacker"] == "both" and none) else knowing)


def _searches(attack: Any) -> list[tuple[int, int]]:
    """Evaluations and restarts of each search that an attack is made of; of several that are tried in turn all."""
    inner = [*getattr(attack, "attacks", {}).values()]
    inner += [one for name in ("attack", "matching", "init") if dataclasses.is_dataclass(one := getattr(attack, name, None))]
    found = [search for one in inner for search in _searches(one)]
    if (evaluations := getattr(getattr(attack, "optimizer", None), "evaluations", 0)) > 0:
        twice = isinstance(attack, TextMatching) and attack.labels == "joint"  # words are settled, and searched with again
        found += [(evaluations, getattr(attack, "restarts", 1))] * (2 if twice else 1)
    return found


def _key(config: Config) -> str:
    model = {key: value for key, value in config["model"].items() if key != "init"}  # any weights take as long
    return json.dumps({"model": model, "data": config["data"]}, sort_keys=True)


def parameters(config: Config) -> int:
    """How many a run's network has."""
    return sum(p.numel() for p in _network(_key(config))[0].parameters())


@functools.cache
def _network(text: str) -> tuple[nn.Module, tuple[int, ...], int]:
    """A run's network, the shape that it is given, and how many classes it tells apart; of the `_key` of the run."""
    config = json.loads(text)
    shape: tuple[int, ...] = (LENGTH,)
    classes = VOCABULARY
    if config["data"]["name"] != "text":
        shape, classes = image_shape(config["data"]["name"], config["data"].get("side")), 10
    return build_checked("model", config["model"], image_shape=shape, num_classes=classes), shape, classes


@functools.cache
def _gradient(text: str, batch: int) -> float:
    """Seconds of one gradient of a batch, the fastest of three."""
    model, shape, classes = _network(text)
    if shape == (LENGTH,):
        images = torch.randint(classes, (batch, LENGTH))
        labels = torch.full((batch, LENGTH), IGNORED)
        labels[:, 0] = 0
    else:
        images, labels = torch.rand(batch, *shape), torch.zeros(batch, dtype=torch.int64)
    model.train()
    times = []
    with on_one_thread():
        for _ in range(3):
            began = time.perf_counter()
            local_update(model, *split(model), [(images, labels)], lr=1.0)
            times.append(time.perf_counter() - began)
    return min(times)
