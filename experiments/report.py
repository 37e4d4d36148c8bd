"""One HTML file with everything there is to see of runs: no network, no other file, data as JSON, pictures as WebP.

Numbers are computed here, from the runs' tables; the page, `report.html` beside this file, selects and draws them. Whatever comes
from a configuration gets into the page as text, never as markup.
"""

import html
import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from attacks.metrics import BARS
from experiments import claims
from experiments.album import Album
from experiments.card import GUESS, card, obstacles
from experiments.config import Config
from experiments.naming import contender, contenders, label, leaves, without_defense
from experiments.plots import IMAGES, TEXTS
from experiments.progress import size
from experiments.ranking import ATTACKERS, Row, counts_of, ranked, strength
from experiments.replay import replay
from experiments.scoring import ADAPTIVE, STOLEN_MSE, STOLEN_TOKENS, is_told_labels
from experiments.study import ABOUT, distinct
from experiments.summary import TRIVIAL, VICTIM, Summary, attack_settings, each_once, furthest, of_text, summarised, tables
from fedsim.files import finite, read_json, write_bytes
from fedsim.run import RunFolder
from fedsim.setup import build, setup_of

TEMPLATE = Path(__file__).with_suffix(".html")
PICTURES = 12  # victims of each contender in the gallery
MOST = 14_000_000  # bytes of a page; pictures that would make it larger are left out
EACH = 6  # settings without a defense that are told one by one
CURVE = 200  # points of an accuracy curve


def write(folders: Sequence[RunFolder], path: Path, command: str, *, blur: bool = False) -> int:
    """Writes the report of these runs, and returns its size in bytes.

    blur  leave of each original 4x4 pixels, of a sentence nothing
    """
    page = rendered(data_of(folders, command, blur=blur)).encode()
    write_bytes(path, page)
    return len(page)


def rendered(data: Row) -> str:
    """The page that shows `data`."""
    # A "<" could end the script element that holds the data.
    text = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    title, template = html.escape(data["title"]), TEMPLATE.read_text(encoding="utf-8")
    return template.replace("__TITLE__", title).replace("__DATA__", text)


def data_of(folders: Sequence[RunFolder], command: str, *, blur: bool = False) -> Row:
    """All that the page shows, as plain values. Raises ValueError where nothing was attacked."""
    verdicts, folders = _of_studies(folders), distinct(folders)
    unbegun = [folder for folder in folders if not len(folder.rounds())]
    folders = [folder for folder in folders if folder not in unbegun]
    rounds, leaks = tables(folders)
    some = folders or unbegun
    where = ", ".join(str(folder.path) for folder in some[:3]) + ", …" * (len(some) > 3)
    if not len(rounds):
        raise ValueError(f"{where}: no round is finished yet")
    if not len(leaks):
        raise ValueError(f"{where}: nothing was attacked, so there is no leak to report; fedsim attack RUN attack=NAME")
    text, configs = of_text(folders), {str(folder.path): folder.config for folder in folders}
    leaks, ranking = ranked(folders, leaks)
    grouped = _by_contender(folders)
    unders = list(leaks["under"].unique())
    places = {str(folder.path): place for place, folder in enumerate(folders)}
    contenders = [_contender(name, of, rounds, leaks, places) for name, of in grouped.items()]
    points = []
    album = Album({str(folder.path): folder for folder in folders}, places, text, blur)
    for (kind, attack), of in leaks.groupby(["kind", "attack"], sort=False):
        points += [point | {"under": unders.index(point["under"])} for point in _points(str(kind), str(attack), of, rounds, album)]
    gallery = [
        {"kind": kind, "attack": attack, "victims": _gallery(of, leaks[leaks["attack"] == attack], album)}
        for (kind, attack), of in leaks.groupby(["kind", "attack"], sort=False)
    ]
    shown = TEXTS if text else IMAGES
    tested = dict.fromkeys(config["choices"]["data"] for config in configs.values())
    data = ", ".join(dict.fromkeys(f"{c['choices']['data']} with {c['choices']['model']}" for c in configs.values()))
    page = {
        "title": f"fedsim: {data}",
        "text": text,
        "blurred": blur,
        "command": command,
        "pictures": PICTURES,
        "words": _in_words(folders, unbegun, contenders, ranking, leaks, data, text),
        "score": {
            "name": "in place" if text else "PSNR",
            "axis": shown.axis,
            "most": shown.most,
            "bar": shown.bar,
            "stolen": shown.stolen,
            "guesses": _guesses(leaks, text),
        },
        "contenders": contenders,
        "points": points,
        "ranking": ranking,
        "gallery": gallery,
        "heat": [
            _heat(str(kind), str(attack), str(who), of)
            for (kind, attack, who), of in leaks.groupby(["kind", "attack", "attacker"], sort=False)
        ],
        "knobs": _knobs({name: of[0].config for name, of in grouped.items()}),
        "tables": [_section("table", "Summary table", summarised(folders)), *verdicts],
        "stages": sorted({int(round) for round in leaks["round"]}),
        "victims": album.victims,
        "images": album.images,
        "films": album.films,
        "left_out": album.left_out,
        "test": f"test set of {', '.join(tested)}",
    }
    album.fill(MOST - len(rendered(page).encode()))
    return page


