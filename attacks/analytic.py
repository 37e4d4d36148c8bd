"""Exact inversion of a linear layer with a bias that sees the image first (Phong et al. 2017, section 3; Geiping et al. 2020, 3.1).

The layer computes z = W x + b, so for one image dL/dW_i = (dL/db_i) x: every unit i that took part holds the image, times a number
that is sent beside it. Nothing behind the layer matters, a variational bottleneck least of all. Dense layers see whole images in
MLPs; behind a convolution they see its features, and this attack does not apply.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.batching import one_by_one
from attacks.evidence import (
    Unsupported,
    draws,
    fed_to_linear,
    gradient_of,
    reconstruction,
    relative_gap,
    sent_entries,
    size_of,
)
from attacks.labels import labels_at
from fedsim.observation import Knowledge, Observation, Reconstruction
from fedsim.seeding import generator


@dataclass(frozen=True)
class Entrance:
    """The linear layer that an image enters first: it is fed `scale * image + shift`, entry by entry, flattened.

    name          as in `model.named_modules()`
    scale, shift  (C, H, W) what stands before it: normalisation, or 1 and 0
    """

    name: str
    scale: Tensor
    shift: Tensor

    def fed(self, images: Tensor) -> Tensor:
        """(B, n) float64, what the layer is fed for images (B, C, H, W)."""
        return (images.double() * self.scale + self.shift).flatten(1)

    def images(self, fed: Tensor) -> Tensor:
        """(B, C, H, W) float64, the images for which the layer is fed `fed` (B, n)."""
        return (fed.double().reshape(-1, *self.scale.shape) - self.shift) / self.scale


def entrance(
    model: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], image_shape: tuple[int, ...]
) -> Entrance:
    """Finds the layer by what it is fed when the model is shown black, white and a random image; Unsupported if there is none."""
    device = next(iter(params.values())).device
    noise = torch.rand(image_shape, generator=generator(0, "probe")).to(device)
    probes = torch.stack([torch.zeros_like(noise), torch.ones_like(noise), noise])
    fed, _ = fed_to_linear(model, params, buffers, probes)
    for name, h in fed.items():
        if h.shape[1] != noise.numel() or f"{name}.bias" not in params:
            continue
        black, white, noisy = h.double().reshape(3, *noise.shape)
        scale = white - black
        if bool((scale != 0).all()) and torch.allclose(black + scale * noise, noisy, rtol=1e-4, atol=1e-5):
            return Entrance(name, scale, black)
    raise Unsupported(
        f"no linear layer with a bias sees the image first in this {type(model).__name__}: use rgap, or an attack by optimisation"
    )


@dataclass(frozen=True)
class Analytic:
    """Divides the first linear layer's gradient by its bias's: exact for one image, whatever stands behind the layer.

    Threat model: sees one client's gradient and the parameters it was computed at; the label is read off the gradient. Units are
    averaged by least squares, x = sum_i db_i dW_i / sum_i db_i^2, over what was sent of each pixel if the update is sparse.

    A batch of B: unit i holds sum_b d_ib x_b / sum_b d_ib, a mix of its images with weights that sum to 1. With ReLU, some units
    were switched on by one image only and hold it alone: two such units agree, while two mixes do not. So units that agree on an
    image to within `same` are taken for it, the most numerous first. Where there are fewer such images than B, as always with
    smooth activations, mixes fill the places, those nearest to the range of an image: expect averages, and `converged` False.

    `converged`: the gradient at the reconstruction is the one that was sent, up to `tolerance` (relative squared gap), and of a
    batch no place was filled by a mix: two images of one class and their average have nearly the same gradient in a smooth network.
    For a single image whose gradient nobody can recompute, of a model that draws at random or of several local steps: the first
    layer's update is that of some signal times the reconstruction; no other image of a batch of one could have had it.

    same       root mean squared difference of two units' images, in pixel values, below which they are one image
    """

    same: float = 1e-4
    tolerance: float = 1e-8

    def __post_init__(self) -> None:
        if not (self.same > 0 and self.tolerance > 0):
            raise ValueError(f"same and tolerance must be > 0, got {self.same} and {self.tolerance}")

    def __call__(
        self,
        seen: Sequence[Observation],
        known: Knowledge,
        model: nn.Module,
        rng: torch.Generator,
        *,
        report: Callable[[int, int], None] | None = None,
    ) -> list[Reconstruction]:
        """One reconstruction for each observation, in order; draws nothing."""
        return one_by_one(seen, lambda one: self._invert(one, known, model), report)

    def check_model(self, model: nn.Module, image_shape: tuple[int, ...]) -> None:
        """Raises Unsupported for a model that it cannot work on."""
        entrance(model, dict(model.named_parameters()), dict(model.named_buffers()), image_shape)

    def _invert(self, seen: Observation, known: Knowledge, model: nn.Module) -> Reconstruction:
        began = time.perf_counter()
        layer = entrance(model, seen.params, seen.buffers, known.image_shape)
        gradient = gradient_of(seen, known)
        weight, bias = gradient[f"{layer.name}.weight"].double(), gradient[f"{layer.name}.bias"].double()
        size = size_of(seen, known)
        if size == 1:
            images = layer.images(_least_squares(weight, bias, sent_entries(seen, f"{layer.name}.weight"))[None])
            certain = int(bias.any())  # where no unit took part, every image explains the gradient, and none is stolen
        else:
            images, certain = separate(layer, weight, bias, size, self.same)
        images = images.nan_to_num(0.5).float().clamp(0, 1)
        labels, soft = labels_at(seen, known, model, images)
        gap = relative_gap(seen, known, model, images, soft)
        if size == 1 and gap > self.tolerance and ((known.local_steps or 1) > 1 or draws(seen, model, images)):
            gap = _unexplained(weight, bias, layer.fed(images))
        return reconstruction(images, labels, gap, certain == size and gap <= self.tolerance, time.perf_counter() - began)


def _least_squares(weight: Tensor, bias: Tensor, sent: Tensor | None = None) -> Tensor:
    """(n,) the x for which `bias` (m,) times x is nearest to `weight` (m, n), over the entries `sent`; NaN where none was."""
    if sent is None:
        return bias @ weight / bias.square().sum()
    return (bias[:, None] * weight * sent).sum(0) / (bias.square()[:, None] * sent).sum(0)


def _unexplained(weight: Tensor, bias: Tensor, fed: Tensor) -> float:
    """Share of the squared gradient [dL/dW, dL/db] that is no multiple, unit by unit, of [x, 1] with x = `fed` (1, n)."""
    x = torch.cat([fed[0], fed.new_ones(1)])
    g = torch.cat([weight, bias[:, None]], 1)
    total = float(g.square().sum())
    return 1 - float((g @ x).square().sum() / x.square().sum()) / total if total else 1.0


def separate(layer: Entrance, weight: Tensor, bias: Tensor, size: int, same: float) -> tuple[Tensor, int]:
    """Images (B, C, H, W) of a batch of B = `size`, as `Analytic` tells, and on how many of them, the first, units agree.

    weight  (m, n) gradient of the layer's weight
    bias    (m,) of its bias
    """
    alive = (bias.abs() > 1e-6 * bias.abs().max()).nonzero().squeeze(1)
    alive = alive[bias[alive].abs().argsort(descending=True, stable=True)]  # the larger, the less rounding in the quotient
    if not len(alive):
        return torch.full((size, *layer.scale.shape), 0.5, device=weight.device, dtype=torch.float64), 0
    mixes = layer.images(weight[alive] / bias[alive, None]).flatten(1)
    near = torch.cdist(mixes, mixes) < same * mixes.shape[1] ** 0.5
    clusters, free = [], torch.ones(len(alive), dtype=torch.bool, device=weight.device)
    for i in range(len(alive)):
        if free[i] and int((members := near[i] & free).sum()) > 1:
            clusters.append(members)
            free &= ~members
    clusters.sort(key=lambda members: -int(members.sum()))
    agreeing = [alive[members] for members in clusters[:size]]
    chosen = [layer.images(_least_squares(weight[units], bias[units])[None])[0].flatten() for units in agreeing]
    outside = (mixes - mixes.clamp(0, 1)).square().sum(1)
    rest = outside.argsort(stable=True)[: size - len(chosen)]
    images = torch.stack([*chosen, *mixes[rest]])
    images = torch.cat([images, images[-1:].expand(size - len(images), -1)])
    return images.reshape(size, *layer.scale.shape), len(chosen)
