"""The papers' attacks, as settings of `GradientMatching`. Each says who the attacker is and where it departs from its paper."""

from attacks.matching import GradientMatching
from attacks.optimizers import LBFGS, Adam
from attacks.terms import CosineGap, SquaredGap, TotalVariation


def dlg(restarts: int = 1, evaluations: int = 6000) -> GradientMatching:
    """Deep Leakage from Gradients (Zhu, Liu & Han 2019): images and soft labels that reproduce the gradient, from N(0, 1) noise.

    Threat model: sees one client's gradient and the parameters it was computed at; is told no label.
    Departures: a line search for each problem (the published script has none, and diverges on 20-45 % of starts), restarts
    chosen by matching loss, and a budget counted in gradient evaluations (the paper's 300 outer steps are about 4,000-6,000).
    """
    return GradientMatching(
        gap=SquaredGap(), labels="joint", optimizer=LBFGS(evaluations), restarts=restarts, init="normal"
    )


def idlg(restarts: int = 1, evaluations: int = 6000) -> GradientMatching:
    """Improved DLG (Zhao, Mopuri & Bilen 2020): as `dlg`, with the label read off the gradient first.

    Threat model: as `dlg`. Exact labels at batch size 1; for batches a guess, see `attacks.labels`. Departures: as `dlg`.
    """
    return GradientMatching(
        gap=SquaredGap(), labels="analytic", optimizer=LBFGS(evaluations), restarts=restarts, init="normal"
    )


def inverting_gradients(
    restarts: int = 1, iterations: int = 24_000, rate: float = 0.1, tv: float = 1e-4, told: bool = False
) -> GradientMatching:
    """Inverting Gradients (Geiping et al. 2020): cosine gap, total variation, signed Adam in the box [0, 1].

    Threat model: as `dlg`; with `told`, knows the labels as in the paper's image experiments, else reads them off the gradient.
    Departures: images and box are [0, 1] rather than normalised, so `rate` counts in pixels.
    """
    return GradientMatching(
        gap=CosineGap(),
        priors=(TotalVariation(tv),),
        labels="given" if told else "analytic",
        optimizer=Adam(iterations, rate=rate, signed=True),
        restarts=restarts,
        box=True,
    )
