"""What clients do to their updates before they send them, or while they compute them.

Each is a frozen dataclass with the protocol `fedsim.defense.Defense`.
"""

from defenses.base import Chain, ErrorFeedback, NoDefense, Partial
from defenses.factorize import PowerSGD
from defenses.formats import FixedPoint, FloatFormat, Int8, LogQuantization
from defenses.gradients import OutPost, Soteria
from defenses.mixing import InstaHide, MixUp
from defenses.noise import GaussianNoise, LaplacianNoise
from defenses.privacy import DPSGD, Clip, DPFedAvg
from defenses.quantize import QSGD, KMeansQuantization, SignSGD, StochasticQuantization, Ternary, UniformQuantization
from defenses.sparsify import DeepGradientCompression, Pruning, RandomK, Threshold, TopK
from defenses.transforms import ATS

__all__ = [
    "ATS",
    "DPSGD",
    "QSGD",
    "Chain",
    "Clip",
    "DPFedAvg",
    "DeepGradientCompression",
    "ErrorFeedback",
    "FixedPoint",
    "FloatFormat",
    "GaussianNoise",
    "InstaHide",
    "Int8",
    "KMeansQuantization",
    "LaplacianNoise",
    "LogQuantization",
    "MixUp",
    "NoDefense",
    "OutPost",
    "Partial",
    "PowerSGD",
    "Pruning",
    "RandomK",
    "SignSGD",
    "Soteria",
    "StochasticQuantization",
    "Ternary",
    "Threshold",
    "TopK",
    "UniformQuantization",
]
