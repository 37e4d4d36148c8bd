"""The server: any of Flower's strategies works on updates, whoever listens changes nothing, and chance is the seed's."""

import dataclasses
import io
import logging
import math
import os
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, RecordDict
from torch import Tensor
from worlds import FEDAVG, FEDSGD, FLOWER, NORMED, TOPK_EF, History, assert_same, config, everybody, federate, nobody

from fedsim import client
from fedsim.federation import Checkpoint, Evaluation
from fedsim.observation import Observation
from fedsim.records import METRICS, PACKETS, array_of, masked_reply_of, reply_of
from fedsim.server import restore_strategy, strategy_state
from fedsim.setup import build
from fedsim.wire import nbytes, pack, to_bytes

STRATEGIES = {
    "FedAvg": {},
    "FedAvgM": {"server_momentum": 0.9},
    "FedAdam": {"eta": 0.01},
    "FedAdagrad": {"eta": 0.01},
    "FedYogi": {"eta": 0.01},
    "FedProx": {"proximal_mu": 0.1},
    "FedMedian": {},
    "FedTrimmedAvg": {"beta": 0.2},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "Bulyan": {"num_malicious_nodes": 1},
}
ALL_SEVEN = FEDAVG | {"clients": 7, "per_round": 7}  # Bulyan needs 4 f + 3
SKEWED = {"_target_": "fedsim.data.SizeSkewed"}


def strategy(name: str) -> dict[str, object]:
    return {"_target_": FLOWER + name, **STRATEGIES[name]}


def moved(history: History, round: int) -> dict[str, Tensor]:
    before, after = (history.checkpoints[i].tensors for i in (round - 1, round))
    return {name: before[name] - after[name] for name in before}


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_learns_from_updates_and_keeps_float32(name):
    left = federate(config(strategy=strategy(name), federation=ALL_SEVEN), rounds=3)
    assert [report.round for report in left.reports] == [0, 1, 2, 3]
    for round in (1, 2, 3):
        assert all(t.dtype == torch.float32 for t in left.checkpoints[round].tensors.values())
        assert all(t.isfinite().all() for t in left.checkpoints[round].tensors.values())
        assert all(t.any() for t in moved(left, round).values())
    assert all(t.dtype == torch.float32 for one in left.seen for t in one.params.values())


@pytest.mark.parametrize("federation", [FEDSGD, FEDAVG], ids=lambda protocol: protocol["_target_"])
def test_fedavg_subtracts_the_mean_update_weighted_by_examples(federation):
    left = federate(config(federation=federation, partition=SKEWED), rounds=2)
    scale = federation["lr"] if federation is FEDSGD else 1.0
    for round in (1, 2):
        seen = [one for one in left.seen if one.round == round]
        total = sum(one.num_examples for one in seen)
        if federation is FEDAVG:
            assert len({one.num_examples for one in seen}) > 1
        for name, step in moved(left, round).items():
            expected = scale * sum(one.num_examples * one.update[name].double() for one in seen) / total
            assert torch.allclose(step.double(), expected, rtol=0, atol=1e-6), name


def test_fedmedian_takes_the_median_and_krum_one_of_them():
    median = federate(config(strategy=strategy("FedMedian"), federation=ALL_SEVEN), rounds=1)
    krum = federate(config(strategy=strategy("Krum"), federation=ALL_SEVEN), rounds=1)
    updates = {name: torch.stack([one.update[name] for one in median.seen]) for name in median.weights}
    for name, step in moved(median, 1).items():
        assert torch.allclose(step, updates[name].median(0).values, rtol=0, atol=1e-6)
    step = moved(krum, 1)
    taken = [all(torch.allclose(step[name], updates[name][i], atol=1e-6) for name in step) for i in range(7)]
    assert sum(taken) == 1


def test_fedprox_tells_the_clients_its_mu():
    strong = {"_target_": FLOWER + "FedProx", "proximal_mu": 5.0}
    held, free = (federate(config(strategy=s, federation=FEDAVG)) for s in (strong, strategy("FedAvg")))
    assert_same(held.seen[0].params, free.seen[0].params)
    reach = [sum(float(t.square().sum()) for t in moved(left, 1).values()) for left in (held, free)]
    assert reach[0] < reach[1]


# The eavesdropper -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["FedAvg", "FedAdam"])
def test_listening_changes_nothing(name):
    tapped = federate(config(strategy=strategy(name)), choose=everybody)
    untapped = federate(config(strategy=strategy(name)), choose=nobody)
    assert len(tapped.seen) == 6
    assert untapped.seen == []
    assert_same(tapped.weights, untapped.weights)


