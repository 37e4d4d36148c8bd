"""Labelled images as two tensors: pixels (N, C, H, W) uint8 and labels (N,) int64.

Bytes are what is held, since 60,000 images of CIFAR-10 are then 184 MB; floats in [0, 1] are what is handed out.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Images:
    """One split of a dataset."""

    pixels: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.pixels.dtype != torch.uint8 or self.pixels.dim() != 4:
            raise ValueError(f"pixels must be uint8 (N, C, H, W), got {self.pixels.dtype} {tuple(self.pixels.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.pixels.shape[:1]:
            raise ValueError(f"labels must be int64 ({len(self.pixels)},), got {self.labels.dtype} {tuple(self.labels.shape)}")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Images({len(self)} of {'x'.join(map(str, self.pixels.shape[1:]))})"

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) float32 in [0, 1] and labels (B,) at the places `index` (B,)."""
        return self.pixels[index].float() / 255, self.labels[index]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, `size` at a time; the last batch may be smaller."""
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        for pixels, labels in zip(self.pixels.split(size), self.labels.split(size), strict=True):
            yield pixels.float() / 255, labels

    def take(self, index: Tensor) -> "Images":
        """The images at the places `index`."""
        return Images(self.pixels[index], self.labels[index])

    def to(self, device: torch.device | str) -> "Images":
        """The same images on `device`."""
        return Images(self.pixels.to(device), self.labels.to(device))


def fingerprint(*tensors: Tensor) -> str:
    """A hash of tensors' shapes and values."""
    found = hashlib.sha256()
    for t in tensors:
        found.update(f"{t.dtype} {tuple(t.shape)}".encode())
        found.update(t.contiguous().numpy().data)
    return found.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test images of the same shape and classes. Statistics are of the training images, in [0, 1]."""

    name: str
    train: Images
    test: Images
    classes: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}, train={self.train}, test={self.test}, {self.num_classes} classes)"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        channels, height, width = self.train.pixels.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """K"""
        return len(self.classes)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the training images and labels in their order: runs on data of the same hash see the same."""
        return fingerprint(self.train.pixels, self.train.labels)

    @cached_property
    def mean(self) -> Tensor:
        """(C,) mean of each channel."""
        return (self._histogram @ self._levels).float()

    @cached_property
    def std(self) -> Tensor:
        """(C,) standard deviation of each channel over all pixels of all images."""
        second = self._histogram @ self._levels.square()
        return (second - (self._histogram @ self._levels).square()).clamp_min(0).sqrt().float()

    @cached_property
    def mean_image(self) -> Tensor:
        """(C, H, W) the mean of all images: what an attacker who knows only the dataset would draw."""
        total = sum((part.sum(0, dtype=torch.int64) for part in self.train.pixels.split(1000)), torch.tensor(0))
        return (total.double() / (255 * len(self.train))).float()

    @cached_property
    def _histogram(self) -> Tensor:
        """(C, 256) how often each channel takes each level: exact, and small in memory."""
        counts = [torch.bincount(channel.reshape(-1), minlength=256) for channel in self.train.pixels.unbind(1)]
        return torch.stack(counts).double() / counts[0].sum()

    @property
    def _levels(self) -> Tensor:
        return torch.arange(256, dtype=torch.float64, device=self.train.pixels.device) / 255
