"""A round's clients trained as one program: the same as one by one, up to rounding."""

import logging
import weakref

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from worlds import FEDAVG, FEDSGD, MLP, NORMED, TOPK_EF, assert_same, config, federate

from defenses import MixUp
from fedsim.client import client_app
from fedsim.cohort import Cohort, cohort_of, obstacle
from fedsim.engines.inline import Inline, InlineGrid
from fedsim.protocols import FedAvg
from fedsim.records import CONFIG, observation_of
from fedsim.seeding import generator
from fedsim.setup import setup_of
from fedsim.training import Trained
from fedsim.updates import relative_error

ALONE, TOGETHER = Inline(1), Inline(1, vectorized=True)
SKEWED = {"_target_": "fedsim.data.SizeSkewed"}
MODELS = {
    "lenet": {"_target_": "fedsim.models.lenet", "activation": "sigmoid"},
    "mcmahan_cnn": {"_target_": "fedsim.models.mcmahan_cnn"},
    "mlp": MLP,
    "resnet20": {"_target_": "fedsim.models.resnet20", "norm": "group"},
    "bert_tiny": {"_target_": "fedsim.models.bert_tiny", "width": 8, "heads": 2, "hidden": 16},
}
MLP_DROPOUT = MLP | {"dropout": 0.5}
PRIVATE = {"_target_": "defenses.DPSGD", "clip": 1.0, "noise_multiplier": 0.1}
FEDPROX = {"_target_": "flwr.serverapp.strategy.FedProx", "proximal_mu": 0.5}
LONG = FEDAVG | {"epochs": 2, "weight_decay": 0.01}
RUNS = {
    "FedSGD": {},
    "FedAvg, momentum and decay, shards of other sizes": {"federation": LONG, "partition": SKEWED},
    "FedProx": {"federation": LONG, "partition": SKEWED, "strategy": FEDPROX},
    "mixed images": {"federation": LONG, "partition": SKEWED, "defense": {"_target_": "defenses.MixUp"}},
    "a memory": {"defense": TOPK_EF},
    "sums": {"federation": LONG, "aggregation": {"_target_": "fedsim.secure_aggregation.Secure", "seeded": True}},
    "clients that inspect": {"inspect": {"_target_": "fedsim.inspection.Inspection", "owned": 1e-9}},
    "BatchNorm in eval mode": {"model": NORMED, "federation": FEDSGD | {"train_mode": False}},
}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_learns_what_it_learns_one_by_one(name):
    data = {"name": "text" if name == "bert_tiny" else "synthetic", "train_size": 23, "test_size": 7}
    # Over many steps a deep network of ReLUs makes more of a rounding than its size.
    federation = FEDSGD if name == "resnet20" else LONG | {"lr": 0.02}
    compare(config(model=MODELS[name], data=data, federation=federation, partition=SKEWED))


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_every_kind_of_training_is_what_it_is_one_by_one(changes, tmp_path):
    compare(config(**changes), tmp_path)


@pytest.mark.parametrize(
    "made",
    [
        {"model": NORMED},
        {"model": MLP_DROPOUT},
        {"defense": PRIVATE},
        {
            "model": MLP | {"bottleneck": {"_target_": "fedsim.models.Precode", "width": 5}},
            "federation": FEDSGD | {"train_mode": False},
        },
    ],
    ids=["BatchNorm", "dropout", "DP-SGD", "PRECODE in eval mode"],
)
def test_what_cannot_be_one_program_says_why(made):
    setup = setup_of(config(**made))
    why = obstacle(setup)
    assert why is not None
    with pytest.raises(ValueError, match=r"engine\.vectorized=True is not possible: .*; take engine\.vectorized=auto"):
        federate(config(**made), TOGETHER)
    assert cohort_of(setup, "auto") == (None, f"one by one: {why}")


def test_a_cpu_trains_one_by_one_unless_it_is_told_to():
    setup = setup_of(config())
    cohort, why = cohort_of(setup, "auto")
    assert cohort is None
    assert why.startswith("one by one: faster on a CPU, but for 10 and more clients")
    many = FEDSGD | {"clients": 40, "per_round": 10, "batch_size": 1}
    assert cohort_of(setup_of(config(federation=many)), "auto")[1] == "as one program"
    for slower in ({"batch_size": 2}, {"per_round": 9}, {"_target_": "fedsim.protocols.FedAvg", "steps": 2}):
        assert cohort_of(setup_of(config(federation=many | slower, data={**config()["data"], "train_size": 80})), "auto")[0] is None
    assert cohort_of(setup, False) == (None, "one by one")
    assert cohort_of(setup, True)[1] == "as one program"
    with pytest.raises(ValueError, match=r"engine\.vectorized must be true, false or auto, got 'yes'"):
        Inline(vectorized="yes")
    with pytest.raises(ValueError, match=r"engine\.chunk must be a whole number >= 1, got 0"):
        Inline(chunk=0)