def test_an_observation_is_what_was_sent_to_the_byte_and_nothing_else(monkeypatch):
    sent = []

    def spy(packets, buffers, num_examples, loss, sender):
        sent.append((sender, {name: to_bytes(p) for name, p in packets.items()}, num_examples))
        return reply_of(packets, buffers, num_examples, loss, sender)

    monkeypatch.setattr(client, "reply_of", spy)
    left = federate(config(defense=TOPK_EF["inner"]), rounds=1)
    seen = [(one.client, {name: to_bytes(p) for name, p in one.packets.items()}, one.num_examples) for one in left.seen]
    assert seen == sorted(sent, key=lambda reply: reply[0])
    assert_same(left.seen[0].params, left.checkpoints[0].tensors)
    fields = {field.name for field in dataclasses.fields(Observation)}
    assert fields == {"params", "packets", "num_examples", "round", "client", "buffers", "sent_buffers", "summed", "masked"} | {
        "previous",  # another observation
        "followed",
        "chance",  # the attacker's own
    }
    assert all(one.chance is None for one in left.seen)


def test_nobody_is_listened_to_who_was_not_picked():
    left = federate(config(), rounds=3, choose=lambda round, clients: clients[:1] if round == 2 else [])
    assert [one.round for one in left.seen] == [2]


# Chance and memory ----------------------------------------------------------------------------------------------------------------


def chosen(made: dict, rounds: int = 5, start: Checkpoint | None = None) -> list[tuple[int, list[int]]]:
    """The rounds of a run, and the clients that took part in each."""
    found = []
    federate(made, rounds=rounds, start=start, choose=lambda round, clients: found.append((round, clients)) or [])
    return found


def test_who_takes_part_depends_on_the_seed_and_the_round_only():
    few = FEDSGD | {"clients": 11, "per_round": 3}
    first = chosen(config(federation=few))
    assert len({tuple(clients) for _, clients in first}) > 1
    random.seed(42)
    assert chosen(config(federation=few | {"lr": 0.01}, strategy="FedAdam", defense=TOPK_EF["inner"])) == first
    assert chosen(config(federation=few, seed=1)) != first
    halfway = federate(config(federation=few), rounds=2).checkpoints[-1]
    assert chosen(config(federation=few), start=halfway) == first[2:]


def test_python_s_own_random_numbers_are_left_alone():
    random.seed(42)
    before = random.getstate()
    federate(config(), evaluation=Evaluation(clients=True))
    assert random.getstate() == before


@pytest.mark.parametrize("name", ["FedAvg", "FedAvgM", "FedAdam", "FedAdagrad", "FedYogi"])
def test_a_run_that_goes_on_from_a_checkpoint_ends_as_one_that_never_stopped(name):
    made = config(strategy=strategy(name))
    whole = federate(made, rounds=4)
    assert_same(federate(made, rounds=4, start=whole.checkpoints[2]).weights, whole.weights)


@pytest.mark.parametrize("name", ["FedAvgM", "FedAdam", "FedAdagrad", "FedYogi"])
def test_a_strategy_s_memory_is_its_arrays_and_numbers(name):
    made = config(strategy=strategy(name))
    whole = federate(made, rounds=4)
    halfway = whole.checkpoints[2]
    assert halfway.arrays
    fresh = build(made["strategy"])
    restore_strategy(fresh, halfway.arrays, halfway.numbers)
    arrays, numbers = strategy_state(fresh)
    assert numbers == halfway.numbers
    assert list(arrays) == list(halfway.arrays)
    assert all((arrays[key] == halfway.arrays[key]).all() for key in arrays)
    # Without it, the run would end elsewhere.
    forgetful = federate(made, rounds=4, start=Checkpoint(2, halfway.tensors))
    assert any(not torch.equal(forgetful.weights[key], whole.weights[key]) for key in whole.weights)


# Counting and failing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [None, NORMED], ids=["plain", "BatchNorm"])
def test_what_a_round_sends_is_counted(model):
    left = federate(config(defense=TOPK_EF["inner"], **({"model": model} if model else {})), rounds=1)
    untrained, report = left.reports
    broadcast = sum(t.numel() * t.element_size() for t in left.weights.values())
    statistics = sum(t.numel() * t.element_size() for one in left.seen for t in one.sent_buffers.values())
    assert (untrained.clients, untrained.bytes_up, untrained.bytes_down) == (0, 0, 0)
    assert (report.clients, report.failures) == (3, 0)
    assert report.bytes_up == sum(nbytes(p) for one in left.seen for p in one.packets.values()) + statistics
    assert report.bytes_down == report.bytes_up_dense == 3 * broadcast
    assert report.train_loss is not None


