"""The models the papers use, as functions `(image_shape, num_classes, *, mean, std, init, rng, **settings) -> Classifier`.

Images (B, C, H, W) come in [0, 1]; with `mean` and `std` (one for each channel) the first layer normalises them. Weights are
drawn by `init` from `rng`; without `rng`, from the same stream each time. Global random state is left as it was. A `bottleneck`
(fedsim.models.bottleneck) stands between two layers, and its weights are drawn last: the others are those of the model without it.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.checks import whole
from fedsim.models.bottleneck import Bottleneck
from fedsim.models.init import Default, Init, Uniform
from fedsim.models.layers import Classifier, Normalize, activation_of, norm_of
from fedsim.seeding import generator

ImageShape = tuple[int, int, int]
Statistics = Tensor | Sequence[float] | None


def lenet(
    image_shape: ImageShape,
    num_classes: int,
    *,
    convs: int = 3,
    activation: str = "sigmoid",
    bottleneck: Bottleneck | None = None,
    mean: Statistics = None,
    std: Statistics = None,
    init: Init = Uniform(-0.5, 0.5),
    rng: torch.Generator | None = None,
) -> Classifier:
    """DLG's LeNet (Zhu et al. 2019): `convs` 5x5 convolutions of 12 channels, the first two with stride 2, and one linear layer.

    The authors' code has 3 convolutions, a variant in use elsewhere 4. Nothing pools and a sigmoid is smooth, so its gradient can
    be differentiated again.
    """
    if convs < 2:
        raise ValueError(f"convs must be at least 2, got {convs}")

    def features() -> nn.Sequential:
        layers: list[nn.Module] = []
        for i in range(convs):
            channels = 12 if i else image_shape[0]
            layers += [nn.Conv2d(channels, 12, 5, stride=2 if i < 2 else 1, padding=2), activation_of(activation)]
        return nn.Sequential(*layers, nn.Flatten())

    return _build(features, image_shape, num_classes, bottleneck, mean, std, init, rng)


def mcmahan_cnn(
    image_shape: ImageShape,
    num_classes: int,
    *,
    norm: str = "none",
    activation: str = "relu",
    dropout: float = 0.0,
    bottleneck: Bottleneck | None = None,
    mean: Statistics = None,
    std: Statistics = None,
    init: Init = Default(),
    rng: torch.Generator | None = None,
) -> Classifier:
    """The two-convolution network of McMahan et al. (2017), as the initialization study builds it, with `norm="batch"`.

    Feature maps of a 32x32 image are 30, 16, 14 and 8 wide, which makes 2.16 million parameters for CIFAR-10.
    """
    channels = image_shape[0]

    def features() -> nn.Sequential:
        maps = nn.Sequential(
            *(nn.Conv2d(channels, 32, 5, padding=1), norm_of(norm, 32), activation_of(activation), nn.MaxPool2d(2, padding=1)),
            *(nn.Conv2d(32, 64, 5, padding=1), norm_of(norm, 64), activation_of(activation), nn.MaxPool2d(2, padding=1)),
            nn.Flatten(),
        )
        hidden = (nn.Linear(_shape(maps, image_shape)[0], 512), activation_of(activation), *_dropout(dropout))
        return nn.Sequential(*maps, *hidden)

    return _build(features, image_shape, num_classes, bottleneck, mean, std, init, rng)


def mlp(
    image_shape: ImageShape,
    num_classes: int,
    *,
    hidden: Sequence[int] = (1024, 1024),
    activation: str = "relu",
    dropout: float = 0.0,
    bottleneck: Bottleneck | None = None,
    mean: Statistics = None,
    std: Statistics = None,
    init: Init = Default(),
    rng: torch.Generator | None = None,
) -> Classifier:
    """Linear layers of `hidden` units on the flattened image."""

    def features() -> nn.Sequential:
        channels, height, width = image_shape
        widths = (channels * height * width, *hidden)
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), activation_of(activation), *_dropout(dropout)]
        return nn.Sequential(*layers)

    return _build(features, image_shape, num_classes, bottleneck, mean, std, init, rng)


def mlp_2nn(image_shape: ImageShape, num_classes: int, **settings: Any) -> Classifier:
    """The 2NN of McMahan et al. (2017): two hidden layers of 200 units.

    It returns logits like every model here: a softmax before the cross-entropy, which some configurations of it have, would
    normalise twice and shrink the gradient.
    """
    return mlp(image_shape, num_classes, hidden=(200, 200), **settings)


def precode_mlp(image_shape: ImageShape, num_classes: int, **settings: Any) -> Classifier:
    """The MLP that PRECODE (Scheliga et al. 2022) defends: two hidden layers of 1024 units."""
    return mlp(image_shape, num_classes, hidden=(1024, 1024), **settings)


def resnet18(
    image_shape: ImageShape,
    num_classes: int,
    *,
    norm: str = "batch",
    activation: str = "relu",
    bottleneck: Bottleneck | None = None,
    mean: Statistics = None,
    std: Statistics = None,
    init: Init = Default(),
    rng: torch.Generator | None = None,
) -> Classifier:
    """ResNet-18 (He et al. 2016) with the stem for small images: a 3x3 convolution of stride 1 and no pooling before the blocks.

    Layer for layer torchvision's network, whose weights fit in order, but nothing works in place. `norm="batch"` keeps
    statistics, which are sent besides the parameters, and cannot run under vmap in training mode.
    """

    def features() -> nn.Sequential:
        stem = (_conv3x3(image_shape[0], 64, 1), norm_of(norm, 64), activation_of(activation))
        blocks, before = [], 64
        for stage, channels in enumerate((64, 128, 256, 512)):
            for block in range(2):
                blocks.append(BasicBlock(before, channels, 2 if stage and not block else 1, norm, activation))
                before = channels
        return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    return _build(features, image_shape, num_classes, bottleneck, mean, std, init, rng)


def resnet20(
    image_shape: ImageShape,
    num_classes: int,
    *,
    norm: str = "batch",
    activation: str = "relu",
    strides: bool = True,
    bottleneck: Bottleneck | None = None,
    mean: Statistics = None,
    std: Statistics = None,
    init: Init = Default(),
    rng: torch.Generator | None = None,
) -> Classifier:
    """ResNet-20 for small images (He et al. 2016, section 4.2): 3 stages of 3 blocks, shortcuts without weights, 0.27 M parameters.

    `norm="none", activation="sigmoid", strides=False` is what DLG makes of a ResNet, so that it can be differentiated twice and
    loses no pixel (Zhu et al. 2019, section 4.1). Without strides all maps are as large as the image, at seven times the cost.
    """

    def features() -> nn.Sequential:
        stem = (_conv3x3(image_shape[0], 16, 1), norm_of(norm, 16), activation_of(activation))
        blocks, before = [], 16
        for stage, channels in enumerate((16, 32, 64)):
            for block in range(3):
                stride = 2 if strides and stage and not block else 1
                blocks.append(BasicBlock(before, channels, stride, norm, activation, projection=False))
                before = channels
        return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    return _build(features, image_shape, num_classes, bottleneck, mean, std, init, rng)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: a `projection` where shapes differ (He et al. 2016, option B), or pixels left out and
    channels of zeros added (option A)."""

    def __init__(self, before: int, channels: int, stride: int, norm: str, activation: str, projection: bool = True) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *(_conv3x3(before, channels, stride), norm_of(norm, channels), activation_of(activation)),
            *(_conv3x3(channels, channels, 1), norm_of(norm, channels)),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != channels:
            self.shortcut = (
                nn.Sequential(nn.Conv2d(before, channels, 1, stride, bias=False), norm_of(norm, channels))
                if projection
                else Padded(channels - before, stride)
            )
        self.activation = activation_of(activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.residual(x) + self.shortcut(x))


