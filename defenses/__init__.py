"""What clients do to their updates before they send them. Each is a frozen dataclass with the protocol `fedsim.defense.Defense`."""

from defenses.base import Chain, ErrorFeedback, NoDefense, Partial
from defenses.noise import GaussianNoise, LaplacianNoise
from defenses.quantize import StochasticQuantization, UniformQuantization
from defenses.sparsify import TopK

__all__ = [
    "Chain",
    "ErrorFeedback",
    "GaussianNoise",
    "LaplacianNoise",
    "NoDefense",
    "Partial",
    "StochasticQuantization",
    "TopK",
    "UniformQuantization",
]
