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

import importlib.util
import itertools
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from experiments.answers import CHECKS, Answer, NotMeasured
from experiments.config import Config
from experiments.results import Results, flat, matches, of_cells, own
from experiments.statistics import LEVEL, holm
from experiments.summary import Summary
from fedsim.checks import one_of
from fedsim.files import read_json
from fedsim.run import RunFolder

FILE = Path(__file__).with_name("claims.yaml")
UNIT = "tests"  # claims that no study but a test answers
UNMEASURED = ("cells", "test")  # checks of the project itself
HOLDS, NAIVE, OPEN, REFUTED, MISSING = (
    *("holds", "holds only against a naive attacker", "not reproduced", "refuted", "not measured"),
)


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
            (check,) = one.keys() & {*CHECKS, *UNMEASURED} or [None]
            if check is None:
                checks = ", ".join((*CHECKS, *UNMEASURED))
                raise ValueError(f"{path.name}: claim {one.get('row')} of {name} has none of the checks {checks}")
            rest = {key: value for key, value in one.items() if key != check}
            settings = one[check] if isinstance(one[check], dict) else {"expect": one[check]}
            found.append(Claim(study=name, check=check, settings=settings, **rest))
    return found


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

    rounds, config, leaks = folder.rounds(), folder.config, own(folder)
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
        for where in map(of_cells, asked or [claim.settings.get("where", {})])
        for values in itertools.product(*(one if isinstance(one, list) else [one] for one in where.values()))
    ]
    missing = any(not any(matches(settings, where) for settings in quick) for where in every)
    return f"fedsim study {claim.study}" + (" --full" if missing else "")


def _is_where(claim: Claim, side: str) -> bool:
    return isinstance(claim.settings.get(side), dict)
