"""The theorem of each sparsifier and of factors: what is kept, what it is on average, what the client remembers, what it costs."""

import pytest
import torch
from torch import Tensor

from defenses import (
    QSGD,
    DeepGradientCompression,
    ErrorFeedback,
    PowerSGD,
    Pruning,
    RandomK,
    StochasticQuantization,
    Threshold,
    TopK,
    UniformQuantization,
)
from fedsim.defense import Defense
from fedsim.seeding import generator
from fedsim.updates import Update
from fedsim.wire import Packets, nbytes, pack, unpack


def normal(*shape: int, name: str = "values") -> Tensor:
    return torch.randn(shape, generator=generator(0, name, *shape))


def apply(defense: Defense, update: Update, seed: int = 0) -> Packets:
    return defense(pack(update), defense.init(update), generator(seed, "defense", 1, 0))[0]


def rounds(defense: Defense, updates: list[Update]) -> tuple[list[Packets], dict[str, Tensor]]:
    """What is sent in each round, and the memory at the end."""
    sent, state = [], defense.init(updates[0])
    for round, update in enumerate(updates):
        packets, state = defense(pack(update), state, generator(0, "defense", round, 0))
        sent.append(packets)
    return sent, state


# Which entries --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.01, 0.3, 1.0])
def test_global_top_k_is_top_k_of_all_entries_in_a_row(ratio):
    update = {"large": 10 * normal(41), "small": 0.01 * normal(13, 7), "scalar": torch.tensor(0.5), "none": torch.zeros(0)}
    sent = unpack(apply(TopK(ratio, scope="global"), update))
    row = torch.cat([t.flatten() for t in update.values()])
    expected = apply(TopK(ratio), {"row": row})["row"].dense()
    assert torch.equal(torch.cat([t.flatten() for t in sent.values()]), expected)
    if ratio == 0.01:
        assert not sent["small"].any()
        assert int((sent["large"] != 0).sum()) == 2  # 1 % of 133 entries, rounded up


@pytest.mark.parametrize(("ratio", "k"), [(0.3, 31), (0.001, 1), (1.0, 101)])
def test_random_k_sends_k_entries_at_places_that_chance_picks_evenly(ratio, k):
    x, draws = normal(101), 400
    times = torch.zeros(101)
    for seed in range(draws):
        packet = apply(RandomK(ratio), {"x": x}, seed)["x"]
        assert len(packet.values) == k
        times += packet.dense() != 0
    # Each place is taken in a share k / n of the draws; the furthest of 101 is within 4.5 standard deviations but once in 1,500.
    share = k / 101
    assert bool(((times - draws * share).abs() <= 4.5 * (draws * share * (1 - share)) ** 0.5 + 1e-9).all())


def test_scaled_random_k_is_unbiased_and_unscaled_shrinks():
    x, draws = normal(53), 10_000
    for scaled in (True, False):
        defense, rng, packets = RandomK(0.2, scaled=scaled), generator(0, "draws"), pack({"x": x})
        total = torch.zeros(53, dtype=torch.float64)
        for _ in range(draws):
            total += defense(packets, {}, rng)[0]["x"].dense()
        # k = 11 of 53. An entry n / k x, sent with probability k / n, has variance x^2 (n / k - 1); 4 standard errors, as above.
        scale = 53 / 11 if scaled else 1.0
        error = 4 * x.abs() * scale * (11 / 53 * (1 - 11 / 53) / draws) ** 0.5 + 1e-6
        assert bool(((total / draws - x * scale * 11 / 53).abs() <= error).all())


def test_random_k_takes_its_share_of_all_places_whatever_was_sent_of_them():
    x = normal(1009)
    few, _ = RandomK(0.5)(apply(TopK(0.2), {"x": x}), {}, generator(0, "draw"))
    # Of 202 entries, a half with a standard deviation of 7, and scaled by 1009 / 505.
    assert 70 < len(few["x"].values) < 132
    arrived = few["x"].dense()
    assert torch.allclose(arrived[arrived != 0], x[arrived != 0] * 1009 / 505)


def test_a_threshold_sends_what_reaches_it():
    sent = apply(Threshold(0.5), {"x": torch.tensor([0.5, -0.5, 0.49, -7.0, 0.0]), "y": torch.tensor([0.1])})
    assert sent["x"].dense().tolist() == [0.5, -0.5, 0, -7, 0]
    # flags, dimensions, one of 4 bytes, k = 0; and no bytes of places or values
    assert nbytes(sent["y"]) == 2 + 4 + 4
    assert torch.equal(apply(Threshold(0.0), {"x": torch.zeros(3)})["x"].values, torch.zeros(3))


