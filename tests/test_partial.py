"""A defense of some tensors is that defense there, and none elsewhere."""

from dataclasses import dataclass, replace

import pytest
import torch

from defenses import (
    DPSGD,
    Chain,
    DPFedAvg,
    ErrorFeedback,
    GaussianNoise,
    MixUp,
    NoDefense,
    Partial,
    SignSGD,
    Soteria,
    StochasticQuantization,
    TopK,
)
from fedsim.defense import beliefs_of
from fedsim.seeding import generator
from fedsim.updates import Update
from fedsim.wire import pack

LOSSY = [TopK(0.1), StochasticQuantization(4), GaussianNoise(relative=0.5)]


def named(**counts: int) -> Update:
    return {name.replace("_", "."): torch.randn(n, generator=generator(0, name)) for name, n in counts.items()}


def test_a_partial_defense_changes_what_it_names_and_nothing_else():
    update = named(features_0=31, features_2=17, head=7)
    for inner in LOSSY:
        packets, _ = Partial(inner, ["features."])(pack(update), inner.init(update), generator(0, "defense"))
        alone, _ = inner(pack({n: update[n] for n in ("features.0", "features.2")}), inner.init(update), generator(0, "defense"))
        assert list(packets) == list(update)
        assert torch.equal(packets["head"].dense(), update["head"])
        assert all(torch.equal(packets[name].dense(), alone[name].dense()) for name in alone)


def test_a_partial_defense_remembers_for_what_it_names_only():
    update = named(features_0=31, head=7)
    partial = Partial(ErrorFeedback(TopK(0.1)), ["features."])
    state = partial.init(update)
    assert list(state) == ["residual/features.0"]
    packets, state = partial(pack(update), state, generator(0, "defense"))
    assert torch.equal(packets["features.0"].dense() + state["residual/features.0"], update["features.0"])


@dataclass(frozen=True)
class Vague(NoDefense):
    """Sends what it is given, and lets nobody conclude more than one step in either direction."""

    step: float = 1.0

    def explain(self, packets, beliefs):
        return {n: replace(b, low=b.value - self.step, high=b.value + self.step) for n, b in beliefs.items()}


def test_what_a_partial_defense_leaves_alone_is_known_exactly():
    update = named(features_0=31, head=7)
    packets, _ = Partial(Vague(), ["features."])(pack(update), {}, generator(0, "defense"))
    believed = beliefs_of(packets, Partial(Vague(), ["features."]))
    assert list(believed) == list(update)
    for name, width in (("features.0", 2.0), ("head", 0.0)):
        belief = believed[name]
        assert bool((belief.low <= update[name]).all() and (update[name] <= belief.high).all())
        torch.testing.assert_close(belief.high - belief.low, torch.full_like(belief.value, width))


def test_a_partial_defense_that_names_nothing_is_an_error_and_not_no_defense():
    partial = Partial(TopK(0.1), ["feature_"])
    with pytest.raises(ValueError, match=r"no tensor's name begins with feature_: they are features\.0, head"):
        partial.init(named(features_0=31, head=7))
    with pytest.raises(ValueError, match=r"such as \['features\.'\], got 'features'"):
        Partial(TopK(0.1), "features")
    with pytest.raises(ValueError, match=r"such as \['features\.'\], got \[5\]"):
        Partial(TopK(0.1), [5])
    with pytest.raises(TypeError, match="wraps a defense"):
        Partial(TopK, ["features."])


@pytest.mark.parametrize(
    "inner", [Soteria(0.4), Chain((TopK(0.1), MixUp())), ErrorFeedback(DPSGD(0.5, noise_multiplier=0.3))], ids=repr
)
def test_what_acts_while_the_client_trains_cannot_be_partial(inner):
    with pytest.raises(ValueError, match="acts on all tensors while the client trains"):
        Partial(inner, ["features."])


@pytest.mark.parametrize(
    "inner", [DPFedAvg(1.0, epsilon=8.0), ErrorFeedback(Chain((TopK(0.1), DPFedAvg(1.0, epsilon=8.0))))], ids=repr
)
def test_a_partial_defense_proves_nothing_and_cannot_aim_at_an_epsilon(inner):
    with pytest.raises(ValueError, match="there is no epsilon to aim at: give noise_multiplier"):
        Partial(inner, ["features."])
    assert Partial(DPFedAvg(1.0, noise_multiplier=0.5), ["features."])


def test_a_partial_defense_hides_the_length_where_what_it_wraps_does():
    assert Partial(SignSGD(scaled=False), ["features."]).rescales == SignSGD(scaled=False).rescales is True
    assert not Partial(TopK(0.1), ["features."]).rescales
