"""Attacks: what an eavesdropper can make of the updates it sees. Choose a preset, or put one together from the parts."""

from attacks.adaptive import Rehearsed, adapted
from attacks.analytic import Analytic
from attacks.escalation import Escalation, Where
from attacks.evidence import Unsupported, relative_gap
from attacks.gan import ClassGAN
from attacks.generative import Autoencoder, GenerativePrior, PrincipalComponents
from attacks.imprint import Imprint
from attacks.labels import analytic_labels, soft_labels
from attacks.matching import GradientMatching
from attacks.optimizers import LBFGS, SGD, Adam, Stop
from attacks.presets import (
    cosine_adam,
    cosine_lbfgs,
    dager,
    dlg,
    dlg_text,
    fedavg,
    gan,
    gias,
    gradinversion,
    idlg,
    inverting_gradients,
    precode_aware,
    precode_ignore,
    precode_naive,
    sapag,
    strongest,
    tag,
)
from attacks.rgap import RGAP
from attacks.spear import SPEAR
from attacks.terms import CosineGap, GaussianGap, OutOfRange, SquaredAndAbsoluteGap, SquaredGap, SquaredPixels, TotalVariation
from attacks.text import BagOfTokens, SpanCheck, TextMatching
from attacks.unmixing import Undone, Unmixed

__all__ = [
    "LBFGS",
    "RGAP",
    "SGD",
    "SPEAR",
    "Adam",
    "Analytic",
    "Autoencoder",
    "BagOfTokens",
    "ClassGAN",
    "CosineGap",
    "Escalation",
    "GaussianGap",
    "GenerativePrior",
    "GradientMatching",
    "Imprint",
    "OutOfRange",
    "PrincipalComponents",
    "Rehearsed",
    "SpanCheck",
    "SquaredAndAbsoluteGap",
    "SquaredGap",
    "SquaredPixels",
    "Stop",
    "TextMatching",
    "TotalVariation",
    "Undone",
    "Unmixed",
    "Unsupported",
    "Where",
    "adapted",
    "analytic_labels",
    "cosine_adam",
    "cosine_lbfgs",
    "dager",
    "dlg",
    "dlg_text",
    "fedavg",
    "gan",
    "gias",
    "gradinversion",
    "idlg",
    "inverting_gradients",
    "precode_aware",
    "precode_ignore",
    "precode_naive",
    "relative_gap",
    "sapag",
    "soft_labels",
    "strongest",
    "tag",
]
