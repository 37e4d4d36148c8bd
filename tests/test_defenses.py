"""What all defenses keep, as one table: a new defense is one more row."""

import math
import pickle

import pytest
import torch
from torch import Tensor

import defenses
from defenses import (
    ATS,
    DPSGD,
    QSGD,
    Chain,
    Clip,
    DeepGradientCompression,
    DPFedAvg,
    ErrorFeedback,
    FixedPoint,
    FloatFormat,
    GaussianNoise,
    InstaHide,
    Int8,
    KMeansQuantization,
    LaplacianNoise,
    LogQuantization,
    MixUp,
    NoDefense,
    OutPost,
    Partial,
    PowerSGD,
    Pruning,
    RandomK,
    SignSGD,
    Soteria,
    StochasticQuantization,
    Ternary,
    Threshold,
    TopK,
    UniformQuantization,
)
from fedsim.defense import Defense, beliefs_of
from fedsim.seeding import generator
from fedsim.updates import Update
from fedsim.wire import Packets, from_bytes, nbytes, pack, to_bytes, unpack

# Every defense, and the compositions that are made of two kinds; the second entry says whether what is sent depends on chance (that
# of k-means does not here: of so few entries, it finds the same centroids from any starts).
ALL = [
    (NoDefense(), False),
    (UniformQuantization(16), False),
    (UniformQuantization(7), False),
    (StochasticQuantization(16), True),
    (QSGD(6, norm="linf"), True),
    (QSGD(4), True),
    (Ternary(), True),
    (SignSGD(), False),
    (SignSGD(scaled=False), False),
    (KMeansQuantization(5), False),
    (LogQuantization(), False),
    (FixedPoint(8, 5), False),
    (Int8(), False),
    (Int8(scaled=False), False),
    (FloatFormat("fp16"), False),
    (FloatFormat("bf16"), False),
    (FloatFormat("fp8_e4m3"), False),
    (FloatFormat("fp8_e5m2"), False),
    (TopK(0.1), False),
    (TopK(1.0), False),
    (TopK(0.1, scope="global"), False),
    (RandomK(0.3), True),
    (RandomK(0.3, scaled=False), True),
    (Threshold(0.5), False),
    (Pruning(0.3, "entries"), False),
    (Pruning(0.3, "tensors"), False),
    (Pruning(0.3, "literal"), False),
    (DeepGradientCompression(0.01, clip=1.0), False),
    (PowerSGD(2), True),
    (GaussianNoise(std=0.3), True),
    (GaussianNoise(relative=0.3), True),
    (LaplacianNoise(variance=0.09), True),
    (LaplacianNoise(relative=0.3), True),
    (Clip(0.5), False),
    (DPFedAvg(0.5, noise_multiplier=0.3), True),
    (DPSGD(0.5, noise_multiplier=0.3), False),  # those that act in training leave the update as it is
    (Soteria(0.4), False),
    (OutPost(), False),
    (ATS(), False),
    (MixUp(), False),
    (InstaHide(), False),
    (Chain((TopK(0.2), StochasticQuantization(5))), True),
    (Chain((TopK(0.2), Clip(0.5), UniformQuantization(16))), False),
    (Chain((ATS("random"), DPSGD(0.5, noise_multiplier=0.3), TopK(0.2))), False),
    (ErrorFeedback(Chain((TopK(0.2), DPFedAvg(0.5, noise_multiplier=0.3)))), True),
    (Chain((UniformQuantization(16), TopK(0.2))), False),
    (Chain((StochasticQuantization(5), GaussianNoise(std=0.3))), True),
    (Chain((TopK(0.2), KMeansQuantization(4))), False),
    (Chain((Ternary(), TopK(0.5))), True),
    (Chain((TopK(0.3, scope="global"), QSGD(3))), True),
    (Chain((UniformQuantization(4), UniformQuantization(16))), False),
    (Chain((LogQuantization(), FloatFormat("fp8_e5m2"))), False),
    (Chain((TopK(0.3), Threshold(1.5), Pruning(0.3))), False),
    (Chain((TopK(0.9), RandomK(0.2), Int8())), True),
    (Chain((FloatFormat("bf16"), SignSGD())), False),
    (Chain((PowerSGD(1), TopK(0.5), UniformQuantization(16))), True),
    (ErrorFeedback(TopK(0.1)), False),
    (ErrorFeedback(StochasticQuantization(3)), True),
    (ErrorFeedback(SignSGD()), False),
    (ErrorFeedback(PowerSGD(1)), True),
    (ErrorFeedback(Chain((TopK(0.2), GaussianNoise(std=0.3)))), True),
    (Chain((ErrorFeedback(TopK(0.5)), ErrorFeedback(UniformQuantization(3)))), False),
    (Partial(GaussianNoise(relative=0.3), ("", "matrix")), True),
    (Partial(ErrorFeedback(TopK(0.1)), [""]), False),
]
every_defense = pytest.mark.parametrize("defense", [d for d, _ in ALL], ids=[repr(d) for d, _ in ALL])
random_defense = pytest.mark.parametrize("defense", [d for d, chance in ALL if chance], ids=[repr(d) for d, c in ALL if c])