def _of_studies(folders: Sequence[RunFolder]) -> list[Row]:
    """The verdicts of the studies whose cells these runs are."""
    studies: dict[Path, list[RunFolder]] = {}
    for folder in folders:
        studies.setdefault(folder.path.parent, []).append(folder)
    named = {base: read_json(base / ABOUT) for base in studies if (base / ABOUT).is_file()}
    several = Counter(about["study"] for about in named.values())
    verdicts, lacking = [], []
    alone: list[Row] = []
    for base, about in named.items():
        name = about["study"]
        if asked := [one for one in claims.load() if one.study == name]:
            cells, wanted, told = claims.measured(base, studies[base])
            found = claims.verify(asked, {name: cells}, {name: wanted})
            if several[name] > 1:  # two answers to one question do not stand in one table
                table = claims.summary(found, told, full=about["size"] == "full")
                alone.append(_section(f"claims-{len(alone)}", f"Claims, by {base}", table))
            else:
                verdicts += found
                lacking += told
    full = all(about["size"] == "full" for about in named.values())
    return ([_section("claims", "Claims", claims.summary(verdicts, lacking, full=full))] if verdicts else []) + alone


def _section(key: str, title: str, table: Summary) -> Row:
    """A section of the page that is a table, at report.html#`key`."""
    return {"id": key, "section": title} | asdict(table)


def _by_contender(folders: Sequence[RunFolder]) -> dict[str, list[RunFolder]]:
    found: dict[str, list[RunFolder]] = {}
    for folder, name in zip(folders, contenders([folder.config for folder in folders]), strict=True):
        found.setdefault(name, []).append(folder)
    return found


def _contender(
    name: str, folders: Sequence[RunFolder], rounds: pd.DataFrame, leaks: pd.DataFrame, places: Mapping[str, int]
) -> Row:
    """What training under a defense cost, what is proved of it, and how to do it again."""
    of = rounds[rounds["run"].isin([str(folder.path) for folder in folders])].sort_values("round")
    tested = each_once(of).dropna(subset="accuracy")
    done = furthest(of)
    ends = done.dropna(subset="accuracy").groupby("run")["accuracy"].last()
    by = tested.groupby("round")["accuracy"]
    curve = [
        [int(round), mean, low, high] for round, mean, low, high in zip(by.mean().index, by.mean(), by.min(), by.max(), strict=True)
    ]
    last = of.groupby("run").last()
    config = folders[0].config
    tried = _tried(folders, leaks)
    return {
        "name": name,
        "accuracy": finite(ends.mean()),
        "accuracies": [float(ends.min()), float(ends.max())] if len(ends) else [],
        "curve": [curve[place] for place in _evenly(len(curve), CURVE)],
        "sent": float(done.groupby("run")["bytes_up"].sum().mean()),
        "sent_text": size(done.groupby("run")["bytes_up"].sum().mean()) if len(done) else "",
        "share": _of_dense(done),
        "proof": _proof(last) if "epsilon" in last and np.isfinite(last["epsilon"]).all() else None,
        "bare": without_defense(config),
        "family": f"{config['choices']['defense']} {config['choices'].get('model/bottleneck')}",
        "settings": "; ".join([config["choices"]["data"], *(label(config, group) for group in ("model", "federation"))]),
        "attacks": {attack: one.label for attack, one in tried.items()},
        "card": _card(config, tried),
        "runs": [_run(folder, of[of["run"] == str(folder.path)]) | {"id": places[str(folder.path)]} for folder in folders],
    }


