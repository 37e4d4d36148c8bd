"""The checks that answer a claim by what a study measured, see `experiments.claims`: each gives two one-sided p-values.

Each raises NotMeasured where there is nothing to answer by.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from attacks.metrics import BARS, wilson
from experiments.results import FOUND, ROWS, SHARES, Results, Where
from experiments.statistics import ROUNDING, bounded_mean
from fedsim.checks import one_of


@dataclass(frozen=True)
class Answer:
    """What was measured: in words, and how surely the claim is true and false, as p-values."""

    ours: str
    holds: float
    fails: float


class NotMeasured(Exception):
    """No cell of the study is what a claim asks for."""


def rate(
    found: Results, attacker: str | None, *, of: str, expect: str, where: Where | None = None, knowing: Where | None = None
) -> Answer:
    """A binomial test of the share of victims that pass."""
    if attacker == "adaptive" and knowing:
        where, who = {**(where or {}), **knowing}, None
    else:
        where, who = where or {}, attacker
    passed = _some(found, where, of, who)
    bound, above = _bound(expect)
    each, text = _once(passed), f"{int(passed.sum())}/{len(passed)}"
    low, high = wilson(each.sum(), len(each))
    text += f" = {passed.mean():.0%} [{low:.0%}, {high:.0%}]" + (f", {len(each)} updates" if len(each) < len(passed) else "")
    p = _share(each, bound)
    if of in FOUND and (perhaps := found.victims(where, of, who, perhaps=True)).sum() > passed.sum():
        text += f", {int((perhaps - passed).sum())} not converged"
        if above or attacker == "adaptive":  # of protection, or that nothing leaks, these say nothing
            p["less"] = _share(_once(perhaps), bound)["less"]
    return Answer(text, *_sided(p, above))


def mean(found: Results, attacker: str | None, *, of: str, expect: str, where: Where | None = None) -> Answer:
    """A t-test of the mean; of scores between 0 and 1, many of which may be 1, a test that holds for whatever they are."""
    where, (bound, above), less = where or {}, _bound(expect), _less(of)
    values = _once(_some(found, where, of, attacker)).to_numpy()
    p = bounded_mean(values, bound) if of in SHARES else _t(values - bound)
    lost = found.lost(where, of, attacker)
    if lost[0] and (above == (less == "less") or attacker == "adaptive"):
        perhaps = _once(found.victims(where, of, attacker, perhaps=True)).to_numpy()
        p[less] = max(p[less], _signs(perhaps - bound)[less])
    return Answer(_told(of, values) + _not_ended(lost), *_sided(p, above))


def difference(
    found: Results, attacker: str | None, *, column: str, of: Where, than: Where, expect: str, where: Where | None = None
) -> Answer:
    """A paired t-test where victims are the same, Welch's where they are not."""
    bound, above = _bound(expect)
    text, values = _compared(found, attacker, column, of, than, where)
    p = _t(values[0] - bound, column == "accuracy") if len(values) == 1 else _welch(values[0] - bound, values[1])
    if column in FOUND:
        less = _less(column)
        more = "less" if less == "greater" else "greater"
        for way, perhaps in ((less, of), (more, than)):  # the side that would leak less may have leaked all the same
            asked = {**(where or {}), **perhaps}
            knows = (attacker or asked.get("attacker", "adaptive")) == "adaptive"
            if knows and found.lost(asked, column, "adaptive")[0]:
                _, values = _compared(found, attacker, column, of, than, where, perhaps)
                ranks = _signs(values[0] - bound) if len(values) == 1 else _ranks(values[0] - bound, values[1])
                p[way] = max(p[way], ranks[way])
    return Answer(text, *_sided(p, above))


def equivalent(
    found: Results, attacker: str | None, *, column: str, of: Where, than: Where, margin: float, where: Where | None = None
) -> Answer:
    """Two one-sided t-tests (TOST) of what was reached; it fails where the difference is beyond the margin on one side."""
    text, values = _compared(found, attacker, column, of, than, where)

    def shifted(by: float) -> dict[str, float]:
        return _t(values[0] + by, column == "accuracy") if len(values) == 1 else _welch(values[0] + by, values[1])

    low, high = shifted(margin), shifted(-margin)
    return Answer(text, max(low["greater"], high["less"]), min(1.0, 2 * min(low["less"], high["greater"])))


