"""Defenses by what they give away to the stronger of their attackers, and what may be said of each: a test, not an opinion."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from scipy import stats

from attacks.metrics import BARS, Rate, success_rates
from experiments.naming import contenders, without_defense
from experiments.statistics import LEVEL
from experiments.summary import KNOWING, PERFECT, VICTIM, of_text, updates_of
from fedsim.run import RunFolder

LEAST = math.ceil(-math.log2(LEVEL))  # thefts that have to fail before a sign test can show anything: 2^-5 < 5 %
ATTACKERS = ("naive", "adaptive")

Row = dict[str, Any]  # plain values, which JSON can hold


def ranked(folders: Sequence[RunFolder], leaks: pd.DataFrame) -> tuple[pd.DataFrame, list[Row]]:
    """These leaks with what tells victims and defenses apart, and a line for each defense and attack, the least leak first."""
    configs = {str(folder.path): folder.config for folder in folders}
    leaks = leaks.assign(
        kind=leaks["defense"].str.removesuffix(KNOWING),
        contender=leaks["run"].map(dict(zip(configs, contenders(list(configs.values())), strict=True))),
        bare=leaks["run"].map(lambda run: without_defense(configs[run])),
        score=leaks["token_accuracy"] if of_text(folders) else leaks["psnr_db"].clip(upper=PERFECT),
    )
    lines = [
        _line(str(kind), str(attack), of, leaks[leaks["attack"] == attack])
        for (kind, attack), of in leaks.groupby(["kind", "attack"], sort=False)
    ]
    return leaks, sorted(lines, key=lambda row: (row["attack"], row["strongest"], row["score"]))


def _line(kind: str, attack: str, leaks: pd.DataFrame, every: pd.DataFrame) -> Row:
    """A line of the ranking, which goes by the stronger attacker, and what may be said of the defense.

    A defense is shown to protect against an attacker where that one stole fewer images of the same updates than he did without a
    defense (exact sign test of the pairs, one-sided, 5 %, each by itself). One who was not tried without is held against the other.
    A victim on whom an adaptive attacker's search did not end counts as perhaps stolen: such a search protects nobody. To protect
    only against the naive attacker takes one more test: that the adaptive one stole from more behind the same defense.
    """
    by = {who: counts_of(of) for who in ATTACKERS if len(of := leaks[leaks["attacker"] == who])}
    stronger = max(by, key=lambda who: strength(by[who]))
    row = {"kind": kind, "contender": leaks["contender"].iloc[0], "attack": attack, "by": by, "stronger": stronger}
    row |= {"strongest": by[stronger]["share"], "score": by[stronger]["median"], "flag": False, "bare": bool(leaks["bare"].all())}
    if row["bare"]:
        secure = "secure aggregation" in kind
        return row | {"says": ("secure aggregation alone" if secure else "no defense") + ": what the others are held against"}
    bare = every[every["bare"] & every["under"].isin(leaks["under"]) & every["how"].isin(leaks["how"])]
    if not len(bare):
        return row | {"says": "no run without a defense, attacked alike, to compare with"}
    without = {who: _stolen(of if len(of := bare[bare["attacker"] == who]) else bare) for who in by}
    stolen = {who: _stolen(leaks[leaks["attacker"] == who]) for who in by}
    perhaps = {who: _stolen(leaks[leaks["attacker"] == who], perhaps=who == "adaptive") for who in by}
    protects = {who: _fewer(perhaps[who], without[who]) for who in by}
    row["p"] = protects
    if any(p is None for p in protects.values()):
        return row | {"says": f"too few to tell: of fewer than {LEAST} updates anything was stolen without a defense"}
    safe = {who for who in by if _shown(protects[who])}
    lost = "adaptive" in by and "adaptive" not in safe and _shown(_fewer(stolen["adaptive"], without["adaptive"]))
    undecided = f"undecided: {by['adaptive']['lost']} of his searches did not end" if lost else ""
    if len(by) == 1:
        (who,) = by
        other = next(one for one in ATTACKERS if one != who)
        what = "fewer thefts than without a defense" if safe else undecided or "no fewer thefts were shown"
        return row | {"says": f"{what}; the {other} attacker was not tried"}
    if safe == {"naive"}:
        if not lost and _shown(_fewer(stolen["naive"], stolen["adaptive"])):
            return row | {"flag": True, "says": "protects only against the naive attacker"}
        return row | {"says": f"fewer thefts by the naive attacker; of the adaptive one {undecided or 'that was not shown'}"}
    if safe == {"adaptive"}:
        return row | {"says": "fewer thefts by the adaptive attacker; of the naive one that was not shown"}
    if not safe:
        return row | {"says": f"of the adaptive attacker {undecided}" if lost else "no fewer thefts were shown"}
    return row | {"says": "fewer thefts than without a defense, by both attackers"}


def counts_of(victims: pd.DataFrame) -> Row:
    """How many of these victims one attacker stole from, with the 95 % interval of that share, and how close he came."""
    updates = updates_of(victims)
    rate = Rate(int((victims["verdict"] == "stolen").sum()), len(victims), updates)
    bars = {name: str(bar) for name, bar in success_rates(victims, updates=updates).items()} if "mse" in victims else {}
    return {
        "n": rate.n,
        "stolen": rate.passed,
        "share": rate.share,
        "interval": list(rate.interval),
        "lost": int((victims["verdict"] == "not converged").sum()),
        "bars": {name: bar for name, bar in bars.items() if name != next(iter(BARS))},
        "median": float(victims["score"].median()),
        "best": float(victims["score"].max()),
        "labels": int(victims["label_right"].sum()),
    }


def strength(counts: Row) -> tuple[float, float]:
    """Who stole more is the stronger attacker; of two that stole as much, who came closer."""
    return counts["share"], counts["median"]


def _shown(p: float | None) -> bool:
    return p is not None and p < LEVEL


def _stolen(leaks: pd.DataFrame, *, perhaps: bool = False) -> pd.Series:
    """Whether each victim was stolen from, by who it is; `perhaps` also where a search did not end."""
    taken = leaks["verdict"] != "not stolen" if perhaps else leaks["verdict"] == "stolen"
    return taken.groupby([leaks[key] for key in VICTIM]).any()


def _fewer(behind: pd.Series, without: pd.Series) -> float | None:
    """p of the sign test over updates of both, that fewer of their images were stolen `behind`; None where of so few any was stolen
    `without` that no outcome could show anything. Images of one update are found or missed together."""
    both = pd.concat([behind, without], axis=1, join="inner", keys=["behind", "without"])
    both = both.groupby([name for name in both.index.names if name != "image"]).mean()
    if (both["without"] > 0).sum() < LEAST:
        return None
    fewer, more = int((both["without"] > both["behind"]).sum()), int((both["behind"] > both["without"]).sum())
    return float(stats.binomtest(fewer, fewer + more, alternative="greater").pvalue) if fewer + more else 1.0
