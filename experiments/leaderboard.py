"""The leaderboard: defenses by what they give away to the strongest of their attackers, among those that cost as much accuracy.

One page in Markdown. Its numbers are those of the summary table and its verdicts those of the report; what is added here is the
order. Runs under other conditions (data, model, training) have a table of their own: nothing is ranked across them.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.naming import conditions, contender, label
from experiments.ranking import Row, ranked
from experiments.statistics import Difference
from experiments.study import distinct
from experiments.summary import KNOWING, LAST, MARGIN, Summary, against_none, row_name, summarised, tables
from experiments.table import markdown_rows
from fedsim.files import read_json, write_bytes
from fedsim.run import RunFolder

MOST = 0.05  # of accuracy: who loses more is beyond the last but one of the groups that are ranked
NEAR, FAR = f"{100 * MARGIN:.0f}", f"{100 * MOST:.0f}"  # in points
GROUPS = (
    f"Loses less than {NEAR} points",
    f"Loses less than {FAR} points",
    f"Loses more than {FAR} points",
    "Undecided: the interval is too wide to say",
    "Not compared: fewer than two seeds in common with finished runs without a defense",
)

RULES = f"""\
How to read it. A defense is ranked by the share that its **strongest** attacker stole: the one, of all that were tried, naive and
adaptive, who stole the largest share (of two that stole as much, who came closer). "Stolen" has the 95 % Wilson interval of that
share; ranks whose intervals overlap are not shown to differ. An attack that stole nothing and did not converge counts as no theft
here, which is not the same as protection: the column "not converged" has how many these are.

Only defenses that cost as much accuracy are ranked against each other. The loss is that against `none` under the same conditions,
paired by seed, of the mean of the last {LAST} evaluations; its 90 % t-interval is in the column "against none", in points.
A defense is in the first of these groups that holds: the interval lies above −{NEAR} points; above −{FAR}; below −{FAR}; none of
them. Each is a one-sided test at 5 %; the first is one half of the equivalence test (TOST), and "equivalent" stands where the
other half holds as well, that no more than {NEAR} points are gained. Each test stands by itself: there is no correction for the
number of defenses. Runs that did not come to their end are counted nowhere, and named: a defense under which training breaks down
is no better for it.