def test_without_enough_memory_fewer_clients_are_trained_at_once(monkeypatch, caplog):
    made, most, train = config(federation=LONG), 1, FedAvg.train
    alone, counts = federate(made, ALONE), []

    def short_of_memory(self, model, params, *rest, **settings):
        counts.append(len(next(iter(params.values()))))
        if counts[-1] > most:
            raise torch.OutOfMemoryError("tried to allocate more than there is")
        return train(self, model, params, *rest, **settings)

    monkeypatch.setattr(FedAvg, "train", short_of_memory)
    with caplog.at_level(logging.WARNING):
        found = federate(made, TOGETHER)
    assert counts == [3, 2, 1, 1, 1] * 2
    assert "round 1: not enough memory to train 3 clients at once: 2 and fewer" in caplog.text
    close_to(found.weights, alone.weights)


def test_what_did_not_fit_is_let_go_before_fewer_are_trained(monkeypatch):
    train, held = FedAvg.train, []

    class Large:
        pass

    def short_of_memory(self, *arguments, **settings):
        tried.append([one() is not None for one in held])
        if len(held) < 2:
            large = Large()
            held.append(weakref.ref(large))
            raise torch.OutOfMemoryError("tried to allocate more than there is")
        return train(self, *arguments, **settings)

    tried: list[list[bool]] = []
    monkeypatch.setattr(FedAvg, "train", short_of_memory)
    federate(config(federation=LONG), TOGETHER)
    assert tried[:3] == [[], [False], [False, False]]


def test_a_client_that_fails_is_left_out_of_the_round_alone(monkeypatch, caplog):
    batch, calls = MixUp.batch, []

    def broken(self, images, labels, classes, rng):
        calls.append(len(images))
        if rng.initial_seed() == worst:
            raise ArithmeticError("out of numbers")
        return batch(self, images, labels, classes, rng)

    made = config(defense={"_target_": "defenses.MixUp"})
    worst = generator(0, "defense", 1, federate(made, ALONE, rounds=1).seen[0].client, "batch").initial_seed()
    monkeypatch.setattr(MixUp, "batch", broken)
    with caplog.at_level(logging.ERROR):
        left = federate(made, TOGETHER)
    assert [(report.clients, report.failures) for report in left.reports[1:]] == [(2, 1), (3, 0)]
    assert "round 1: 3 clients cannot be trained as one program" in caplog.text


def test_chunks_and_threads_change_nothing_but_rounding():
    made = config(federation=LONG, partition=SKEWED)
    alone = federate(made, ALONE)
    for engine in (Inline(1, vectorized=True, chunk=2), Inline(2, vectorized=True, chunk=1)):
        close_to(federate(made, engine).weights, alone.weights)


def test_a_client_that_was_trained_along_with_others_does_not_read_the_broadcast():
    model = setup_of(config()).model()
    update = {name: torch.full_like(p, 0.25) for name, p in model.named_parameters()}
    grid = InlineGrid(client_app(config(), None, lambda round, client: Trained(update, {}, torch.tensor(1.5))), 4)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 1
    asked = RecordDict({CONFIG: ConfigRecord({"server-round": 1})})  # and no arrays
    try:
        (reply,) = grid.send_and_receive([Message(asked, 2, "train")])
    finally:
        grid.close()
    assert_same(dict(observation_of(reply.content, {}, {}, 1).update), update)


def close_to(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-4, atol=1e-5), f"{name}: {(found[name] - tensor).abs().max()}"


def compare(made, memory=None):
    """Both engines leave the same weights, losses, bytes and messages."""
    taken, take = [], Cohort.take

    def seen(self, round, client):
        taken.append(take(self, round, client))
        return taken[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cohort, "take", seen)
        alone, together = (
            federate(made, engine, memory=None if memory is None else memory / str(i)) for i, engine in enumerate((ALONE, TOGETHER))
        )
    assert len(taken) == 2 * 3  # rounds and clients, and none of them was left to train by itself
    assert all(one is not None for one in taken)
    if memory is not None:
        mine, theirs = ({path.relative_to(memory / i) for path in (memory / i).rglob("*.*")} for i in "01")
        assert mine == theirs
        assert bool(mine) == ("inspect" in made or made["defense"] == TOPK_EF)
    close_to(together.weights, alone.weights)
    for mine, theirs in zip(together.reports[1:], alone.reports[1:], strict=True):
        assert mine.train_loss == pytest.approx(theirs.train_loss, rel=1e-4)
        assert (mine.clients, mine.failures, mine.bytes_up, mine.bytes_down) == (
            theirs.clients,
            0,
            theirs.bytes_up,
            theirs.bytes_down,
        )
    first = [[one for one in left.seen if one.round == 1 and not one.masked] for left in (together, alone)]  # masks are random
    assert len(first[0]) == len(first[1]) > 0
    for mine, theirs in zip(*first, strict=True):
        assert (mine.client, mine.num_examples) == (theirs.client, theirs.num_examples)
        assert relative_error(mine.update, theirs.update) < 1e-4