def trend(
    found: Results,
    attacker: str | None,
    *,
    column: str,
    expect: str,
    along: str,
    levels: Sequence[Any],
    where: Where | None = None,
) -> Answer:
    """Kendall's rank correlation of the column with the place of the level, over updates or runs.

    A study of the quick size has fewer levels: those not measured are left out, but three of several are a trend's least.
    """
    one_of("expect", expect, ("rises", "falls"))
    _check_listed(found, {**(where or {}), along: list(levels)}, column, attacker)

    def at_each(*, perhaps: bool = False) -> list[np.ndarray]:
        every = (_once(found.values({**(where or {}), along: level}, column, attacker, perhaps=perhaps)) for level in levels)
        return [values.to_numpy() for values in every if len(values)]

    groups = at_each()
    if len(groups) < min(3, len(levels)):
        raise NotMeasured
    p, lost = _kendall(groups), found.lost({**(where or {}), along: list(levels)}, column, attacker)
    if lost[0] and attacker == "adaptive":
        perhaps = _kendall(at_each(perhaps=True))
        p = {way: max(one, perhaps[way]) for way, one in p.items()}
    text = " → ".join(_number(column, group.mean()) for group in groups)
    text += f", n={sum(map(len, groups))}{_not_ended(lost)}"
    if column == "accuracy":
        text += _broken_off(found, {**(where or {}), along: list(levels)})
    return Answer(text, *_sided(p, expect == "rises"))


def correlation(found: Results, attacker: str | None, *, columns: Sequence[str], expect: str, where: Where | None = None) -> Answer:
    """Over settings, of the medians of two columns; Fisher's z with the variance that Bonett and Wright (2000) give Spearman's."""
    bound, above = _bound(expect)
    _check_listed(found, where or {}, columns[0], attacker)
    pairs: list[tuple[float, float]] = []
    for alike in found.of_settings():
        one, other = (_once(alike.victims(where or {}, column, attacker)) for column in columns)
        if len(one):
            pairs.append((float(one.median()), float(other.median())))
    if len(pairs) < 5:
        raise NotMeasured
    rho = float(stats.spearmanr([a for a, _ in pairs], [b for _, b in pairs]).statistic)
    spread = math.sqrt((1 + rho**2 / 2) / (len(pairs) - 3))
    z = (math.atanh(np.clip(rho, -0.999999, 0.999999)) - math.atanh(bound)) / spread
    p = {"greater": float(stats.norm.sf(z)), "less": float(stats.norm.cdf(z))}
    return Answer(f"rho = {rho:.2f} over {len(pairs)} settings", *_sided(p, above))


CHECKS: dict[str, Any] = {
    "rate": rate,
    "mean": mean,
    "difference": difference,
    "equivalent": equivalent,
    "trend": trend,
    "correlation": correlation,
}


def _check_listed(found: Results, where: Where, column: str, attacker: str | None) -> None:
    """Raises NotMeasured where a list asks for a value that the study was to have cells of, and there is nothing of them."""
    for key, asked in where.items():
        for one in asked if isinstance(asked, list) and key not in ROWS else ():
            alone = {**where, key: one}
            if found.is_wanted(alone) and not len(found.values(alone, column, attacker)):
                raise NotMeasured


def _some(
    found: Results, where: Where, column: str, attacker: str | None, apart: Sequence[str] = (), *, perhaps: bool = False
) -> pd.Series:
    """The values of what is selected. Raises NotMeasured where there are none, or not of all that a list asks for."""
    _check_listed(found, where, column, attacker)
    values = found.values(where, column, attacker, apart, perhaps=perhaps)
    if not len(values):
        raise NotMeasured
    return values


def _once(values: pd.Series) -> pd.Series:
    """One value for each update or run, the mean of its images and of those it has in several cells."""
    one = [name for name in values.index.names if name not in ("apart", "image")]
    return values.groupby(level=one).mean() if len(values) else values


def _not_ended(*sides: tuple[int, int]) -> str:
    """In words, of how many searches of each side how many did not end, whatever they found; empty where all did."""
    return f", not ended: {' and '.join(f'{lost}/{n}' for lost, n in sides)}" if any(lost for lost, _ in sides) else ""


def _broken_off(found: Results, *sides: Where) -> str:
    """In words, of how many runs of each side how many did not come to their end; empty where all did."""
    broken = [f"{lost} of {n} runs" for lost, n in map(found.unfinished, sides) if lost]
    return f", {' and '.join(broken)} did not finish" if broken else ""


def _less(column: str) -> str:
    """Which way a score goes where less leaks."""
    return "greater" if column == "mse" else "less"