LAYERS = {name: torch.tensor(t) for name, t in {"a": [3.0, 4.0], "b": [1.0], "c": [2.0, -2.0, 1.0], "d": [0.1, 0.2]}.items()}
# norms 5, 1, 3 and 0.22; int(0.3 * 4) + 1 = 2 tensors, int(0.7 * 4) + 1 = 3, and one is always sent
PRUNED = [
    (Pruning(0.3, "tensors"), {"b", "d"}),
    (Pruning(0.7, "tensors"), {"b", "c", "d"}),
    (Pruning(1.0, "tensors"), {"b", "c", "d"}),
    (Pruning(0.0, "tensors"), {"d"}),
    (Pruning(0.3, "literal"), {"a", "b"}),
]


@pytest.mark.parametrize(("defense", "dropped"), PRUNED, ids=[repr(defense) for defense, _ in PRUNED])
def test_pruning_drops_the_tensors_it_says(defense, dropped):
    for name, t in unpack(apply(defense, LAYERS)).items():
        assert torch.equal(t, torch.zeros_like(t) if name in dropped else LAYERS[name])


@pytest.mark.parametrize("share", [0.0, 0.07, 0.5, 0.999])
def test_pruning_entries_drops_int_of_its_share_of_each_tensor(share):
    x = normal(100)
    sent = apply(Pruning(share, "entries"), {"x": x})["x"].dense()
    assert int((sent == 0).sum()) == int(share * 100 + 1e-6)
    assert float(x[sent == 0].abs().max() if share else 0.0) <= float(sent[sent != 0].abs().min())


def test_pruning_half_of_the_worked_example_leaves_the_three_largest():
    # int(0.5 * 5) = 2 entries go, the two smallest
    x = torch.tensor([0.3199, 0.7562, 0.1792, 0.9981, 0.7452])
    expected = torch.tensor([0, 0.7562, 0, 0.9981, 0.7452])
    assert torch.equal(apply(Pruning(0.5, "entries"), {"x": x})["x"].dense(), expected)


# Deep Gradient Compression --------------------------------------------------------------------------------------------------------

UPDATES = [{"x": normal(41, 3, name=f"x{i}"), "s": torch.tensor(0.1 * i)} for i in range(7)]


def test_deep_gradient_compression_without_momentum_is_top_k_with_error_feedback():
    deep, state = rounds(DeepGradientCompression(0.1, momentum=0.0, warmup=0), UPDATES)
    plain, residual = rounds(ErrorFeedback(TopK(0.1)), UPDATES)
    for one, other in zip(deep, plain, strict=True):
        assert all(torch.equal(one[name].dense(), other[name].dense()) for name in one)
        assert all(nbytes(one[name]) == nbytes(other[name]) for name in one)
    assert all(torch.equal(state[f"accumulated/{name}"], residual[f"residual/{name}"]) for name in UPDATES[0])


def test_deep_gradient_compression_follows_its_algorithm():
    # By hand: momentum 1/2, one of two entries sent. u and v after each round, before what is sent is set to 0 in both.
    defense = DeepGradientCompression(0.5, momentum=0.5, warmup=0)
    sent, state = rounds(defense, [{"x": torch.tensor(x)} for x in ([4.0, 3.0], [1.0, 1.0], [1.0, 1.0])])
    # round 1: u = v = (4, 3), sends 4. Round 2: u = (1, 1.5 + 1), v = (1, 3 + 2.5), sends 5.5. Round 3: u = (1.5, 1), v = (2.5, 1)
    assert [packets["x"].dense().tolist() for packets in sent] == [[4, 0], [0, 5.5], [2.5, 0]]
    assert state["momentum/x"].tolist() == [0, 1]
    assert state["accumulated/x"].tolist() == [0, 1]
    assert int(state["rounds"]) == 3


def test_deep_gradient_compression_loses_nothing_of_a_momentum_that_is_never_sent():
    # An entry too small to be sent accumulates what momentum SGD would have moved by: the sum of u_t = g (1 - m^t) / (1 - m).
    update = {"x": torch.cat([torch.tensor([0.001]), 1 + normal(99).abs()])}
    _, state = rounds(DeepGradientCompression(0.5, momentum=0.9, warmup=0), [update] * 20)
    expected = sum(0.001 * (1 - 0.9**t) / (1 - 0.9) for t in range(1, 21))
    assert float(state["accumulated/x"][0]) == pytest.approx(expected, rel=1e-5)


def test_deep_gradient_compression_clips_before_it_adds():
    update = {"x": torch.tensor([30.0, 0.0]), "y": torch.tensor([40.0])}  # norm 50
    sent = rounds(DeepGradientCompression(1.0, momentum=0.0, clip=5.0), [update])[0][0]
    assert torch.cat([p.dense() for p in sent.values()]).tolist() == pytest.approx([3, 0, 4])
    sent = rounds(DeepGradientCompression(1.0, momentum=0.0, clip=50.1), [update])[0][0]
    assert torch.cat([p.dense() for p in sent.values()]).tolist() == [30, 0, 40]


