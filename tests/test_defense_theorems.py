"""The theorem of each defense: how wrong it is at most, what it is on average, how much it keeps, what it costs."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from defenses import Chain, ErrorFeedback, GaussianNoise, LaplacianNoise, StochasticQuantization, TopK, UniformQuantization
from fedsim.defense import Defense
from fedsim.seeding import generator
from fedsim.updates import Update, norm
from fedsim.wire import Packets, nbytes, pack, unpack


def apply(defense: Defense, update: Update) -> tuple[Packets, dict[str, Tensor]]:
    return defense(pack(update), defense.init(update), generator(0, "defense", 1, 0))


# Quantization ---------------------------------------------------------------------------------------------------------------------


def test_uniform_quantization_does_the_worked_example():
    # s = (0.9981 - 0.1792) / 15 = 0.054593; 0.3199 is 2.58 steps above 0.1792 and goes to 3, 0.1792 + 3 s = 0.3430, and so on
    update = {"x": torch.tensor([0.3199, 0.7562, 0.1792, 0.9981, 0.7452])}
    sent = unpack(apply(UniformQuantization(16), update)[0])["x"]
    assert torch.allclose(sent, torch.tensor([0.3430, 0.7797, 0.1792, 0.9981, 0.7251]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("levels", [2, 3, 16, 255, 2**24])
def test_uniform_quantization_is_wrong_by_half_a_step_at_most(levels):
    x = torch.randn(10_007, generator=generator(0, "values", levels))
    sent = unpack(apply(UniformQuantization(levels), {"x": x})[0])["x"]
    step = float(x.max() - x.min()) / (levels - 1)
    # Besides half a step, one rounding to float32 at the size of the entries.
    assert float((sent - x).abs().max()) <= step / 2 + float(x.abs().max()) * 2**-23
    assert len(sent.unique()) <= levels
    assert sent.min() == x.min()


@pytest.mark.parametrize("levels", [2, 7, 16, 255])
def test_uniform_quantization_done_twice_is_done_once(levels):
    x = torch.randn(31, 7, generator=generator(0, "values", levels))
    once, _ = apply(UniformQuantization(levels), {"x": x})
    twice, _ = UniformQuantization(levels)(once, {}, generator(0, "unused"))
    assert torch.allclose(once["x"].dense(), twice["x"].dense(), rtol=2e-7, atol=float(x.abs().max()) * 2**-23)


def test_stochastic_quantization_is_unbiased():
    x = torch.randn(53, generator=generator(0, "values"))
    defense, rng, draws = StochasticQuantization(5), generator(0, "draws"), 10_000
    packets = pack({"x": x})
    total = sum((defense(packets, {}, rng)[0]["x"].values.double() for _ in range(draws)), torch.zeros(53, dtype=torch.float64))
    # An entry that lies the fraction f above a level is sent with variance f (1 - f) step^2. Of 53 means, the largest is beyond
    # 4 standard errors once in 300 seeds; 1e-6 is the rounding of float32.
    step = float(x.max() - x.min()) / 4
    fraction = ((x.double() - float(x.min())) / step).frac()
    error = 4 * step * (fraction * (1 - fraction) / draws).sqrt() + 1e-6
    assert bool(((total / draws - x).abs() <= error).all())


@pytest.mark.parametrize("levels", [2, 3, 16, 255])
def test_stochastic_quantization_sends_a_neighbour_on_the_grid(levels):
    x = torch.randn(10_007, generator=generator(0, "values", levels))
    packet = apply(StochasticQuantization(levels), {"x": x})[0]["x"]
    step = float(x.max() - x.min()) / (levels - 1)
    steps = (packet.values.double() - float(x.min())) / step
    assert float((steps - steps.round()).abs().max()) < 1e-3
    assert float((packet.values - x).abs().max()) < step * 1.0001
    assert bool((steps.round() <= levels - 1).all())
    # Codes of `levels` levels take ceil(log2(levels)) bits.
    assert packet.grid is not None
    assert packet.grid.bits == math.ceil(math.log2(levels))


# Sparsification -------------------------------------------------------------------------------------------------------------------

# (ratio, n, k): at least one, rounded up; 0.07 * 100 is 7.000000000000001 in floating point
KEPT = [(0.5, 5, 3), (0.07, 100, 7), (0.1, 31, 4), (0.01, 7, 1), (0.999, 7, 7), (1.0, 7, 7), (0.3, 10_007, 3003), (0.5, 1, 1)]


@pytest.mark.parametrize(("ratio", "n", "k"), KEPT)
def test_top_k_keeps_the_largest_and_as_many_as_asked(ratio, n, k):
    x = torch.randn(n, generator=generator(0, "values", n))
    packet = apply(TopK(ratio), {"x": x})[0]["x"]
    assert len(packet.values) == k
    assert abs(k / n - ratio) <= 1 / n or k == 1
    sent = packet.dense()
    kept = sent != 0
    assert torch.equal(sent[kept], x[kept])
    if k < n:
        assert x[kept].abs().min() >= x[~kept].abs().max()
        assert torch.equal(packet.support, kept.nonzero().flatten())  # ascending


def test_top_k_keeps_as_many_when_all_are_equal():
    assert len(apply(TopK(0.3), {"x": torch.full((10,), 0.7)})[0]["x"].values) == 3


def test_top_k_after_top_k_keeps_a_share_of_a_share():
    x = torch.randn(1000, generator=generator(0, "values"))
    packet = apply(Chain((TopK(0.1), TopK(0.5))), {"x": x})[0]["x"]
    assert len(packet.values) == 50
    assert torch.equal(packet.dense(), apply(TopK(0.05), {"x": x})[0]["x"].dense())


def test_a_sparse_quantized_update_stays_sparse_and_quantized():
    packet = apply(Chain((TopK(0.1), StochasticQuantization(16))), {"x": torch.randn(1009, generator=generator(0, "x"))})[0]["x"]
    assert len(packet.values) == 101
    assert packet.grid is not None
    assert packet.grid.bits == 4
    # flags, dimensions, one of 4 bytes, k; a bitmap of 1009 bits is as long as 101 indices of 10 bits or shorter; grid; codes
    assert nbytes(packet) == 2 + 4 + 4 + 127 + 9 + 51


# Noise ----------------------------------------------------------------------------------------------------------------------------

NOISES = {
    GaussianNoise: lambda std: stats.norm(scale=std).cdf,
    LaplacianNoise: lambda std: stats.laplace(scale=std / math.sqrt(2)).cdf,
}
both_noises = pytest.mark.parametrize("kind", NOISES, ids=lambda kind: kind.__name__)


def noise_of(defense: Defense, update: Update) -> Tensor:
    sent = unpack(apply(defense, update)[0])
    return torch.cat([(sent[name].double() - t.double()).flatten() for name, t in update.items()])


@both_noises
@pytest.mark.parametrize("std", [0.02, 3.0])
def test_noise_has_the_distribution_it_claims_and_not_one_half_wider(kind, std):
    noise = noise_of(kind(std=std), {"x": torch.zeros(10_007)}).numpy()
    # The seed is fixed. A p-value below 1e-3 says "not this one"; the wider distribution is 6 % away, 6 times the critical 1 %.
    assert stats.kstest(noise, NOISES[kind](std)).pvalue > 1e-3
    assert stats.kstest(noise, NOISES[kind](1.5 * std)).pvalue < 1e-9
    other = next(cdf for name, cdf in NOISES.items() if name is not kind)
    assert stats.kstest(noise, other(std)).pvalue < 1e-3
    # Of 10,007 draws the standard deviation is known to 0.7 % (Gaussian) or 1.1 % (Laplacian): 4 of that.
    assert float(noise.std()) == pytest.approx(std, rel=0.045)


@both_noises
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_relative_noise_is_a_share_of_the_update_whatever_its_scale(kind, scale):
    rng = generator(0, "update")
    # Layers of different scale share one standard deviation. 40,009 entries: |noise| is known to 0.4 % or 0.6 %, so 2 % is > 3.
    update = {"a": scale * torch.randn(40_000, generator=rng), "b": 10 * scale * torch.randn(3, 3, generator=rng)}
    noise = noise_of(kind(relative=0.3), update)
    assert float(noise.norm() / norm(update)) == pytest.approx(0.3, rel=0.02)


@both_noises
def test_std_variance_and_relative_are_three_ways_to_say_the_same(kind):
    update = {"x": torch.tensor([3.0, -3.0, 3.0, 3.0, -3.0])}  # root mean square 3
    expected = unpack(apply(kind(std=0.6), update)[0])["x"]
    for same in (kind(variance=0.36), kind(relative=0.2)):
        assert torch.allclose(unpack(apply(same, update)[0])["x"], expected, rtol=0, atol=1e-6)


@both_noises
def test_noise_stays_where_something_is_sent_and_leaves_the_grid(kind):
    x = torch.randn(101, generator=generator(0, "x"))
    packets, _ = apply(Chain((TopK(0.2), UniformQuantization(4))), {"x": x})
    noisy = kind(std=0.1)(packets, {}, generator(0, "noise"))[0]["x"]
    assert noisy.grid is None
    assert torch.equal(noisy.support, packets["x"].support)
    assert len(noisy.values.unique()) == 21


@both_noises
def test_relative_noise_on_a_zero_update_is_none(kind):
    assert not noise_of(kind(relative=0.3), {"a": torch.zeros(3, 5), "b": torch.zeros(())}).any()


# Error feedback -------------------------------------------------------------------------------------------------------------------

LOSSY = [
    TopK(0.1),
    UniformQuantization(3),
    StochasticQuantization(4),
    Chain((TopK(0.2), UniformQuantization(4))),
    GaussianNoise(std=0.1),
]


def rounds(defense: Defense, count: int = 7) -> tuple[list[Update], list[Update], dict[str, Tensor]]:
    """Updates of some rounds, what was sent, and the memory at the end."""
    updates, sent, state = [], [], None
    for round in range(count):
        updates.append({"x": torch.randn(41, 3, generator=generator(0, "update", round)), "s": torch.tensor(0.1 * round)})
        state = defense.init(updates[0]) if state is None else state
        packets, state = defense(pack(updates[-1]), state, generator(0, "defense", round, 0))
        sent.append(unpack(packets))
    return updates, sent, state or {}


@pytest.mark.parametrize("inner", LOSSY, ids=repr)
def test_error_feedback_loses_nothing(inner):
    updates, sent, state = rounds(ErrorFeedback(inner))
    for name in updates[0]:
        arrived = sum(one[name] for one in sent) + state[f"residual/{name}"]
        assert torch.allclose(arrived, sum(one[name] for one in updates), rtol=0, atol=1e-5)
    # Without it, most of the sum is gone or wrong.
    lost = sum(one["x"] for one in rounds(inner)[1]) - sum(one["x"] for one in updates)
    assert float(lost.norm()) > 0.1


def test_error_feedback_around_what_drops_nothing_changes_nothing():
    updates, sent, state = rounds(ErrorFeedback(TopK(1.0)))
    for wanted, arrived in zip(updates, sent, strict=True):
        assert all(torch.equal(arrived[name], wanted[name]) for name in wanted)
    assert not any(t.any() for t in state.values())


def test_a_chain_keeps_the_memories_of_its_parts_apart():
    first, second = ErrorFeedback(TopK(0.2)), ErrorFeedback(UniformQuantization(3))
    updates, sent, state = rounds(Chain((first, second)))
    assert sorted(state) == ["0/residual/s", "0/residual/x", "1/residual/s", "1/residual/x"]
    one, other = first.init(updates[0]), second.init(updates[0])  # by hand, each with its own
    for update, expected in zip(updates, sent, strict=True):
        packets, one = first(pack(update), one, generator(0, "unused"))
        packets, other = second(packets, other, generator(0, "unused"))
        assert all(torch.equal(t, expected[name]) for name, t in unpack(packets).items())
