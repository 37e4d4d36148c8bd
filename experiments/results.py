"""What the cells of a study say: values of victims and of runs, of those cells and rows that settings select."""

import fnmatch
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from attacks.metrics import BARS
from experiments.config import Config
from experiments.naming import NO_MATTER, conditions, label
from experiments.scoring import ADAPTIVE
from experiments.summary import LAST, PERFECT
from fedsim.checks import one_of
from fedsim.run import RunFolder

Where = Mapping[str, Any]


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
            [own(folder) for folder in folders],
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
        return any(matches(settings, of_cells(where)) for settings in self.wanted)

    def shared(self, one: Where, other: Where) -> list[str]:
        """Settings that vary among what is selected, and in which a cell of one side has its like on the other."""
        sides = [[settings for settings in self.settings if matches(settings, of_cells(where))] for where in (one, other)]

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
            if not matches(settings, of_cells(where)):
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


def own(folder: RunFolder) -> pd.DataFrame:
    """What leaked to the attack that a cell was run for, without those that were made on it later."""
    leaks = folder.leaks()
    return leaks[leaks["attack"].str.removesuffix(ADAPTIVE) == folder.config["choices"]["attack"]] if len(leaks) else leaks


_KEYS = ("round", "client", "image")
ROWS = (*_KEYS, "attacker")  # what `where` asks of the rows of a cell rather than of its configuration


def of_cells(where: Where) -> dict[str, Any]:
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
