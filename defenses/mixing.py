"""Defenses that train on mixtures of images, with their labels mixed alike. A batch of one image has nothing to be mixed with."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from defenses.base import Untouched
from fedsim.checks import number, whole
from fedsim.training import Batch, probabilities


def images_of(defense: object, images: Tensor) -> Tensor:
    """The images. Raises ValueError for anything else: the defense that was chosen works on pixels."""
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"{type(defense).__name__} works on images (B, C, H, W), got {images.dtype} {tuple(images.shape)}")
    return images


def mixed(mixture: Tensor, batch: Tensor) -> Tensor:
    """Mixtures, by the weights (B, B), of a batch of images (B, C, H, W) or of labels (B, K)."""
    return torch.einsum("ij,j...->i...", mixture.to(batch), batch)


@dataclass(frozen=True)
class MixUp(Untouched):
    """Trains on lambda x_i + (1 - lambda) x_j, and the same of the labels, with lambda ~ Beta(alpha, alpha) (Zhang et al. 2018).

    One lambda a batch and j a permutation of it, as in the paper's own code. Small values of alpha mix little.
    """

    alpha: float = 1.0

    reflects: ClassVar[bool] = False

    def __post_init__(self) -> None:
        number("alpha", self.alpha, 0, above=True)

    def batch(self, images: Tensor, labels: Tensor, classes: int, rng: torch.Generator) -> Batch:
        mixture = self.mixture(len(images_of(self, images)), rng)
        return mixed(mixture, images), mixed(mixture, probabilities(labels, classes))

    def mixture(self, size: int, rng: torch.Generator) -> Tensor:
        seed = int(torch.randint(2**62, (), generator=rng))  # torch draws no Beta from a generator
        share = float(np.random.default_rng(seed).beta(self.alpha, self.alpha))
        own = torch.eye(size)
        return share * own + (1 - share) * own[torch.randperm(size, generator=rng)]


@dataclass(frozen=True)
class InstaHide(Untouched):
    """Trains on mixtures of `k` images with a random sign for each pixel (Huang et al. 2020, the setting within one data set).

    The paper's pixels lie in [-1, 1], where a sign is a reflection about 0; here they lie in [0, 1], and the same mask replaces a
    pixel p of the mixture by 1 - p in half of the places. Weights are uniform on those that add up to 1 and are at most `largest`.
    Each image is mixed with `k` - 1 others of its batch, not of the whole data set, and is in `k` mixtures. Of a batch of fewer
    images all are mixed; where so few cannot keep to `largest`, nothing bounds their weights. Carlini et al. (2021) undo it.
    """

    k: int = 4
    largest: float = 0.65

    reflects: ClassVar[bool] = True

    def __post_init__(self) -> None:
        whole("k", self.k)
        number("largest", self.largest, 0, 1, above=True)
        if self.k > 1 and not self._can_add_up(self.k):
            raise ValueError(
                f"weights of {self.k} images add up to 1: largest must be well above {1 / self.k:g}, got {self.largest}"
            )

    def batch(self, images: Tensor, labels: Tensor, classes: int, rng: torch.Generator) -> Batch:
        mixture = self.mixture(len(images_of(self, images)), rng)
        pixels = mixed(mixture, images)
        kept = (torch.rand(pixels.shape, generator=rng) < 0.5).to(images.device)
        return torch.where(kept, pixels, 1 - pixels), mixed(mixture, probabilities(labels, classes))

    def mixture(self, size: int, rng: torch.Generator) -> Tensor:
        k = min(self.k, size)
        weights = torch.stack([self._weights(k, rng) for _ in range(size)], 1)  # (k, B)
        # Permutations drawn one by one may meet, and mix an image with itself. Steps around a circle of all images do not.
        circle, steps = torch.randperm(size, generator=rng), 1 + torch.randperm(size - 1, generator=rng)[: k - 1]
        partners = [circle[(circle.argsort() + step) % size] for step in steps]
        return torch.einsum("kb,kbi->bi", weights, torch.eye(size)[torch.stack([torch.arange(size), *partners])])

    def _weights(self, k: int, rng: torch.Generator) -> Tensor:
        if k == 1:
            return torch.ones(1)
        largest = self.largest if self._can_add_up(k) else 1.0
        while True:  # one try in at most a few hundred is kept, see __post_init__
            # Exponential numbers over their sum are uniform on the simplex.
            draws = -torch.log1p(-torch.rand(k, generator=rng, dtype=torch.float64))
            weights = draws / draws.sum()
            if float(weights.max()) <= largest:
                return weights.float()

    def _can_add_up(self, k: int) -> bool:
        return self.largest * k > 1.05
