"""Layers that all models share. None works in place, so every model runs under `torch.func.vmap`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fedsim.checks import one_of

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "leaky_relu": nn.LeakyReLU,
    "softplus": nn.Softplus,
    "silu": nn.SiLU,
}
NORM_GROUPS = 8


def activation_of(name: str) -> nn.Module:
    """The activation called `name`."""
    return ACTIVATIONS[one_of("activation", name, ACTIVATIONS)]()


def norm_of(name: str, channels: int) -> nn.Module:
    """The normalisation called `name` of feature maps of `channels` channels; groups are 8, and keep no statistics."""
    norms: dict[str, Callable[[], nn.Module]] = {
        "none": nn.Identity,
        "batch": lambda: nn.BatchNorm2d(channels),
        "group": lambda: nn.GroupNorm(NORM_GROUPS, channels),
    }
    return norms[one_of("norm", name, norms)]()


class Normalize(nn.Module):
    """Images in [0, 1] to zero mean and unit deviation in each channel: the first layer, so that nothing outside mentions a mean.

    The two constants are neither parameters nor buffers, since buffers are sent as BatchNorm statistics. They follow the module
    to a device and are not in its state dict.
    """

    def __init__(self, mean: Tensor | Sequence[float], std: Tensor | Sequence[float]) -> None:
        super().__init__()
        self.mean = torch.as_tensor(mean, dtype=torch.float32).reshape(-1, 1, 1)
        self.std = torch.as_tensor(std, dtype=torch.float32).reshape(-1, 1, 1)
        if self.mean.shape != self.std.shape or not bool((self.std > 0).all()):
            raise ValueError(
                f"std must be > 0, one for each channel of mean {self.mean.flatten().tolist()}, got {self.std.flatten().tolist()}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Normalize":
        super()._apply(fn, recurse)
        self.mean, self.std = fn(self.mean), fn(self.std)
        return self

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


class Classifier(nn.Module):
    """Normalised images to features (B, D), then to logits (B, K) by the linear layer `head`.

    `head` is the last layer of every model, so "the gradient of the last bias" is that of `head.bias`. A `bottleneck` maps
    features to features of the same shape and a scalar penalty; the model then returns (logits, penalty). It stands in front of
    the head, or of the layer `features[place]`.
    """

    def __init__(
        self,
        normalize: nn.Module,
        features: nn.Module,
        head: nn.Linear,
        bottleneck: nn.Module | None = None,
        place: int | None = None,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.features = features
        self.bottleneck = bottleneck
        self.head = head
        self.place = place

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.normalize(images)
        if self.bottleneck is None:
            return self.head(self.features(x))
        if self.place is None:
            x, penalty = self.bottleneck(self.features(x))
            return self.head(x), penalty
        assert isinstance(self.features, nn.Sequential)
        x, penalty = self.bottleneck(self.features[: self.place](x))
        return self.head(self.features[self.place :](x)), penalty
