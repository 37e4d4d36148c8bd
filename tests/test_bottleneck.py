"""Bottlenecks: what they compute, that what they draw is a client's own and reproducible, and that evaluation draws nothing."""

import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from worlds import FEDAVG, FEDSGD, assert_same, config, federate

from fedsim import models
from fedsim.client import chance_seeded, draws
from fedsim.engines.inline import Inline
from fedsim.models import ConvolutionalBottleneck, Dropout, Precode, Stochastic
from fedsim.models.bottleneck import divergence_bits
from fedsim.seeding import generator
from fedsim.setup import setup_of
from fedsim.training import batch_loss, evaluate, local_update, split

SHAPE = (3, 11, 13)
FLAT, MAPS = (17,), (5, 7, 3)
CHOICES = [
    (Precode(width=7), FLAT),
    (Precode(width=7), MAPS),
    (ConvolutionalBottleneck(), MAPS),
    (ConvolutionalBottleneck(channels=2, kernel=5), MAPS),
    (Dropout(0.3), FLAT),
    (Dropout(0.3), MAPS),
]
WITHOUT_AND_WITH: tuple[dict, dict] = ({}, {"bottleneck": Precode()})
every_bottleneck = pytest.mark.parametrize(("choice", "shape"), CHOICES, ids=[f"{c} {s}" for c, s in CHOICES])


def images(count: int = 2) -> Tensor:
    return torch.rand(count, *SHAPE, generator=generator(0, "images"))


def relative_distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    a, b = (torch.cat([t.flatten() for t in update.values()]) for update in (one, other))
    return float((a - b).norm() / a.norm())


# What they compute ----------------------------------------------------------------------------------------------------------------


@every_bottleneck
def test_features_keep_their_shape_and_come_with_a_penalty(choice, shape):
    module, features = choice(shape), torch.randn(11, *shape, generator=generator(0))
    for mode in (True, False):
        made, penalty = module.train(mode)(features)
        assert made.shape == features.shape
        assert penalty.shape == ()
        assert penalty >= 0


@every_bottleneck
def test_noise_handed_over_is_the_noise_that_is_used(choice, shape):
    module, features = choice(shape), torch.randn(11, *shape, generator=generator(0))
    torch.manual_seed(7)
    drawn, _ = module(features)
    torch.manual_seed(7)
    noise = module.sample(torch.empty(11, *module.noise_shape))
    handed, _ = functional_call(module, {"noise": noise}, (features,))
    assert torch.equal(handed, drawn)
    assert not torch.equal(module(features)[0], drawn), "the noise is forgotten afterwards"


@every_bottleneck
def test_noise_is_neither_sent_nor_saved(choice, shape):
    module = choice(shape)
    assert isinstance(module, Stochastic)
    assert not dict(module.named_buffers())
    assert not [name for name in module.state_dict() if "noise" in name]


def test_precode_adds_the_published_number_of_parameters_to_its_mlp():
    plain, guarded = (sum(p.numel() for p in models.precode_mlp((3, 32, 32), 10, **more).parameters()) for more in WITHOUT_AND_WITH)
    # Linear(1024 -> 2 * 256) and Linear(256 -> 1024), with biases.
    assert guarded - plain == (1024 + 1) * 512 + (256 + 1) * 1024 == 787_968
    assert (guarded - plain) / plain == pytest.approx(0.187, abs=0.0005)


def test_the_divergence_of_a_standard_normal_is_zero_and_others_have_their_formula():
    zeros, ones = torch.zeros(3, 5), torch.ones(3, 5)
    assert divergence_bits(zeros, ones) == 0
    # Half a nat for each of 5 entries moved by one deviation; the mean over the batch, not the sum.
    assert divergence_bits(ones, ones).item() == pytest.approx(2.5 / math.log(2))
    p, q = torch.distributions.Normal(0.3 * ones, 2 * ones), torch.distributions.Normal(zeros, ones)
    exact = torch.distributions.kl_divergence(p, q).sum(1).mean() / math.log(2)
    assert divergence_bits(0.3 * ones, 2 * ones).item() == pytest.approx(exact.item())


