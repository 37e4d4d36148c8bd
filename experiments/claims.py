"""What was published, held against what studies measured: `claims.yaml` says each claim as a test, and the verdict is computed.

A claim is checked by one of these, on victims or runs that `where` selects by their configuration or by columns of their tables:

    rate         share of victims that pass a bar, or of which a column is true                  expect: ">= 0.5" or "<= 0.5"
    mean         mean of a column over victims, or of `accuracy` over runs                      expect: ">= 20"
    difference   mean of a column where `of` minus where `than`, paired where both have a victim expect: ">= 4"
    equivalent   the same difference is within +-`margin` (TOST)
    trend        a column rises or falls along the levels of a setting (Kendall)                 expect: rises or falls
    correlation  Spearman's between two columns, over the medians of settings (Fisher's z)       expect: ">= 0.7"
    cells        how many cells the full study has                                              expect: 960
    test         a test of this project shows it                                                tests/test_file.py::test_name

Each gives two one-sided p-values: that the claim is not true, and that it is. Within a study they are adjusted (Holm 1979).

A victim counts once, in however many cells it was attacked, and images of one update, which are found or missed together, are one
trial: n counts updates. Two sides are compared in cells that are alike in all other settings. A claim that lists several values of
a setting is not measured where the study was to have cells of one of them, and none are there.

That something protects is shown only by an attacker who knows of it and whose searches came to their end: of one that did not, a
victim counts as perhaps stolen. Nor do such searches refute a leak. So where an adaptive attacker's searches did not end, that less
leaks has to hold both of what they reached and, by ranks, if they had found everything. What a naive attacker reaches with one and
the same budget is compared as it is, and how many of his searches did not end stands beside it.
`knowing` is what is asked of the adaptive attacker's cells in the place of `where`, if he needs another attack.
"""

import fnmatch
import importlib.util
import itertools
import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from attacks.metrics import BARS, wilson
from experiments.config import Config
from experiments.naming import NO_MATTER, conditions, label
from experiments.scoring import ADAPTIVE
from experiments.statistics import LEVEL, ROUNDING, bounded_mean, holm
from experiments.summary import LAST, PERFECT, Summary
from fedsim.checks import one_of
from fedsim.files import read_json
from fedsim.run import RunFolder

FILE = Path(__file__).with_name("claims.yaml")
UNIT = "tests"  # claims that no study but a test answers
HOLDS, NAIVE, OPEN, REFUTED, MISSING = (
    *("holds", "holds only against a naive attacker", "not reproduced", "refuted", "not measured"),
)

Where = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """One published claim.

    row        where it stands in the list of sources' claims
    study      whose cells answer it
    claim      what is said, in words
    source     by whom
    published  the number or words there; None where it could not be read again
    check      one of the checks above, by name, with its settings
    attacker   naive or adaptive; of a claim that something protects, both
    """

    row: str
    study: str
    claim: str
    source: str
    check: str
    settings: dict[str, Any]
    published: str | None = None
    attacker: str = "naive"


@dataclass(frozen=True)
class Answer:
    """What was measured: in words, and how surely the claim is true and false, as p-values."""

    ours: str
    holds: float
    fails: float


@dataclass(frozen=True)
class Verdict:
    """A claim, what was measured of it by each attacker it is asked of, and what follows from that."""

    claim: Claim
    verdict: str
    ours: str


def load(path: Path = FILE) -> list[Claim]:
    """All claims. Raises ValueError for one that no check can answer."""
    from omegaconf import OmegaConf

    from experiments import study

    told: Any = OmegaConf.to_container(OmegaConf.load(path))
    found = []
    for name, claims in told.items():
        if name != UNIT:
            one_of("study", name, study.names())
        for one in claims:
            (check,) = one.keys() & CHECKS.keys() or [None]
            if check is None:
                raise ValueError(f"{path.name}: claim {one.get('row')} of {name} has none of the checks {', '.join(CHECKS)}")
            rest = {key: value for key, value in one.items() if key != check}
            settings = one[check] if isinstance(one[check], dict) else {"expect": one[check]}
            found.append(Claim(study=name, check=check, settings=settings, **rest))
    return found


