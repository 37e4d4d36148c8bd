"""The theorem of each quantizer: worked examples, how wrong it is at most, what it is on average, how many bits it takes."""

import math
import statistics

import numpy as np
import pytest
import torch
from torch import Tensor

from defenses import (
    QSGD,
    ErrorFeedback,
    FixedPoint,
    FloatFormat,
    Int8,
    KMeansQuantization,
    LogQuantization,
    Pruning,
    SignSGD,
    StochasticQuantization,
    Ternary,
    UniformQuantization,
)
from fedsim.data import load
from fedsim.defense import Defense
from fedsim.models import lenet
from fedsim.seeding import generator
from fedsim.training import local_update, split
from fedsim.updates import Update, relative_error
from fedsim.wire import Codebook, Multiples, Packet, nbytes, pack, unpack

EXAMPLE = torch.tensor([0.3199, 0.7562, 0.1792, 0.9981, 0.7452])


def packet_of(defense: Defense, x: Tensor, seed: int = 0) -> Packet:
    return defense(pack({"x": x}), defense.init({"x": x}), generator(seed, "defense", 1, 0))[0]["x"]


def sent(defense: Defense, x: Tensor, seed: int = 0) -> Tensor:
    return packet_of(defense, x, seed).dense()


def normal(n: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(n, generator=generator(0, "values", n))


# Worked examples ------------------------------------------------------------------------------------------------------------------


def test_log_quantization_does_the_worked_example():
    # log2 of the entries: -1.64, -0.40, -2.48, -0.003, -0.42
    assert sent(LogQuantization(), EXAMPLE).tolist() == [0.25, 1, 0.25, 1, 1]
    assert sent(LogQuantization(), -EXAMPLE).tolist() == [-0.25, -1, -0.25, -1, -1]


@pytest.mark.parametrize("seed", range(50))
def test_k_means_does_the_worked_example_from_any_seed(seed):
    # the means of {0.3199, 0.1792}, of {0.7562, 0.7452}, and 0.9981
    expected = torch.tensor([0.24955, 0.7507, 0.24955, 0.9981, 0.7507])
    assert torch.allclose(sent(KMeansQuantization(3), EXAMPLE, seed), expected, rtol=0, atol=1e-6)


def test_fixed_point_does_a_worked_example():
    # 4 bits, 2 of them behind the point: quarters from -2 to 1.75. 0.3199 is 1.28 quarters, 0.7562 is 3.02; 0.375 is a tie
    x = torch.tensor([0.3199, 0.7562, -0.1792, 0.375, 0.625, -0.375, 1.99, 7.0, -1.9, -2.3])
    assert sent(FixedPoint(4, 2), x).tolist() == [0.25, 0.75, -0.25, 0.5, 0.5, -0.5, 1.75, 1.75, -2.0, -2.0]
    assert packet_of(FixedPoint(4, 2), x).grid == Multiples(0.25, 4)


def test_qsgd_of_six_levels_does_the_worked_example():
    # in sixths of 0.9981: 0.3199 is 1.92, 0.7562 is 4.55, 0.1792 is 1.08, 0.7452 is 4.48; the largest is always sent as it is
    codes = {tuple((sent(QSGD(6, "linf"), EXAMPLE, seed) / 0.9981 * 6).round().int().tolist()) for seed in range(200)}
    assert [sorted({code[i] for code in codes}) for i in range(5)] == [[1, 2], [4, 5], [1, 2], [6], [4, 5]]


def test_int8_does_a_worked_example():
    # of largest magnitude 2.54 a step is 0.02
    x = torch.tensor([2.54, -2.54, 0.0, 0.031, -1.0])
    assert sent(Int8(), x).tolist() == pytest.approx([2.54, -2.54, 0.0, 0.04, -1.0], abs=1e-6)
    assert sent(Int8(scaled=False), torch.tensor([2.9, -2.9, 0.99, -0.99, 127.5, 300.0, -129.0])).tolist() == [
        *(2, -2, 0, 0),
        *(127, 127, -128),
    ]


def test_sign_sgd_does_a_worked_example():
    x = torch.tensor([0.5, -1.0, 0.0, 2.5])  # mean magnitude 1
    assert sent(SignSGD(), x).tolist() == [1, -1, 1, 1]
    assert sent(SignSGD(), 3 * x).tolist() == [3, -3, 3, 3]
    assert sent(SignSGD(scaled=False), 3 * x).tolist() == [1, -1, 1, 1]


# How wrong at most ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "fraction"), [(2, 0), (8, 5), (16, 10), (24, 20)])
def test_fixed_point_is_wrong_by_half_a_step_within_its_range_and_stays_there(bits, fraction):
    x = normal(10_007, 2.0 ** (bits - fraction))
    made = sent(FixedPoint(bits, fraction), x)
    low, step = -(2.0 ** (bits - fraction - 1)), 2.0**-fraction
    inside = (x >= low) & (x <= -low - step)
    assert 0 < int(inside.sum()) < len(x)
    assert float((made - x)[inside].abs().max()) <= step / 2
    assert float(made.min()) == low
    assert float(made.max()) == -low - step


FLOATS = {"fp16": (2**-11, 2**-14), "bf16": (2**-8, 2**-126), "fp8_e4m3": (2**-4, 2**-6), "fp8_e5m2": (2**-3, 2**-14)}


@pytest.mark.parametrize(("name", "relative", "normal_from"), [(name, *of) for name, of in FLOATS.items()])
def test_a_float_format_is_wrong_by_half_a_unit_in_its_last_place(name, relative, normal_from):
    # From one power of two to the next are 2**p numbers of p bits behind the point, so half the gap is 2**-(p + 1) of the power,
    # and the worst is half way to the first of them, which is that much larger than the power.
    x = 2.0 ** (40 * torch.rand(10_007, generator=generator(0, "x")) - 30)
    made = sent(FloatFormat(name), x)
    largest = {"fp16": 65504, "bf16": math.inf, "fp8_e4m3": 448, "fp8_e5m2": 57344}[name]
    inside = (x <= largest) & (x >= normal_from)
    error = ((made - x).abs() / x)[inside].max()
    assert relative * 0.85 < float(error) <= relative / (1 + relative) * (1 + 1e-6)
    below = x < normal_from
    assert bool(((made - x)[below].abs() <= relative * normal_from).all())  # the gap stays that of the smallest power
    assert bool((made[x > largest] == largest).all())
    assert torch.equal(sent(FloatFormat(name), made), made)
    assert torch.equal(sent(FloatFormat(name), -x), -made)


def test_half_precision_is_that_of_another_implementation():
    x = normal(10_007, 100.0)
    assert np.array_equal(sent(FloatFormat("fp16"), x).numpy(), x.numpy().astype(np.float16).astype(np.float32))


def test_bfloat16_is_the_upper_half_of_a_float_rounded_to_even():
    x = normal(10_007)
    bits = x.numpy().view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    assert np.array_equal(sent(FloatFormat("bf16"), x).numpy(), rounded)


def test_a_float_format_saturates_and_never_overflows():
    x = torch.tensor([1e6, -1e6, 3.4e38, -3.4e38])
    for name in FLOATS:
        made = sent(FloatFormat(name), x)
        assert bool(made.isfinite().all())
        assert made[0] <= made[2]


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_scaled_int8_is_wrong_by_a_254th_of_the_largest_and_keeps_zero(scale):
    x = torch.cat([normal(10_007, scale), torch.zeros(3)])
    made = sent(Int8(), x)
    # The step is a float32 itself, 2**-24 off at most, 127 times in the largest.
    assert float((made - x).abs().max()) <= float(x.abs().max()) * (1 / 254 + 2**-23)
    assert not made[-3:].any()


def test_casting_gradients_to_int8_leaves_nothing_of_them():
    assert not sent(Int8(scaled=False), normal(10_007, 0.1)).any()


def test_log_quantization_is_right_to_a_factor_of_the_root_of_two():
    x = torch.cat([normal(10_007, scale) for scale in (1e-30, 1e-3, 1.0, 1e30)])
    made = sent(LogQuantization(), x)
    ratio = made.double() / x.double()
    assert float(ratio.min()) >= 2**-0.5 * (1 - 1e-12)
    assert float(ratio.max()) <= 2**0.5 * (1 + 1e-12)
    exponents = made.abs().log2()
    assert torch.equal(exponents, exponents.round())


def test_log_quantization_sends_zero_as_zero_and_the_ends_of_float32_as_powers():
    x = torch.tensor([0.0, -0.0, 3.4e38, -3.4e38, 1.4e-45])
    assert sent(LogQuantization(), x).tolist() == [0, 0, 2.0**127, -(2.0**127), 2.0**-149]


@pytest.mark.parametrize("centroids", [2, 5, 16])
def test_k_means_sends_the_nearest_centroid_which_is_the_mean_of_what_it_stands_for(centroids):
    x = normal(2003)
    packet = packet_of(KMeansQuantization(centroids), x)
    assert isinstance(packet.grid, Codebook)
    levels = torch.tensor(packet.grid.values)
    assert len(levels) <= centroids
    distances = (x[:, None] - levels).abs()
    assert torch.allclose((packet.values - x).abs(), distances.min(1).values, rtol=0, atol=1e-6)
    # Lloyd's condition; the search stops when it gains less than 1e-5 of the largest entry, a thousandth of a centroid's distance.
    for level in levels:
        assert float(x[packet.values == level].mean()) == pytest.approx(float(level), abs=0.02)


def test_k_means_is_less_wrong_than_equal_steps():
    x = normal(10_007) ** 3  # as peaked as gradients are
    errors = [float((sent(d, x) - x).norm()) for d in (KMeansQuantization(16), UniformQuantization(16))]
    assert errors[0] < errors[1] / 2


def test_k_means_of_few_values_sends_them_as_they_are():
    x = torch.tensor([0.1, -0.3, 0.1, 0.1, 7.0])
    assert torch.equal(sent(KMeansQuantization(3), x), x)
    assert len(sent(KMeansQuantization(3), normal(5)).unique()) == 3


def test_k_means_of_a_large_tensor_is_as_good_from_a_sample():
    x = normal(100_003)
    made = sent(KMeansQuantization(4), x)
    # The best 4 levels of a normal distribution leave 0.1175 of its variance (Max 1960, table I).
    assert float((made - x).square().mean()) == pytest.approx(0.1175, rel=0.02)


# On average -----------------------------------------------------------------------------------------------------------------------

# What the steps are of x.
STEPS = {
    QSGD(4): lambda x: x.norm() / 4,
    QSGD(6, norm="linf"): lambda x: x.abs().max() / 6,
    Ternary(): lambda x: x.abs().max(),
}


@pytest.mark.parametrize(("defense", "step_of"), STEPS.items(), ids=list(map(repr, STEPS)))
def test_a_random_quantizer_is_unbiased(defense, step_of):
    x, draws, rng = normal(53), 10_000, generator(0, "draws")
    packets, total = pack({"x": x}), torch.zeros(53, dtype=torch.float64)
    for _ in range(draws):
        total += defense(packets, {}, rng)[0]["x"].values
    step = step_of(x.double())
    # What lies the fraction f of a step above a level is sent with variance f (1 - f) step^2. Of 53 means, the largest is beyond 4
    # standard errors once in 300 seeds; 1e-6 is the rounding of float32. Rounding to the nearest would be off by up to step / 2.
    fraction = (x.double() / step).abs().frac()
    error = 4 * step * (fraction * (1 - fraction) / draws).sqrt() + 1e-6
    assert bool(((total / draws - x).abs() <= error).all())


@pytest.mark.parametrize("defense", STEPS, ids=repr)
@pytest.mark.parametrize("n", [1, 53])
def test_a_random_quantizer_sends_a_neighbour_on_the_lattice(defense, n):
    x = normal(n)
    step = float(STEPS[defense](x.double()))
    packet = packet_of(defense, x)
    codes = packet.values.double() / step
    assert float((codes - codes.round()).abs().max()) < 1e-5
    assert float((packet.values - x).abs().max()) < step * 1.0001
    assert bool((packet.values.sign() * x.sign() >= 0).all())


@pytest.mark.parametrize("levels", [1, 3, 8, 100])
def test_qsgd_has_the_variance_it_promises(levels):
    # Lemma 3.1: the mean squared error is at most min(n / s^2, sqrt(n) / s) |x|^2. Its mean over 200 draws is known to 5 % here.
    x = normal(211)
    errors = [float((sent(QSGD(levels), x, seed) - x).double().square().sum()) for seed in range(200)]
    assert statistics.mean(errors) <= 1.05 * min(211 / levels**2, 211**0.5 / levels) * float(x.double().square().sum())


def test_qsgd_with_the_l2_norm_sends_few_entries():
    # Lemma 3.1 as well: s (s + sqrt(n)) entries on average are not 0, here of 10,007 at most 101.
    assert int((sent(QSGD(1), normal(10_007)) != 0).sum()) <= 1.3 * 101


def test_ternary_sends_three_values():
    x = normal(211)
    largest = float(x.abs().max())
    assert sent(Ternary(), x).unique().tolist() == pytest.approx([-largest, 0, largest])


def test_signs_with_error_feedback_follow_the_update():
    # The sum of what was sent stays within a bounded residual of the sum of updates (Karimireddy et al. 2019, lemma 3), so their
    # means differ by a bound / rounds.
    x = torch.cat([normal(97, 0.1), torch.tensor([3.0])])
    defense = ErrorFeedback(SignSGD())
    state, total = defense.init({"x": x}), torch.zeros(98)
    for round in range(1500):
        packets, state = defense(pack({"x": x}), state, generator(0, "defense", round))
        total += packets["x"].dense()
    assert float((total / 1500 - x).norm() / x.norm()) < 0.05
    assert float((sent(SignSGD(), x) - x).norm() / x.norm()) > 0.8


# What it takes --------------------------------------------------------------------------------------------------------------------

# Bits of a code and bytes of a header: `Multiples` 5, `Grid` 9, `Floats` 1, a codebook 2 and 4 a value.
COSTS = [
    (QSGD(6, norm="linf"), 4, 5),  # 13 values
    (QSGD(7), 4, 5),  # 15
    (QSGD(8), 5, 5),  # 17
    (Ternary(), 2, 5),
    (SignSGD(), 1, 9),
    (FixedPoint(7, 3), 7, 5),
    (Int8(), 8, 5),
    (Int8(scaled=False), 8, 5),
    (FloatFormat("fp16"), 16, 1),
    (FloatFormat("bf16"), 16, 1),
    (FloatFormat("fp8_e4m3"), 8, 1),
    (FloatFormat("fp8_e5m2"), 8, 1),
    (KMeansQuantization(5), 3, 2 + 4 * 5),
]


@pytest.mark.parametrize(("defense", "bits", "header"), COSTS, ids=lambda value: repr(value))
def test_an_entry_takes_the_bits_it_says(defense, bits, header):
    # 2 bytes and one dimension of 4 before it
    assert nbytes(packet_of(defense, normal(1009))) == 2 + 4 + header + math.ceil(1009 * bits / 8)


# On a gradient --------------------------------------------------------------------------------------------------------------------

# Relative errors of LeNet's gradient of one image as measured independently before there was this code (median of 12).
MEASURED = {
    FloatFormat("fp16"): 0.0002,
    FloatFormat("bf16"): 0.0015,
    Int8(): 0.0095,
    Pruning(0.1, "entries"): 0.0065,
    Pruning(0.2, "entries"): 0.018,
    Pruning(0.3, "entries"): 0.036,
    StochasticQuantization(240): 0.029,
    UniformQuantization(120): 0.048,
    StochasticQuantization(120): 0.068,
    UniformQuantization(40): 0.118,
    StochasticQuantization(40): 0.19,
    QSGD(6, norm="linf"): 0.24,
    UniformQuantization(20): 0.26,
}


@pytest.fixture(scope="module")
def gradients() -> list[Update]:
    data = load(name="synthetic", train_size=12, test_size=10, seed=0)
    made = []
    for i in range(12):
        model = lenet(data.image_shape, 100, convs=4, rng=generator(0, "network", i)).eval()
        made.append(local_update(model, *split(model), [data.train.batch(torch.tensor([i]))], lr=1.0).update)
    return made


@pytest.mark.parametrize(("defense", "measured"), MEASURED.items(), ids=lambda value: repr(value))
def test_the_error_on_a_gradient_is_as_large_as_others_measured(defense, measured, gradients):
    errors = [relative_error(unpack(defense(pack(g), {}, generator(0, "draw"))[0]), g) for g in gradients]
    # Other images and networks: a third more or less, and more where it matters how near to 0 a level happens to lie.
    assert statistics.median(errors) == pytest.approx(measured, rel=0.45 if isinstance(defense, UniformQuantization) else 0.35)
