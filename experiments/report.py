"""One HTML file with everything there is to see of runs: no network, no other file, data as JSON, pictures as WebP.

Numbers are computed here, from the runs' tables; the page, `report.html` beside this file, selects and draws them. Whatever comes
from a configuration gets into the page as text, never as markup.
"""

import base64
import functools
import html
import io
import itertools
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy import stats
from torch import Tensor

from attacks.metrics import BARS, Rate, success_rates
from experiments import claims
from experiments.card import GUESS, card, obstacles
from experiments.config import GROUPS, Config, ConfigError, compose
from experiments.naming import contender, contenders, label, leaves, without_defense
from experiments.pictures import moments
from experiments.plots import (
    IMAGES,
    KNOWING,
    PERFECT,
    TEXTS,
    TRIVIAL,
    VICTIM,
    Summary,
    attack_settings,
    furthest,
    of_text,
    sender,
    summarised,
    tables,
)
from experiments.progress import size
from experiments.scoring import ADAPTIVE, STOLEN_MSE, STOLEN_TOKENS, is_told_labels
from experiments.statistics import LEVEL
from experiments.study import ABOUT, distinct
from fedsim.files import read_json, write_bytes
from fedsim.run import RunFolder
from fedsim.setup import build, setup_of

TEMPLATE = Path(__file__).with_suffix(".html")
PICTURES = 12  # victims of each contender in the gallery
FRAMES = 20  # of an animation
MOST = 14_000_000  # bytes of a page; pictures that would make it larger are left out
STILLS = 0.7  # share of the room for pictures that still ones may take
QUOTES = 3  # bytes that JSON puts around a picture
PLACES = len('"truth":99999,"stolen":99999,"film":99999,')  # what a victim's pictures add to what is said of it
CURVE = 200  # points of an accuracy curve
LEAST = math.ceil(-math.log2(LEVEL))  # thefts that have to fail before a sign test can show anything: 2^-5 < 5 %
ATTACKERS = ("naive", "adaptive")

Row = dict[str, Any]


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
    album = _Album({str(folder.path): folder for folder in folders}, places, text, blur)
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
    named = {base: (read_json(base / ABOUT)["study"], of) for base, of in studies.items() if (base / ABOUT).is_file()}
    verdicts, lacking = [], []
    for base, (name, of) in named.items():
        if asked := [one for one in claims.load() if one.study == name]:
            verdicts += claims.verify(asked, {name: of})
            lacking += claims.caveats(base, of)
    return [_section("claims", "Claims", claims.summary(verdicts, lacking))] if verdicts else []


def _section(key: str, title: str, table: Summary) -> Row:
    """A section of the page that is a table, at report.html#`key`."""
    return {"id": key, "section": title} | asdict(table)


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
        _ranked(str(kind), str(attack), of, leaks[leaks["attack"] == attack])
        for (kind, attack), of in leaks.groupby(["kind", "attack"], sort=False)
    ]
    return leaks, sorted(lines, key=lambda row: (row["attack"], row["strongest"], row["score"]))


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
    tested = of.dropna(subset="accuracy")
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
        "accuracy": _number(ends.mean()),
        "accuracies": [float(ends.min()), float(ends.max())] if len(ends) else [],
        "curve": [curve[place] for place in _evenly(len(curve), CURVE)],
        "sent": float(done.groupby("run")["bytes_up"].sum().mean()),
        "sent_text": size(done.groupby("run")["bytes_up"].sum().mean()) if len(done) else "",
        "share": float(done["bytes_up"].sum() / max(1, done["bytes_up_dense"].sum())) if len(done) else None,
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


def replay(config: Config) -> str | None:
    """The command that makes this run again, or None where today's choices have no such name or setting.

    What a setting or a choice says already is left out. Settings that were added since then are as they are by default.
    """
    try:
        overrides = _overrides(config)
    except ConfigError:  # a choice that has gone since
        return None
    if any(override.startswith("+") for override in overrides):
        return None
    return shlex.join(["fedsim", "run", *overrides, f"seed={config['seed']}"])


def _overrides(config: Config) -> list[str]:
    chosen = config["choices"]
    setting = [f"setting={chosen['setting']}"] if chosen.get("setting") not in (None, "none") else []
    found = tuple(setting)
    for groups in (_CHOSEN, ("model/bottleneck",)):  # a defense may choose the bottleneck
        now = _composed(found)["choices"]
        found += tuple(f"{group}={chosen[group]}" for group in groups if chosen.get(group) not in (None, now.get(group)))
    return [*found, *_differing(config, _composed(found), "")]