@dataclass(frozen=True)
class Results:
    """What the cells of a study say: their configurations, one flat mapping each, their rounds and their leaks.

    `conditions` and `defenses` are what each was trained under, and behind what; `wanted` the configurations that there were to be.
    """

    settings: list[dict[str, Any]]
    leaks: list[pd.DataFrame]
    rounds: list[pd.DataFrame]
    conditions: list[str]
    defenses: list[str]
    wanted: Sequence[dict[str, Any]] = ()

    @classmethod
    def of(cls, folders: Sequence[RunFolder], wanted: Sequence[Config] = ()) -> "Results":
        """The results of these cells, of those that were wanted."""
        configs = [folder.config for folder in folders]
        return cls(
            [flat(config) for config in configs],
            [_own(folder) for folder in folders],
            [folder.rounds() for folder in folders],
            [conditions(config) for config in configs],
            [label(config) for config in configs],
            [flat(config) for config in wanted],
        )

    def of_settings(self) -> list["Results"]:
        """Cells that differ in their seeds alone, together."""
        alike: dict[str, list[int]] = {}
        for i, settings in enumerate(self.settings):
            matter = {key: value for key, value in settings.items() if key.split(".")[0] not in (*NO_MATTER, "seed", "choices")}
            alike.setdefault(json.dumps(matter, sort_keys=True), []).append(i)
        return [
            Results(
                [self.settings[i] for i in places],
                [self.leaks[i] for i in places],
                [self.rounds[i] for i in places],
                [self.conditions[i] for i in places],
                [self.defenses[i] for i in places],
            )
            for places in alike.values()
        ]

    def is_wanted(self, where: Where) -> bool:
        """Whether there was to be a cell of what is selected."""
        return any(matches(settings, _of_cells(where)) for settings in self.wanted)

    def shared(self, one: Where, other: Where) -> list[str]:
        """Settings that vary among what is selected, and in which a cell of one side has its like on the other."""
        sides = [[settings for settings in self.settings if matches(settings, _of_cells(where))] for where in (one, other)]

        def is_shared(key: str) -> bool:
            if one.get(key) != other.get(key) or key.split(".")[0] in (*NO_MATTER, *ROWS, "seed", "choices"):
                return False
            values = [{settings.get(key) for settings in side} for side in sides]
            # What only cells of one side have, or have by what tells the sides apart, has no like.
            return len(values[0] | values[1]) > 1 and (key in one or bool(values[0] & values[1] - {None}))

        return [key for key in dict.fromkeys(itertools.chain(*sides[0], *sides[1])) if is_shared(key)]

    def victims(
        self, where: Where, column: str, attacker: str | None, apart: Sequence[str] = (), *, perhaps: bool = False
    ) -> pd.Series:
        """A column of the leaks of what is selected; the index tells victims apart, seeds and rounds too, but of cells those alone
        that differ in the settings `apart`. `perhaps` takes searches that did not end for having found everything."""
        found = []
        for settings, leaks in zip(self.settings, self.leaks, strict=True):
            if not len(leaks):
                continue
            inside = {key: value for key, value in where.items() if key in ROWS}
            if not matches(settings, _of_cells(where)):
                continue
            if isinstance(named := inside.get("round"), str):
                rounds = sorted(leaks["round"].unique())
                inside["round"] = rounds[STAGES[one_of("round", named, STAGES)](len(rounds))]
            for key, asked in (inside if attacker is None else {**inside, "attacker": attacker}).items():
                leaks = leaks[[matches({key: value}, {key: asked}) for value in leaks[key]]]
            values, keys = _values(leaks, column), [leaks[key] for key in _KEYS]
            if perhaps:
                values = values.mask(leaks["converged"] == 0, FOUND[column])
            of_cell = [[value] * len(leaks) for value in (settings["data"], settings["seed"], _told_apart(settings, apart))]
            values.index = pd.MultiIndex.from_arrays([*of_cell, *keys], names=["data", "seed", "apart", *_KEYS])
            found.append(values)
        return pd.concat(found) if found else pd.Series(dtype=float)

    def runs(self, where: Where, column: str, apart: Sequence[str] = ()) -> pd.Series:
        """The mean of the last evaluations of a column of the rounds, or that of one round, of each selected run that came to its
        end; by seed, by what it was trained under, and by the settings `apart`."""
        found = []
        for i, key in self._trained(where):
            settings, rounds = self.settings[i], self.rounds[i]
            if column not in rounds or rounds["round"].max() < settings["rounds"]:
                continue
            asked = rounds["round"] == where["round"] if "round" in where else rounds["round"] > 0
            if len(of := rounds[asked].dropna(subset=column)):
                found.append((*key, _told_apart(settings, apart), float(of.sort_values("round")[column].tail(LAST).mean())))
        keys = ["seed", "conditions", "defense", "apart"]
        once = pd.DataFrame(found, columns=[*keys, column]).drop_duplicates(keys)  # what differs in its attack has learned the same
        return once.set_index(["seed", "conditions", "apart"])[column].astype(float)

    def unfinished(self, where: Where) -> tuple[int, int]:
        """How many of the selected trainings did not come to their end, of how many."""
        trained = self._trained(where)
        done = {key for i, key in trained if len(of := self.rounds[i]) and of["round"].max() >= self.settings[i]["rounds"]}
        every = {key for _, key in trained}
        return len(every - done), len(every)

    def _trained(self, where: Where) -> list[tuple[int, tuple[int, str, str]]]:
        """The places of the selected cells, and what tells their trainings apart."""
        cells = {key: value for key, value in where.items() if key != "round"}
        return [
            (i, (settings["seed"], self.conditions[i], self.defenses[i]))
            for i, settings in enumerate(self.settings)
            if matches(settings, cells)
        ]

    def values(
        self, where: Where, column: str, attacker: str | None, apart: Sequence[str] = (), *, perhaps: bool = False
    ) -> pd.Series:
        """Of victims or of runs, by what the column is one of."""
        if column == "accuracy":
            return self.runs(where, column, apart)
        return self.victims(where, column, attacker, apart, perhaps=perhaps)

    def lost(self, where: Where, column: str, attacker: str | None) -> tuple[int, int]:
        """How many searches for what is selected did not end, of how many; of none if the column does not say what they found."""
        searches = self.victims(where, "converged", attacker) if column in FOUND else pd.Series(dtype=float)
        return int((searches == 0).sum()), len(searches)