def test_a_deviation_that_underflows_has_a_finite_divergence_and_gradient():
    spread = torch.full((2, 3), -200.0, requires_grad=True)  # softplus is 0 in float32
    bits = divergence_bits(torch.zeros(2, 3), F.softplus(spread))
    (gradient,) = torch.autograd.grad(bits, spread)
    assert bits.isfinite()
    assert gradient.isfinite().all()


def test_the_code_is_the_mean_plus_epsilon_deviations():
    module = Precode(width=7)(FLAT)
    module.decoder = nn.Identity()
    features, epsilon = (torch.randn(11, n, generator=generator(0, n)) for n in (17, 7))
    statistics = module.encoder[1](features)
    code, _ = functional_call(module, {"noise": epsilon}, (features,))
    torch.testing.assert_close(code, statistics[:, :7] + epsilon * (1 + statistics[:, 7:].exp()).log())
    assert torch.equal(module.eval()(features)[0], statistics[:, :7])


def test_the_loss_is_the_cross_entropy_plus_beta_times_the_divergence():
    labels, losses = torch.tensor([0, 4]), []
    for beta in (0.0, 0.5):
        model = models.mlp_2nn(SHAPE, 5, bottleneck=Precode(width=7, beta=beta))
        torch.manual_seed(0)
        losses.append(batch_loss(model, *split(model), images(), labels))
    mean, spread = model.bottleneck.encoder(model.features(images())).chunk(2, 1)
    assert (losses[1] - losses[0]).item() == pytest.approx(0.5 * divergence_bits(mean, F.softplus(spread)).item(), rel=1e-4)
    torch.manual_seed(0)
    unpenalised = batch_loss(model, *split(model), images(), labels, penalty=False)
    assert unpenalised.item() == losses[0].item()


def test_dropout_divides_by_what_is_kept_so_that_its_mean_is_the_feature():
    module = Dropout(0.3)((10_000,))
    torch.manual_seed(0)
    out, penalty = module(torch.ones(1, 10_000))
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.7])
    # The mean of 10,000 draws of deviation sqrt(0.3 / 0.7) = 0.65 has the deviation 0.0065.
    assert out.mean().item() == pytest.approx(1, abs=4 * 0.0065)
    assert penalty == 0


# Where they stand -----------------------------------------------------------------------------------------------------------------

PLACES = [  # what a bottleneck behind so many layers with weights sees, for 3 x 11 x 13
    (models.lenet, 1, (12, 6, 7)),
    (models.lenet, None, (12, 3, 4)),
    (models.mcmahan_cnn, 1, (32, 5, 6)),  # (11 + 2 - 4) / 2 + 1 and (13 + 2 - 4) / 2 + 1 after pooling
    (models.mcmahan_cnn, None, (512,)),
    (models.mlp_2nn, 1, (200,)),
    (models.resnet20, 1, (16, 11, 13)),
    (models.resnet18, None, (512, 1, 1)),
]


@pytest.mark.parametrize(("build", "after", "seen"), PLACES, ids=[f"{b.__name__} {a}" for b, a, _ in PLACES])
def test_a_bottleneck_stands_behind_so_many_layers(build, after, seen):
    plain, model = build(SHAPE, 5), build(SHAPE, 5, bottleneck=Dropout(0.5, after))
    assert model.bottleneck.noise_shape == seen
    torch.testing.assert_close(model.eval()(images())[0], plain.eval()(images()))


def test_weights_in_front_of_and_behind_a_bottleneck_are_those_of_the_model_without():
    plain, guarded = (dict(models.lenet(SHAPE, 5, **more, rng=generator(3)).named_parameters()) for more in WITHOUT_AND_WITH)
    assert all(torch.equal(guarded[name], p) for name, p in plain.items())
    assert list(guarded)[-1] == "head.bias"


# What they draw -------------------------------------------------------------------------------------------------------------------


def test_two_gradients_of_one_image_differ_in_training_and_not_in_eval_mode():
    model = models.precode_mlp((3, 32, 32), 10, bottleneck=Precode())
    batch = (torch.rand(1, 3, 32, 32, generator=generator(1)), torch.tensor([3]))

    def gradient() -> dict[str, Tensor]:
        return local_update(model, *split(model), [batch], lr=1.0).update

    assert relative_distance(gradient(), gradient()) > 0.3
    model.eval()
    assert relative_distance(gradient(), gradient()) == 0


