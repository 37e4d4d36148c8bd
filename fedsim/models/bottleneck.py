"""Modules that stand between two layers of a network and draw at random, so that its gradient depends on more than the image.

A bottleneck is chosen by a frozen dataclass that is called with the shape of the features it will see, (D,) or (C, H, W), and
returns a module from features (B, ...) to features of the same shape and a scalar penalty, which the loss adds. It draws in
training mode only: in eval mode the mean of what would be drawn takes its place, and an evaluation is a function of the weights.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.checks import number, whole

Shape = tuple[int, ...]


class Stochastic(nn.Module):
    """A module that draws one tensor of `noise_shape` for each image.

    It draws from torch's global stream, as dropout does, while its buffer `noise` is None, which is in no state dict and not sent.
    Who knows or seeks the noise hands (B, *noise_shape) over under that name in `torch.func.functional_call`.
    """

    noise: Tensor | None

    def __init__(self, noise_shape: Shape) -> None:
        super().__init__()
        self.noise_shape = tuple(noise_shape)
        self.register_buffer("noise", None, persistent=False)

    def sample(self, like: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Noise of the shape, dtype and device of `like` (B, *noise_shape)."""
        raise NotImplementedError

    def noise_for(self, like: Tensor) -> Tensor:
        """The noise that was handed over, or else a sample."""
        return self.sample(like) if self.noise is None else self.noise


class VariationalBottleneck(Stochastic):
    """Features to mean mu and deviation sigma of a code, a draw z = mu + epsilon * sigma of it, and back to features.

    The penalty is beta times the mean over the batch of the divergence of N(mu, sigma^2) from N(0, 1), in bits. In eval mode z
    is mu.

    encoder  (B, ...) to (B, 2K, ...): mu, then what softplus makes sigma
    decoder  (B, K, ...) to (B, ...)
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, noise_shape: Shape, beta: float) -> None:
        super().__init__(noise_shape)
        self.encoder, self.decoder, self.beta = encoder, decoder, beta

    def sample(self, like: Tensor, rng: torch.Generator | None = None) -> Tensor:
        return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=rng)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        mean, spread = self.encoder(features).chunk(2, 1)
        deviation = F.softplus(spread)
        code = mean + self.noise_for(mean) * deviation if self.training else mean
        return self.decoder(code), self.beta * divergence_bits(mean, deviation)


def divergence_bits(mean: Tensor, deviation: Tensor) -> Tensor:
    """Divergence of N(mean, deviation^2) from N(0, 1) in bits, summed over the entries of a code (B, ...), mean over the batch."""
    positive = deviation.clamp(min=torch.finfo(deviation.dtype).tiny)  # softplus underflows to 0, whose logarithm is no number
    nats = (mean.square() + deviation.square() - 1) / 2 - positive.log()
    return nats.flatten(1).sum(1).mean() / math.log(2)


class DropoutBottleneck(Stochastic):
    """Each feature is dropped with probability p, the others are divided by 1 - p; the noise is the mask of those that are kept."""

    def __init__(self, shape: Shape, p: float) -> None:
        super().__init__(shape)
        self.p = p

    def sample(self, like: Tensor, rng: torch.Generator | None = None) -> Tensor:
        return (torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=rng) >= self.p).to(like.dtype)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        kept = features * self.noise_for(features) / (1 - self.p) if self.training else features
        return kept, features.new_zeros(())


class Bottleneck(Protocol):
    """A choice of bottleneck.

    after  layers with weights in front of it (convolutions, linear layers, residual blocks); None puts it before the head
    """

    @property
    def after(self) -> int | None: ...

    def __call__(self, shape: Shape) -> nn.Module:
        """The module for features of this shape."""
        ...


def _check_after(after: int | None) -> None:
    if after is not None:
        whole("after", after)


@dataclass(frozen=True)
class Precode:
    """PRECODE's variational bottleneck of `width` codes (Scheliga et al. 2022, section 3): linear encoder and decoder.

    Its gradients, and those of what stands behind it, are those of a random code; those of what stands in front are not hidden, and
    an image that a linear layer sees first stands in them in the clear (`attacks.Analytic`). Costs 2 width (d + 1) + (width + 1) d
    parameters for features of d entries, 787,968 for 1,024, all of which are sent.

    beta  weight of the divergence beside the cross-entropy
    """

    width: int = 256
    beta: float = 1e-3
    after: int | None = None

    def __post_init__(self) -> None:
        whole("width", self.width)
        number("beta", self.beta, 0)
        _check_after(self.after)

    def __call__(self, shape: Shape) -> VariationalBottleneck:
        entries = math.prod(shape)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(entries, 2 * self.width))
        decoder = nn.Sequential(nn.Linear(self.width, entries), nn.Unflatten(1, shape))
        return VariationalBottleneck(encoder, decoder, (self.width,), self.beta)


@dataclass(frozen=True)
class ConvolutionalBottleneck:
    """The convolutional variational bottleneck (Scheliga et al. 2023, arXiv:2309.04515): PRECODE with convolutions, put early.

    Early, because an attacker may leave out the gradients from the bottleneck on, and with few parameters: `channels` codes a pixel
    (None: as many as the features have channels) by square kernels. The paper's sizes could not be read; these are ours.
    """

    channels: int | None = None
    kernel: int = 3
    beta: float = 1e-3
    after: int | None = 1

    def __post_init__(self) -> None:
        if self.channels is not None:
            whole("channels", self.channels)
        whole("kernel", self.kernel)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, so that feature maps keep their size, got {self.kernel}")
        number("beta", self.beta, 0)
        _check_after(self.after)

    def __call__(self, shape: Shape) -> VariationalBottleneck:
        if len(shape) != 3:
            raise ValueError(
                f"a convolutional bottleneck needs feature maps, and these have shape {tuple(shape)}: set "
                f"bottleneck.after to a convolution, or take model/bottleneck=precode"
            )
        channels = self.channels or shape[0]
        encoder = nn.Conv2d(shape[0], 2 * channels, self.kernel, padding="same")
        decoder = nn.Conv2d(channels, shape[0], self.kernel, padding="same")
        return VariationalBottleneck(encoder, decoder, (channels, *shape[1:]), self.beta)


@dataclass(frozen=True)
class Dropout:
    """Drops features with probability `p` (Srivastava et al. 2014), taken for a defense since the attacker does not know which.

    An attacker who looks for the mask together with the image is not stopped by it (Scheliga et al. 2023, arXiv:2208.06163). Sends
    no byte more. The models' own `dropout` stands where their papers put it; this one anywhere, in any model.
    """

    p: float = 0.5
    after: int | None = None

    def __post_init__(self) -> None:
        number("p", self.p, 0, 1)
        if self.p == 1:
            raise ValueError("p must lie in [0, 1), got 1: nothing would be left")
        _check_after(self.after)

    def __call__(self, shape: Shape) -> DropoutBottleneck:
        return DropoutBottleneck(shape, self.p)