def _own(folder: RunFolder) -> pd.DataFrame:
    """What leaked to the attack that a cell was run for, without those that were made on it later."""
    leaks = folder.leaks()
    return leaks[leaks["attack"].str.removesuffix(ADAPTIVE) == folder.config["choices"]["attack"]] if len(leaks) else leaks


_KEYS = ("round", "client", "image")
ROWS = (*_KEYS, "attacker")  # what `where` asks of the rows of a cell rather than of its configuration


def _of_cells(where: Where) -> dict[str, Any]:
    """What is asked of a cell's configuration."""
    return {key: value for key, value in where.items() if key not in ROWS}


def _told_apart(settings: Mapping[str, Any], keys: Sequence[str]) -> str:
    return json.dumps([settings.get(key) for key in keys])


# Rounds that `where` names by their place among those that were attacked, as studies of both sizes have them.
STAGES: dict[Any, Any] = {"first": lambda n: 0, "middle": lambda n: n // 2, "last": lambda n: n - 1}


def flat(config: Config) -> dict[str, Any]:
    """A configuration's settings by their dotted names, and the choices by those of their groups."""
    found: dict[str, Any] = {}

    def walk(node: Any, name: str) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            inner = f"{name}.{key}" if name else str(key)
            if isinstance(value, dict | list):
                walk(value, inner)
            else:
                found[inner] = value

    walk(config, "")
    return found | dict(config["choices"])


def matches(settings: Mapping[str, Any], where: Where) -> bool:
    """Whether each setting is the value asked for, or one of a list; names may have * in them."""

    def same(value: Any, asked: Any) -> bool:
        if isinstance(asked, list):
            return any(same(value, one) for one in asked)
        if isinstance(asked, str) and isinstance(value, str):
            return fnmatch.fnmatchcase(value, asked)
        if isinstance(asked, int | float) and isinstance(value, int | float):
            return math.isclose(value, asked, rel_tol=1e-9)
        return bool(value == asked)

    return all(same(settings.get(key), asked) for key, asked in where.items())


def _values(rows: pd.DataFrame, column: str) -> pd.Series:
    if column in BARS:
        bar = BARS[column]
        return pd.Series(bar.passes(rows[bar.score].to_numpy(float, copy=True)).numpy().astype(float), rows.index)
    if column == "exact" and "mse" in rows:
        return (rows["mse"] < EXACT).astype(float)
    if column not in rows:
        raise ValueError(f"{column!r} is no column of what leaked: take one of {', '.join((*rows.columns, *BARS, 'exact'))}")
    values = rows[column].astype(float)
    return values.clip(upper=PERFECT).fillna(0.0) if column == "psnr_db" else values


EXACT = 1e-8  # mean squared error of what counts as the very image
SHARES = ("token_accuracy", "tokens_found", "rouge1", "rouge2", "rougeL")  # scores between 0 and 1, often at an end of it
FOUND = {"psnr_db": PERFECT, "mse": 0.0, "ssim": 1.0, **dict.fromkeys((*SHARES, *BARS, "exact"), 1.0)}  # of who finds everything

# The checks. Each raises NotMeasured where there is nothing to answer by.


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
    "cells": None,
    "test": None,
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


def verify(
    claims: Sequence[Claim],
    folders: Mapping[str, Sequence[RunFolder]],
    wanted: Mapping[str, Sequence[Config]] | None = None,
) -> list[Verdict]:
    """The verdict on each claim, by the cells of its study; `folders` are those there are, by study, and `wanted` the
    configurations of those that there were to be."""
    found = {name: Results.of(of, (wanted or {}).get(name, ())) for name, of in folders.items()}
    passed = _tests([one.settings["expect"] for one in claims if one.check == "test"])
    answers = [_answers(claim, found.get(claim.study), passed) for claim in claims]
    adjusted: list[dict[str, tuple[float, float]]] = [{} for _ in claims]
    for study in dict.fromkeys(claim.study for claim in claims):
        asked = [(i, who) for i, claim in enumerate(claims) if claim.study == study for who in answers[i]]
        if not asked:
            continue
        holds = holm([answers[i][who].holds for i, who in asked])
        fails = holm([answers[i][who].fails for i, who in asked])
        for (i, who), a, b in zip(asked, holds, fails, strict=True):
            adjusted[i][who] = (a, b)
    return [_verdict(claim, answers[i], adjusted[i]) for i, claim in enumerate(claims)]


def _answers(claim: Claim, found: Results | None, passed: Mapping[str, bool]) -> dict[str, Answer]:
    """By attacker; empty where an answer is missing."""
    if claim.check == "test":
        node = claim.settings["expect"]
        return {"": _certain(f"{node} {'passed' if passed[node] else 'failed'}", passed[node])} if node in passed else {}
    if claim.check == "cells":
        from experiments import study

        count = len(study.load(claim.study).cells("full"))
        return {"": _certain(f"{count} cells", count == claim.settings["expect"])}
    if found is None:
        return {}
    try:
        who = ["naive", "adaptive"] if claim.attacker == "both" else [claim.attacker]
        return {one: CHECKS[claim.check](found, None if one == "any" else one, **claim.settings) for one in who}
    except NotMeasured:
        return {}


def _certain(text: str, true: bool) -> Answer:
    return Answer(text, float(not true), float(true))


def _verdict(claim: Claim, answers: Mapping[str, Answer], p: dict[str, tuple[float, float]]) -> Verdict:
    if not answers:
        return Verdict(claim, MISSING, "")
    said = {who: HOLDS if holds < LEVEL else REFUTED if fails < LEVEL else OPEN for who, (holds, fails) in p.items()}
    both = list(said.values())
    if len(both) == 1 or both[0] == both[1]:
        verdict = both[0]
    elif said["naive"] == HOLDS and said["adaptive"] == REFUTED:
        verdict = NAIVE
    else:
        verdict = OPEN if REFUTED not in both else REFUTED
    ours = "; ".join((f"{who}: " if len(answers) > 1 else "") + one.ours for who, one in answers.items())
    return Verdict(claim, verdict, ours)


def _tests(nodes: Sequence[str]) -> dict[str, bool]:
    """Which of these tests pass, without those that are skipped; empty where there are none, as in an installed package."""
    root = Path(__file__).parent.parent
    if not nodes or not (root / "tests").is_dir() or importlib.util.find_spec("pytest") is None:
        return {}
    files = sorted({node.split("::")[0] for node in nodes})
    if missing := [file for file in files if not (root / file).is_file()]:
        raise ValueError(f"{FILE.name} names {missing[0]}, which is not there")
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        told = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *dict.fromkeys(nodes)]
        ended = subprocess.run(told, cwd=root, capture_output=True, text=True, check=False)
        if not report.exists():
            raise ValueError(f"pytest could not run the tests that claims name: {ended.stdout.strip().splitlines()[-1:]}")
        outcome: dict[str, bool] = {}
        skipped = set()
        for case in ElementTree.parse(report).iter("testcase"):
            node = f"{case.get('classname', '').replace('.', '/')}.py::{(case.get('name') or '').partition('[')[0]}"
            if case.find("skipped") is not None:
                skipped.add(node)
            outcome[node] = outcome.get(node, True) and all(case.find(tag) is None for tag in ("failure", "error"))
    return {node: outcome[node] for node in nodes if node in outcome and node not in skipped}