def _share(each: pd.Series, bound: float) -> dict[str, float]:
    """One-sided p-values that the share is above and below a bound; an update may pass in a part of its images and cells."""
    if not each.isin((0.0, 1.0)).all():
        return bounded_mean(each.to_numpy(), bound)
    return {way: float(stats.binomtest(int(each.sum()), len(each), bound, alternative=way).pvalue) for way in ("greater", "less")}


def _bound(expect: str) -> tuple[float, bool]:
    """The number of ">= 0.5", and whether more is expected."""
    sign, _, number = expect.partition(" ")
    return float(number), one_of("expect", sign, (">=", "<=")) == ">="


def _sided(p: Mapping[str, float], above: bool) -> tuple[float, float]:
    return (p["greater"], p["less"]) if above else (p["less"], p["greater"])


def _t(values: np.ndarray, runs: bool = False) -> dict[str, float]:
    """One-sided p-values that the mean is above and below 0.

    Where all values are the same there is no t. Of `runs` with several seeds that is taken for certain; scores of victims may all
    lie at an end of their scale and say little.
    """
    if len(values) < 2:
        return {"greater": 1.0, "less": 1.0}
    if np.ptp(values) < ROUNDING:
        return {"greater": float(not runs or values[0] < -ROUNDING), "less": float(not runs or values[0] > ROUNDING)}
    return {way: float(stats.ttest_1samp(values, 0.0, alternative=way).pvalue) for way in ("greater", "less")}


def _welch(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    if min(len(one), len(other)) < 2 or np.ptp(one) + np.ptp(other) < ROUNDING:
        return {"greater": 1.0, "less": 1.0}
    return {way: float(stats.ttest_ind(one, other, equal_var=False, alternative=way).pvalue) for way in ("greater", "less")}


def _signs(differences: np.ndarray) -> dict[str, float]:
    """One-sided p-values of the sign test."""
    above, below = int((differences > 0).sum()), int((differences < 0).sum())
    if not above + below:
        return {"greater": 1.0, "less": 1.0}
    return {way: float(stats.binomtest(above, above + below, alternative=way).pvalue) for way in ("greater", "less")}


def _ranks(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """One-sided p-values of Mann and Whitney's test."""
    return {way: float(stats.mannwhitneyu(one, other, alternative=way).pvalue) for way in ("greater", "less")}


def _kendall(groups: Sequence[np.ndarray]) -> dict[str, float]:
    """One-sided p-values that values rise and fall from group to group; 1 where all are the same."""
    places = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    p = {way: float(stats.kendalltau(places, np.concatenate(groups), alternative=way).pvalue) for way in ("greater", "less")}
    return {way: 1.0 if math.isnan(one) else one for way, one in p.items()}


def _compared(
    found: Results, attacker: str | None, column: str, of: Where, than: Where, where: Where | None, perhaps: Where | None = None
) -> tuple[str, list[np.ndarray]]:
    """In words, and the differences of pairs where half of a side or more are in both, else the values of both; `perhaps` is the
    side whose searches that did not end are taken for having found everything."""
    asked = [{**(where or {}), **side} for side in (of, than)]
    apart = found.shared(*asked)
    one, other = (_some(found, {**(where or {}), **side}, column, attacker, apart, perhaps=side is perhaps) for side in (of, than))
    alike = set(one.index.unique("apart")) & set(other.index.unique("apart"))
    if not alike:
        raise NotMeasured
    one, other = (side[side.index.isin(alike, level="apart")].groupby(level=side.index.names).mean() for side in (one, other))
    both = one.index.intersection(other.index)
    pairs = [_once(side.loc[both]) for side in (one, other)]
    one, other = _once(one), _once(other)
    paired = len(pairs[0]) > 1 and 2 * len(pairs[0]) >= min(len(one), len(other))
    if paired:
        one, other = pairs
    text = f"{_number(column, float(one.mean()))} against {_number(column, float(other.mean()))}"
    text += f", {len(one)} pairs" if paired else f", n={len(one)}, {len(other)}"
    text += _not_ended(*(found.lost(side, column, attacker) for side in asked))
    if column == "accuracy":
        text += _broken_off(found, *asked)
    return text, [(one - other).to_numpy()] if paired else [one.to_numpy(), other.to_numpy()]


def _number(column: str, value: float) -> str:
    if column == "psnr_db":
        return f"{value:.1f} dB"
    if column in ("accuracy", "label_right", "exact", *BARS):
        return f"{value:.1%}"
    return f"{value:.3g}"


def _told(column: str, values: np.ndarray) -> str:
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return f"{_number(column, float(values.mean()))} (se {_number(column, error)}), n={len(values)}"
