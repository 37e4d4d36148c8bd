"""Defenses that act in local training: what all keep, as one table, and then what each does to a batch or a gradient."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from worlds import FEDAVG, FEDSGD, config, federate

from defenses import ATS, DPSGD, Chain, ErrorFeedback, InstaHide, MixUp, NoDefense, OutPost, Soteria, TopK
from defenses.gradients import last_linear, sensitivity
from defenses.transforms import LIBRARY, operation
from experiments import scoring
from fedsim.defense import beliefs_of, hooks_of
from fedsim.models import bert_tiny, lenet, mcmahan_cnn, mlp
from fedsim.seeding import generator
from fedsim.setup import setup_of
from fedsim.training import Batch, batch_gradients, local_update, probabilities, split
from fedsim.updates import Update
from fedsim.wire import pack

SHAPE, CLASSES = (3, 11, 13), 7

# Every defense that acts in training, and compositions of those that do with those that do not.
BATCH = [MixUp(), MixUp(0.2), InstaHide(), InstaHide(k=1), ATS(), ATS("random"), Chain((ATS(), MixUp()))]
GRADIENT = [DPSGD(0.5, noise_multiplier=0.3), Soteria(0.4), OutPost()]
BOTH = [ErrorFeedback(Chain((MixUp(), TopK(0.1), Soteria(0.4))))]
every_batch = pytest.mark.parametrize("defense", [*BATCH, *BOTH], ids=repr)
every_gradient = pytest.mark.parametrize("defense", [*GRADIENT, *BOTH], ids=repr)
every = pytest.mark.parametrize("defense", [*BATCH, *GRADIENT, *BOTH], ids=repr)


def examples(size: int = 5, name: str = "examples") -> Batch:
    rng = generator(0, name)
    return torch.randint(256, (size, *SHAPE), generator=rng) / 255, torch.randint(CLASSES, (size,), generator=rng)


def trained(defense: object, model: nn.Module, batches: list[Batch], client: int = 0) -> Update:
    hooks = hooks_of(defense, CLASSES, 0, 1, client)
    return local_update(model, *split(model), batches, lr=0.1, hooks=hooks).update


def small() -> nn.Module:
    return mlp(SHAPE, CLASSES, hidden=(11,))


@every
def test_the_same_client_computes_the_same_and_another_draws_its_own(defense):
    model, batches = small(), [examples(5, "one"), examples(3, "other")]
    first, again, other = trained(defense, model, batches), trained(defense, model, batches), trained(defense, model, batches, 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first) == (defense != Soteria(0.4)), "Soteria draws nothing"
    assert all(t.isfinite().all() for t in first.values())


@every
def test_nothing_is_written_to_and_global_random_numbers_are_left_alone(defense):
    model, (images, labels) = small(), examples()
    params, buffers = split(model)
    kept = [t.clone() for t in (images, labels, *params.values())]
    state = torch.get_rng_state()
    local_update(model, params, buffers, [(images, labels)], lr=0.1, hooks=hooks_of(defense, CLASSES, 0, 1, 0))
    assert all(torch.equal(now, before) for now, before in zip((images, labels, *params.values()), kept, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@every_batch
def test_a_batch_keeps_its_size_its_range_and_the_weight_of_its_labels(defense):
    for size in (1, 2, 5):
        images, labels = examples(size)
        made, weights = defense.batch(images, labels, CLASSES, generator(0, "batch"))
        assert made.shape == images.shape
        assert made.dtype == torch.float32
        # Weights in float32 add up to 1 within a few roundings.
        assert made.min() >= -1e-6
        assert made.max() <= 1 + 1e-6
        weights = probabilities(weights, CLASSES)
        assert weights.shape == (size, CLASSES)
        assert torch.allclose(weights.sum(1), torch.ones(size), rtol=0, atol=1e-6)


@every_gradient
def test_a_gradient_keeps_names_shapes_and_the_reported_loss(defense):
    model, (images, labels) = small(), examples()
    loss, found = defense.gradients(model, *split(model), images, labels, 0, generator(0, "gradients"))
    plain_loss, plain = batch_gradients(model, *split(model), images, labels)
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in plain.items()}
    assert float(loss) == pytest.approx(float(plain_loss), rel=1e-5)
    assert not any(t.requires_grad for t in found.values())


@pytest.mark.parametrize("defense", [NoDefense(), TopK(0.1), Chain((TopK(0.1), NoDefense())), ErrorFeedback(TopK(0.1))], ids=repr)
def test_a_defense_of_updates_changes_no_bit_of_training(defense):
    model, batches = lenet(SHAPE, CLASSES), [examples(5, "one"), examples(3, "other")]
    plain = local_update(model, *split(model), batches, lr=0.1).update
    assert all(torch.equal(t, plain[name]) for name, t in trained(defense, model, batches).items())


@pytest.mark.parametrize("defense", [MixUp(), InstaHide(), ATS(), Soteria(0.4)], ids=repr)
def test_text_is_told_from_images(defense):
    model = bert_tiny((16,), 400) if isinstance(defense, Soteria) else small()
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\(B, C, H, W\), got torch.int64 \(2, 16\)"):
        trained(defense, model, [(tokens, tokens)])


def test_a_chain_applies_its_batches_in_order_and_its_gradient_last():
    model, batch = small(), examples()
    chain = Chain((ATS("3-1-7"), MixUp(), Soteria(0.5)))
    rng, other = generator(0, "defense", 1, 0, "batch"), generator(0, "defense", 1, 0, "gradients")
    mixed = MixUp().batch(*ATS("3-1-7").batch(*batch, CLASSES, rng), CLASSES, rng)
    expected = Soteria(0.5).gradients(model, *split(model), *mixed, 0, other)[1]
    found = trained(chain, model, [batch])
    assert all(torch.allclose(found[name], 0.1 * t, rtol=1e-6, atol=0) for name, t in expected.items())


# In a federation ------------------------------------------------------------------------------------------------------------------

RUNS = {
    "FedSGD": (FEDSGD | {"batch_size": 3}, {"_target_": "defenses.Soteria", "share": 0.4}),
    "FedAvg": (FEDAVG, {"_target_": "defenses.InstaHide", "k": 2, "largest": 0.7}),
}


@pytest.mark.parametrize(("protocol", "defense"), RUNS.values(), ids=RUNS)
def test_what_is_sent_is_held_against_the_update_of_the_raw_images(protocol, defense):
    made = config(federation=protocol, defense=defense)
    setup = setup_of(made)
    one, other = federate(made), federate(config(federation=protocol))
    for sent, true in zip(one.seen[:3], other.seen[:3], strict=True):  # the first round is of the same weights
        whole, _ = scoring.true_update_error(setup, sent)
        plain, _ = scoring.true_update_error(setup, true)
        assert plain == 0
        far = sum((sent.update[n] - t).double().square().sum() for n, t in true.update.items())
        size = sum(t.double().square().sum() for t in true.update.values())
        assert whole == pytest.approx(math.sqrt(far / size), rel=1e-4)
        assert whole > 0.001
    images, labels = setup.truth(1, one.seen[0].client)
    index = torch.cat(setup.protocol.batches(setup.shards[one.seen[0].client], 0, 1, one.seen[0].client)).unique()
    assert sorted(images.flatten(1).sum(1).tolist()) == sorted(setup.batch(index)[0].flatten(1).sum(1).tolist())
    assert not labels.is_floating_point()


# MixUp ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_s_share_is_beta_distributed(alpha):
    # A batch of a white and a black image: if they are exchanged, the first one's pixels are the share.
    images = torch.stack([torch.ones(1, 1, 1), torch.zeros(1, 1, 1)])
    rng, shares = generator(0, "batch"), []
    for _ in range(3000):
        made, labels = MixUp(alpha).batch(images, torch.tensor([0, 1]), 2, rng)
        assert float(made[0]) == float(labels[0, 0]), "labels are mixed as images are"
        if float(made[0]) != 1.0 or float(made[1]) != 0.0:
            shares.append(float(made[0]))
    # A permutation of two exchanges them half of the time: 1,500 +- 27, 4 of that. (Rounding can hide a share next to 1.)
    assert 1390 < len(shares) < 1610
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert stats.kstest(shares, stats.beta(2 * alpha, 2 * alpha).cdf).pvalue < 1e-6
    # The mean of Beta(a, a) is 1/2 and its variance 1 / (4 (2 a + 1)).
    assert sum(shares) / len(shares) == pytest.approx(0.5, abs=4 * math.sqrt(1 / (4 * (2 * alpha + 1)) / len(shares)))


def test_mixup_keeps_the_mean_of_a_batch():
    images, labels = examples()
    made, weights = MixUp().batch(images, labels, CLASSES, generator(0, "batch"))
    assert torch.allclose(made.mean(0), images.mean(0), rtol=0, atol=1e-6)  # each image is in it with share and with 1 - share
    assert torch.allclose(weights.mean(0), probabilities(labels, CLASSES).mean(0), rtol=0, atol=1e-6)


# InstaHide ------------------------------------------------------------------------------------------------------------------------


def test_instahide_keeps_magnitudes_and_turns_half_of_the_signs():
    images, labels = examples(1)
    made, weights = InstaHide(k=1).batch(images, labels, CLASSES, generator(0, "batch"))
    before, after = 2 * images - 1, 2 * made - 1  # the paper's pixels
    assert torch.allclose(before.abs(), after.abs(), rtol=0, atol=1e-6)
    assert torch.equal(weights, probabilities(labels, CLASSES))
    large = before.abs() > 0.01
    turned = (before.sign() != after.sign())[large].double()
    # Of about 425 coins the share of tails is known to 0.024; 4 of that.
    assert float(turned.mean()) == pytest.approx(0.5, abs=0.1)


def test_instahide_mixes_k_images_by_weights_that_add_up_and_stay_small():
    # Image i is white in row i and black elsewhere; reflected, a weight w reads 1 - w. So |2 p - 1| in row j is |2 w_ij - 1|.
    n, defense = 6, InstaHide(k=3, largest=0.6)
    images = torch.eye(n).reshape(n, 1, n, 1).expand(n, 1, n, 400)
    labels = torch.arange(n)
    made, weights = defense.batch(images, labels, n, generator(0, "batch"))
    assert torch.allclose((2 * made - 1).abs()[:, 0, :, 0], (2 * weights - 1).abs(), rtol=0, atol=1e-5)
    assert torch.allclose(weights.sum(1), torch.ones(n), rtol=0, atol=1e-6)
    assert bool((weights.diag() > 0).all()), "an image is in its own mixture"
    draws = torch.stack([defense._weights(3, generator(i, "weights")) for i in range(2000)])
    assert draws.max() <= 0.6
    # All three are alike, and their mean is 1/3; the standard deviation of one is below 0.2 on this part of the simplex.
    assert torch.allclose(draws.mean(0), torch.full((3,), 1 / 3), rtol=0, atol=4 * 0.2 / math.sqrt(2000))


@pytest.mark.parametrize(("k", "size"), [(2, 2), (2, 5), (3, 3), (3, 7), (4, 4), (4, 8)])
def test_instahide_mixes_no_image_with_itself(k, size):
    defense = InstaHide(k=k, largest=0.9)
    mixtures = torch.stack([defense.mixture(size, generator(i, "mixture")) for i in range(300)])
    for images in (mixtures.gt(0).sum(1), mixtures.gt(0).sum(2)):  # in k mixtures each, k in each mixture
        assert bool((images == k).all())
    assert float(mixtures.max()) <= 0.9
    assert torch.allclose(mixtures.sum(2), torch.ones(300, size), rtol=0, atol=1e-6)
    pairs = mixtures.gt(0).double().mean(0)[~torch.eye(size, dtype=torch.bool)]
    share = (k - 1) / (size - 1)  # of an image's mixtures that another is in
    assert torch.allclose(pairs, torch.full_like(pairs, share), rtol=0, atol=4.5 * math.sqrt(share * (1 - share) / 300))


def test_instahide_mixes_all_images_of_a_batch_of_fewer_than_k():
    defense = InstaHide(k=4, largest=0.3)
    assert torch.equal(defense.mixture(1, generator(0, "mixture")), torch.ones(1, 1))
    for size in (2, 3):
        assert bool((defense.mixture(size, generator(0, "mixture")) > 0).all())


# ATS ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({name for name, _ in LIBRARY}))
def test_every_operation_of_the_library_keeps_bytes_and_does_nothing_at_strength_0_or_something_at_1(name):
    rng = generator(0, "image")
    image = torch.randint(30, 200, (3, 16, 16), generator=rng).byte()
    changed = operation(name)(image, 1.0, 1)
    assert changed.dtype == torch.uint8
    assert changed.shape == image.shape
    assert not torch.equal(changed, image)
    if name not in ("invert", "equalize", "autocontrast"):  # these have no strength
        assert torch.equal(operation(name)(image, 0.0, 1), image)


def test_the_operations_are_the_ones_they_are_called():
    image = torch.arange(3 * 8 * 8).reshape(3, 8, 8).byte()
    assert torch.equal(operation("invert")(image, 0.0, 1), 255 - image)
    assert torch.equal(operation("posterize")(image, 1.0, 1), image // 16 * 16)  # 4 bits are left
    # 150 / 331 of 8 pixels are 3.6, so 4: to the right, and black comes in.
    right = operation("translate_x")(image, 1.0, 1)
    assert torch.equal(right[:, :, 4:], image[:, :, :4])
    assert not right[:, :, :4].any()
    down = operation("translate_y")(image, 1.0, -1)
    assert torch.equal(down[:, :4], image[:, 4:])
    assert torch.equal(operation("solarize")(image, 0.5, 1), torch.where(image >= 128, 255 - image, image))


def test_a_policy_is_its_transforms_one_after_the_other():
    images, labels = examples(2)
    pixels = (images * 255).round().byte()
    made, same = ATS("29-31").batch(images, labels, CLASSES, generator(0, "batch"))  # invert, then autocontrast: neither has a sign
    expected = torch.stack([operation("autocontrast")(255 - one, 0.0, 1) for one in pixels])
    assert torch.equal((made * 255).round().byte(), expected)
    assert same is labels


def test_a_hybrid_draws_one_of_its_policies_for_each_image():
    images, labels = examples(40)
    made, _ = ATS("29-29+29").batch(images, labels, CLASSES, generator(0, "batch"))  # inverted twice, or once
    twice = (made - images).flatten(1).abs().max(1).values < 1e-6
    once = (made - (1 - images)).flatten(1).abs().max(1).values < 1e-6
    assert bool((twice ^ once).all())
    assert 8 <= int(twice.sum()) <= 32  # 20 +- 3.2, 4 of that


def test_a_random_policy_is_another_one_for_each_image():
    image = examples(1)[0].expand(12, *SHAPE)
    made, _ = ATS("random").batch(image, torch.zeros(12, dtype=torch.int64), CLASSES, generator(0, "batch"))
    assert len(torch.unique(made.flatten(1), dim=0)) > 6


def test_grey_images_are_transformed_as_well():
    images = torch.rand(50, 1, 16, 16, generator=generator(0, "grey"))
    made, _ = ATS("random").batch(images, torch.zeros(50, dtype=torch.int64), CLASSES, generator(0, "batch"))
    assert made.shape == images.shape


# Soteria --------------------------------------------------------------------------------------------------------------------------


def soteria_by_loops(model: nn.Module, features: nn.Module, images: Tensor) -> Tensor:
    """The sum over the batch of ||dr/dX|| / |r| for each feature, one derivative at a time."""
    images = images.clone().requires_grad_()
    made = features(model.normalize(images))
    ratios = []
    for i in range(made.shape[1]):
        (slope,) = torch.autograd.grad(made[:, i].sum(), images, retain_graph=True)
        ratios.append((slope.flatten(1).norm(dim=1) / made[:, i].abs()).sum())
    return torch.stack(ratios).detach()


@pytest.mark.parametrize("build", [lambda: lenet(SHAPE, CLASSES), lambda: mlp(SHAPE, CLASSES, hidden=(31,), activation="tanh")])
def test_sensitivity_is_the_ratio_of_the_paper(build):
    model, (images, _) = build(), examples(2)
    found = sensitivity(model, *split(model), images)
    assert torch.allclose(found, soteria_by_loops(model, model.features, images), rtol=1e-4, atol=0)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_soteria_zeroes_the_columns_of_the_most_telling_features_and_nothing_else(share):
    model, (images, labels) = mlp(SHAPE, CLASSES, hidden=(31,), activation="tanh"), examples()
    _, found = Soteria(share).gradients(model, *split(model), images, labels, 0, generator(0, "unused"))
    _, plain = batch_gradients(model, *split(model), images, labels)
    pruned = (found["head.weight"] == 0).all(0)
    assert int(pruned.sum()) == round(share * 31)
    assert torch.equal(found["head.weight"][:, ~pruned], plain["head.weight"][:, ~pruned])
    assert bool((plain["head.weight"][:, pruned] != 0).any(0).all()), "they were not zero before"
    ratios = sensitivity(model, *split(model), images)
    if 0 < share < 1:
        assert ratios[pruned].max() <= ratios[~pruned].min()
    for name, t in plain.items():
        assert name == "head.weight" or torch.equal(found[name], t)


def test_soteria_prunes_each_local_step_by_what_tells_most_at_the_weights_it_has_come_to():
    model, batches = mlp(SHAPE, CLASSES, hidden=(31,), activation="tanh"), [examples(name="first"), examples(name="second")]
    start, buffers = split(model)
    params, pruned = dict(start), []
    for images, labels in batches:
        _, gradient = batch_gradients(model, params, buffers, images, labels)
        pruned.append(sensitivity(model, params, buffers, images).argsort(stable=True)[:12])
        gradient["head.weight"][:, pruned[-1]] = 0
        params = {name: t - 0.1 * gradient[name] for name, t in params.items()}
    found = trained(Soteria(0.4), model, batches)
    for name, t in start.items():
        assert torch.allclose(found[name], t - params[name], rtol=0, atol=1e-7), name
    both = set(pruned[0].tolist()) & set(pruned[1].tolist())
    assert set((found["head.weight"] == 0).all(0).nonzero().flatten().tolist()) == both
    assert 0 < len(both) < 12


def test_features_that_are_off_are_not_pruned_in_place_of_those_that_tell():
    model, (images, labels) = mlp(SHAPE, CLASSES, hidden=(31,)), examples(1)  # ReLU: about half are off
    params, buffers = split(model)
    off = sensitivity(model, params, buffers, images).isinf()
    assert 3 < int(off.sum()) < 28
    _, plain = batch_gradients(model, params, buffers, images, labels)
    _, found = Soteria(0.1).gradients(model, params, buffers, images, labels, 0, generator(0, "unused"))
    lost = (found["head.weight"] == 0).all(0) & (plain["head.weight"] != 0).any(0)
    assert int(lost.sum()) == 3  # 0.1 * 31


def test_soteria_leaves_batch_statistics_and_hooks_as_they_are():
    model, (images, labels) = mcmahan_cnn(SHAPE, CLASSES, norm="batch").train(), examples(2)
    params, buffers = split(model)
    plain = local_update(model, params, buffers, [(images, labels)], lr=1.0).buffers
    defended = local_update(
        model, params, buffers, [(images, labels)], lr=1.0, hooks=hooks_of(Soteria(0.4), CLASSES, 0, 1, 0)
    ).buffers
    assert all(torch.equal(defended[name], t) for name, t in plain.items())
    assert not model.get_submodule(last_linear(model))._forward_pre_hooks


def test_soteria_needs_a_linear_layer():
    model = nn.Sequential(nn.Conv2d(3, CLASSES, (11, 13)), nn.Flatten())
    with pytest.raises(ValueError, match="prunes the gradient of a linear layer, and Sequential has none"):
        trained(Soteria(0.4), model, [examples()])


# OutPost --------------------------------------------------------------------------------------------------------------------------


def outpost(defense: OutPost, step: int = 0, draw: int = 0) -> tuple[nn.Module, Update, Update]:
    model, batch = mlp(SHAPE, CLASSES, hidden=(31,), activation="tanh"), examples()
    _, found = defense.gradients(model, *split(model), *batch, step, generator(draw, "gradients"))
    return model, found, batch_gradients(model, *split(model), *batch)[1]


def test_outpost_without_noise_prunes_the_smallest_of_each_layer():
    _, found, plain = outpost(OutPost(noise=0.0, prune=0.3))
    for name, t in plain.items():
        zero = found[name] == 0
        assert int(zero.sum()) == round(0.3 * t.numel()), name
        assert torch.equal(found[name][~zero], t[~zero])
        if int(zero.sum()) > 0:
            assert t[zero].abs().max() <= t[~zero].abs().min()


def test_outpost_adds_noise_by_each_layer_s_spread_to_the_entries_with_most_information():
    model, found, plain = outpost(OutPost(noise=0.8, prune=0.0, protect=0.4))
    noise = {name: found[name] - t for name, t in plain.items()}
    touched = torch.cat([(t != 0).flatten() for t in noise.values()])
    every = torch.cat([t.abs().flatten() for t in plain.values()])
    assert int(touched.sum()) == pytest.approx(0.4 * len(every), rel=1e-3)  # noise below rounding would hide in a large entry
    assert every[touched].min() >= every[~touched].max() * (1 - 1e-6)
    first = noise["features.1.weight"]
    std = 0.8 * float(split(model)[0]["features.1.weight"].var())
    draws = first[first != 0].double().numpy()
    # More than 4,000 draws: the critical distance is 2 % to 3 %, a width of 3/2 is 6 % away.
    assert len(draws) > 4000
    assert stats.kstest(draws, stats.norm(scale=std).cdf).pvalue > 1e-3
    assert stats.kstest(draws, stats.norm(scale=1.5 * std).cdf).pvalue < 1e-9


def test_outpost_protects_as_many_entries_where_most_are_zero():
    defense, rng = OutPost(protect=0.4), generator(0, "sparse")
    found = {"one": torch.randn(50, 20, generator=rng), "other": torch.randn(1000, generator=rng)}
    sparse = {name: t * (torch.rand(t.shape, generator=rng) < 0.3) for name, t in found.items()}  # as ReLU leaves them
    largest = defense._largest(sparse)
    assert sum(int(mask.sum()) for mask in largest.values()) == 800
    assert all(bool(largest[name][t != 0].all()) for name, t in sparse.items())
    assert {name: mask.shape for name, mask in largest.items()} == {name: t.shape for name, t in found.items()}


def test_a_layer_s_risk_is_one_at_most():
    defense = OutPost(noise=1.0, prune=0.0, protect=1.0)
    gradient, wide = torch.ones(10_007), 5 * torch.randn(10_007, generator=generator(0, "weights"))
    noise = defense._perturbed(gradient, wide, torch.ones_like(gradient, dtype=torch.bool), generator(0, "noise")) - gradient
    assert float(noise.std()) == pytest.approx(1.0, rel=0.03)  # 10,007 draws: known to 0.7 %, 4 of that; the weights' is 25


def test_outpost_defends_the_first_step_always_and_later_ones_less_and_less():
    _, _, plain = outpost(OutPost())

    def defended(step: int) -> int:
        return sum(
            not torch.equal(outpost(OutPost(decay=0.5), step, draw)[1]["head.bias"], plain["head.bias"]) for draw in range(100)
        )

    assert defended(0) == 100
    # 1 / (1 + 0.5 * 2) = 1/2 and 1 / (1 + 0.5 * 18) = 1/10 of 100: 50 +- 5 and 10 +- 3, 4 of that.
    assert 30 <= defended(2) <= 70
    assert 0 < defended(18) <= 22


# What they leave possible ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("defense", [Soteria(0.5), OutPost(), DPSGD(0.5, noise_multiplier=0.3)], ids=repr)
def test_the_true_gradient_lies_within_what_is_said_to_be_possible(defense):
    model, batch = lenet(SHAPE, CLASSES), examples(1)
    hooks = hooks_of(defense, CLASSES, 0, 1, 0)
    true = local_update(model, *split(model), [batch], lr=1).update
    sent = local_update(model, *split(model), [batch], lr=1, hooks=hooks).update
    told = beliefs_of(pack(sent), defense)
    for name, belief in told.items():
        assert bool(((belief.low <= true[name]) & (true[name] <= belief.high)).all()), name
    if isinstance(defense, Soteria):
        assert int((told["head.weight"].weight == 0).all(0).sum()) == round(0.5 * true["head.weight"].shape[1])
        assert torch.equal(told["head.bias"].low, told["head.bias"].high)
