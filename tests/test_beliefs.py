"""What each defense leaves possible is no less than the truth, and no more than it must be.

That the update lies within it is tested for every defense in `test_defenses.py`; here for chains that chance makes, and that the
bounds are as narrow as the defense allows: a bound of infinity would be right as well.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from defenses import (
    QSGD,
    Chain,
    Clip,
    DeepGradientCompression,
    DPFedAvg,
    ErrorFeedback,
    FixedPoint,
    FloatFormat,
    GaussianNoise,
    Int8,
    KMeansQuantization,
    LaplacianNoise,
    LogQuantization,
    NoDefense,
    OutPost,
    Partial,
    PowerSGD,
    Pruning,
    RandomK,
    SignSGD,
    StochasticQuantization,
    Ternary,
    Threshold,
    TopK,
    UniformQuantization,
)
from fedsim.defense import Belief, Defense, beliefs_of, declares, is_followed
from fedsim.seeding import generator
from fedsim.updates import Update
from fedsim.wire import Packet, from_bytes, pack, to_bytes

PARTS = [
    *(UniformQuantization(2), UniformQuantization(16), UniformQuantization(2**24), StochasticQuantization(3), QSGD(1)),
    *(QSGD(5, "linf"), Ternary(), SignSGD(), SignSGD(scaled=False), KMeansQuantization(3), LogQuantization(), FixedPoint(2, 0)),
    *(FixedPoint(16, 10), FloatFormat("fp16"), FloatFormat("bf16"), FloatFormat("fp8_e4m3"), FloatFormat("fp8_e5m2"), Int8()),
    *(Int8(scaled=False), TopK(0.05), TopK(0.5), TopK(0.3, "global"), RandomK(0.3), RandomK(0.8, scaled=False), Threshold(0.0)),
    *(Threshold(0.5), Pruning(0.3, "entries"), Pruning(0.6, "tensors"), Pruning(0.0, "literal"), NoDefense()),
    *(Clip(0.1), Clip(3.0), Clip(1e6), DPFedAvg(1.0, noise_multiplier=0.1), DPFedAvg(1e6, noise_multiplier=0.0)),
    *(GaussianNoise(std=0.0), PowerSGD(1), DeepGradientCompression(0.1), ErrorFeedback(TopK(0.3))),
]
SHAPES: list[tuple[int, ...]] = [(), (1,), (3,), (41,), (31, 7), (5, 3, 2, 2)]
KINDS = {
    "normal": lambda t: t,
    "sparse": lambda t: t * (t > 0.7),
    "whole": torch.round,
    "positive": torch.abs,
    "tiny": lambda t: 1e-42 * t,
    "huge": lambda t: 1e15 * t,
}


def told(defense: Defense, update: Update, seed: int = 0) -> tuple[dict[str, Packet], dict[str, Belief]]:
    """What arrives, and what somebody who knows the defense can say."""
    packets, _ = defense(pack(update), defense.init(update), generator(seed, "defense", 1, 0))
    arrived = {name: from_bytes(to_bytes(packet)) for name, packet in packets.items()}
    return arrived, beliefs_of(arrived, defense)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    parts=st.lists(st.sampled_from(PARTS), min_size=1, max_size=4),
    leaves=st.lists(st.tuples(st.sampled_from(SHAPES), st.sampled_from(list(KINDS))), min_size=1, max_size=3),
    seed=st.integers(0, 2**31),
)
def test_the_update_lies_within_what_any_chain_leaves_possible(parts, leaves, seed):
    rng = generator(seed, "leaves")
    update = {f"{i}": KINDS[kind](torch.randn(shape, generator=rng)) for i, (shape, kind) in enumerate(leaves)}
    arrived, beliefs = told(Chain(parts), update, seed)
    fills = [i for i, part in enumerate(parts) if declares(part, "fills")]
    hidden = any(declares(part, "drops") for i in fills for part in parts[:i])  # what was dropped: it may be any 0
    for name, belief in beliefs.items():
        assert bool((belief.low <= update[name]).all())
        assert bool((update[name] <= belief.high).all())
        assert bool((belief.low <= belief.value).all())
        assert bool((belief.value <= belief.high).all())
        nothing = (belief.low == -math.inf) & (belief.high == math.inf) & (belief.weight == 0)
        sent = arrived[name].sent() & (belief.value != 0) if hidden else arrived[name].sent()
        assert not bool((nothing & sent).any()), "what was sent tells nothing at all"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    first=st.sampled_from([part for part in PARTS if not isinstance(part, PowerSGD)]),
    second=st.sampled_from([part for part in PARTS if not isinstance(part, ErrorFeedback)]),
    kind=st.sampled_from(list(KINDS)),
    seed=st.integers(0, 2**31),
)
def test_what_a_defense_was_given_lies_within_what_it_leaves_whatever_was_done_before(first, second, kind, seed):
    update = {f"{i}": KINDS[kind](torch.randn(31, generator=generator(seed, "leaf", i))) for i in range(2)}
    given, _ = first(pack(update), first.init(update), generator(seed, "first"))
    packets, _ = second(given, second.init(update), generator(seed, "second"))
    for name, belief in beliefs_of(packets, second).items():
        true = given[name].dense()
        assert bool((belief.low <= true).all())
        assert bool((true <= belief.high).all())


@pytest.mark.parametrize("later", [TopK(0.05, "global"), TopK(0.9, "global"), Pruning(0.0, "tensors")])
@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_entries_of_factors_bound_no_entries_of_tensors(later, scale):
    # The first factor's entries are (1, …, 7) / 11.8 and its norm is 1, whatever the size of the matrix.
    matrix = scale * torch.outer(torch.arange(1.0, 8.0), torch.arange(1.0, 10.0))
    update = {"matrix": matrix, "vector": torch.tensor([0.5, -0.3, 0.1])}
    for name, belief in told(Chain((PowerSGD(1), later)), update)[1].items():
        assert bool((belief.low <= update[name]).all())
        assert bool((update[name] <= belief.high).all())


@pytest.mark.parametrize("later", [ErrorFeedback(StochasticQuantization(256)), Partial(ErrorFeedback(TopK(0.9)), ["matrix"])])
def test_a_memory_behind_factors_tells_nothing_of_single_entries(later):
    update = {"matrix": torch.randn(5, 7, generator=generator(0, "matrix")), "vector": torch.tensor([0.5, -0.3, 0.1])}
    packets, _ = (defense := Chain((PowerSGD(1), later)))(pack(update), defense.init(update), generator(0, "defense"))
    for name, belief in beliefs_of(packets, defense, {}).items():
        assert bool((belief.low <= update[name]).all())
        assert bool((update[name] <= belief.high).all())


@pytest.mark.parametrize("defense", [TopK(0.5), TopK(0.5, "global"), Pruning(0.5, "entries")])
def test_where_nothing_arrives_the_dropped_are_no_larger_than_the_largest_may_be(defense):
    # Somebody who knows that entry 1 was kept at first, and lies in [-2, 2], knows that entry 0 does as well.
    packet = Packet(torch.zeros(0), (2,), torch.zeros(0, dtype=torch.int64))
    belief = Belief(torch.zeros(2), torch.tensor([0.0, -2.0]), torch.tensor([0.0, 2.0]), torch.zeros(2))
    found = defense.explain({"x": packet}, {"x": belief})["x"]
    assert found.low.tolist() == [-2, -2]
    assert found.high.tolist() == [2, 2]


# How narrow ---------------------------------------------------------------------------------------------------------------------

X = torch.randn(1009, generator=generator(0, "x"))
SPAN, LARGEST = float(X.max() - X.min()), float(X.abs().max())


def top(k: int) -> float:
    return float(X.abs().sort(descending=True).values[k - 1])


# The widest finite cell of what was sent, that of what was not (None where all was), and the weight of what was sent. A tensor's
# ends cut the cells beside them, so a cell of a random quantizer is two steps wide only inside.
WIDTHS: list[tuple[Defense, float, float | None, int]] = [
    (NoDefense(), 0, None, 1),
    (UniformQuantization(16), SPAN / 15, None, 0),
    (StochasticQuantization(16), 2 * SPAN / 15, None, 1),
    (QSGD(6, norm="linf"), 2 * LARGEST / 6, None, 1),
    (Ternary(), 2 * LARGEST, None, 1),
    (FixedPoint(8, 4), 1 / 16, None, 0),
    (Int8(), LARGEST / 127, None, 0),
    (Int8(scaled=False), 2, None, 0),  # all between -1 and 1 become 0
    (FloatFormat("fp16"), 2**-9, None, 0),  # between 2 and 4 are 2**10 numbers
    (FloatFormat("bf16"), 2**-6, None, 0),
    (LogQuantization(), 2**2.5 - 2**1.5, None, 0),  # the cell of 4, which the largest entry, 3.3, goes to
    (TopK(0.1), 0, 2 * top(101), 1),
    (TopK(0.1, scope="global"), 0, 2 * top(101), 1),
    (Threshold(1.5), 0, 3, 1),
    (Pruning(0.3, "entries"), 0, 2 * top(707), 1),
    (Chain((TopK(0.1), Int8())), LARGEST / 127, 2 * (top(101) + LARGEST / 127), 0),
    (Chain((UniformQuantization(16), TopK(0.1))), SPAN / 15, 2 * (top(101) + SPAN / 15), 0),
    (Chain((FixedPoint(16, 10), FixedPoint(8, 4))), 1 / 16 + 1 / 1024, None, 0),
    (Chain((StochasticQuantization(16), TopK(0.1))), 2 * SPAN / 15, 2 * (top(101) + 2 * SPAN / 15), 1),
]


@pytest.mark.parametrize(("defense", "width", "missing", "weight"), WIDTHS, ids=[repr(row[0]) for row in WIDTHS])
def test_bounds_are_as_narrow_as_the_defense_allows(defense, width, missing, weight):
    arrived, beliefs = told(defense, {"x": X})
    sent, belief = arrived["x"].sent(), beliefs["x"]
    cells = (belief.high - belief.low)[sent]
    assert bool(cells.isfinite().all())
    # Rounding to float32 adds 2**-22 of the largest entry on either side.
    assert float(cells.max()) <= width + 2**-20 * LARGEST
    assert float(cells.max()) >= 0.99 * width
    assert bool((belief.weight[sent] == weight).all())
    assert bool((belief.weight[~sent] == 0).all())
    assert bool(sent.all()) == (missing is None)
    if missing is not None:
        cells = (belief.high - belief.low)[~sent]
        assert 0.9 * (width + 2 * top(1009)) <= float(cells.max()) <= missing * 1.0001


QUANTIZERS = [UniformQuantization(16), KMeansQuantization(4), LogQuantization(), FixedPoint(16, 10), Int8(), Int8(scaled=False)]
QUANTIZERS += [FloatFormat("fp16"), FloatFormat("bf16"), FloatFormat("fp8_e4m3")]


@pytest.mark.parametrize("rounds", QUANTIZERS, ids=repr)
@pytest.mark.parametrize("hides", [GaussianNoise(std=1e-3), DPFedAvg(100.0, noise_multiplier=1e-8), OutPost()], ids=repr)
def test_whatever_hides_the_bounds_before_or_after_rounding_leaves_the_values(rounds, hides):
    update = {"x": X.clone()}
    for chain in (Chain((rounds, hides)), Chain((hides, rounds))):
        arrived, beliefs = told(chain, update)
        belief = beliefs["x"]
        assert torch.equal(belief.value, arrived["x"].dense())
        # OutPost says of zeros that they were pruned.
        assert torch.equal(belief.weight, (belief.value != 0).float() if isinstance(hides, OutPost) else torch.ones_like(X))


def test_clipping_turns_no_sign():
    for chain in (Chain((Clip(0.1), SignSGD())), Chain((Clip(0.1), Int8(scaled=False)))):
        belief = told(chain, {"x": 100 * X})[1]["x"]
        some = belief.value != 0
        assert bool((torch.where(belief.value > 0, belief.low, -belief.high)[some] > -1e-19).all())
        assert bool((belief.weight[~some] == 1).all())


def test_signs_leave_half_a_line():
    _, beliefs = told(SignSGD(), {"x": X})
    belief = beliefs["x"]
    assert torch.equal(belief.low, torch.where(X < 0, -torch.inf, 0.0))
    assert torch.equal(belief.high, torch.where(X < 0, 0.0, torch.inf))
    assert not belief.weight.any()
    tiny = told(SignSGD(), {"x": torch.tensor([1e-45] + 7 * [0.0])})[1]["x"]  # a mean that is 0 in float32
    assert tiny.high[0] == torch.inf
    zeros = told(SignSGD(), {"x": torch.zeros(3)})[1]["x"]
    assert torch.equal(zeros.low, torch.zeros(3))
    assert torch.equal(zeros.high, torch.zeros(3))


def test_k_means_leaves_what_lies_nearest_the_centroid():
    arrived, beliefs = told(KMeansQuantization(4), {"x": X})
    levels, belief = arrived["x"].dense().unique(), beliefs["x"]
    for level, low, high in zip(levels, [-math.inf, *levels[:-1]], [*levels[1:], math.inf], strict=True):
        of = arrived["x"].dense() == level
        assert belief.low[of].unique().item() == pytest.approx((level + low) / 2)
        assert belief.high[of].unique().item() == pytest.approx((level + high) / 2)


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp8_e4m3", "fp8_e5m2"])
def test_what_is_rounded_alike_is_what_a_float_format_leaves(name):
    # Just inside the bounds an entry is sent as the same number, just outside as another.
    arrived, beliefs = told(FloatFormat(name), {"x": X})
    belief = beliefs["x"]
    for bound, towards in ((belief.low, 1), (belief.high, -1)):
        inside, outside = bound + towards * 1e-6 * (1 + bound.abs()), bound - towards * 1e-6 * (1 + bound.abs())
        wide = (belief.high - belief.low) > 1e-5 * (1 + bound.abs())
        assert int(wide.sum()) > 900
        assert torch.equal(told(FloatFormat(name), {"x": inside})[0]["x"].dense()[wide], arrived["x"].dense()[wide])
        assert bool((told(FloatFormat(name), {"x": outside})[0]["x"].dense() != arrived["x"].dense())[wide].all())


def test_what_is_larger_than_a_format_has_no_bound_on_that_side():
    update = {"x": torch.tensor([1e6, -1e6, 1.0])}
    for defense in (FloatFormat("fp16"), FixedPoint(8, 0), Int8(scaled=False)):
        belief = told(defense, update)[1]["x"]
        assert belief.high.isinf().tolist() == [True, False, False]
        assert belief.low.isinf().tolist() == [False, True, False]


def test_random_k_is_divided_by_its_scale():
    arrived, beliefs = told(RandomK(0.1), {"x": X})
    sent, belief = arrived["x"].sent(), beliefs["x"]
    assert torch.allclose(belief.value[sent], X[sent], rtol=1e-6, atol=0)
    assert bool((belief.high - belief.low <= 2**-20 * belief.value.abs())[sent].all())
    assert torch.equal(belief.weight, sent.float())
    assert bool((belief.low[~sent] == -torch.inf).all())
    assert bool((belief.high[~sent] == torch.inf).all())


def test_a_dropped_tensor_is_no_longer_than_the_shortest_that_was_sent():
    update = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0, -2.0]), "c": torch.tensor([6.0, 8.0])}
    _, beliefs = told(Pruning(0.0, "tensors"), update)
    assert beliefs["b"].high.tolist() == [5, 5]
    assert beliefs["b"].low.tolist() == [-5, -5]
    _, beliefs = told(Pruning(0.0, "literal"), update)
    assert beliefs["a"].high.tolist() == [math.inf, math.inf]


def test_global_top_k_bounds_a_tensor_of_which_nothing_was_sent():
    update = {"large": torch.tensor([3.0, -5.0]), "small": torch.tensor([0.1, 0.2, 0.3])}
    _, beliefs = told(TopK(0.4, scope="global"), update)
    assert beliefs["small"].high.tolist() == [3, 3, 3]


# No bounds ----------------------------------------------------------------------------------------------------------------------

UNBOUNDED: list[tuple[Defense, Tensor]] = [
    (GaussianNoise(std=0.1), torch.ones(31, 7)),
    (LaplacianNoise(relative=0.1), torch.ones(31, 7)),
    (ErrorFeedback(UniformQuantization(16)), torch.ones(31, 7)),
    (ErrorFeedback(SignSGD()), torch.ones(31, 7)),
    (PowerSGD(2), torch.ones(31, 7)),
    (Chain((UniformQuantization(4), GaussianNoise(std=0.1))), torch.ones(31, 7)),
    (Chain((GaussianNoise(std=0.1), UniformQuantization(4))), torch.ones(31, 7)),
    (Chain((QSGD(4), Int8())), torch.ones(31, 7)),  # the scale of QSGD is not sent
]


@pytest.mark.parametrize(("defense", "weight"), UNBOUNDED, ids=[repr(d) for d, _ in UNBOUNDED])
def test_what_has_no_bounds_goes_by_its_value(defense, weight):
    arrived, beliefs = told(defense, {"x": X[: 31 * 7].reshape(31, 7)})
    belief = beliefs["x"]
    assert bool((belief.low == -torch.inf).all())
    assert bool((belief.high == torch.inf).all())
    assert torch.equal(belief.value, arrived["x"].dense())
    assert torch.equal(belief.weight, weight)


@pytest.mark.parametrize(
    "defense", [ErrorFeedback(TopK(0.1)), DeepGradientCompression(0.1), Chain((TopK(0.1), GaussianNoise(0.1)))]
)
def test_what_was_not_sent_and_has_no_bounds_tells_nothing(defense):
    arrived, beliefs = told(defense, {"x": X})
    assert torch.equal(beliefs["x"].weight, arrived["x"].sent().float())
    assert bool((beliefs["x"].high == torch.inf).all())


@pytest.mark.parametrize("last", [ErrorFeedback(FloatFormat("fp16")), DeepGradientCompression(0.5)])
def test_what_was_dropped_before_all_entries_were_sent_tells_nothing(last):
    """Nobody sees which places were dropped: what is 0 may have been."""
    arrived, beliefs = told(Chain((TopK(0.1), last)), {"x": X})
    assert beliefs["x"].weight.sum() == arrived["x"].dense().count_nonzero() < X.numel()
    assert bool((beliefs["x"].high == torch.inf).all())


def test_in_a_first_round_what_error_feedback_wraps_is_sound_of_the_update():
    defense = ErrorFeedback(UniformQuantization(16))
    arrived, _ = told(defense, {"x": X})
    belief = beliefs_of(arrived, defense.inner)["x"]
    assert bool(((belief.low <= X) & (belief.high >= X)).all())
    # and in a second it is not, of this round's update alone
    update = {"x": X}
    _, state = defense(pack(update), defense.init(update), generator(0, "unused"))
    packets, _ = defense(pack({"x": 0.1 * X}), state, generator(0, "unused"))
    belief = beliefs_of(packets, defense.inner)["x"]
    assert not bool(((belief.low <= 0.1 * X) & (belief.high >= 0.1 * X)).all())


FOLLOWED = [
    *(ErrorFeedback(part) for part in (TopK(0.3), TopK(0.3, "global"), UniformQuantization(16), StochasticQuantization(4))),
    *(ErrorFeedback(part) for part in (Threshold(0.5), LogQuantization(), FloatFormat("fp8_e4m3"), SignSGD(), RandomK(0.5))),
    ErrorFeedback(Chain((TopK(0.5), UniformQuantization(8)))),
    ErrorFeedback(NoDefense()),
    *(DeepGradientCompression(0.3, momentum=m, clip=clip) for m, clip in ((0.0, None), (0.9, None), (0.9, 1.0))),
    *(Chain((UniformQuantization(64), last)) for last in (ErrorFeedback(TopK(0.3)), DeepGradientCompression(0.3))),
    Chain((ErrorFeedback(TopK(0.3)), UniformQuantization(8))),
    *(
        Chain((first, ErrorFeedback(FloatFormat("fp16"))))
        for first in (TopK(0.3), RandomK(0.5), Threshold(0.5), Pruning(0.5, "entries"))
    ),
    *(Chain((TopK(0.3), last)) for last in (ErrorFeedback(SignSGD()), DeepGradientCompression(0.5), ErrorFeedback(TopK(0.6)))),
    Partial(ErrorFeedback(TopK(0.3)), ["a"]),
]


@pytest.mark.parametrize("defense", FOLLOWED, ids=repr)
def test_the_update_lies_within_what_two_messages_of_a_client_with_a_memory_leave(defense):
    rng, state, before = generator(0, "updates"), None, {}
    for round in range(6):
        update = {"a": torch.randn(31, 7, generator=rng), "b": torch.randn(5, generator=rng) ** 3}
        state = defense.init(update) if state is None else state
        packets, state = defense(pack(update), state, generator(0, "defense", round))
        for name, belief in beliefs_of(packets, defense, before).items():
            slack = 1e-5 * update[name].abs().max()  # sums of float32 numbers round
            assert bool((belief.low <= update[name] + slack).all())
            assert bool((belief.high >= update[name] - slack).all())
        before = packets


def test_what_top_k_sent_twice_in_a_row_is_known():
    defense, rng = ErrorFeedback(TopK(0.5)), generator(0, "updates")
    first, second = ({"x": torch.randn(101, generator=rng)} for _ in range(2))
    before, state = defense(pack(first), defense.init(first), rng)
    packets, _ = defense(pack(second), state, rng)
    belief = beliefs_of(packets, defense, before)["x"]
    twice = before["x"].sent() & packets["x"].sent()
    assert 10 < int(twice.sum()) < 51
    for told in (belief.value, belief.low, belief.high):
        assert torch.allclose(told[twice], second["x"][twice])
    assert bool((belief.weight[twice] == 1).all())
    # Sent now and not before: off by at most the smallest entry that was sent before.
    once = packets["x"].sent() & ~twice
    smallest = before["x"].dense()[before["x"].sent()].abs().min()
    assert torch.allclose((belief.high - belief.low)[once], (2 * smallest).expand(int(once.sum())))
    assert not bool(belief.weight[once].any())


def test_what_was_sent_before_tells_of_a_defense_that_is_part_of_another_as_it_does_of_it_alone():
    inner, rng = ErrorFeedback(TopK(0.5)), generator(0, "updates")
    first, second = ({"x": torch.randn(101, generator=rng)} for _ in range(2))
    before, state = inner(pack(first), inner.init(first), rng)
    packets, _ = inner(pack(second), state, rng)
    alone, blind = beliefs_of(packets, inner, before)["x"], beliefs_of(packets, inner)["x"]
    assert not torch.equal(alone.high, blind.high)
    for defense in (Chain([NoDefense(), inner]), Chain([Chain([inner])]), Partial(inner, ["x"])):
        assert is_followed(defense)
        told = beliefs_of(packets, defense, before)["x"]
        for part in ("value", "low", "high", "weight"):
            assert torch.equal(getattr(told, part), getattr(alone, part))
    assert not any(map(is_followed, (Chain([inner, TopK(0.5)]), Partial(TopK(0.5), ["x"]))))


def test_a_first_message_of_deep_gradient_compression_tells_what_top_k_tells_and_later_ones_of_what_is_sent_again():
    defense, rng = DeepGradientCompression(0.5, momentum=0.9, warmup=0), generator(0, "updates")
    first, second = ({"x": torch.randn(101, generator=rng)} for _ in range(2))
    before, state = defense(pack(first), defense.init(first), rng)
    now, top_k = beliefs_of(before, defense, {})["x"], beliefs_of(before, TopK(0.5))["x"]
    for part in ("value", "low", "high", "weight"):
        assert torch.equal(getattr(now, part), getattr(top_k, part))
    packets, _ = defense(pack(second), state, rng)
    belief, sent, again = beliefs_of(packets, defense, before)["x"], packets["x"].sent(), before["x"].sent()
    assert 10 < int((sent & again).sum()) < 51
    for told in (belief.value, belief.low, belief.high):
        assert torch.equal(told[sent & again], second["x"][sent & again])
    assert float(belief.high[~sent & again].max()) == packets["x"].values.abs().min()
    assert bool(belief.high[~again].isinf().all())
    assert torch.equal(belief.weight, sent.float())


UNBIASED = [
    StochasticQuantization(4),
    QSGD(3),
    QSGD(3, norm="linf"),
    Ternary(),
    RandomK(0.3),
    GaussianNoise(std=0.5),
    LaplacianNoise(std=0.5),
    Chain((RandomK(0.5), StochasticQuantization(5))),
    Chain((TopK(0.5), QSGD(2))),
    Chain((StochasticQuantization(5), GaussianNoise(std=0.1))),
]


@pytest.mark.parametrize("defense", UNBIASED, ids=repr)
def test_what_has_weight_averages_to_the_truth(defense):
    x = X[:53]
    packets, rng = pack({"x": x}), generator(0, "draws")
    times, total, squares = (torch.zeros(53, dtype=torch.float64) for _ in range(3))
    for _ in range(4000):
        belief = beliefs_of(defense(packets, {}, rng)[0], defense)["x"]
        off = belief.weight * (belief.value.double() - x)
        times, total, squares = times + belief.weight, total + off, squares + off.square()
    told_of = times > 0
    assert int(told_of.sum()) >= 26
    # Of 53 means the largest is beyond 4.5 standard errors, estimated from the draws, once in 3,000; 1e-6 is float32's rounding.
    error = 4.5 * squares.sqrt() / times + 1e-6
    assert bool((total.abs() / times <= error)[told_of].all())