_CHOSEN = tuple(group for group in GROUPS if group not in ("setting", "model/init", "model/bottleneck"))


@functools.lru_cache(maxsize=256)
def _composed(overrides: tuple[str, ...]) -> Config:
    return compose(overrides)


def _differing(config: Config, composed: Config, path: str) -> list[str]:
    """Overrides for what `config` has otherwise, without `seed`, `name`, `out` and the names of choices."""
    found = []
    for key, value in config.items():
        if not path and key in ("seed", "name", "out", "choices"):
            continue
        if isinstance(value, dict) and isinstance(composed.get(key), dict):
            found += _differing(value, composed[key], f"{path}{key}.")
        elif key not in composed or composed[key] != value:
            found.append(f"{'' if key in composed else '+'}{path}{key}={_override(value)}")
    return found


def _override(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, str):
        return value if re.fullmatch(r"[\w./-]+", value) else "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_override(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_override, value)) + "]"
    return json.dumps(value)


# Leaks.


def _points(kind: str, attack: str, leaks: pd.DataFrame, rounds: pd.DataFrame, album: "_Album") -> list[Row]:
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
                    "accuracy": _number(accuracy.mean()),
                    "sent": float(until.groupby("run")["bytes_up"].sum().mean()),
                    "dense": float(until["bytes_up"].sum() / max(1, until["bytes_up_dense"].sum())),
                    **_counts(of),
                    "median_victim": album.want(of.iloc[(len(of) - 1) // 2], first=stage is None),
                    "worst_victim": album.want(of.iloc[0], first=stage is None),
                    "scores": [round(float(value), 2) for value in of["score"]] if stage is None else [],
                }
            )
        for point in here:
            point["stronger"] = point is max(here, key=_strength)
        found += here
    return found


