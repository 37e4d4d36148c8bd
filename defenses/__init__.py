"""What clients do to their updates before they send them. Each is a frozen dataclass with the protocol `fedsim.defense.Defense`."""

from defenses.base import Chain, ErrorFeedback, NoDefense
from defenses.factorize import PowerSGD
from defenses.formats import FixedPoint, FloatFormat, Int8, LogQuantization
from defenses.noise import GaussianNoise, LaplacianNoise
from defenses.quantize import QSGD, KMeansQuantization, SignSGD, StochasticQuantization, Ternary, UniformQuantization
from defenses.sparsify import DeepGradientCompression, Pruning, RandomK, Threshold, TopK

__all__ = [
    "QSGD",
    "Chain",
    "DeepGradientCompression",
    "ErrorFeedback",
    "FixedPoint",
    "FloatFormat",
    "GaussianNoise",
    "Int8",
    "KMeansQuantization",
    "LaplacianNoise",
    "LogQuantization",
    "NoDefense",
    "PowerSGD",
    "Pruning",
    "RandomK",
    "SignSGD",
    "StochasticQuantization",
    "Ternary",
    "Threshold",
    "TopK",
    "UniformQuantization",
]