LEAVES: dict[str, Tensor] = {
    "matrix": torch.randn(31, 7, generator=generator(0, "matrix")),
    "kernel": 1e-4 * torch.randn(5, 3, 2, 2, generator=generator(0, "kernel")),
    "scalar": torch.tensor(0.7),
    "one entry": torch.tensor([-0.3]),
    "empty": torch.zeros(0),
    "constant": torch.full((11,), 0.3),
    "zeros": torch.zeros(13),
    "huge": 1e30 * torch.randn(17, generator=generator(0, "huge")),
}
UPDATES: dict[str, Update] = {
    "all leaves": LEAVES,
    **{name: {name: leaf} for name, leaf in LEAVES.items()},
    "all zero": {"a": torch.zeros(3, 5), "b": torch.zeros(())},
}
every_update = pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)


def apply(defense: Defense, update: Update, client: int = 0) -> tuple[Packets, dict[str, Tensor]]:
    return defense(pack(update), defense.init(update), generator(0, "defense", 1, client))


@every_update
@every_defense
def test_every_defense_keeps_names_shapes_and_dtypes_and_stays_finite(defense, update):
    packets, state = apply(defense, update)
    assert list(packets) == list(update)
    for name, received in unpack(packets).items():
        assert received.shape == update[name].shape
        assert received.dtype == torch.float32
        assert received.isfinite().all()
    for name, fresh in defense.init(update).items():
        assert state[name].shape == fresh.shape


@every_update
@every_defense
def test_every_defense_sends_what_it_counts(defense, update):
    for name, packet in apply(defense, update)[0].items():
        data = to_bytes(packet)
        assert len(data) == nbytes(packet)
        assert torch.equal(from_bytes(data).dense(), packet.dense()), name


@every_defense
def test_no_defense_writes_to_its_arguments(defense):
    update = {name: leaf.clone() for name, leaf in LEAVES.items()}
    _, state = apply(defense, update)
    packets, kept = pack(update), {name: t.clone() for name, t in state.items()}
    defense(packets, state, generator(0, "defense", 2, 0))
    for name, leaf in LEAVES.items():
        assert torch.equal(update[name], leaf)
        assert torch.equal(packets[name].dense(), leaf)
        assert packets[name].support is packets[name].grid is packets[name].rank is None
    assert list(state) == list(kept)
    assert all(torch.equal(state[name], kept[name]) for name in kept)


@every_defense
def test_same_seed_same_result(defense):
    first, again = unpack(apply(defense, LEAVES)[0]), unpack(apply(defense, LEAVES)[0])
    assert all(torch.equal(first[name], again[name]) for name in LEAVES)


