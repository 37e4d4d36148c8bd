"""Synthetic images: one textured shape on clutter, 32x32, ten classes, made from a seed without any file.

A shape is a signed distance function on the plane (negative inside, unit size about 1), turned, stretched and moved, coloured
and lit at random. One pixel of distance is the width of an edge, which makes edges smooth without drawing larger images. Images
are made in chunks, each with a random stream of its own: a small set is the beginning of a larger one, and memory stays small.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from fedsim.seeding import seed_of

VERSION = 1  # raise it when the same seed would give other images
SIDE = 32
CHUNK = 500
DISTRACTORS = 3

Array = np.ndarray
CENTRES = (np.arange(SIDE, dtype=np.float32) + 0.5) - SIDE / 2  # of pixels, from the middle of the image


def _circle(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 0.95


def _square(x: Array, y: Array) -> Array:
    return np.maximum(abs(x), abs(y)) - 0.82


def _triangle(x: Array, y: Array) -> Array:
    return np.maximum(y - 0.6, abs(x) * 0.866 - y * 0.5 - 0.55)


def _star(x: Array, y: Array) -> Array:
    return _folded(x, y, 5, inner=0.42, outer=1.15)


def _cross(x: Array, y: Array) -> Array:
    x, y = abs(x), abs(y)
    return np.maximum(np.minimum(x, y) - 0.33, np.maximum(x, y) - 1.0)


def _ring(x: Array, y: Array) -> Array:
    return abs(np.hypot(x, y) - 0.76) - 0.24


def _crescent(x: Array, y: Array) -> Array:
    x = x - 0.2
    return np.maximum(np.hypot(x, y) - 1.05, 0.88 - np.hypot(x - 0.55, y))


def _heart(x: Array, y: Array) -> Array:
    x, y = abs(x), 0.2 - y  # tip down
    diamond = (x + abs(y) - 0.9) * 0.7071
    return np.minimum(diamond, np.hypot(x - 0.45, y - 0.45) - 0.636)


def _arrow(x: Array, y: Array) -> Array:
    shaft = np.maximum(abs(y) - 0.25, abs(x + 0.4) - 0.7)
    head = np.maximum(-x - 0.05, (x + abs(y) - 1.0) * 0.7071)
    return np.minimum(shaft, head)


def _flower(x: Array, y: Array) -> Array:
    r = np.hypot(x, y)
    return (r - 0.74 - 0.3 * np.cos(6 * np.arctan2(y, x))) * 0.6


def _folded(x: Array, y: Array, points: int, *, inner: float, outer: float) -> Array:
    """A star: the plane folded into one half of a ray, where its edge is a straight line from tip to notch."""
    sector = np.float32(np.pi / points)
    angle = abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)
    r = np.hypot(x, y)
    along, across = r * np.cos(angle) - np.float32(outer), r * np.sin(angle)
    dx, dy = inner * np.cos(sector) - outer, inner * np.sin(sector)
    return (across * -dx + along * dy) / np.float32(np.hypot(dx, dy))


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "crescent": _crescent,
    "heart": _heart,
    "arrow": _arrow,
    "flower": _flower,
}
CLASSES = tuple(SHAPES)


def images(count: int, *, seed: int, split: str, advance: Callable[[int], None] = lambda done: None) -> tuple[Tensor, Tensor]:
    """Pixels (count, 3, 32, 32) uint8 and labels (count,) int64, in equal shares of each 500; `advance` hears of progress."""
    pixels = np.empty((count, 3, SIDE, SIDE), dtype=np.uint8)
    labels = np.empty(count, dtype=np.int64)

    def fill(start: int) -> int:
        drawn, classes = _chunk(np.random.default_rng(seed_of(seed, "synthetic", split, start)))
        size = min(CHUNK, count - start)
        pixels[start : start + size], labels[start : start + size] = drawn[:size], classes[:size]
        return size

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for done in pool.map(fill, range(0, count, CHUNK)):
            advance(done)
    return torch.from_numpy(pixels), torch.from_numpy(labels)


def _chunk(rng: np.random.Generator) -> tuple[Array, Array]:
    """CHUNK images as bytes and their classes, in random order of classes."""
    order = rng.permutation(CHUNK)
    labels = (np.arange(CHUNK) % len(CLASSES))[order]
    pixels = np.empty((CHUNK, 3, SIDE, SIDE), dtype=np.uint8)
    for label, shape in enumerate(SHAPES.values()):
        pixels[labels == label] = _draw(shape, CHUNK // len(CLASSES), rng)
    return pixels, labels


def _draw(shape: Callable[[Array, Array], Array], n: int, rng: np.random.Generator) -> Array:
    """n images (n, 3, 32, 32) uint8 of one class."""

    def uniform(low: float, high: float, *more: int) -> Array:
        return rng.uniform(low, high, (n, *more, 1, 1)).astype(np.float32)

    canvas = _background(n, rng, uniform)

    size = uniform(6.5, 13.0)
    room = 15.5 - size
    x, y = _turned(uniform(-1, 1) * room, uniform(-1, 1) * room, uniform(-np.pi, np.pi))
    stretch = np.exp(uniform(-0.22, 0.22))
    u, v = x / (size * stretch), y * stretch / size
    u = u + uniform(-0.25, 0.25) * v
    distance = shape(u, v) * size
    inside = np.clip(0.5 - distance, 0, 1)[:, None]
    shadow = np.clip(1 - distance / uniform(1.0, 4.0), 0, 1)[:, None]

    light = uniform(0, 2 * np.pi)
    lit = 1 + uniform(0.1, 0.35) * (u * np.cos(light) + v * np.sin(light))
    edge = 1 - uniform(0.0, 0.5) * np.clip(1 + distance / 2, 0, 1)
    mean = canvas.mean((2, 3), keepdims=True)
    colour = _colour_apart_from(mean, uniform)
    second = np.clip(colour + uniform(-0.35, 0.35, 3), 0, 1)
    paint = colour + (second - colour) * _texture(u * size, v * size, uniform)[:, None]
    canvas *= 1 - uniform(0.1, 0.6)[:, None] * shadow
    canvas += (paint * (lit * edge)[:, None] - canvas) * inside

    exposure = uniform(0.65, 1.15)[:, None] * (
        1 + uniform(-0.012, 0.012)[:, None] * CENTRES + uniform(-0.012, 0.012)[:, None] * CENTRES[:, None]
    )
    canvas *= exposure
    canvas += uniform(0.0, 0.05)[:, None] * rng.standard_normal(canvas.shape, dtype=np.float32)
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


Uniform = Callable[..., Array]


def _background(n: int, rng: np.random.Generator, uniform: Uniform) -> Array:
    """A gradient between two colours with a faint texture, crossed by a few bars and blobs."""
    x, y = _turned(uniform(0, 0), uniform(0, 0), uniform(0, 2 * np.pi))
    first, second = uniform(0.05, 0.95, 3), uniform(0.05, 0.95, 3)
    blend = np.clip(0.5 + x / 36 + uniform(-0.3, 0.3) * (_texture(x, y, uniform) - 0.5), 0, 1)
    canvas = first + (second - first) * blend[:, None]
    for _ in range(DISTRACTORS):
        x, y = _turned(uniform(-17, 17), uniform(-17, 17), uniform(0, 2 * np.pi))
        distance = np.maximum(abs(x) - uniform(2, 14), abs(y) - uniform(0.7, 4.5))
        cover = np.clip(0.5 - distance / uniform(1.0, 3.0), 0, 1) * uniform(0.3, 1.0)
        canvas += (uniform(0.05, 0.95, 3) - canvas) * cover[:, None]
    return canvas


def _turned(centre_x: Array, centre_y: Array, angle: Array) -> tuple[Array, Array]:
    """Pixel positions seen from `centre`, turned by `angle`: each (n, 32, 32)."""
    x, y = CENTRES - centre_x, CENTRES[:, None] - centre_y
    cos, sin = np.cos(angle), np.sin(angle)
    return x * cos + y * sin, y * cos - x * sin


def _texture(x: Array, y: Array, uniform: Uniform) -> Array:
    """Stripes, checks or neither, in [0, 1]; positions in pixels."""
    waves = np.sin(x * uniform(0.5, 1.6) + uniform(0, 6.3))
    other = np.sin(y * uniform(0.5, 1.6) + uniform(0, 6.3))
    checked = uniform(0, 1) < 0.4
    waves = np.where(checked, waves * other * 1.5, waves)
    return np.clip(0.5 + waves * uniform(0.0, 1.2), 0, 1)


def _colour_apart_from(mean: Array, uniform: Uniform) -> Array:
    """A colour (n, 3, 1, 1) away from `mean`, so that the object stands out."""
    colour = uniform(0.05, 1.0, 3)
    gap = colour - mean
    length = np.sqrt((gap * gap).sum(1, keepdims=True)) + 1e-3
    return np.clip(mean + gap * np.maximum(1, 0.4 / length), 0, 1)
