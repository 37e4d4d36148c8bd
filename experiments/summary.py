"""The summary table of one run or of several, compared by defense; runs that differ in seed alone are one defense.

The tables that it and figures, reports and rankings are made of are put together here, from those in the runs' folders.
"""

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from attacks.metrics import BARS, Rate, success_rates
from experiments.card import GUESS
from experiments.naming import conditions, contenders, without_defense
from experiments.progress import size
from experiments.scoring import ADAPTIVE, STOLEN_MSE, STOLEN_TOKENS
from experiments.statistics import Difference, holm, paired
from fedsim.observation import SUM
from fedsim.run import RunFolder

TRIVIAL = {"grey": "a grey card", "mean_image": "the mean image", "mean_colour": "its mean colour"}  # what knowing nothing makes
VICTIM = ("under", "seed", "seen", "round", "client", "image")  # who a victim is; seeds decide who is attacked
KNOWING = ", adaptive"  # ends the label of an attacker who knows the defense
PERFECT = 60.0  # dB; better than any eye, and an exact copy has no finite PSNR
MARGIN = 0.02  # of accuracy: what a defense may cost and still count as equivalent to none
LAST = 5  # evaluations that a run's accuracy is averaged over where it is tested; a single one jitters


def tables(folders: Sequence[RunFolder]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rounds and leaks of all runs, with the columns `run`, `seed` and `defense`: what a run is called among these; of a leak, see
    `leaks_of`, and `under`: the conditions."""
    rounds, leaks = [], []
    for folder, name in named(folders):
        about = {"run": str(folder.path), "defense": name, "seed": folder.config["seed"]}
        rounds.append(folder.rounds().assign(**about))
        leaks.append(leaks_of(folder, name).assign(run=about["run"], seed=about["seed"], under=conditions(folder.config)))
    every = _joined(leaks, [])
    # A victim whom runs alike in all that matters have both attacked alike is one.
    once = every.drop_duplicates([*VICTIM, "defense", "attack", "how", "attacker"], ignore_index=True) if len(every) else every
    return _joined(rounds, ["accuracy", "defense", "run", "round"]).astype({"accuracy": float}), once


def updates_of(victims: pd.DataFrame) -> int:
    """Of how many updates these victims are the images."""
    return len(victims[[key for key in VICTIM if key != "image"]].drop_duplicates())


def named(folders: Sequence[RunFolder]) -> list[tuple[RunFolder, str]]:
    return list(zip(folders, contenders([folder.config for folder in folders]), strict=True))


def leaks_of(folder: RunFolder, name: str) -> pd.DataFrame:
    """The leaks of a run of this name, with a label for each kind of victim and attacker.

    Where updates are masked, those of masked ones and of sums have labels of their own, and so have those of an attacker who knew
    the defense, which come last. `attack` is then the method both used, `how` its settings, and `made_by` names what it made. What
    is no number is as far off as can be, and has 0 dB.
    """
    leaks = folder.leaks()
    if not len(leaks):
        return leaks
    if "psnr_db" in leaks:
        leaks = leaks.fillna({"psnr_db": 0.0})
    how = {name: json.dumps(_without_record(attack_settings(folder, name)), sort_keys=True) for name in leaks["attack"].unique()}
    seen = leaks["seen"] if "seen" in leaks else pd.Series("update", leaks.index)  # tables of earlier versions
    method = leaks["attack"].str.removesuffix(ADAPTIVE)
    labels = [
        (name if what == "update" else f"{name}: {what}") + (KNOWING if adaptive else "")
        for what, adaptive in zip(seen, leaks["attacker"] == "adaptive", strict=True)
    ]
    told = leaks.assign(seen=seen, defense=labels, made_by=leaks["attack"], attack=method, how=leaks["attack"].map(how))
    return told.sort_values("attacker", ascending=False, kind="stable")


def attack_settings(folder: RunFolder, made_by: str) -> dict[str, Any] | None:
    """The settings of the attack that made these reconstructions; None where an earlier version did not write them down."""
    later, config = folder.attacks_made(), folder.config
    if made_by in later:
        return dict(later[made_by]["attack"])
    return config["attack"] if made_by.removesuffix(ADAPTIVE) == config["choices"]["attack"] else None


def _without_record(attack: dict[str, Any] | None) -> dict[str, Any] | None:
    return attack and {key: value for key, value in attack.items() if key != "record"}


def sender(leak: pd.Series, client: int) -> int:
    """Whose reply a client's image was taken out of: its own, or the sum."""
    return SUM if leak["seen"].startswith("sum") else client


def of_text(folders: Sequence[RunFolder]) -> bool:
    """Whether these runs are on text. Raises ValueError when some are and some are not: there is nothing to compare."""
    kinds = {folder.config["data"]["name"] == "text" for folder in folders}
    if len(kinds) > 1:
        raise ValueError("runs on text and on images cannot be compared: plot one kind at a time")
    return kinds == {True}


def _joined(tables: list[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    filled = [table for table in tables if len(table)]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=columns)


def each_once(rounds: pd.DataFrame) -> pd.DataFrame:
    """The rounds of one run of each defense and seed: others repeat its training, as under another attack, and would weigh twice.

    It is the one that came furthest, and was tested most often.
    """
    runs = rounds.groupby(["defense", "seed", "run"], sort=False, as_index=False).agg(
        end=("round", "max"), tested=("accuracy", "count")
    )
    best = runs.sort_values(["end", "tested"], ascending=False, kind="stable").drop_duplicates(["defense", "seed"])
    return rounds[rounds["run"].isin(best["run"])]


def furthest(rounds: pd.DataFrame) -> pd.DataFrame:
    """Those of them that came as far as any: what a run that broke off had learned and sent is no end to average."""
    once = each_once(rounds)
    ends = once.groupby("run")["round"].transform("max")
    return once[ends == ends.max()]


def against_none(folders: Sequence[RunFolder], rounds: pd.DataFrame) -> dict[str, Difference]:
    """How the accuracy of each defense differs from that of no defense under the same conditions, seed by seed; worse and better
    are claimed under Holm's correction.

    A run's accuracy is the mean of its last evaluations. A defense is left out that shares fewer than two seeds with none.
    """
    none: dict[str, dict[int, float]] = defaultdict(dict)
    others: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for folder in folders:
        of, config = rounds[rounds["run"] == str(folder.path)].sort_values("round"), folder.config
        tested = of[of["round"] > 0].dropna(subset="accuracy")  # round 0 is the untrained model
        if len(tested) and of["round"].iloc[-1] == config["rounds"]:  # one that was stopped has learned less
            under = conditions(config) + json.dumps(config.get("evaluate"))  # which decides what is averaged
            ends = none[under] if without_defense(config) else others[of["defense"].iloc[0], under]
            # Runs that differ in their attack only have learned the same, and are one.
            ends[config["seed"]] = float(tested["accuracy"].tail(LAST).mean())
    costs = {}
    for (defense, under), ends in others.items():  # conditions are part of the name where there are several
        if len(seeds := sorted(ends.keys() & none[under].keys())) > 1:
            costs[defense] = paired([ends[seed] for seed in seeds], [none[under][seed] for seed in seeds], MARGIN)
    adjusted = holm([cost.p_different for cost in costs.values()])
    return {defense: replace(cost, p_different=p) for (defense, cost), p in zip(costs.items(), adjusted, strict=True)}


@dataclass(frozen=True)
class Summary:
    """A table of text, for `experiments.table` to show and to write.

    rows     what each defense costs and what it stops, a row for each attacker
    guesses  what knowing nothing scores, in the same columns
    notes    what stands below it, in lines
    words    whether its cells are words, set flush left, or numbers
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    guesses: list[list[str]]
    notes: list[str]
    words: bool = False


def summarised(folders: Sequence[RunFolder]) -> Summary:
    """What each defense costs and what it stops, with n and 95 % Wilson intervals."""
    rounds, leaks = tables(folders)
    costs = against_none(folders, rounds)
    attacks = list(leaks["attack"].unique()) if len(leaks) else ["none"]
    who = f", by {attacks[0]}" if len(attacks) == 1 else ""
    text = of_text(folders)
    bar = f"{STOLEN_TOKENS:.0%} of a sentence's words in place" if text else f"MSE < {STOLEN_MSE} on pixels in [0, 1]"
    title = f"stolen: {bar}{who}; adaptive: by an attacker who knows the defense, else by one who does not"
    scores = (
        ("stolen", "words found", "in place", "ROUGE-L", "exact", "not converged")
        if text
        else ("stolen", *list(BARS)[1:], "not converged", "PSNR", "labels")
    )
    proofs = ("epsilon", f"{GUESS:.0%} guess") if "epsilon" in rounds else ()  # no column where nobody has one
    compared = ("against none",) if costs else ()
    columns = ["defense", "accuracy", *compared, "sent", "of dense", *proofs, *scores]
    rows = []
    for defense, of, victims in _rows(rounds, leaks):
        final, sent, share = _ends(of)
        cost = [_cost(costs[defense]) if defense in costs else ""] if compared else []
        cells = [f"{final.mean():.1%}" if len(final) else "", *cost, size(sent), f"{share:.1%}", *(_proof(of) if proofs else [])]
        name = row_name(victims["defense"].iloc[0], victims["attack"].iloc[0], attacks) if len(victims) else defense
        rows.append([name, *cells, *(_text_cells if text else _leak_cells)(victims)])
    notes = [note for note in (_counted(leaks), _compared(costs), _stopped(folders), _found(folders)) if note]
    return Summary(title, columns, rows, _guesses(leaks, attacks[0], len(compared + proofs), text), notes)


def numbers(folders: Sequence[RunFolder]) -> pd.DataFrame:
    """The same for programs: a row for each defense, attack and attacker, then what knowing nothing scores.

    Accuracies, their differences and intervals of shares are from 0 to 1; thefts are counted: `stolen`, and by stricter bars, as in
    `psnr_db_20`; `bytes_up` are a run's. A cell is empty where there is nothing to tell.
    """
    rounds, leaks = tables(folders)
    costs, text = against_none(folders, rounds), of_text(folders)
    rows: list[dict[str, Any]] = []
    for defense, of, victims in _rows(rounds, leaks):
        final, sent, share = _ends(of)
        row = {"defense": defense, "runs": of["run"].nunique(), "accuracy": final.mean(), "bytes_up": sent, "bytes_share": share}
        if defense in costs:
            cost = costs[defense]
            row |= {"against_none": cost.mean, "against_none_low": cost.low, "against_none_high": cost.high}
            row |= {"against_none_verdict": cost.verdict}
        if (proof := _proved(of)) is not None:
            row |= {key: proof[key] for key in ("epsilon", "delta", "reconstruction_bound")}
        if len(victims):
            row |= {key: victims[key].iloc[0] for key in ("seen", "attack", "attacker")}
            row |= _shares(victims, "", text, updates_of(victims))
            row |= {"not_converged": int((victims["verdict"] == "not converged").sum())}
            counted = {"exact": "exact"} if text else {"labels_right": "label_right"}
            row |= {name: int(victims[column].sum()) for name, column in counted.items()}
            row |= {"tokens_found": victims["tokens_found"].mean()} if text else {}
        rows.append(row)
    if len(leaks):
        attack = leaks["attack"].iloc[0]
        guesses = {"typical_": "the usual words"} if text else {f"{name}_": what for name, what in TRIVIAL.items()}
        for prefix, what in guesses.items():
            rows.append({"defense": what, "attacker": "knows nothing"} | _shares(_guessed(leaks, attack, text), prefix, text, None))
    return pd.DataFrame(rows).convert_dtypes()  # counts stay whole where others have none


def _shares(victims: pd.DataFrame, prefix: str, text: bool, updates: int | None) -> dict[str, Any]:
    """How many pass each bar and their Wilson intervals, and the median or mean of what says how near they came."""
    if text:
        stolen = Rate(int((victims[f"{prefix}token_accuracy"] >= STOLEN_TOKENS).sum()), len(victims), updates)
        rates, scores = {"stolen": stolen}, ("token_accuracy", "rougeL")
        near = {score: victims[f"{prefix}{score}"].mean() for score in scores}
    else:
        names = {name: f"{bar.score}_{bar.level:g}" for name, bar in BARS.items()} | {next(iter(BARS)): "stolen"}
        rates = {names[bar]: rate for bar, rate in success_rates(victims, prefix, updates).items()}
        near = {"median_psnr_db": victims[f"{prefix}psnr_db"].median()}
    told: dict[str, Any] = {"victims": len(victims)} | ({} if updates is None else {"updates": updates})
    for name, rate in rates.items():
        told |= {name: rate.passed, f"{name}_low": rate.interval[0], f"{name}_high": rate.interval[1]}
    return told | near


def _rows(rounds: pd.DataFrame, leaks: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame, pd.DataFrame]]:
    """For each defense and attacker the defense, the rounds of its runs that came furthest, and the attacker's victims, if any."""
    attacks = in_order(leaks["attack"]) if len(leaks) else []
    for defense in in_order(rounds["defense"]):
        every = rounds[rounds["defense"] == defense]
        here = leaks[leaks["run"].isin(every["run"])] if len(leaks) else leaks
        of = furthest(every)
        if not len(here):
            yield defense, of, here
        for label, attack in itertools.product(in_order(here["defense"]), attacks) if len(here) else ():
            if len(victims := here[(here["defense"] == label) & (here["attack"] == attack)]):
                yield defense, of, victims


def _ends(rounds: pd.DataFrame) -> tuple[pd.Series, float, float]:
    """Of each run the last accuracy; and what a run sent, in bytes and as a share of what it would be dense."""
    final = rounds.dropna(subset="accuracy").sort_values("round").groupby("run")["accuracy"].last()
    sent = rounds.groupby("run")["bytes_up"].sum().mean()
    return final, sent, rounds["bytes_up"].sum() / max(1, rounds["bytes_up_dense"].sum())


def row_name(label: str, attack: str, attacks: Sequence[str]) -> str:
    """What a row of the summary is called: by its label (see `leaks_of`), and by the attack where there are several."""
    return label if len(attacks) == 1 else f"{label}, {attack}"


def _guesses(leaks: pd.DataFrame, attack: str, blank: int, text: bool) -> list[list[str]]:
    if not len(leaks):
        return []
    first = _guessed(leaks, attack, text)
    before = ["", "", "", *[""] * blank]
    if text:
        passed = int((first["typical_token_accuracy"] >= STOLEN_TOKENS).sum())
        shares = [f"{first[f'typical_{score}'].mean():.0%}" for score in ("token_accuracy", "rougeL")]
        return [["the usual words", *before, str(Rate(passed, len(first))), "", *shares, "", ""]]
    return [[what, *before, *_bars(first, f"{name}_"), "", _median(first, f"{name}_"), ""] for name, what in TRIVIAL.items()]


def _guessed(leaks: pd.DataFrame, attack: str, text: bool) -> pd.DataFrame:
    """Each victim once: defenses and attacks mostly have the same ones, and a guess scores the same on them."""
    scores = ["typical_token_accuracy"] if text else [f"{name}_mse" for name in TRIVIAL]
    return leaks[leaks["attack"] == attack].drop_duplicates(["seed", "round", "client", "image", *scores])


def _cost(cost: Difference) -> str:
    """In percentage points, in two lines: the table is wide already."""
    mean, low, high = (f"{100 * value:+z.1f}" for value in (cost.mean, cost.low, cost.high))
    return f"{mean} [{low}, {high}]\n{cost.verdict}"


def _counted(leaks: pd.DataFrame) -> str | None:
    """What intervals count, in a line, where it is not images."""
    several = len(leaks) > 0 and bool((leaks["image"] > 0).any())
    told = "intervals of attackers are of as many trials as there are updates, whose images are found or missed together"
    return told if several else None


def _compared(costs: dict[str, Difference]) -> str | None:
    """What the column "against none" holds, in a line."""
    if not costs:
        return None
    told = f", Holm over {len(costs)} comparisons" if len(costs) > 1 else ""
    return (
        f"against none: percentage points of accuracy (mean of the last {LAST} evaluations), "
        f"90 % t-interval over {seeds_of(costs)}; "
        f"equivalent: within {100 * MARGIN:.0f} points (TOST, 5 %); worse or better: paired t-test (5 %{told})"
    )


def seeds_of(costs: dict[str, Difference]) -> str:
    """How many seeds the differences were taken over."""
    least, most = min(cost.n for cost in costs.values()), max(cost.n for cost in costs.values())
    return f"{least} seeds" if least == most else f"{least} to {most} seeds"


def _proof(rounds: pd.DataFrame) -> tuple[str, str]:
    """Epsilon in the end, and how often a reconstruction succeeds at most when a blind guess has `GUESS`; empty without a proof."""
    if (worst := _proved(rounds)) is None:
        return "", ""
    bound = math.ceil(100 * worst["reconstruction_bound"]) / 100  # never below what is proved
    return f"{worst['epsilon']:.3g} at {worst['delta']:g}", f"<= {bound:.0%}"


def _proved(rounds: pd.DataFrame) -> pd.Series | None:
    """The last round of the run that spent most; None where any has no proof."""
    if "epsilon" not in rounds:
        return None
    last = rounds.sort_values("round").groupby("run").last()
    return None if last["epsilon"].isna().any() else last.sort_values("epsilon").iloc[-1]


def _stopped(folders: Sequence[RunFolder]) -> str | None:
    """How many of each defense's runs did not finish, in a line."""
    stopped: dict[str, list[bool]] = defaultdict(list)
    for folder, name in named(folders):
        rounds = folder.rounds()
        stopped[name].append(not len(rounds) or rounds["round"].max() < folder.config["rounds"])
    told = [f"{sum(of)} of {len(of)} runs of {name}" for name, of in stopped.items() if any(of)]
    return f"did not finish: {'; '.join(told)}; accuracy and bytes are of those that came furthest" if told else None


def _found(folders: Sequence[RunFolder]) -> str | None:
    """A line for each kind of thing that clients' inspections found."""
    lines = []
    for folder, name in named(folders):
        found = folder.findings()
        for check, of in found.groupby("check", sort=False) if len(found) else ():
            sent = f", {of.loc[of['refused'], 'client'].nunique()} of them sent nothing" if of["refused"].any() else ""
            who = f"{of['client'].nunique()} clients found {check}, first in round {of['round'].min()}{sent}"
            lines.append(f"{name}: {who}: {of['says'].iloc[0]}")
    return "\n".join(lines) or None


def _leak_cells(victims: pd.DataFrame) -> list[str]:
    n = len(victims)
    if not n:
        return [""] * 6
    lost = f"{int((victims['verdict'] == 'not converged').sum())}/{n}"
    return [*_bars(victims, updates=updates_of(victims)), lost, _median(victims), f"{int(victims['label_right'].sum())}/{n}"]


def _text_cells(victims: pd.DataFrame) -> list[str]:
    n = len(victims)
    if not n:
        return [""] * 6
    means = [f"{victims[score].mean():.0%}" for score in ("tokens_found", "token_accuracy", "rougeL")]
    verdicts = list(victims["verdict"])
    lost = f"{verdicts.count('not converged')}/{n}"
    return [str(Rate(verdicts.count("stolen"), n, updates_of(victims))), *means, f"{int(victims['exact'].sum())}/{n}", lost]


def _bars(victims: pd.DataFrame, of: str = "", updates: int | None = None) -> list[str]:
    """How many pass each bar, with 95 % Wilson intervals; n is in the first cell."""
    first, *others = success_rates(victims, of, updates).values()
    return [str(first), *(str(rate).replace(f"/{rate.n}", "") for rate in others)]


def _median(victims: pd.DataFrame, of: str = "") -> str:
    return f"{victims[f'{of}psnr_db'].median():.1f} dB"


def in_order(values: pd.Series) -> list[str]:
    return list(dict.fromkeys(values))
