"""Defenses that train on transformed images, each for itself."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from defenses.base import Untouched
from defenses.mixing import images_of
from fedsim.training import Batch

# (operation, strength in 0..9): the 50 transforms that policies name by their places, as published with the paper.
LIBRARY: tuple[tuple[str, int], ...] = (
    *(("invert", 7), ("contrast", 6), ("rotate", 2), ("translate_x", 9), ("sharpness", 1)),
    *(("sharpness", 3), ("shear_y", 2), ("translate_y", 2), ("autocontrast", 5), ("equalize", 2)),
    *(("shear_y", 5), ("posterize", 5), ("color", 3), ("brightness", 5), ("sharpness", 9)),
    *(("brightness", 9), ("equalize", 5), ("equalize", 1), ("contrast", 7), ("sharpness", 5)),
    *(("color", 5), ("translate_x", 5), ("equalize", 7), ("autocontrast", 8), ("translate_y", 3)),
    *(("sharpness", 6), ("brightness", 6), ("color", 8), ("solarize", 0), ("invert", 0)),
    *(("equalize", 0), ("autocontrast", 0), ("equalize", 8), ("equalize", 4), ("color", 5)),
    *(("equalize", 5), ("autocontrast", 4), ("solarize", 4), ("brightness", 3), ("color", 0)),
    *(("solarize", 1), ("autocontrast", 0), ("translate_y", 3), ("translate_y", 3), ("autocontrast", 1)),
    *(("solarize", 1), ("equalize", 5), ("invert", 0), ("translate_y", 3), ("autocontrast", 1)),
)
RANDOM = "random"
ENHANCE = 0.5  # how far the strongest enhancement is from none
ENHANCEMENTS = ("color", "contrast", "brightness")  # that can be taken back; sharpness cannot
MOVES = ("translate_x", "translate_y", "shear_y")
LENGTH = 3  # transforms of a random policy, as of the published ones


@dataclass(frozen=True)
class ATS(Untouched):
    """Trains on images transformed by a policy chosen to defeat reconstruction (Gao et al. 2021).

    A policy names transforms of the library that are applied one after the other: `3-1-7` and `43-18-18` are the paper's for
    CIFAR-100. With `3-1-7+43-18-18` one of them is drawn for each image, its hybrid; with `random`, any three transforms, its
    baseline. The paper's search for policies is left out. Operations are AutoAugment's, with the strengths of the authors' code
    (enhancements to 1 +- 0.5), by torchvision on bytes. An attacker reconstructs the transformed image, and who knows the policy
    runs it backwards (`undone`).
    """

    policy: str = "3-1-7+43-18-18"

    def __post_init__(self) -> None:
        if not isinstance(self.policy, str) or not all(map(_places, self.policy.split("+"))):
            example = f"numbers below {len(LIBRARY)} such as 3-1-7, several of these joined by +, or {RANDOM}"
            raise ValueError(f"policy must be {example}, got {self.policy!r}")

    def batch(self, images: Tensor, labels: Tensor, classes: int, rng: torch.Generator) -> Batch:
        return torch.stack([self._transformed(image, rng) for image in images_of(self, images)]), labels

    def _transformed(self, image: Tensor, rng: torch.Generator) -> Tensor:
        policies = self.policy.split("+")
        policy = policies[int(torch.randint(len(policies), (), generator=rng))]
        places = torch.randint(len(LIBRARY), (LENGTH,), generator=rng).tolist() if policy == RANDOM else _places(policy)
        return _forward(image, places, [1 - 2 * int(torch.randint(2, (), generator=rng)) for _ in places])

    def undone(self, images: Tensor) -> Tensor:
        """Each image by the policy and the signs that, run backwards and forwards again, come nearest to what is there.

        What was moved out of the frame is lost; the mean of the rest stands there. Random policies are too many to try.
        """
        policies = self.policy.split("+")
        return (
            images
            if RANDOM in policies
            else torch.stack([_undone(image, [_places(policy) for policy in policies]) for image in images])
        )


def _places(policy: str) -> list[int]:
    """Places in the library; empty when that is not what they are. A random policy is given one, which is not used."""
    words = ["0"] if policy == RANDOM else policy.split("-")
    return [int(word) for word in words] if all(word.isdecimal() and int(word) < len(LIBRARY) for word in words) else []


def _forward(image: Tensor, places: Sequence[int], signs: Sequence[int]) -> Tensor:
    """The image after the transforms at these places, on bytes."""
    pixels = (image * 255).round().byte()
    for place, sign in zip(places, signs, strict=True):
        name, strength = LIBRARY[place]
        pixels = operation(name)(pixels, strength / 9, sign)
    return pixels.to(image) / 255


def _undone(image: Tensor, policies: Sequence[Sequence[int]]) -> Tensor:
    ways = [(places, signs) for places in policies for signs in itertools.product((1, -1), repeat=len(places))]
    found = [_backward(image, *way) for way in ways]
    again = [_forward(one, *way) for (one, _), way in zip(found, ways, strict=True)]
    made, inside = found[min(range(len(ways)), key=lambda i: float((again[i] - image).square().mean()))]
    mean = (made * inside).flatten(1).sum(1) / inside.sum().clamp(min=1)
    return torch.where(inside, made, mean[:, None, None])


def _backward(image: Tensor, places: Sequence[int], signs: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The image before the transforms at these places, and where (1, H, W) there is anything of it."""
    steps = [(*LIBRARY[place], sign) for place, sign in zip(places, signs, strict=True)]
    inside = torch.ones_like(image[:1])
    for name, strength, sign in steps:
        if name in MOVES:
            inside = operation(name)(inside, strength / 9, sign)
    for name, strength, sign in reversed(steps):
        if name in MOVES:
            inside, image = (operation(name)(t, strength / 9, -sign) for t in (inside, image))
        elif name in ENHANCEMENTS:
            # By one over the factor: the grey that images are blended with stays as it is.
            back = (1 / (1 + sign * strength / 9 * ENHANCE) - 1) / ENHANCE
            image = operation(name)(image, abs(back), -1 if back < 0 else 1)
        elif name == "invert":
            image = 1 - image
    return image.clamp(0, 1), inside > 0.5


