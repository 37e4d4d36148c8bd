"""The models of the papers: sizes, names on the wire, initial weights. Image shapes are (3, 32, 32) where a count is derived."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from fedsim import models
from fedsim.models import Default, He, Kaiming, Normalize, Uniform, Xavier
from fedsim.models.zoo import BasicBlock
from fedsim.seeding import generator
from fedsim.training import loss_of, split

CIFAR = (3, 32, 32)
BUILDERS = {
    "lenet": models.lenet,
    "lenet, 4 convolutions": lambda *a, **k: models.lenet(*a, convs=4, **k),
    "mcmahan_cnn": models.mcmahan_cnn,
    "mcmahan_cnn, group": lambda *a, **k: models.mcmahan_cnn(*a, norm="group", **k),
    "mcmahan_cnn, batch": lambda *a, **k: models.mcmahan_cnn(*a, norm="batch", **k),
    "mlp": lambda *a, **k: models.mlp(*a, hidden=(13, 7), activation="gelu", **k),
    "mlp_2nn": models.mlp_2nn,
    "resnet18, none": lambda *a, **k: models.resnet18(*a, norm="none", activation="sigmoid", **k),
    "resnet18, group": lambda *a, **k: models.resnet18(*a, norm="group", **k),
    "resnet18, batch": models.resnet18,
    "resnet20, batch": models.resnet20,
    "resnet20, DLG's": lambda *a, **k: models.resnet20(*a, norm="none", activation="sigmoid", strides=False, **k),
}
INITS = (Default(), Uniform(-0.5, 0.5), Xavier("uniform"), Xavier("normal", gain=2.0), Kaiming("uniform"), Kaiming("normal"), He())


@pytest.fixture(params=BUILDERS)
def build(request):
    return BUILDERS[request.param]


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("image_shape", [CIFAR, (1, 28, 28), (2, 17, 23)], ids=str)
def test_every_model_takes_any_image_size(build, image_shape):
    model = build(image_shape, 5).eval()
    assert model(torch.rand(3, *image_shape)).shape == (3, 5)
    assert list(model.named_parameters())[-1][0] == "head.bias"
    assert model.head.bias.shape == (5,)


SIZES = {
    # 5x5 convolutions 3->12 and 12->12 with biases, then 12 maps of 8x8 to K
    "lenet": (models.lenet, 10, (3 * 25 + 1) * 12 + 2 * (12 * 25 + 1) * 12 + (12 * 8 * 8 + 1) * 10),
    "lenet 4": (lambda *a: models.lenet(*a, convs=4), 100, (3 * 25 + 1) * 12 + 3 * (12 * 25 + 1) * 12 + (12 * 8 * 8 + 1) * 100),
    # 32 -> 30 -> 16 -> 14 -> 8: 64 maps of 8x8
    "mcmahan_cnn": (models.mcmahan_cnn, 10, (3 * 25 + 1) * 32 + (32 * 25 + 1) * 64 + (64 * 8 * 8 + 1) * 512 + (512 + 1) * 10),
    "mlp_2nn": (models.mlp_2nn, 10, (3072 + 1) * 200 + (200 + 1) * 200 + (200 + 1) * 10),
    # 3x3 convolutions without biases: a stem, 6 of 16 maps, 16 -> 32 and 5, 32 -> 64 and 5; scale and shift of each map; 64 to K
    "resnet20": (
        models.resnet20,
        10,
        9 * (3 * 16 + 6 * 16**2 + 16 * 32 + 5 * 32**2 + 32 * 64 + 5 * 64**2) + 2 * (7 * 16 + 6 * 32 + 6 * 64) + 65 * 10,
    ),
    "precode_mlp": (models.precode_mlp, 10, (3072 + 1) * 1024 + (1024 + 1) * 1024 + (1024 + 1) * 10),
}


@pytest.mark.parametrize(("build", "classes", "expected"), SIZES.values(), ids=SIZES)
def test_parameters_are_as_many_as_the_paper_s_layers_have(build, classes, expected):
    assert count(build(CIFAR, classes)) == expected


def test_the_published_sizes_are_met():
    assert count(models.lenet(CIFAR, 10)) == 15_826
    assert count(models.mcmahan_cnn(CIFAR, 10)) == pytest.approx(2.16e6, rel=0.01)
    assert count(models.precode_mlp(CIFAR, 10)) == pytest.approx(4.21e6, rel=0.01)
    assert count(models.resnet20(CIFAR, 10)) == pytest.approx(0.27e6, rel=0.01)  # He et al. 2016, table 6


def test_the_feature_maps_of_the_mcmahan_cnn_are_30_16_14_and_8_wide():
    widths, x = [], torch.rand(1, *CIFAR)
    for layer in models.mcmahan_cnn(CIFAR, 10).features:
        x = layer(x)
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
            widths.append(x.shape[-1])
    assert widths == [30, 16, 14, 8]


def test_our_resnet_is_torchvision_s_but_for_the_stem():
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.resnet18(num_classes=7)
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    ours = models.resnet18(CIFAR, 7)
    mine, yours = ours.state_dict(), theirs.state_dict()
    assert [t.shape for t in mine.values()] == [t.shape for t in yours.values()]
    ours.load_state_dict(dict(zip(mine, yours.values(), strict=True)))
    images = torch.rand(2, *CIFAR, generator=generator(0))
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))
    torch.testing.assert_close(ours.train()(images), theirs.train()(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("strides", "sides"), [(True, [32, 16, 8]), (False, [32, 32, 32])])
def test_the_stages_of_resnet20_have_16_32_and_64_maps_of_falling_size(strides, sides):
    maps, x = [], torch.rand(1, *CIFAR)
    for layer in models.resnet20(CIFAR, 10, strides=strides).eval().features:
        x = layer(x)
        if isinstance(layer, BasicBlock):
            maps.append(tuple(x.shape[1:3]))
    assert maps == [(channels, side) for channels, side in zip((16, 32, 64), sides, strict=True) for _ in range(3)]


def test_a_shortcut_without_weights_keeps_every_other_pixel_and_adds_zeros():
    block = BasicBlock(2, 6, 2, "none", "relu", projection=False)
    for p in block.parameters():
        nn.init.zeros_(p)  # nothing but the shortcut is left
    x = torch.rand(3, 2, 7, 5, generator=generator(0))
    out = block(x)
    assert out.shape == (3, 6, 4, 3)
    assert torch.equal(out[:, 2:4], x[:, :, ::2, ::2])
    assert not out[:, :2].any()
    assert not out[:, 4:].any()


def test_only_batch_norm_has_buffers(build):
    model = build(CIFAR, 10, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    has_batch_norm = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert bool(dict(model.named_buffers())) == has_batch_norm


@pytest.mark.parametrize("name", [name for name in BUILDERS if "batch" not in name])
def test_gradients_of_several_models_are_one_program(name):
    shape = (3, 11, 13)
    nets = [BUILDERS[name](shape, 5, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), rng=generator(i)) for i in range(2)]
    images, labels = torch.rand(2, 3, *shape, generator=generator(9)), torch.tensor([[0, 1, 2], [4, 3, 2]])

    def loss(params, x, y):
        return loss_of(functional_call(nets[0], params, (x,)), y)

    stacked = {key: torch.stack([split(net)[0][key] for net in nets]) for key in split(nets[0])[0]}
    together = vmap(grad(loss))(stacked, images, labels)
    for i, net in enumerate(nets):
        alone = torch.autograd.grad(loss_of(net(images[i]), labels[i]), list(net.parameters()))
        for (key, _), expected in zip(net.named_parameters(), alone, strict=True):
            torch.testing.assert_close(together[key][i], expected, rtol=1e-3, atol=1e-5)


def test_no_activation_works_in_place():
    x = torch.linspace(-2, 2, 7)
    for name in models.ACTIVATIONS:
        before = x.clone()
        assert models.activation_of(name)(x).shape == x.shape
        assert torch.equal(x, before)


def test_the_same_stream_gives_the_same_weights_and_another_gives_others(build):
    one, same, other = (build((1, 9, 9), 5, rng=generator(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)


def test_weights_depend_on_nothing_but_the_stream(build):
    torch.manual_seed(1)
    one = build((1, 9, 9), 5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    two = build((1, 9, 9), 5)
    assert torch.equal(torch.get_rng_state(), before), "building a model drew from the global stream"
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


# Standard deviation of a weight with `i` inputs and `o` outputs; U(-b, b) has b / sqrt(3).
DEVIATIONS = {
    Default(): lambda i, o: 1 / math.sqrt(3 * i),
    Uniform(-0.5, 0.5): lambda i, o: 0.5 / math.sqrt(3),
    Uniform(-0.1, 0.3): lambda i, o: 0.2 / math.sqrt(3),
    Xavier("uniform"): lambda i, o: math.sqrt(2 / (i + o)),
    Xavier("normal", gain=2.0): lambda i, o: 2 * math.sqrt(2 / (i + o)),
    Kaiming("uniform"): lambda i, o: 1 / math.sqrt(3 * i),
    Kaiming("normal"): lambda i, o: 1 / math.sqrt(3 * i),
    Kaiming("normal", a=1.0): lambda i, o: 1 / math.sqrt(i),
    He(): lambda i, o: math.sqrt(2 / i),
    He("uniform"): lambda i, o: math.sqrt(2 / i),
}


@pytest.mark.parametrize("init", DEVIATIONS, ids=repr)
def test_initial_weights_have_the_deviation_the_formula_says(init):
    net = nn.Sequential(nn.Conv2d(7, 50, 5), nn.Linear(211, 100), nn.Linear(100, 211, bias=False))
    init(net, generator(3))
    convolution, linear, thin = net
    for weight, i, o in ((convolution.weight, 7 * 25, 50 * 25), (linear.weight, 211, 100), (thin.weight, 100, 211)):
        # The deviation of the estimate from n normal draws is 1 / sqrt(2 n) of it: under 0.8 % here.
        assert float(weight.detach().std()) == pytest.approx(DEVIATIONS[init](i, o), rel=0.03)
    low, high = (init.a, init.b) if isinstance(init, Uniform) else (-1 / math.sqrt(211), 1 / math.sqrt(211))
    bias = linear.bias.detach()
    assert low <= float(bias.min())
    assert float(bias.max()) <= high
    assert float(bias.max() - bias.min()) > 0.9 * (high - low)  # the range of 100 uniform draws is 0.98 of the whole


def test_a_normal_rule_leaves_the_range_of_a_uniform_one_of_the_same_deviation():
    uniform, normal = (nn.Linear(100, 100) for _ in range(2))
    Kaiming("uniform")(uniform, generator(0))
    Kaiming("normal")(normal, generator(0))
    assert float(uniform.weight.detach().abs().max()) <= 0.1 < float(normal.weight.detach().abs().max())


def test_the_default_init_is_pytorch_s():
    """Redrawn from a generator in the state of the global one, a layer gets the very weights PyTorch gave it."""
    torch.manual_seed(7)
    layer = nn.Conv2d(3, 5, 3)
    expected = copy.deepcopy(layer.state_dict())
    Default()(layer, torch.Generator().manual_seed(7))
    assert all(torch.equal(layer.state_dict()[key], expected[key]) for key in expected)


@pytest.mark.parametrize("init", INITS, ids=repr)
def test_normalisation_layers_start_as_the_identity(init):
    norms = [m for m in models.mcmahan_cnn((1, 9, 9), 5, norm="batch", init=init).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 2
    for norm in norms:
        assert bool((norm.weight == 1).all())
        assert not norm.bias.any()
        assert not norm.running_mean.any()


def test_an_init_refuses_parameters_it_has_no_rule_for():
    with pytest.raises(ValueError, match="0, a PReLU"):
        Default()(nn.Sequential(nn.PReLU()), generator(0))


def test_lenet_starts_from_dlg_s_uniform_weights_and_biases():
    flat = torch.cat([p.detach().flatten() for p in models.lenet(CIFAR, 100).parameters()])
    assert float(flat.abs().max()) <= 0.5
    assert float(flat.std()) == pytest.approx(0.5 / math.sqrt(3), rel=0.01)


def test_normalize_makes_zero_mean_and_unit_deviation_and_follows_its_model():
    images = torch.rand(11, 3, 5, 7, generator=generator(0))
    layer = Normalize(images.mean((0, 2, 3)), images.transpose(0, 1).flatten(1).std(1))
    out = layer(images).transpose(0, 1).flatten(1)
    torch.testing.assert_close(out.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std(1), torch.ones(3))
    assert not layer.state_dict()
    model = models.lenet((3, 5, 7), 2, mean=layer.mean, std=layer.std).double()
    assert model(images.double()).dtype == torch.float64
    assert model.to("meta").normalize.mean.device.type == "meta"


def test_a_bottleneck_adds_a_penalty():
    class Halve(nn.Module):
        def forward(self, features):
            return features / 2, features.square().mean()

    model = models.mlp((1, 3, 3), 4, hidden=(5,))
    images = torch.rand(2, 1, 3, 3, generator=generator(0))
    plain = model(images)
    model.bottleneck = Halve()
    logits, penalty = model(images)
    torch.testing.assert_close(logits - model.head.bias, (plain - model.head.bias) / 2)
    assert penalty.shape == ()


def test_dropout_is_off_in_evaluation():
    model = models.mlp((1, 5, 5), 3, hidden=(97,), dropout=0.5)
    images = torch.ones(1, 1, 5, 5)
    assert torch.equal(model.eval()(images), model(images))
    assert not torch.equal(model.train()(images), model(images))


MISTAKES = [
    (lambda: models.lenet(CIFAR, 10, activation="sigmoyd"), "unknown activation 'sigmoyd': did you mean 'sigmoid'? choices: relu"),
    (lambda: models.mcmahan_cnn(CIFAR, 10, norm="bach"), "unknown norm 'bach': did you mean 'batch'? choices: none, batch, group"),
    (lambda: models.resnet18(CIFAR, 10, norm="zzz"), "unknown norm 'zzz': choices: none, batch, group"),
    (lambda: Xavier("norml"), "unknown distribution 'norml': did you mean 'normal'? choices: uniform, normal"),
    (lambda: Uniform(0.5, -0.5), "a must be < b, got a=0.5, b=-0.5"),
    (lambda: models.lenet(CIFAR, 10, convs=1), "convs must be at least 2, got 1"),
    (lambda: models.mlp(CIFAR, 10, dropout=1.0), "dropout must lie in [0, 1), got 1.0"),
    (lambda: models.mlp((32, 32), 10), "image_shape must be (C, H, W), got (32, 32)"),
    (lambda: models.mlp(CIFAR, 1), "num_classes must be at least 2, got 1"),
    (lambda: models.mlp(CIFAR, 10, mean=(0, 0, 0)), "mean and std are given together or not at all"),
    (lambda: models.mlp(CIFAR, 10, mean=(0, 0, 0), std=(1, 1, 0)), "std must be > 0"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_is_answered_with_the_value_and_the_way_out(mistake, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        mistake()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