def guarded_mlp(bottleneck: str = "Precode", **settings: int) -> dict:
    made = {"_target_": f"fedsim.models.{bottleneck}"} | settings
    return {"_target_": "fedsim.models.mlp", "hidden": [5], "init": {"_target_": "fedsim.models.Default"}, "bottleneck": made}


class Noisy(nn.Module):
    """A user's model that draws by a call of its own."""

    def __init__(self, pixels: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(pixels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear((x + torch.rand_like(x) * self.training).flatten(1))


def noisy(image_shape: tuple[int, ...], num_classes: int, **_: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Noisy(math.prod(image_shape), num_classes)


DRAWING = [guarded_mlp(width=3), guarded_mlp("Dropout"), {"_target_": "test_bottleneck.noisy"}]


@pytest.mark.parametrize("model", DRAWING, ids=["precode", "dropout", "a user's"])
def test_what_a_client_draws_is_its_own_and_the_same_on_any_number_of_workers(model):
    # So small a rate that weights stay, and every client with the same images: what differs is what was drawn.
    still = FEDSGD | {"clients": 3, "per_round": 3, "lr": 1e-30, "batch_size": 1}
    made = config(model=model, federation=still, data={"name": "synthetic", "train_size": 3, "test_size": 2})
    alone, again, together = (federate(made, engine).seen for engine in (Inline(1), Inline(1), Inline(3)))
    for one, same, also in zip(alone, again, together, strict=True):
        assert_same(same.update, one.update)
        assert_same(also.update, one.update)
    by_client = {(one.round, one.client): one.update for one in alone}
    for client in range(3):  # one image each, the same in both rounds
        assert relative_distance(by_client[1, client], by_client[2, client]) > 1e-3


def test_no_model_is_made_while_a_client_draws():
    """Layers draw as they are made, from the stream that the client has seeded."""
    setup = setup_of(config(model=guarded_mlp(width=3)))
    model, made = setup.model(), []
    pixels = torch.rand(1, 3, 32, 32)
    maker = threading.Thread(target=lambda: made.append(setup.model()))
    with chance_seeded(model, pixels, 7):
        maker.start()
        maker.join(0.5)
        assert not made
        drawn = torch.rand(3)
    maker.join()
    assert len(made) == 1
    with chance_seeded(model, pixels, 7):
        assert torch.equal(torch.rand(3), drawn)


def test_local_steps_draw_anew():
    model = models.mlp_2nn(SHAPE, 5, bottleneck=Precode(width=7))
    batch = (images(), torch.tensor([0, 4]))
    with chance_seeded(model, images(), 3):
        two = local_update(model, *split(model), [batch, batch], lr=1e-6).update
    with chance_seeded(model, images(), 3):
        one = local_update(model, *split(model), [batch], lr=1e-6).update
    # At so small a rate two steps of the same draw would be twice one.
    assert relative_distance({n: 2 * t for n, t in one.items()}, two) > 0.01


@pytest.mark.parametrize("bottleneck", [None, Precode(width=7), ConvolutionalBottleneck(), Dropout()], ids=repr)
def test_models_are_known_to_draw_by_trying(bottleneck):
    model = models.lenet(SHAPE, 5, bottleneck=bottleneck)
    state = torch.get_rng_state()
    assert draws(model, images()) == (bottleneck is not None)
    assert not draws(model.eval(), images())
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_draws_nothing():
    model = models.lenet(SHAPE, 5, bottleneck=Precode(width=7))
    batch = (images(5), torch.tensor([0, 1, 2, 3, 4]))
    state = torch.get_rng_state()
    assert evaluate(model, *split(model), [batch]) == evaluate(model, *split(model), [batch])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_federation_with_a_bottleneck_learns_several_local_steps():
    made = config(
        model=guarded_mlp(width=32),
        federation=FEDAVG | {"epochs": 5, "lr": 0.05},
        data={"name": "synthetic", "train_size": 200, "test_size": 50},
    )
    reports = federate(made, rounds=6).reports
    assert reports[-1].train_loss < reports[1].train_loss  # of the first round; 0 is the untrained model