def failing(clients: set[int]):
    def reply(packets, buffers, num_examples, loss, sender):
        if sender in clients:
            raise ArithmeticError(f"client {sender} has no more memory")
        return reply_of(packets, buffers, num_examples, loss, sender)

    return reply


def test_a_client_that_fails_is_left_out_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(client, "reply_of", failing({2}))
    made = config(federation=FEDSGD | {"per_round": 4})
    with caplog.at_level(logging.WARNING, "fedsim"):
        left = federate(made, rounds=2)
    assert [(r.clients, r.failures) for r in left.reports] == [(0, 0), (3, 1), (3, 1)]
    assert [one.client for one in left.seen] == [0, 1, 3] * 2
    warned = [
        record.getMessage() for record in caplog.records if record.levelno == logging.WARNING and record.name == "fedsim.server"
    ]
    assert len(warned) == 2
    assert warned[0].startswith("round 1: a client failed and is left out: ")
    assert "client 2 has no more memory" in warned[0]
    mean = sum(one.update["head.bias"] for one in left.seen[:3]) / 3
    assert torch.allclose(moved(left, 1)["head.bias"], 0.1 * mean, rtol=0, atol=1e-6)


def test_a_round_in_which_all_fail_ends_the_run_and_says_why(monkeypatch):
    monkeypatch.setattr(client, "reply_of", failing({0, 1, 2, 3}))
    with pytest.raises(RuntimeError, match=r"round 1: none of the 3 chosen clients sent an update: .*no more memory"):
        federate(config())


# Replies that are no updates ------------------------------------------------------------------------------------------------------


def bad(entry: float) -> Callable[..., RecordDict]:
    def reply(packets, *about):
        return reply_of(packets | {"head.bias": replace(packets["head.bias"], values=torch.full((10,), entry))}, *about)

    return reply


def with_packet(name: str, data: bytes) -> Callable[..., RecordDict]:
    def reply(*about):
        made = reply_of(*about)
        made.array_records[PACKETS][name] = array_of(np.frombuffer(data, np.uint8))
        return made

    return reply


def without(kind: str) -> Callable[..., RecordDict]:
    return lambda *about: RecordDict({name: record for name, record in reply_of(*about).items() if name != kind})


def pickled(*about: Any) -> RecordDict:
    """A reply whose array is a pickle, in the envelope that NumPy gives it."""
    made, data = reply_of(*about), io.BytesIO()
    np.save(data, np.array([Evil()], dtype=object), allow_pickle=True)
    made.array_records[PACKETS]["head.bias"] = Array("object", (1,), "numpy.ndarray", data.getvalue())
    return made


def edited(change: Callable[[Any], object]) -> Callable[..., RecordDict]:
    def made(*about: Any) -> RecordDict:
        reply = reply_of(*about)
        change(reply[METRICS])
        return reply

    return made