"Fewer thefts": of the victims that an attacker stole without a defense, the same attacker got fewer behind it; whom a search of the
adaptive attacker did not end on counts as perhaps stolen, and where only that stands against it, the row is "undecided". "Protects
only against the naive attacker": he got fewer, the adaptive one, who knows the defense, was not shown to, and he got more than the
naive one behind the same defense (exact sign tests, one-sided, 5 %). "Naive" is what the naive attacker stole.
"""


def group_of(cost: Difference | None) -> int:
    """Which of `GROUPS` a loss of accuracy belongs to."""
    if cost is None:
        return 4
    return 0 if cost.low > -MARGIN else 1 if cost.low > -MOST else 2 if cost.high < -MOST else 3


def write(folders: Sequence[RunFolder], path: Path, command: str) -> int:
    """Writes the leaderboard of these runs, and returns how many defenses are ranked. Raises ValueError if nothing was attacked."""
    settings: dict[str, list[RunFolder]] = {}
    folders = distinct(folders)
    for folder in folders:
        settings.setdefault(conditions(folder.config), []).append(folder)
    boards = [(some, _board(some)) for some in settings.values()]
    if not any(count for _, (_, count) in boards):
        raise ValueError(f"{folders[0].path}: no defense was attacked, so there is nothing to rank; fedsim attack RUN attack=NAME")
    lines = ["# Leaderboard", "", f"Made by `{command}`.", "", *RULES.splitlines()]
    for some, (board, _) in boards:
        lines += ["", f"## {_setting(some[0].config)}", "", *board, "", *_made_with(some)]
    write_bytes(path, "\n".join([*lines, ""]).encode())
    return sum(count for _, (_, count) in boards)


def _board(folders: Sequence[RunFolder]) -> tuple[list[str], int]:
    """The lines of the tables of runs under the same conditions, and how many defenses are ranked in them."""
    done, every = {folder: _done(folder) for folder in folders}, Counter(map(contender, _configs(folders)))
    folders = [folder for folder in folders if done[folder] == folder.config["rounds"]]
    broken = {folder: rounds for folder, rounds in done.items() if folder not in folders}
    stopped = Counter(contender(folder.config) for folder in broken)
    told_of = [f"{folder.path.name} (round {rounds} of {folder.config['rounds']})" for folder, rounds in broken.items()]
    left_out = ["", f"Not finished, and counted nowhere: {'; '.join(told_of)}."] if broken else []
    rounds, leaks = tables(folders)
    if not len(leaks):
        return ["Nothing was attacked.", *left_out], 0
    leaks, lines = ranked(folders, leaks)
    costs, told = against_none(folders, rounds), summarised(folders)
    cells = {row[0]: row[1:] for row in told.rows}
    attacks = list(dict.fromkeys(leaks["attack"]))
    best: dict[str, Row] = {}
    for line in lines:
        name = line["contender"]
        if name not in best or (line["strongest"], line["score"]) > (best[name]["strongest"], best[name]["score"]):
            best[name] = line
    by_run = {str(folder.path): contender(folder.config) for folder in folders}
    plain = dict(zip(leaks["contender"], leaks["run"].map(by_run), strict=True))
    bare = set(leaks.loc[leaks["bare"], "contender"])

    def row(place: str, line: Row) -> list[str]:
        label = line["kind"] + (KNOWING if line["stronger"] == "adaptive" else "")
        numbers = dict(zip(told.columns[1:], cells[row_name(label, line["attack"], attacks)], strict=True))
        if numbers.get("against none") and costs[line["contender"]].verdict != "equivalent":
            numbers["against none"] = numbers["against none"].split("\n")[0]  # its verdict is another test's than the group's
        naive = line["by"].get("naive")
        by = f"{line['attack']}, {line['stronger']}" + (f", {line['kind'].split(': ')[-1]}" if ": " in line["kind"] else "")
        name, says = line["contender"], line["says"]
        stops, all_runs = stopped[plain[name]], every[plain[name]]
        says += f"; {stops} of {all_runs} runs did not finish" if stops else ""
        return [place, by, numbers.pop("stolen"), f"{naive['stolen']}/{naive['n']}" if naive else "", says, *numbers.values()]

    others = [column for column in told.columns[1:] if column != "stolen"]
    columns = ["defense", "strongest attacker", "stolen", "naive", "what is shown", *others]
    named = [dict(zip(told.columns, guess, strict=True)) for guess in told.guesses]
    guesses = [[one["defense"], "", one["stolen"], "", "knows nothing", *(one[name] for name in others)] for one in named]
    shown = ["What no defense gives away, and what knowing nothing scores:", ""]
    shown += markdown_rows(columns, [*(row(name, best[name]) for name in best if name in bare), *guesses])
    defended = sorted((line for line in best.values() if line["contender"] not in bare), key=lambda x: (x["strongest"], x["score"]))
    for place, title in enumerate(GROUPS):
        members = [line for line in defended if group_of(costs.get(line["contender"])) == place]
        if members:
            ranks = [row(f"{rank}. {line['contender']}", line) for rank, line in enumerate(members, 1)]
            shown += ["", f"### {title}", "", *markdown_rows(columns, ranks)]
    if flagged := [line["contender"] for line in defended if line["flag"]]:
        shown += ["", f"Protect only against the naive attacker: {'; '.join(flagged)}."]
    if silent := [name for name in dict.fromkeys(map(contender, _configs(folders))) if name not in plain.values()]:
        shown += ["", f"Not attacked, and so not ranked: {'; '.join(silent)}."]
    return [*shown, *left_out, *_notes(told)], len(defended)


def _done(folder: RunFolder) -> int:
    rounds = folder.rounds()
    return int(rounds["round"].max()) if len(rounds) else 0


def _notes(told: Summary) -> list[str]:
    """What clients found, as the summary tells it, and what counts as a theft."""
    return ["", told.title + ".", *(line for note in told.notes if not note.startswith("against none") for line in ("", note))]


def _setting(config: dict[str, Any]) -> str:
    """What the defenses of a table were tried on, in a line."""
    chosen, federation = config["choices"], config["federation"]
    unusual = [
        f"{group}={chosen[group]}"
        for group, usually in (("server", "honest"), ("aggregation", "plain"))
        if chosen.get(group, usually) != usually
    ]
    clients = f"{federation['per_round']} of {federation['clients']} clients a round, batches of {federation['batch_size']}"
    what = ", ".join(chosen[group] for group in ("data", "model", "federation"))
    return ", ".join([what, clients, chosen["partition"], f"{config['rounds']} rounds", *unusual])


def _made_with(folders: Sequence[RunFolder]) -> list[str]:
    """Seeds, the attackers' budget, hardware, versions and commands of these runs."""
    configs = _configs(folders)
    made = [read_json(folder.path / "environment.json") for folder in folders]
    _, leaks = tables(folders)
    said = [f"Runs: {len(folders)}; seeds: {_list(sorted({config['seed'] for config in configs}))}."]
    budgets: dict[str, list[str]] = defaultdict(list)
    for config in configs:
        if config["attack"] and (told := label(config, "attack")) not in (said_of := budgets[config["choices"]["attack"]]):
            said_of.append(told)
    for attack, of in leaks.groupby("attack", sort=False) if len(leaks) else ():
        budget = " and ".join(budgets.get(str(attack), [f"{attack} of `fedsim attack`, in all else as it comes"]))
        spent = [f"{who}: {_spent(some)}" for who, some in of.groupby("attacker", sort=False)]
        said.append(f"Attack: {budget}; {'; '.join(spent)}.")
    said.append(f"Listened to: {'; '.join(_distinct(_heard(config) for config in configs))}.")
    machines = _distinct(
        f"{one['processor']}, {one['cores']} cores, {one['gpu'] or one['device']}, {one['platform']}, Python {one['python']}"
        for one in made
    )
    said.append(f"Hardware: {'; '.join(machines)}.")
    versions = _distinct(", ".join(f"{name} {version}" for name, version in one["packages"].items()) for one in made)
    said.append(f"Versions: {'; '.join(versions)}.")
    commands = _distinct(f"`{re.sub(' (-o|--out)[ =][^ ]+', '', one['command'])}`" for one in made)  # where to is no matter
    begun = sorted(one["started"] for one in made)
    said.append(f"Run by {'; '.join(commands)}, between {begun[0]} and {begun[-1]}.")
    return ["Made with:", "", *(f"- {line}" for line in said)]


def _spent(leaks: pd.DataFrame) -> str:
    left = int((leaks["converged"] == 0).sum())
    evaluations, seconds = leaks["evaluations"].median(), leaks["seconds"].median()
    return f"{evaluations:,.0f} evaluations and {seconds:.2g} s a victim (medians), {left} of {len(leaks)} searches did not end"


def _heard(config: dict[str, Any]) -> str:
    every, rounds, clients = (config["tap"][key] for key in ("every", "rounds", "clients"))
    when = [f"every {every} rounds"] if every else []
    if rounds:
        when.append(f"rounds {_list(rounds)}" if isinstance(rounds, list) else f"{rounds} rounds")
    who = f"clients {_list(clients)}" if isinstance(clients, list) else f"{clients} clients"
    return f"{who} in {' and '.join(when) or 'no round'}"


def _configs(folders: Sequence[RunFolder]) -> list[dict[str, Any]]:
    return [folder.config for folder in folders]


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _list(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
