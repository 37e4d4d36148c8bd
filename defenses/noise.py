"""Additive noise on every entry that is sent.

Its size is given in exactly one of three ways, because the papers mix them up and the same number means very different things:
`std`, the standard deviation of an entry; `variance`, its square; or `relative`, the expected length of the whole noise vector as
a share of the length of the update, which alone does not depend on the model, the loss or the learning rate.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsim.checks import number
from fedsim.defense import Belief, Beliefs, State
from fedsim.updates import Update
from fedsim.wire import Packets


def _checked(noise: "GaussianNoise | LaplacianNoise") -> None:
    given = {name: getattr(noise, name) for name in ("std", "variance", "relative") if getattr(noise, name) is not None}
    if len(given) != 1:
        got = f"{given}: put null for the others" if given else "none"
        raise ValueError(f"noise takes exactly one of std, variance and relative, got {got}")
    ((name, size),) = given.items()
    number(name, size, 0)


def _std(noise: "GaussianNoise | LaplacianNoise", packets: Packets) -> float:
    if noise.std is not None:
        return noise.std
    if noise.variance is not None:
        return math.sqrt(noise.variance)
    assert noise.relative is not None  # _checked
    entries = sum(p.values.numel() for p in packets.values())
    squares = sum(float(p.values.double().square().sum()) for p in packets.values())
    return noise.relative * math.sqrt(squares / entries) if entries else 0.0


@dataclass(frozen=True)
class GaussianNoise:
    """Adds independent N(0, std^2) to each entry sent. Entries no longer lie on a grid afterwards, so they travel as floats."""

    std: float | None = None
    variance: float | None = None
    relative: float | None = None

    def __post_init__(self) -> None:
        _checked(self)

    def init(self, like: Update) -> State:
        return {}

    def __call__(self, packets: Packets, state: State, rng: torch.Generator) -> tuple[Packets, State]:
        std = _std(self, packets)

        def noisy(values: Tensor) -> Tensor:
            return values + std * torch.randn(values.shape, generator=rng).to(values.device)

        return {name: replace(p, values=noisy(p.values), grid=None) for name, p in packets.items()}, state

    def explain(self, packets: Packets, beliefs: Mapping[str, Belief]) -> Beliefs:
        return {name: belief.unbounded(packets[name].sent()) for name, belief in beliefs.items()}


@dataclass(frozen=True)
class LaplacianNoise:
    """Adds independent Laplace(0, b) to each entry sent, with b = std / sqrt(2), so that its variance is std^2."""

    std: float | None = None
    variance: float | None = None
    relative: float | None = None

    def __post_init__(self) -> None:
        _checked(self)

    def init(self, like: Update) -> State:
        return {}

    def __call__(self, packets: Packets, state: State, rng: torch.Generator) -> tuple[Packets, State]:
        b = _std(self, packets) / math.sqrt(2)

        def noisy(values: Tensor) -> Tensor:
            # The quantile function of the Laplace distribution at a uniform number in [-1/2, 1/2).
            u = torch.rand(values.shape, generator=rng, dtype=torch.float64).to(values.device) - 0.5
            draw = -u.sign() * torch.log1p(-2 * u.abs().clamp(max=0.5 - 1e-16))
            return values + (b * draw).float()

        return {name: replace(p, values=noisy(p.values), grid=None) for name, p in packets.items()}, state

    def explain(self, packets: Packets, beliefs: Mapping[str, Belief]) -> Beliefs:
        return {name: belief.unbounded(packets[name].sent()) for name, belief in beliefs.items()}