def _proof(last: pd.DataFrame) -> Row:
    worst = last.sort_values("epsilon").iloc[-1]
    return {
        "epsilon": float(worst["epsilon"]),
        "delta": float(worst["delta"]),
        "bound": math.ceil(100 * worst["reconstruction_bound"]) / 100,  # never below what is proved
        "guess": GUESS,
    }


@dataclass(frozen=True)
class _Attack:
    """An attack that was made of a contender's runs: its settings, None where nobody wrote them down, and who made it."""

    label: str
    settings: Config | None
    told: list[bool]


def _tried(folders: Sequence[RunFolder], leaks: pd.DataFrame) -> dict[str, _Attack]:
    """By name, the attacks that were made of these runs."""
    by_run = {str(folder.path): folder for folder in folders}
    found = {}
    for attack, of in leaks[leaks["run"].isin(by_run)].groupby("attack", sort=False):
        first = of.iloc[0]
        folder, told = by_run[first["run"]], [who == "adaptive" for who in ATTACKERS if (of["attacker"] == who).any()]
        own = attack == folder.config["choices"]["attack"]  # one that was made later has its unusual settings in its name
        text = label(folder.config, "attack") if own else str(attack)
        found[str(attack)] = _Attack(text, attack_settings(folder, first["made_by"]), told)
    return found


def _card(config: Config, tried: Mapping[str, _Attack]) -> list[list[str]]:
    """The threat-model card, with the conditions under which an attack is weak or hopeless anyway. What differs between attacks
    is told of each."""
    setup, tap, names = setup_of(config), build(config["tap"]), ", ".join(tried)
    cards, hard = {}, []
    for name, one in tried.items():
        attack = None if one.settings is None else build(one.settings)
        cards[name] = dict(card(setup, tap, names, label(config), one.told, given=is_told_labels(attack)))
        hard += [(name, grade, why) for grade, why in (obstacles(setup, attack) if attack is not None else [])]
    lines: dict[str, dict[str, list[str]]] = {}
    for name, told in cards.items():
        for what, known in told.items():
            lines.setdefault(what, {}).setdefault(known, []).append(name)
    found = [
        [what if len(names) == len(cards) else f"{what}, {', '.join(names)}", known]
        for what, several in lines.items()
        for known, names in several.items()
    ]
    return found + [[f"{grade} attack" + (f", {name}" if len(cards) > 1 else ""), why] for name, grade, why in hard]


def _run(folder: RunFolder, rounds: pd.DataFrame) -> Row:
    environment = read_json(folder.path / "environment.json")
    config = folder.config
    done, path = int(rounds["round"].max()) if len(rounds) else 0, shlex.quote(str(folder.path))
    own, who = config["choices"]["attack"], config.get("attacker", "naive")
    return {
        "name": folder.path.name,
        "path": path,
        "own": [own] if who == "naive" else [own, own + ADAPTIVE],
        "later": {
            made_by: f"fedsim attack {path} {shlex.join(one['overrides'])}" for made_by, one in folder.attacks_made().items()
        },
        "seed": config["seed"],
        "rounds": done,
        "of": config["rounds"],
        "recorded": environment["command"],
        "command": replay(config),
        "config": json.dumps(config, indent=2),
        "made": {key: value for key, value in environment.items() if key != "command"},
    }


# Leaks.


