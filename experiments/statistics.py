"""Whether two accuracies differ, from runs paired by seed: a seed decides the data, the clients and the first weights of both.

That no difference was found does not say that there is none. Two one-sided tests (TOST, Schuirmann 1987) say it: each rejects that
the difference is beyond one end of +-`margin`. Accuracies are shares in [0, 1], and so are differences and margins.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

LEVEL = 0.05
ROUNDING = 1e-9  # accuracies are counts over at most millions of examples, so smaller differences are rounding


@dataclass(frozen=True)
class Difference:
    """The mean of `n` paired differences, with its 90 % t-interval from `low` to `high`, and how far it is from `margin` and 0.

    p_equivalent   of TOST: the larger of its two p-values, below 5 % exactly if the interval lies within +-margin
    p_different    of the two-sided paired t-test; of several that are told together, as `holm` adjusts it
    """

    mean: float
    low: float
    high: float
    n: int
    margin: float
    p_equivalent: float
    p_different: float

    @property
    def verdict(self) -> str:
        """Equivalent, worse or better at 5 %, or undecided; a difference that is certain and within the margin is equivalent."""
        if self.p_equivalent < LEVEL:
            return "equivalent"
        if self.p_different < LEVEL:
            return "worse" if self.mean < 0 else "better"
        return "undecided"


def paired(one: Sequence[float], other: Sequence[float], margin: float) -> Difference:
    """How much `one` is above `other`, the i-th accuracies of which share a seed.

    Differences that are all the same are taken for certain: their p-values are 0 or 1.
    """
    a, b = np.asarray(one, float), np.asarray(other, float)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"accuracies must come in pairs, got {a.shape} and {b.shape}")
    if len(a) < 2:
        raise ValueError(f"a paired test needs two pairs at least, got {len(a)}: run more seeds")
    if not np.isfinite([*a, *b]).all():
        raise ValueError(f"accuracies must be finite, got {[*one]} and {[*other]}")
    if not margin > 0:
        raise ValueError(f"margin must be above 0, got {margin}")
    differences = a - b
    mean = float(differences.mean())
    if np.ptp(differences) < ROUNDING:  # the standard deviation is 0 and t is not a number
        outside, differs = abs(mean) > margin - ROUNDING, abs(mean) > ROUNDING
        return Difference(mean, mean, mean, len(a), margin, float(outside), float(not differs))
    above = stats.ttest_rel(a, b - margin, alternative="greater").pvalue
    below = stats.ttest_rel(a, b + margin, alternative="less").pvalue
    test = stats.ttest_rel(a, b)
    low, high = test.confidence_interval(1 - 2 * LEVEL)
    return Difference(mean, float(low), float(high), len(a), margin, float(max(above, below)), float(test.pvalue))


def bounded_mean(values: np.ndarray, bound: float) -> dict[str, float]:
    """One-sided p-values that the mean of what lies between 0 and 1 is above and below a bound, whatever its distribution.

    Chernoff's bound in the form of Hoeffding (1963, Theorem 1): exp(-n KL(mean, bound)). A t-test is too sure of values most of
    which are 1, and takes values all 1 for proof.
    """
    n, mean = len(values), float(np.clip(values.mean(), 0.0, 1.0))
    p = math.exp(-n * float(special.rel_entr(mean, bound) + special.rel_entr(1 - mean, 1 - bound)))
    return {"greater": p if mean > bound else 1.0, "less": p if mean < bound else 1.0}


def holm(p: Sequence[float]) -> list[float]:
    """These p-values, adjusted (Holm 1979): one or more of those below 5 % is wrong in 5 % of cases at most."""
    order = np.argsort(p)
    steps = np.maximum.accumulate(np.arange(len(p), 0, -1) * np.asarray(p, float)[order])
    return np.minimum(1.0, steps)[np.argsort(order)].tolist()