def _guesses(leaks: pd.DataFrame, text: bool) -> list[Row]:
    """What knowing nothing scores: the median over victims, and the share of them that it steals."""
    known = {"typical": "the usual words"} if text else {name: TRIVIAL[name] for name in ("grey", "mean_image")}
    score = "token_accuracy" if text else "psnr_db"
    stolen = {
        name: leaks["typical_token_accuracy"] >= STOLEN_TOKENS if text else leaks[f"{name}_mse"] < STOLEN_MSE for name in known
    }
    return [
        {"name": words, "median": _number(leaks[f"{name}_{score}"].median()), "share": float(stolen[name].mean())}
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


def _counts(victims: pd.DataFrame) -> Row:
    rate = Rate(int((victims["verdict"] == "stolen").sum()), len(victims))
    bars = {name: str(bar) for name, bar in success_rates(victims).items()} if "mse" in victims else {}
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


def _strength(counts: Row) -> tuple[float, float]:
    """Who stole more is the stronger attacker; of two that stole as much, who came closer."""
    return counts["share"], counts["median"]


def _ranked(kind: str, attack: str, leaks: pd.DataFrame, every: pd.DataFrame) -> Row:
    """A line of the ranking, which goes by the stronger attacker, and what may be said of the defense.

    A defense is shown to protect against an attacker where that one stole from fewer of the same victims than he did without a
    defense (exact sign test of the pairs, one-sided, 5 %, each by itself). One who was not tried without is held against the other.
    A victim on whom an adaptive attacker's search did not end counts as perhaps stolen: such a search protects nobody. To protect
    only against the naive attacker takes one more test: that the adaptive one stole from more behind the same defense.
    """
    by = {who: _counts(of) for who in ATTACKERS if len(of := leaks[leaks["attacker"] == who])}
    stronger = max(by, key=lambda who: _strength(by[who]))
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
        return row | {"says": f"too few victims to tell: fewer than {LEAST} of them were stolen without a defense"}
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
        return row | {"says": "fewer thefts by the adaptive attacker only: the naive one is the stronger here"}
    if not safe:
        return row | {"says": f"of the adaptive attacker {undecided}" if lost else "no fewer thefts were shown"}
    return row | {"says": "fewer thefts than without a defense, by both attackers"}


def _shown(p: float | None) -> bool:
    return p is not None and p < LEVEL


def _stolen(leaks: pd.DataFrame, *, perhaps: bool = False) -> pd.Series:
    """Whether each victim was stolen from, by who it is; `perhaps` also where a search did not end."""
    taken = leaks["verdict"] != "not stolen" if perhaps else leaks["verdict"] == "stolen"
    return taken.groupby([leaks[key] for key in VICTIM]).any()


def _fewer(behind: pd.Series, without: pd.Series) -> float | None:
    """p of the sign test over victims of both, that fewer were stolen `behind`; None where so few were stolen `without` that no
    outcome could show anything."""
    both = pd.concat([behind, without], axis=1, join="inner", keys=["behind", "without"])
    if both["without"].sum() < LEAST:
        return None
    fewer, more = int((both["without"] & ~both["behind"]).sum()), int((both["behind"] & ~both["without"]).sum())
    return float(stats.binomtest(fewer, fewer + more, alternative="greater").pvalue) if fewer + more else 1.0


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
    for row in ranking:
        if row["bare"]:
            counts = row["by"][row["stronger"]]
            said.append(f"Behind {row['kind']}, {row['attack']} ({row['stronger']}) stole {_of(counts)}.")
    for attack in dict.fromkeys(row["attack"] for row in ranking):
        defended = [row for row in ranking if row["attack"] == attack and not row["bare"]]
        said += [_extremes(attack, defended)] if defended else []
    if flagged := list(dict.fromkeys(row["kind"] for row in ranking if row["flag"])):
        said.append(f"These protect only against the naive attacker, who does not know them: {'; '.join(flagged)}.")
    if lost := int((leaks["verdict"] == "not converged").sum()):
        said.append(
            f"{lost} of the {len(leaks)} attacks did not converge: this attacker did not get there, "
            "which does not mean that the victim was protected."
        )
    if not text:
        easy = int((leaks["mean_colour_mse"] < STOLEN_MSE).sum())
        said.append(
            f"A theft is counted at {next(iter(BARS))}, which an image of one colour, the mean of the original, passes for {easy} "
            f"of these {len(leaks)}; the summary table has stricter bars beside it."
        )
    return said


def _extremes(attack: str, defended: list[Row]) -> str:
    """Which defense, of those in the order of the ranking, gave away least to its stronger attacker, and which most."""
    told = [f"the {row['stronger']} attacker: {_of(row['by'][row['stronger']])}" for row in defended]
    first, last = defended[0], defended[-1]
    if len(defended) == 1:
        return f"Behind {first['kind']}, {attack} stole most as {told[0]}."
    if first["strongest"] == last["strongest"]:
        return (
            f"Every defense gave away the same share to its stronger attacker by {attack}: {first['strongest']:.0%} of its victims."
        )
    return f"Tried by {attack}, {first['kind']} gave away least, to {told[0]}; {last['kind']} gave away most, to {told[-1]}."


def _of(counts: Row) -> str:
    low, high = counts["interval"]
    return f"{counts['stolen']} of {counts['n']} (95 % interval {100 * low:.0f}-{100 * high:.0f} %, {counts['lost']} not converged)"


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


# Pictures.


def _gallery(leaks: pd.DataFrame, every: pd.DataFrame, album: "_Album") -> list[dict[str, int]]:
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


@dataclass
class _Album:
    """Victims that the page shows, with their pictures, each once.

    victims   what is said of each
    images    WebP as data URIs; `films` those of animations
    left_out  pictures and animations that there was no room for
    """

    folders: dict[str, RunFolder]
    places: dict[str, int]
    text: bool
    blur: bool
    victims: list[Row] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    films: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=lambda: {"pictures": 0, "animations": 0})
    _leaks: list[pd.Series] = field(default_factory=list)
    _places: dict[tuple[Any, ...], int] = field(default_factory=dict)
    _first: set[int] = field(default_factory=set)
    _stored: dict[bytes, int] = field(default_factory=dict)
    _room: int = 0

    def want(self, leak: pd.Series, *, first: bool) -> int:
        """The place of a victim among `victims`; those wanted `first` have their pictures before others, and move if recorded."""
        key = (leak["run"], leak["made_by"], leak["seen"], *(int(leak[name]) for name in ("round", "client", "image")))
        if key not in self._places:
            self._places[key] = len(self.victims)
            self._leaks.append(leak)
            self.victims.append(self._told(leak))
        if first:
            self._first.add(self._places[key])
        return self._places[key]

    def _told(self, leak: pd.Series) -> Row:
        told: Row = {key: int(leak[key]) for key in ("seed", "round", "client", "image")}
        told |= {
            "kind": leak["kind"],
            "attacker": leak["attacker"],
            "attack": leak["attack"],
            "made_by": leak["made_by"],
            "run": self.places[leak["run"]],
        }
        told |= {"verdict": leak["verdict"], "score": _number(leak["score"]), "label_right": bool(leak["label_right"])}
        if self.text:
            return told | {"written": "" if self.blur else leak["truth"], "read": leak["recovered"]}
        return told | {name: _number(leak[name]) for name in ("mse", "psnr_db", "ssim", "lpips") if name in leak}

    def fill(self, room: int) -> None:
        """Adds pictures of up to `room` bytes: of runs on the same data one after the other, so that data are loaded once."""
        if self.text:
            return
        self._room = room - PLACES * len(self.victims)
        films = int((1 - STILLS) * self._room)
        self._room -= films

        def turn(i: int) -> tuple[Any, ...]:
            leak = self._leaks[i]
            return i not in self._first, leak["under"], leak["seed"], leak["run"]

        truths: dict[tuple[Any, ...], Tensor] = {}
        made: tuple[Any, dict[int, Tensor]] = None, {}
        for i in sorted(range(len(self._leaks)), key=turn):
            leak, told = self._leaks[i], self.victims[i]
            run, round, client = leak["run"], told["round"], told["client"]
            if (key := (leak["under"], leak["seed"], round, client)) not in truths:
                truths[key] = self.folders[run].setup().truth(round, client)[0].cpu()
            if made[0] != (run, leak["made_by"], round):
                made = (run, leak["made_by"], round), self.folders[run].reconstructions(leak["made_by"], round)
            truth = truths[key][told["image"]]
            told["truth"] = self._still(_coarse(truth) if self.blur else truth)
            if (at := int(leak["reconstruction"])) >= 0:  # else the attack says that it has nothing of this one
                told["stolen"] = self._still(made[1][sender(leak, client)][at])
        self._animate(self._room + films)

    def _still(self, image: Tensor) -> int | None:
        data = _webp([image])
        if data not in self._stored:
            uri = _uri(data)
            if (cost := len(uri) + QUOTES) > self._room:
                self.left_out["pictures"] += 1
                return None
            self._room -= cost
            self._stored[data] = len(self.images)
            self.images.append(uri)
        return self._stored[data]

    def _animate(self, room: int) -> None:
        """Films of those wanted first that have a trace; no contender takes more than its part of the room."""
        by: dict[tuple[str, str], list[tuple[int, str]]] = {}

        def where(i: int) -> tuple[str, str, int]:
            return self._leaks[i]["run"], self._leaks[i]["made_by"], int(self._leaks[i]["round"])

        for (run, made_by, round), victims in itertools.groupby(sorted(self._first, key=where), key=where):
            traces = self.folders[run].traces(made_by, round)
            for i in victims:
                leak = self._leaks[i]
                trace = traces.get(sender(leak, int(leak["client"])))
                if trace is not None and leak["reconstruction"] >= 0:
                    frames = trace.images[moments(trace, FRAMES), int(leak["reconstruction"])]
                    by.setdefault((leak["kind"], made_by), []).append((i, _uri(_webp(list(frames)))))
        for several in by.values():
            left = room // len(by)
            for i, uri in sorted(several):
                if (cost := len(uri) + QUOTES) > left:
                    self.left_out["animations"] += 1
                    continue
                left -= cost
                self.victims[i]["film"] = len(self.films)
                self.films.append(uri)


def _coarse(image: Tensor) -> Tensor:
    """What is left of an image (C, H, W) in 4x4 pixels."""
    return torch.nn.functional.adaptive_avg_pool2d(image.float(), 4)


def _webp(images: Sequence[Tensor]) -> bytes:
    """An image (C, H, W), or several as an animation that stands at its last; small ones exactly, pixel by pixel."""
    pixels = [
        (image.detach().cpu().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy() for image in images
    ]
    first, *rest = [Image.fromarray(one.squeeze(-1) if one.shape[-1] == 1 else one).convert("RGB") for one in pixels]
    out = io.BytesIO()
    quality: Row = {"lossless": True, "quality": 50} if max(first.size) <= 64 and not rest else {"quality": 80}
    more: Row = {"save_all": True, "append_images": rest, "duration": [150] * len(rest) + [2000], "loop": 0} if rest else {}
    first.save(out, "WEBP", method=4, **quality, **more)
    return out.getvalue()


def _uri(data: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(data).decode()


def _number(value: Any) -> float | None:
    """JSON has no infinity and no "not a number"."""
    return float(value) if value is not None and math.isfinite(value) else None
