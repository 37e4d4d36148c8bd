"""The client: its noise is its own, and what its defense remembers lasts from round to round."""

import math

import pytest
import torch
from safetensors.torch import load_file
from worlds import FEDSGD, TOPK_EF, config, federate

from fedsim.client import _recall
from fedsim.protocols import FedSGD
from fedsim.setup import setup_of

# So small a rate that no weight moves: each round's true updates are those of a run without defense.
STILL = FEDSGD | {"clients": 2, "per_round": 2, "lr": 1e-30}
DP_FEDAVG = {"_target_": "defenses.DPFedAvg", "clip": 1.0, "noise_multiplier": 1.0}
LOUD = {"_target_": "defenses.GaussianNoise", "std": 1000.0}


def test_every_client_draws_its_own_noise_every_round():
    seen = federate(config(federation=STILL, defense=LOUD)).seen
    noises = [one.update["head.bias"] for one in seen]
    # Gradients are below 1, so whoever shared a stream would have sent the same to 0.1 %.
    assert len(noises) == 4
    for i, one in enumerate(noises):
        assert all((one - other).abs().max() > 10 for other in noises[:i])


def test_noise_is_the_same_when_the_run_is():
    first, again = (federate(config(federation=STILL, defense=LOUD)).seen for _ in range(2))
    assert all(torch.equal(one.update["head.bias"], other.update["head.bias"]) for one, other in zip(first, again, strict=True))


def test_a_client_sends_later_what_its_defense_held_back(tmp_path):
    true = federate(config(federation=STILL), rounds=4).seen
    sent = federate(config(federation=STILL, defense=TOPK_EF), rounds=4, memory=tmp_path).seen
    for client in (0, 1):
        files = sorted((tmp_path / f"client_{client:05d}").iterdir())
        assert [file.name for file in files] == [f"round_00000{round}.safetensors" for round in (2, 3, 4)]  # three are kept
        held = load_file(files[-1])
        for name in true[0].update:
            arrived = sum(one.update[name] for one in sent if one.client == client) + held[f"residual/{name}"]
            wanted = sum(one.update[name] for one in true if one.client == client)
            assert torch.allclose(arrived, wanted, rtol=0, atol=1e-5), name


def test_a_client_forgets_a_round_whose_update_was_no_number(tmp_path, monkeypatch):
    train, trainings = FedSGD.train, []

    def once(self, *arguments, **more):
        trained = train(self, *arguments, **more)
        trainings.append(trained)
        if len(trainings) == 3:  # the first of the second round
            next(iter(trained.update.values())).fill_(math.inf)
        return trained

    monkeypatch.setattr(FedSGD, "train", once)
    federate(config(federation=STILL, defense=TOPK_EF), rounds=3, memory=tmp_path)
    held = [[load_file(file) for file in sorted((tmp_path / f"client_{i:05d}").iterdir())] for i in (0, 1)]
    assert sorted(len(one) for one in held) == [2, 3]
    assert all(t.isfinite().all() for one in held for kept in one for t in kept.values())


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("FixedPoint", {"bits": 8, "fraction": 4}),
        ("Int8", {}),
        ("SignSGD", {"scaled": False}),
        ("Threshold", {"threshold": 0.1}),
        ("FloatFormat", {"format": "fp16"}),
    ],
)
def test_no_number_is_sent_in_place_of_what_is_none(name, more, value, monkeypatch):
    train = FedSGD.train

    def broken(self, *arguments, **more):
        trained = train(self, *arguments, **more)
        next(iter(trained.update.values()))[0] = value
        return trained

    monkeypatch.setattr(FedSGD, "train", broken)
    with pytest.raises(RuntimeError, match=r"entries that are no finite numbers: lower federation\.lr"):
        federate(config(federation=STILL, defense={"_target_": f"defenses.{name}", **more}))
    # That it fails would tell of its data, unless nothing is proved.
    clusters = {"_target_": "defenses.KMeansQuantization", "centroids": 2}
    for parts in ([DP_FEDAVG], [clusters, DP_FEDAVG]):
        assert federate(config(federation=STILL, defense={"_target_": "defenses.Chain", "parts": parts})).seen
    partial = {"_target_": "defenses.Partial", "inner": DP_FEDAVG, "prefixes": ["head"]}
    with pytest.raises(RuntimeError, match="entries that are no finite numbers"):
        federate(config(federation=STILL, defense=partial))


def test_a_defense_with_a_memory_needs_a_place_to_keep_it():
    with pytest.raises(RuntimeError, match=r"ErrorFeedback\(.*has a memory, but the client was given no folder"):
        federate(config(defense=TOPK_EF))


def test_a_machine_that_has_not_the_runs_folder_says_so(tmp_path):
    """On a cluster whose machines share no files, each would remember what it alone saw."""
    setup = setup_of(config(defense=TOPK_EF))
    with pytest.raises(
        ValueError, match=r"is kept in .*elsewhere, and there is no such folder on this client's machine: put out= where"
    ):
        _recall(str(tmp_path / "elsewhere"), 0, 1, setup, {"x": torch.zeros(3)})