def _points(kind: str, attack: str, leaks: pd.DataFrame, rounds: pd.DataFrame, album: Album) -> list[Row]:
    """What each attacker stole over all rounds (`stage` None), and in each; accuracy and bytes are those up to then."""
    found = []
    stages = sorted(leaks["round"].unique())
    trained = furthest(rounds[rounds["run"].isin(leaks["run"])]).sort_values("round")
    for stage in (None, *map(int, stages)):
        victims = leaks if stage is None else leaks[leaks["round"] == stage]
        until = trained if stage is None else trained[trained["round"] <= stage]
        accuracy = until.dropna(subset="accuracy").groupby("run")["accuracy"].last()
        here = []
        for who in ATTACKERS:
            of = victims[victims["attacker"] == who].sort_values("score", ascending=False, kind="stable")
            if not len(of):
                continue
            here.append(
                {
                    "kind": kind,
                    "contender": of["contender"].iloc[0],
                    "under": of["under"].iloc[0],
                    "attack": attack,
                    "attacker": who,
                    "stage": stage,
                    "accuracy": finite(accuracy.mean()),
                    "sent": float(until.groupby("run")["bytes_up"].sum().mean()),
                    "dense": _of_dense(until),
                    **counts_of(of),
                    "median_victim": album.want(of.iloc[(len(of) - 1) // 2], first=stage is None),
                    "worst_victim": album.want(of.iloc[0], first=stage is None),
                    "scores": [round(float(value), 2) for value in of["score"]] if stage is None else [],
                }
            )
        for point in here:
            point["stronger"] = point is max(here, key=strength)
        found += here
    return found


def _of_dense(rounds: pd.DataFrame) -> float | None:
    """The bytes that were sent as a share of what dense updates would take; None where none was sent, as by a run that was stopped
    in its first round."""
    sent, dense = rounds["bytes_up"].sum(), rounds["bytes_up_dense"].sum()
    return float(sent / dense) if sent and dense else None


def _guesses(leaks: pd.DataFrame, text: bool) -> list[Row]:
    """What knowing nothing scores: the median over victims, and the share of them that it steals."""
    known = {"typical": "the usual words"} if text else {name: TRIVIAL[name] for name in ("grey", "mean_image")}
    score = "token_accuracy" if text else "psnr_db"
    stolen = {
        name: leaks["typical_token_accuracy"] >= STOLEN_TOKENS if text else leaks[f"{name}_mse"] < STOLEN_MSE for name in known
    }
    return [
        {"name": words, "median": finite(leaks[f"{name}_{score}"].median()), "share": float(stolen[name].mean())}
        for name, words in known.items()
    ]


def _knobs(configs: dict[str, Config]) -> list[Row]:
    """For each setting of a defense that differs between contenders alike in all else: its values, and who has them."""
    found: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for name, config in configs.items():
        settings = dict(leaves(["defense"], config["defense"])) | dict(leaves(["bottleneck"], config["model"].get("bottleneck")))
        others = {key: config["choices"].get(key) for key in ("defense", "model/bottleneck", "server", "aggregation")}
        others |= {key: config.get(key) for key in ("server", "aggregation")}
        for path, value in settings.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                rest = {key: other for key, other in settings.items() if key != path}
                alike = [others, rest, name.removeprefix(contender(config))]
                found.setdefault((path, json.dumps(alike, sort_keys=True)), []).append((float(value), name))
    knobs = []
    for (path, _), at in found.items():
        if len(at) > 1:
            knob = path.rpartition(".")[2]
            words = at[0][1].split(" ")
            title = " ".join(word for word in words if word.partition("=")[0] != knob)
            knobs.append({"title": title, "knob": knob, "at": sorted(at)})
    return knobs


def _heat(kind: str, attack: str, who: str, leaks: pd.DataFrame) -> Row:
    """The best score of each client in each round, and how many of its images were stolen."""
    keys = ["seed", "client", "round"]
    cells = [
        [*(int(of[key].iloc[0]) for key in keys), float(of["score"].max()), int((of["verdict"] == "stolen").sum()), len(of)]
        for _, of in leaks.groupby(keys)
    ]
    return {"kind": kind, "attack": attack, "attacker": who, "cells": cells}


def _in_words(
    folders: Sequence[RunFolder],
    unbegun: Sequence[RunFolder],
    contenders: list[Row],
    ranking: list[Row],
    leaks: pd.DataFrame,
    data: str,
    text: bool,
) -> list[str]:
    """The report in a few sentences."""
    what = "sentences" if text else "images"
    seeds = leaks["seed"].nunique()
    said = [
        f"{_many(len(folders), 'run')} on {data}: {_many(len(contenders), 'contender')}, {_many(seeds, 'seed')}, "
        f"{len(leaks)} attacks on {what} by {', '.join(leaks['attack'].unique())}."
    ]
    unfinished = [run["name"] for one in contenders for run in one["runs"] if run["rounds"] < run["of"]]
    if unfinished:
        what_counts = "their leaks are counted, their accuracy and bytes only where no run of the same defense came further"
        said.append(f"Not finished; {what_counts}: {', '.join(unfinished)}.")
    if unbegun:
        said.append(f"Without a finished round, and left out: {', '.join(folder.path.name for folder in unbegun)}.")
    attacked = set(leaks["run"])
    if not text and (bare := sum(str(folder.path) in attacked and not folder.pictured for folder in folders)):
        said.append(f"{_many(bare, 'run')} without pictures of what was stolen: the results alone are there.")
    undefended = [row for row in ranking if row["bare"]]
    if len(undefended) <= EACH:
        said += [f"Behind {row['kind']}, {row['attack']} ({row['stronger']}) stole {_of_stronger(row)}." for row in undefended]
    else:
        for attack in dict.fromkeys(row["attack"] for row in undefended):
            said.append(_extremes(attack, [row for row in undefended if row["attack"] == attack], "undefended setting"))
    for attack in dict.fromkeys(row["attack"] for row in ranking):
        defended = [row for row in ranking if row["attack"] == attack and not row["bare"]]
        said += [_extremes(attack, defended)] if defended else []
    if flagged := list(dict.fromkeys(row["kind"] for row in ranking if row["flag"])):
        said.append(f"These protect only against the naive attacker, who does not know them: {'; '.join(flagged)}.")
    if lost := int((leaks["verdict"] == "not converged").sum()):
        said.append(
            f"{lost} of the {len(leaks)} attacks stole nothing and did not converge: this attacker did not get there, "
            "which does not mean that the victim was protected."
        )
    if not text:
        easy = int((leaks["mean_colour_mse"] < STOLEN_MSE).sum())
        said.append(
            f"A theft is counted at {next(iter(BARS))}, which an image of one colour, the mean of the original, passes for {easy} "
            f"of these {len(leaks)}; the summary table has stricter bars beside it."
        )
    return said


def _extremes(attack: str, rows: list[Row], what: str = "defense") -> str:
    """Which of these, in the order of the ranking, gave away least to its stronger attacker, and which most."""
    told = [f"the {row['stronger']} attacker: {_of_stronger(row)}" for row in rows]
    first, last = rows[0], rows[-1]
    if len(rows) == 1:
        return f"Behind {first['kind']}, {attack} stole most as {told[0]}."
    if first["strongest"] == last["strongest"]:
        return (
            f"Every {what} gave away the same share to its stronger attacker by {attack}: {first['strongest']:.0%} of its victims."
        )
    return f"Tried by {attack}, {first['kind']} gave away least, to {told[0]}; {last['kind']} gave away most, to {told[-1]}."


def _of_stronger(row: Row) -> str:
    counts = row["by"][row["stronger"]]
    low, high = counts["interval"]
    return f"{counts['stolen']} of {counts['n']} (95 % interval {100 * low:.0f}-{100 * high:.0f} %, {counts['lost']} not converged)"


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


# Pictures.


def _gallery(leaks: pd.DataFrame, every: pd.DataFrame, album: Album) -> list[dict[str, int]]:
    """Up to `PICTURES` victims, spread evenly, for each the place of what each attacker made of it.

    They are the same for all defenses, if there are as many that all were tried on.
    """
    keys = list(VICTIM)
    own = pd.MultiIndex.from_frame(leaks[keys]).unique().sort_values()
    shared = own
    for _, other in every.groupby("kind", sort=False):
        shared = shared.intersection(pd.MultiIndex.from_frame(other[keys]))
    chosen = shared.sort_values() if len(shared) >= min(PICTURES, len(own)) else own
    rows = leaks.set_index(keys).assign(at=np.arange(len(leaks)))
    found = []
    for place in _evenly(len(chosen), PICTURES):
        both = rows.loc[[chosen[place]]]
        found.append(
            {
                who: album.want(leaks.iloc[int(of["at"].iloc[0])], first=True)
                for who in ATTACKERS
                if len(of := both[both["attacker"] == who])
            }
        )
    return found


def _evenly(count: int, most: int) -> list[int]:
    """Up to `most` of `count` places, the first and the last among them."""
    return [int(place) for place in np.unique(np.linspace(0, count - 1, min(most, count)).round())]