def measured(base: Path, folders: Sequence[RunFolder]) -> tuple[list[RunFolder], list[Config], list[str]]:
    """Of these folders in `base` those that are cells of its study as it was last asked for; the configurations of all cells it was
    to have; and in lines, what was not done as its file has it."""
    from experiments import study

    if not (base / study.ABOUT).is_file():
        return list(folders), [], [f"{base} names no study: whether all of one was run is not known"]
    about, wanted, told = read_json(base / study.ABOUT), study.wanted(base), []
    cells = study.cells_among(folders, wanted)
    if about["overrides"]:
        told.append(f"{about['study']} was run with {' '.join(about['overrides'])}")
    if others := [folder.path.name for folder in folders if folder not in cells]:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        told.append(f"left out, as no cells of {about['study']} as it was last asked for: {', '.join(others[:3])}{more}")
    if (done := sum(map(_is_done, cells))) < len(wanted):
        told.append(f"of {about['study']} {done} of {len(wanted)} cells are finished")
    return cells, wanted, told


def _is_done(folder: RunFolder) -> bool:
    """Whether all rounds of a cell are done, and all its attackers have been there."""
    from experiments.runner import who_attacks

    rounds, config, leaks = folder.rounds(), folder.config, _own(folder)
    done = len(rounds) > 0 and rounds["round"].max() >= config["rounds"]
    return done and who_attacks(config) <= (set(leaks["attacker"]) if len(leaks) else set())