@random_defense
def test_different_client_different_randomness(defense):
    one, other = unpack(apply(defense, LEAVES, 0)[0]), unpack(apply(defense, LEAVES, 1)[0])
    assert not torch.equal(one["matrix"], other["matrix"])


@random_defense
def test_different_layers_have_different_randomness(defense):
    sent = unpack(apply(defense, {"a": LEAVES["matrix"], "b": LEAVES["matrix"]})[0])
    assert not torch.equal(sent["a"], sent["b"])


@every_defense
def test_a_defense_leaves_global_random_numbers_alone(defense):
    before = torch.get_rng_state()
    apply(defense, LEAVES)
    assert torch.equal(torch.get_rng_state(), before)


@every_defense
def test_a_defense_is_a_value(defense):
    assert isinstance(defense, Defense)
    assert eval(repr(defense), vars(defenses).copy()) == defense
    assert pickle.loads(pickle.dumps(defense)) == defense
    with pytest.raises(AttributeError, match="cannot assign"):
        defense.levels = 3


@every_update
@every_defense
def test_the_update_lies_within_what_a_defense_leaves_possible(defense, update):
    packets, _ = apply(defense, update)
    arrived = {name: from_bytes(to_bytes(packet)) for name, packet in packets.items()}
    for name, belief in beliefs_of(arrived, defense).items():
        assert belief.value.shape == belief.low.shape == belief.high.shape == belief.weight.shape == update[name].shape
        assert bool((belief.low <= update[name]).all()), f"{name} lies {(belief.low - update[name]).max()} below"
        assert bool((update[name] <= belief.high).all()), f"{name} lies {(update[name] - belief.high).max()} above"
        assert bool((belief.low <= belief.value).all())
        assert bool((belief.value <= belief.high).all())
        assert bool(((belief.weight == 0) | (belief.weight == 1)).all())


def test_every_defense_there_is_stands_in_the_table():
    def kinds(defense) -> set[str]:
        inner = [*getattr(defense, "parts", ()), *([defense.inner] if hasattr(defense, "inner") else [])]
        return {type(defense).__name__}.union(*map(kinds, inner))

    assert set().union(*(kinds(d) for d, _ in ALL)) == set(defenses.__all__)


# What cannot be meant -------------------------------------------------------------------------------------------------------------