class Padded(nn.Module):
    """Every `stride`-th pixel in both directions, and `more` channels of zeros, half of them in front."""

    def __init__(self, more: int, stride: int) -> None:
        super().__init__()
        self.more, self.stride = more, stride

    def forward(self, x: Tensor) -> Tensor:
        front = self.more // 2
        return nn.functional.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, front, self.more - front))


def _conv3x3(before: int, after: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride, padding=1, bias=False)


def _dropout(p: float) -> tuple[nn.Module, ...]:
    if not 0 <= p < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {p}")
    return (nn.Dropout(p),) if p else ()


def _shape(features: nn.Module, image_shape: ImageShape) -> tuple[int, ...]:
    """Shape of the features that one blank image gives."""
    with torch.no_grad():
        shape = features.eval()(torch.zeros(1, *image_shape)).shape[1:]
    features.train()
    return tuple(shape)


def _place(features: nn.Sequential, after: int | None) -> int:
    """Where a bottleneck stands that has `after` layers with weights in front of it; None takes all of them."""
    norms = nn.modules.batchnorm._NormBase | nn.GroupNorm
    layers = [i for i, layer in enumerate(features) if not isinstance(layer, norms) and any(True for _ in layer.parameters())]
    if after is not None:
        whole("bottleneck.after", after, 1, len(layers))
    place = len(features) if after in (None, len(layers)) else layers[after]
    while isinstance(features[place - 1], nn.Flatten):  # feature maps are still maps there
        place -= 1
    return place


def _build(
    features: Callable[[], nn.Sequential],
    image_shape: ImageShape,
    num_classes: int,
    bottleneck: Bottleneck | None,
    mean: Statistics,
    std: Statistics,
    init: Init,
    rng: torch.Generator | None,
) -> Classifier:
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape must be (C, H, W), got {tuple(image_shape)}; text takes model=bert_tiny")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    if (mean is None) != (std is None):
        raise ValueError("mean and std are given together or not at all")
    normalize = nn.Identity() if mean is None or std is None else Normalize(mean, std)
    with torch.random.fork_rng(devices=[]):  # PyTorch's layers draw from the global stream as they are made
        body = features()
        model = Classifier(normalize, body, nn.Linear(_shape(body, image_shape)[0], num_classes))
    rng = rng or generator(0, "init")
    init(model, rng)
    if bottleneck is None:
        return model
    place = _place(body, bottleneck.after)
    with torch.random.fork_rng(devices=[]):
        module = bottleneck(_shape(body[:place], image_shape))
    init(module, rng)
    return Classifier(normalize, body, model.head, module, place)