def operation(name: str) -> Callable[[Tensor, float, int], Tensor]:
    """AutoAugment's operation `name`, of bytes (C, H, W), a strength in [0, 1], and a sign for those that have two directions."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    def moved(image: Tensor, across: float = 0.0, down: float = 0.0, shear: float = 0.0) -> Tensor:
        height, width = image.shape[-2:]
        offset = [round(across * width), round(down * height)]
        degrees = math.degrees(math.atan(shear))
        smooth = InterpolationMode.BILINEAR
        return F.affine(image, 0.0, offset, 1.0, [0.0, degrees], interpolation=smooth, center=[0.0, 0.0])

    span = 150 / 331
    made: dict[str, Callable[[Tensor, float, int], Tensor]] = {
        "translate_x": lambda x, s, sign: moved(x, across=sign * s * span),
        "translate_y": lambda x, s, sign: moved(x, down=sign * s * span),
        "shear_y": lambda x, s, sign: moved(x, shear=sign * s * 0.3),
        "rotate": lambda x, s, sign: F.rotate(x, 30 * s, InterpolationMode.BILINEAR, fill=[128.0] * x.shape[0]),
        "color": lambda x, s, sign: F.adjust_saturation(x, 1 + sign * s * ENHANCE),
        "contrast": lambda x, s, sign: F.adjust_contrast(x, 1 + sign * s * ENHANCE),
        "brightness": lambda x, s, sign: F.adjust_brightness(x, 1 + sign * s * ENHANCE),
        "sharpness": lambda x, s, sign: F.adjust_sharpness(x, 1 + sign * s * ENHANCE),
        "posterize": lambda x, s, sign: F.posterize(x, round(8 - 4 * s)),
        "solarize": lambda x, s, sign: F.solarize(x, 256 * (1 - s)) if s else x,  # no byte reaches 256
        "autocontrast": lambda x, s, sign: F.autocontrast(x),
        "equalize": lambda x, s, sign: F.equalize(x),
        "invert": lambda x, s, sign: F.invert(x),
    }
    return made[name]