def test_deep_gradient_compression_warms_up_as_published():
    # Lin et al. 2018, section 3.3: sparsity 75 %, 93.75 %, 98.4375 %, 99.6 %, 99.9 %
    defense = DeepGradientCompression(0.001, warmup=4)
    shares = [1 - defense.ratio_of(rounds) for rounds in range(7)]
    assert shares == pytest.approx([0.75, 0.9375, 0.984375, 0.996, 0.999, 0.999, 0.999], abs=2e-3)
    sent, _ = rounds(defense, [{"x": normal(10_000, name=f"warm{i}")} for i in range(6)])
    assert [len(packets["x"].values) for packets in sent] == [2512, 631, 159, 40, 10, 10]  # 10,000 * 10**(-0.6 i), rounded up


# Factors --------------------------------------------------------------------------------------------------------------------------


def test_power_sgd_sends_a_matrix_of_its_rank_as_it_is():
    update = {"kernel": (normal(11, 2) @ normal(2, 24)).reshape(11, 3, 4, 2), "bias": normal(11)}
    sent = apply(PowerSGD(2), update)
    assert torch.allclose(sent["kernel"].dense(), update["kernel"], rtol=0, atol=1e-5)
    assert torch.equal(sent["bias"].dense(), update["bias"])
    # flags, dimensions, 4 of them, the rank, 2 (11 + 24) floats
    assert nbytes(sent["kernel"]) == 2 + 4 * 4 + 4 + 4 * 2 * (11 + 24)


def test_power_sgd_sends_the_projection_on_its_first_factor():
    x = normal(23, 31)
    packet = apply(PowerSGD(3), {"x": x})["x"]
    left = packet.values[: 23 * 3].reshape(23, 3)
    assert torch.allclose(left.T @ left, torch.eye(3), rtol=0, atol=1e-5)
    assert torch.allclose(packet.dense(), left @ left.T @ x, rtol=0, atol=1e-5)


def test_power_sgd_warms_up_to_the_best_approximation():
    # The power method: an iteration a round from the last round's Q converges to the singular vectors; Eckart and Young give the
    # error of the best. The third singular value is 0.6 of the second, so 40 rounds leave 0.6**40 = 1e-9 of the others.
    left, _ = torch.linalg.qr(normal(23, 5))
    right, _ = torch.linalg.qr(normal(31, 5))
    x = left @ torch.diag(torch.tensor([5.0, 3.0, 1.8, 0.5, 0.2])) @ right.T
    sent, _ = rounds(PowerSGD(2), [{"x": x}] * 40)
    best = (1.8**2 + 0.5**2 + 0.2**2) ** 0.5
    errors = [float((packets["x"].dense() - x).norm()) for packets in sent]
    assert errors[-1] == pytest.approx(best, rel=1e-4)
    assert errors[0] > best * 1.01


def test_power_sgd_leaves_alone_what_factors_would_make_longer():
    update = {"square": normal(4, 4), "thin": normal(1, 97), "scalar": torch.tensor(1.0), "none": torch.zeros(0, 3)}
    for name, packet in apply(PowerSGD(2), update).items():  # of 4 x 4, 2 (4 + 4) floats are no fewer
        assert packet.rank is None
        assert torch.equal(packet.dense(), update[name])
    assert apply(PowerSGD(1), update)["square"].rank == 1


def test_power_sgd_goes_on_after_an_update_of_zeros():
    x = normal(7, 1) @ normal(1, 5)
    sent, _ = rounds(PowerSGD(1), [{"x": x}, {"x": torch.zeros(7, 5)}, {"x": x}])
    assert not sent[1]["x"].dense().any()
    assert torch.allclose(sent[2]["x"].dense(), x, rtol=0, atol=1e-5)


LOSSY = [RandomK(0.2, scaled=False), Threshold(1.0), Pruning(0.3, "entries"), Pruning(0.3, "tensors"), PowerSGD(1), QSGD(16)]


@pytest.mark.parametrize("inner", LOSSY, ids=repr)
def test_error_feedback_recovers_what_is_dropped(inner):
    sent, state = rounds(ErrorFeedback(inner), UPDATES)
    for name in UPDATES[0]:
        arrived = sum(packets[name].dense() for packets in sent) + state[f"residual/{name}"]
        assert torch.allclose(arrived, sum(update[name] for update in UPDATES), rtol=0, atol=1e-4)
    alone, _ = rounds(inner, UPDATES)
    lost = [sum(packets[name].dense() for packets in alone) - sum(update[name] for update in UPDATES) for name in UPDATES[0]]
    assert max(float(t.norm()) for t in lost) > 0.1


@pytest.mark.parametrize("quantizer", [UniformQuantization(16), StochasticQuantization(16)])
def test_factors_travel_quantized_too(quantizer):
    x = normal(31, 37)
    packet, _ = quantizer(apply(PowerSGD(2), {"x": x}), {}, generator(0, "draw"))
    # flags, dimensions, 2 of them, the rank, a grid, and half a byte for each of the factors' 2 (31 + 37) entries
    assert nbytes(packet["x"]) == 2 + 8 + 4 + 9 + 68
    assert torch.linalg.matrix_rank(packet["x"].dense()) == 2