def summary(verdicts: Sequence[Verdict], caveats: Sequence[str] = (), *, full: bool = False) -> Summary:
    """All verdicts as a table; of a claim that was not measured, the command that does it, for studies of the `full` size."""
    counts = {name: sum(one.verdict == name for one in verdicts) for name in (HOLDS, NAIVE, OPEN, REFUTED, MISSING)}
    rows = [
        [
            one.claim.row,
            one.claim.claim,
            one.claim.source,
            one.claim.published or "",
            one.ours or _command(one.claim, full),
            one.verdict,
        ]
        for one in verdicts
    ]
    notes = [
        f"{len(verdicts)} claims: " + ", ".join(f"{count} {name}" for name, count in counts.items() if count),
        f"by one-sided tests at {LEVEL:.0%}, adjusted within each study (Holm); not reproduced: neither shown nor refuted",
        "n, pairs and intervals are of updates, whose images are found or missed together, or of runs",
        *caveats,
    ]
    columns = ["row", "claim", "source", "published", "ours", "verdict"]
    return Summary("what was published, and what was measured", columns, rows, [], notes, words=True)


def _command(claim: Claim, full: bool) -> str:
    """What would measure a claim: the quick size of its study, unless the `full` one is asked for or alone has all its cells."""
    from experiments import study

    if claim.study == UNIT:
        return "needs a checkout with tests/ and pytest"
    if full:
        return f"fedsim study {claim.study} --full"
    quick = [flat(config) for config in study.load(claim.study).cells("quick").values()]
    asked = [claim.settings.get("where", {}) | claim.settings.get(side, {}) for side in ("of", "than") if _is_where(claim, side)]
    every = [
        dict(zip(where, values, strict=True))
        for where in map(_of_cells, asked or [claim.settings.get("where", {})])
        for values in itertools.product(*(one if isinstance(one, list) else [one] for one in where.values()))
    ]
    missing = any(not any(matches(settings, where) for settings in quick) for where in every)
    return f"fedsim study {claim.study}" + (" --full" if missing else "")


def _is_where(claim: Claim, side: str) -> bool:
    return isinstance(claim.settings.get(side), dict)