WRONG = [
    (lambda: TopK(0.0), "ratio must be a number in (0, 1], got 0.0"),
    (lambda: TopK(1.5), "ratio must be a number in (0, 1], got 1.5"),
    (lambda: TopK("0.1"), "ratio must be a number in (0, 1], got '0.1'"),
    (lambda: TopK(math.nan), "ratio must be a number in (0, 1], got nan"),
    (lambda: TopK(True), "ratio must be a number in (0, 1], got True"),
    (lambda: UniformQuantization(1), "levels must be a whole number in 2..16777216, got 1"),
    (lambda: UniformQuantization(16.0), "levels must be a whole number in 2..16777216, got 16.0"),
    (lambda: StochasticQuantization(2**24 + 1), "levels must be a whole number in 2..16777216, got 16777217"),
    (lambda: TopK(0.1, scope="layer"), "unknown scope 'layer': choices: tensor, global"),
    (lambda: RandomK(0), "ratio must be a number in (0, 1], got 0"),
    (lambda: Threshold(-0.1), "threshold must be a number >= 0, got -0.1"),
    (lambda: Pruning(1.1), "share must be a number in [0, 1], got 1.1"),
    (lambda: Pruning(0.1, "entry"), "unknown mode 'entry': did you mean 'entries'? choices: entries, tensors, literal"),
    (lambda: DeepGradientCompression(momentum=1.5), "momentum must be a number in [0, 1], got 1.5"),
    (lambda: DeepGradientCompression(clip=0.0), "clip must be a number > 0, got 0.0"),
    (lambda: DeepGradientCompression(warmup=-1), "warmup must be a whole number >= 0, got -1"),
    (lambda: SignSGD("no"), "scaled must be true or false, got 'no'"),
    (lambda: Int8("off"), "scaled must be true or false, got 'off'"),
    (lambda: RandomK(0.1, 1), "scaled must be true or false, got 1"),
    (lambda: PowerSGD(0), "rank must be a whole number >= 1, got 0"),
    (lambda: QSGD(0), "levels must be a whole number in 1..8388607, got 0"),
    (lambda: QSGD(4, norm="l1"), "unknown norm 'l1': did you mean 'l2'? choices: l2, linf"),
    (lambda: KMeansQuantization(1), "centroids must be a whole number in 2..65536, got 1"),
    (lambda: FixedPoint(25, 3), "bits must be a whole number in 2..24, got 25"),
    (lambda: FixedPoint(8, -1), "fraction must be a whole number in 0..126, got -1"),
    (lambda: FloatFormat("fp61"), "unknown float format 'fp61': did you mean 'fp16'? choices: fp16, bf16, fp8_e4m3, fp8_e5m2"),
    (lambda: GaussianNoise(), "noise takes exactly one of std, variance and relative, got none"),
    (lambda: GaussianNoise(std=1.0, relative=0.3), "got {'std': 1.0, 'relative': 0.3}: put null for the others"),
    (lambda: GaussianNoise(std=0.1, relative=0.3), "exactly one of std, variance and relative, got {'std': 0.1, 'relative': 0.3}"),
    (lambda: LaplacianNoise(variance=-0.1), "variance must be a number >= 0, got -0.1"),
    (lambda: LaplacianNoise(std=math.inf), "std must be a number >= 0, got inf"),
    (lambda: Clip(0.0), "clip must be a number > 0, got 0.0"),
    (lambda: DPSGD(1.0), "takes noise_multiplier or epsilon, and null for the other, got noise_multiplier=None and epsilon=None"),
    (lambda: DPFedAvg(1.0, 1.0, 8.0), "null for the other, got noise_multiplier=1.0 and epsilon=8.0"),
    (lambda: DPFedAvg(1.0, epsilon=8, delta=0.0), "delta must be a number in (0, 1], got 0.0"),
    (lambda: DPFedAvg(1.0, -1.0), "noise_multiplier must be a number >= 0, got -1.0"),
    (lambda: apply(DPFedAvg(1.0, epsilon=8), LEAVES), "no noise before it is planned for a run"),
    (lambda: Soteria(40), "share must be a number in [0, 1], got 40"),
    (lambda: OutPost(decay=-0.1), "decay must be a number >= 0, got -0.1"),
    (lambda: ATS("3-50"), "numbers below 50 such as 3-1-7, several of these joined by +, or random, got '3-50'"),
    (lambda: ATS(""), "or random, got ''"),
    (lambda: MixUp(0.0), "alpha must be a number > 0, got 0.0"),
    (lambda: InstaHide(k=0), "k must be a whole number >= 1, got 0"),
    (lambda: InstaHide(k=4, largest=0.25), "largest must be well above 0.25, got 0.25"),
    (
        lambda: Chain((Soteria(0.4), ErrorFeedback(OutPost()))),
        "one part of a chain can compute the gradient, got Soteria(share",
    ),
    (lambda: Chain(()), "a chain needs at least one defense, got none; for no defense use NoDefense()"),
    (lambda: Chain((TopK(0.1), 0.3)), "a chain is made of defenses, got 0.3"),
    (lambda: ErrorFeedback(TopK), "error feedback wraps a defense, got <class 'defenses.sparsify.TopK'>"),
]


@pytest.mark.parametrize(("make", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_value_is_named_with_the_way_out(make, message):
    with pytest.raises((ValueError, TypeError)) as error:
        make()
    assert message in str(error.value)
