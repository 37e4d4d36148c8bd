"""What clients do to their updates before they send them, or while they compute them.

Each is a frozen dataclass with the protocol `fedsim.defense.Defense`.
"""

from defenses.base import Chain, ErrorFeedback, NoDefense
from defenses.gradients import OutPost, Soteria
from defenses.mixing import InstaHide, MixUp
from defenses.noise import GaussianNoise, LaplacianNoise
from defenses.privacy import DPSGD, Clip, DPFedAvg
from defenses.quantize import StochasticQuantization, UniformQuantization
from defenses.sparsify import TopK
from defenses.transforms import ATS

__all__ = [
    "ATS",
    "DPSGD",
    "Chain",
    "Clip",
    "DPFedAvg",
    "ErrorFeedback",
    "GaussianNoise",
    "InstaHide",
    "LaplacianNoise",
    "MixUp",
    "NoDefense",
    "OutPost",
    "Soteria",
    "StochasticQuantization",
    "TopK",
    "UniformQuantization",
]