class Evil:
    """What ends the process where it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (1,)


FLAWS: dict[str, tuple[Callable[..., RecordDict], str]] = {
    "NaN": (bad(math.nan), "an entry of head.bias is nan"),
    "infinite": (bad(-math.inf), "an entry of head.bias is inf"),
    "huge": (bad(1e30), "an entry of head.bias is 1e+30, and none may be above 1e+10"),
    "shape": (
        lambda packets, *about: reply_of(packets | pack({"head.bias": torch.zeros(11)}), *about),
        "head.bias is (11,), not (10,)",
    ),
    "missing": (lambda packets, *about: reply_of({"head.bias": packets["head.bias"]}, *about), "is missing"),
    "unknown": (
        lambda packets, *about: reply_of(packets | pack({"extra": torch.zeros(2)}), *about),
        "extra is no tensor of this model",
    ),
    "junk": (with_packet("head.bias", b"no packet"), "it cannot be read: ValueError"),
    "a pickle": (pickled, "it cannot be read: ValueError"),
    "a claim": (with_packet("head.bias", to_bytes(pack({"x": torch.zeros(3)})["x"])), "head.bias is (3,), not (10,)"),
    "examples": (lambda p, b, n, *about: reply_of(p, b, -n, *about), "it claims -2 examples"),
    "too many": (lambda p, b, n, *about: reply_of(p, b, 10**12, *about), "it claims 1000000000000 examples"),
    "loss": (lambda p, b, n, loss, c: reply_of(p, b, n, math.inf, c), "train-loss is inf"),
    "another": (lambda p, b, n, loss, c: reply_of(p, b, n, loss, 3), "it says that it comes from client 3"),
    "a sum": (lambda p, b, n, loss, c: reply_of(p, b, n, loss, c, [0, 1]), "it says that it is a sum of clients [0, 1]"),
    "masked": (
        lambda p, b, n, loss, c: masked_reply_of(bytes(4), {}, n, c),
        "its metrics are ['num-examples']",
    ),
    "no loss": (edited(lambda metrics: metrics.pop("train-loss")), "its metrics are ['num-examples']"),
    "another metric": (edited(lambda metrics: metrics.update({"x": 1})), "its metrics are ['num-examples', 'train-loss', 'x']"),
    "nothing": (lambda *about: RecordDict(), "it cannot be read: KeyError"),
    "no packets": (without(PACKETS), "it cannot be read: KeyError"),
    "no metrics": (without(METRICS), "it cannot be read: KeyError"),
    "statistics": (lambda p, b, *about: reply_of(p, {"mean": torch.zeros(3)}, *about), "mean is no tensor of this model"),
}


@pytest.mark.parametrize("name", FLAWS)
def test_a_reply_that_is_no_update_is_left_out_and_the_round_goes_on(name, monkeypatch, caplog):
    broken, says = FLAWS[name]
    monkeypatch.setattr(client, "reply_of", lambda *about: (broken if about[-1] == 2 else reply_of)(*about))
    with caplog.at_level(logging.WARNING, "fedsim"):
        left = federate(config(federation=FEDSGD | {"per_round": 4}), rounds=2)
    assert [(r.clients, r.failures) for r in left.reports] == [(0, 0), (3, 1), (3, 1)]
    assert [one.client for one in left.seen] == [0, 1, 3] * 2
    warned = [record.getMessage() for record in caplog.records if record.name == "fedsim.server"]
    assert len(warned) == 2
    assert warned[0].startswith("round 1: a client failed and is left out: client 2: ")
    assert says in warned[0]
    mean = sum(one.update["head.bias"] for one in left.seen[:3]) / 3
    assert torch.allclose(moved(left, 1)["head.bias"], 0.1 * mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda t: t * math.nan, "1.running_mean is nan"),
        (lambda t: t[:1], "1.running_mean is torch.float32 (1,), not torch.float32 (2,)"),
        (lambda t: t.int(), "1.running_mean is torch.int32 (2,), not torch.float32 (2,)"),
    ],
)
def test_batchnorm_statistics_that_are_none_are_left_out_with_their_client(wrong, says, monkeypatch, caplog):
    def reply(packets, buffers, num_examples, loss, sender):
        sent = buffers | {"1.running_mean": wrong(buffers["1.running_mean"])} if sender == 1 else buffers
        return reply_of(packets, sent, num_examples, loss, sender)

    monkeypatch.setattr(client, "reply_of", reply)
    with caplog.at_level(logging.WARNING, "fedsim"):
        left = federate(config(model=NORMED, federation=FEDAVG | {"per_round": 4}), rounds=1)
    assert left.reports[1].failures == 1
    assert says in caplog.text
    assert all(bool(t.isfinite().all()) for t in left.weights.values())


def test_a_round_without_one_valid_reply_ends_the_run_and_says_why(monkeypatch):
    monkeypatch.setattr(client, "reply_of", FLAWS["NaN"][0])
    with pytest.raises(
        RuntimeError, match=r"round 1: none of the 3 chosen clients sent an update: client \d: an entry of head.bias is nan"
    ):
        federate(config())


def test_an_evaluation_that_is_no_number_is_left_out(monkeypatch):
    accuracies = iter([math.nan, 0.5, 0.5, 0.5])
    monkeypatch.setattr(client, "evaluate", lambda *of: (next(accuracies), 1.0))
    left = federate(config(), rounds=1, evaluation=Evaluation(clients=True))
    assert left.reports[1].client_accuracy == 0.5


# BatchNorm ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["FedAvg", "FedAdam", "FedMedian"])
def test_batchnorm_statistics_are_aggregated_and_keep_their_types(name):
    left = federate(config(model=NORMED, federation=FEDAVG, partition=SKEWED, strategy=strategy(name)), rounds=3)
    first = [one for one in left.seen if one.round == 1]
    after = left.checkpoints[1].tensors
    assert after["1.num_batches_tracked"].dtype == left.weights["1.num_batches_tracked"].dtype == torch.int64
    assert after["1.num_batches_tracked"].shape == ()
    assert set(first[0].sent_buffers) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert not set(first[0].packets) & set(first[0].sent_buffers)
    if name == "FedAvg":
        total = sum(one.num_examples for one in first)
        mean = sum(one.num_examples * one.sent_buffers["1.running_mean"] for one in first) / total
        assert torch.allclose(after["1.running_mean"], mean, atol=1e-6)
    for report in left.reports:
        assert report.failures == 0
