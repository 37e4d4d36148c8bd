"""Generators: how they are made of public images, what searching them finds, and that the GAN knows a class and no image."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attacks
from attacks import Adam, Autoencoder, ClassGAN, CosineGap, GenerativePrior, GradientMatching, PrincipalComponents, metrics
from attacks.generative import fitted
from attacks.optimizers import LBFGS
from defenses import GaussianNoise
from experiments import cli
from experiments.config import compose
from experiments.scoring import knowledge
from fedsim.data import Images, cache
from fedsim.observation import Attack, Knowledge, Observation
from fedsim.run import RunFolder
from fedsim.seeding import generator
from fedsim.setup import setup_of
from fedsim.training import local_update
from fedsim.wire import pack

torch.set_num_threads(1)

SHAPE, CLASSES, PIXELS = (2, 8, 8), 5, 128
TYPES = ("float32", "float64")
FREEDOM = 18  # a smooth image interpolates 2 channels of 3 x 3 numbers, linearly


def smooth_images(count: int, stream: str) -> Tensor:
    coarse = torch.rand(count, 2, 3, 3, generator=generator(0, stream))
    return nn.functional.interpolate(coarse, SHAPE[1:], mode="bilinear", align_corners=True)


def as_bytes(images: Tensor) -> Images:
    return Images((images * 255).round().byte(), torch.zeros(len(images), dtype=torch.int64))


PUBLIC = as_bytes(smooth_images(211, "public"))
KNOWN = Knowledge(SHAPE, CLASSES, public=PUBLIC)


def small() -> nn.Module:
    """Two strided convolutions and a head, sigmoid: more equations than unknowns."""
    features = [nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.Sigmoid(), nn.Conv2d(6, 8, 3, padding=1), nn.Sigmoid(), nn.Flatten()]
    return nn.Sequential(*features, nn.Linear(PIXELS, CLASSES))


def victims(sizes: list[int], noise: float = 0.0) -> tuple[nn.Module, list[Observation], list[Tensor]]:
    """Observations of batches of smooth images that are not public, each of another random network; and the images."""
    model, rng = small(), generator(0, "victims")
    defense = GaussianNoise(relative=noise)
    images = list(smooth_images(sum(sizes), "private").split(sizes))
    seen = []
    for i, x in enumerate(images):
        params = {name: torch.rand(p.shape, generator=rng) - 0.5 for name, p in model.named_parameters()}
        labels = torch.randint(CLASSES, (len(x),), generator=rng)
        packets = pack(local_update(model, params, {}, [(x, labels)], lr=1).update)
        packets, _ = defense(packets, {}, generator(i, "noise"))
        seen.append(Observation(params, packets, len(x), client=i))
    return model, seen, images


def prior(latents: int = FREEDOM, tune: Adam | None = None, likely: float = 0.0, **matching: Any) -> GenerativePrior:
    settings = {"gap": CosineGap(), "labels": "analytic", "optimizer": LBFGS(200)} | matching
    return GenerativePrior(PrincipalComponents(latents), GradientMatching(**settings), tune, likely)


def best_fit(network: nn.Module, images: Tensor) -> Tensor:
    """The images nearest to `images` that a linear generator draws."""
    away = (images.flatten(1) - network.linear.bias).T
    return network(torch.linalg.lstsq(network.linear.weight, away).solution.T)


# Making a generator --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [97, 211])
def test_what_principal_components_miss_is_the_variance_they_leave_out(count: int) -> None:
    # Fewer and more images than pixels take different ways. The sum of squares left out is that of the smallest singular values.
    public = PUBLIC.take(torch.arange(count))
    images = public.pixels.float() / 255
    values = torch.linalg.svdvals((images - images.mean(0)).flatten(1).double())
    missed = (best_fit(fitted(PrincipalComponents(7), public), images) - images).square().sum()
    assert float(missed) == pytest.approx(float(values[7:].square().sum()), rel=1e-3)


def test_latents_of_public_images_have_zero_mean_and_unit_variance() -> None:
    network = fitted(PrincipalComponents(7), PUBLIC)
    images = (PUBLIC.pixels.float() / 255).flatten(1)
    codes = torch.linalg.lstsq(network.linear.weight, (images - network.linear.bias).T).solution.T
    assert torch.allclose(codes.mean(0), torch.zeros(7), atol=1e-3)
    assert torch.allclose(codes.T @ codes / len(codes), torch.eye(7), atol=1e-2)


def test_there_are_no_more_components_than_images_less_one() -> None:
    assert fitted(PrincipalComponents(1000), PUBLIC.take(torch.arange(11))).inputs == 10
    assert fitted(PrincipalComponents(1000), PUBLIC).inputs == PIXELS


def test_an_autoencoder_draws_what_the_mean_image_does_not() -> None:
    # Four numbers make an image, five latents are more than enough. Sides that 8 does not divide are drawn larger and cut.
    coarse = torch.rand(157, 1, 2, 2, generator=generator(0, "autoencoder"))
    images = nn.functional.interpolate(coarse, (13, 11), mode="bilinear", align_corners=True)
    network = fitted(Autoencoder(latents=5, width=4, epochs=12, rate=1e-2, batch=13), as_bytes(images[:147]))
    hidden = images[147:]
    latents = torch.zeros(len(hidden), 5, requires_grad=True)
    optimizer = torch.optim.Adam([latents], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        (network(latents) - hidden).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        missed = (network(latents) - hidden).square().mean()
    assert missed < (images[:147].mean(0) - hidden).square().mean() / 2
    assert float(latents.detach().square().mean()) < 9  # whitened: unseen images lie within three deviations


@pytest.mark.parametrize("recipe", [PrincipalComponents(3), Autoencoder(3, 2, epochs=1)], ids=repr)
def test_a_generator_is_made_once(recipe: Any, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    state = torch.get_rng_state()
    first = fitted(recipe, PUBLIC)
    assert torch.equal(torch.get_rng_state(), state)
    (path,) = tmp_path.iterdir()
    monkeypatch.setattr(type(recipe), "fit", lambda *_: pytest.fail("made again"))
    latents = torch.randn(7, 3, generator=generator(0, "latents"))
    assert torch.equal(fitted(recipe, PUBLIC)(latents), first(latents))
    monkeypatch.undo()
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    path.write_bytes(path.read_bytes()[:-1])  # damaged: made again, and the same
    assert torch.equal(fitted(recipe, PUBLIC)(latents), first(latents))
    assert cache.read_tensors(path) is not None
    fitted(recipe, as_bytes(smooth_images(211, "other public")))
    assert len(list(tmp_path.iterdir())) == 2


# Searching it --------------------------------------------------------------------------------------------------------------------


def test_searching_latents_finds_images_that_the_generator_can_draw() -> None:
    model, seen, images = victims([1] * 3)
    for one, true in zip(prior()(seen, KNOWN, model, generator(0, "attack")), images, strict=True):
        assert one.converged
        # Public images are rounded to 256 levels, and so are the directions in which they vary.
        assert float(metrics.mse(one.images, true)) < 1e-4


def test_searching_weights_finds_images_that_it_cannot() -> None:
    model, seen, images = victims([1] * 3)
    true = torch.cat(images)
    network = fitted(PrincipalComponents(9), PUBLIC)
    limit = metrics.mse(best_fit(network, true), true).mean()
    latents, tuned = (
        metrics.mse(torch.cat([one.images for one in attack(seen, KNOWN, model, generator(0, "attack"))]), true).mean()
        for attack in (prior(9), prior(9, tune=Adam(200, rate=3e-3)))
    )
    assert limit > 1e-3
    assert limit <= latents < 3 * limit
    assert tuned < limit / 3


def test_under_noise_the_prior_sees_what_pixels_do_not() -> None:
    # 18 unknowns average the noise away, 128 do not, however much total variation helps them.
    model, seen, images = victims([1] * 4, noise=0.1)
    true = torch.cat(images)

    def error(attack: Any) -> float:
        return float(
            metrics.mse(torch.cat([one.images for one in attack(seen, KNOWN, model, generator(0, "attack"))]), true).mean()
        )

    pixels = min(error(attacks.cosine_lbfgs(evaluations=100, tv=tv)) for tv in (1e-3, 1e-2, 1e-1))
    assert error(prior(likely=1e-4, optimizer=LBFGS(100))) < pixels / 2


def test_unlikely_latents_are_paid_for() -> None:
    # With nothing but the penalty to mind, the mean image is what is left.
    model, seen, _ = victims([1])
    (one,) = prior(likely=1e6)(seen, KNOWN, model, generator(0, "attack"))
    mean = (PUBLIC.pixels.float() / 255).mean(0)
    assert torch.allclose(one.images[0], mean, atol=1e-3)


def test_a_search_in_double_precision_finds_the_same() -> None:
    model, seen, _ = victims([2])
    single, double = (prior(dtype=dtype, optimizer=LBFGS(20))(seen, KNOWN, model, generator(0, "attack"))[0] for dtype in TYPES)
    assert double.loss == pytest.approx(single.loss, rel=0.2)


def test_a_generator_needs_public_images_of_the_victims_shape() -> None:
    model, seen, _ = victims([1])
    with pytest.raises(ValueError, match=r"needs known\.public"):
        prior()(seen, Knowledge(SHAPE, CLASSES), model, generator(0, "attack"))
    with pytest.raises(ValueError, match=r"2 public images and more, got 1: raise data\.test_size"):
        prior()(seen, replace(KNOWN, public=PUBLIC.take(torch.arange(1))), model, generator(0, "attack"))
    public = Images(PUBLIC.pixels[:, :, :4], PUBLIC.labels)
    with pytest.raises(ValueError, match=r"must be \(2, 8, 8\) like the victims', got \(2, 4, 8\)"):
        prior()(seen, replace(KNOWN, public=public), model, generator(0, "attack"))


# The class-representative GAN ----------------------------------------------------------------------------------------------------

GAN = ClassGAN(samples=3, latents=5, width=4, optimizer=Adam(60, rate=1e-2))


def test_the_gan_draws_what_the_model_is_sure_of() -> None:
    # A linear model of large weights takes some image for any class.
    model, rng = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, CLASSES)), generator(0, "linear")
    params = {name: torch.randn(p.shape, generator=rng) for name, p in model.named_parameters()}
    labels = torch.tensor([0, 4, 2, 2])
    packets = pack(local_update(model, params, {}, [(smooth_images(4, "linear"), labels)], lr=1).update)
    known = replace(KNOWN, labels=[labels])
    attack = replace(GAN, labels="given", optimizer=Adam(200, rate=1e-2))
    (found,) = attack([Observation(params, packets, 4)], known, model, generator(0, "gan"))
    logits = torch.func.functional_call(model, params, (found.images,))
    assert found.converged
    assert torch.equal(found.labels, labels)
    assert torch.equal(logits.argmax(1), labels)
    # What is reported for a label is what the model is surest of, so it is no worse than the mean over all.
    assert float(nn.functional.cross_entropy(logits, labels)) <= found.loss + 1e-6
    assert not torch.equal(found.images[2], found.images[3])  # a label that occurs twice is drawn twice


def test_the_gan_knows_a_class_and_nothing_of_the_image() -> None:
    # Two victims of one model, one label and two images: what is drawn is the same to the last bit.
    model, (one, _), _ = victims([1, 1])
    found = []
    for image in smooth_images(2, "twins"):
        update = local_update(model, one.params, {}, [(image[None], torch.tensor([3]))], lr=1).update
        (made,) = GAN([replace(one, packets=pack(update))], KNOWN, model, generator(0, "gan"))
        assert made.labels.tolist() == [3]
        found.append(made.images)
    assert torch.equal(*found)


# What both keep ------------------------------------------------------------------------------------------------------------------

ATTACKS = [
    replace(GAN, optimizer=Adam(5), restarts=2),
    prior(7, restarts=2, optimizer=LBFGS(7), tune=Adam(5, rate=1e-3)),
    GenerativePrior(Autoencoder(3, 2, epochs=1), GradientMatching(labels="given", optimizer=Adam(6), restarts=2)),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: type(attack).__name__)
def test_generator_attacks_keep_the_contract(attack: Any) -> None:
    assert isinstance(attack, Attack)
    sizes = [1, 3, 1, 2]
    model, seen, _ = victims(sizes)
    known = replace(KNOWN, labels=[torch.arange(size) for size in sizes])
    before = [{n: t.clone() for n, t in one.update.items()} for one in seen]
    fitted(PrincipalComponents(7), PUBLIC)
    state = torch.get_rng_state()
    calls: list[tuple[int, int]] = []
    found = attack(seen, known, model, generator(0, "contract"), report=lambda done, total: calls.append((done, total)))
    assert torch.equal(torch.get_rng_state(), state)
    assert calls[-1] == (4, 4)
    again, other = (attack(seen, known, model, generator(seed, "contract")) for seed in (0, 1))
    for one, same, different, size in zip(found, again, other, sizes, strict=True):
        assert one.images.shape == (size, *SHAPE)
        assert one.labels.shape == (size,)
        assert one.starts.shape == (2, size, *SHAPE)
        assert one.losses.shape == (2,)
        assert one.loss == float(one.losses.min())
        assert torch.equal(one.images, one.starts[one.losses.argmin()])
        assert 0 <= one.images.amin() <= one.images.amax() <= 1
        assert one.evaluations > 0
        assert one.seconds > 0
        assert torch.equal(one.images, same.images)
        assert not torch.equal(one.images, different.images)
    for one, update in zip(seen, before, strict=True):
        assert all(torch.equal(t, update[name]) for name, t in one.update.items())


@pytest.mark.parametrize("attack", ATTACKS[:2], ids=lambda attack: type(attack).__name__)
def test_a_victim_does_not_notice_its_companions(attack: Any) -> None:
    model, seen, _ = victims([1, 2, 1])
    together = attack(seen, KNOWN, model, generator(0, "attack"))
    for i, one in enumerate(seen):
        (alone,) = attack([one], KNOWN, model, generator(0, "attack"))
        assert torch.allclose(alone.images, together[i].images, atol=1e-4)


@pytest.mark.parametrize("attack", ATTACKS[:2], ids=lambda attack: type(attack).__name__)
def test_a_victim_that_is_not_a_number_harms_nobody(attack: Any) -> None:
    model, seen, _ = victims([1, 1])
    broken = replace(seen[0], packets=pack({name: torch.full_like(t, math.nan) for name, t in seen[0].update.items()}))
    nan, healthy = attack([broken, seen[1]], KNOWN, model, generator(0, "attack"))
    _, expected = attack(seen, KNOWN, model, generator(0, "attack"))
    assert nan.images.isfinite().all()
    assert torch.allclose(healthy.images, expected.images, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PrincipalComponents(0), "latents must be a whole number >= 1, got 0"),
        (lambda: Autoencoder(rate=0), "rate must be a number > 0, got 0"),
        (lambda: Autoencoder(epochs=0), "epochs must be a whole number >= 1, got 0"),
        (lambda: prior(labels="joint"), 'take labels="analytic" or "given", got "joint"'),
        (lambda: prior(box=True, optimizer=Adam()), "take box=False"),
        (lambda: prior(likely=-1), "likely must be a number >= 0, got -1"),
        (lambda: ClassGAN(labels="joint"), 'labels must be "analytic" or "given", got \'joint\''),  # type: ignore[arg-type]
        (lambda: ClassGAN(samples=0), "samples must be a whole number >= 1, got 0"),
        (lambda: attacks.gias(generator="gan"), "unknown generator 'gan'"),
    ],
)
def test_settings_of_generators_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()


# In a federation -----------------------------------------------------------------------------------------------------------------

TINY = ["data.train_size=23", "data.test_size=19", "federation.clients=3", "federation.per_round=2", "rounds=1", "device=cpu"]


def test_public_images_are_no_clients() -> None:
    setup = setup_of(compose([*TINY, "attack=gias"]))
    public = knowledge(setup, 1).public
    assert public is not None
    assert len(public) == 19
    held = {setup.dataset.train.pixels[i].numpy().tobytes() for shard in setup.shards for i in shard}
    assert len(held) == 23
    assert held.isdisjoint(image.numpy().tobytes() for image in public.pixels)


def test_both_attack_live_and_what_was_captured(tmp_path) -> None:
    cheap = {"gias": ["attack.evaluations=9", "attack.tune=2"], "gan": ["attack.steps=3"]}
    first = [*TINY, "engine.workers=1", f"out={tmp_path}", "name=run", "attack=gias", *cheap["gias"]]
    assert cli.main(["run", *first]) == 0
    assert cli.main(["attack", str(tmp_path / "run"), "attack=gan", *cheap["gan"]]) == 0
    leaks = RunFolder.open(tmp_path / "run").leaks()
    assert leaks["attack"].tolist() == ["gias", "gias", "gan_steps=3", "gan_steps=3"]
    assert leaks["label_right"].all()
