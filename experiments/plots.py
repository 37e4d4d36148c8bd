"""Figures of one run or of several, compared by defense; runs that differ in seed alone are one defense.

Every figure is written as PNG and as SVG, or as asked. Colours are those of Okabe and Ito (2008), which colour-blind readers tell
apart, and each defense has a marker of its own as well.
"""

import json
import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from attacks.metrics import Rate
from experiments.canvas import COLOURS, MARKERS, STYLE, frame, picture, save
from experiments.naming import without_defense
from experiments.pictures import draw_trace
from experiments.scoring import STOLEN_MSE, STOLEN_TOKENS
from experiments.statistics import Difference
from experiments.summary import (
    KNOWING,
    MARGIN,
    PERFECT,
    against_none,
    each_once,
    furthest,
    in_order,
    leaks_of,
    named,
    of_text,
    seeds_of,
    sender,
    tables,
    updates_of,
)
from fedsim.files import write_bytes
from fedsim.observation import SUM
from fedsim.run import RunFolder

MEDIAN, WORST = "#0072B2", "#D55E00"
ATTACKERS = (  # in figures with a row for each defense: name, what it says, colour, marker, place beside the row's middle
    ("naive", "does not know the defense", MEDIAN, "o", -0.15),
    ("adaptive", "knows it", WORST, "D", 0.15),
)
FEW = 8  # contenders that a legend inside the axes has room for
LINES = "lines are medians, open marks neither stole nor converged"
COLUMN = 30  # of a legend beside them
PAGE = 16  # rows of pictures in one file


def draw(folders: Sequence[RunFolder], out: Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Draws every figure the runs have data for, and returns a file of each; what was read of text is a table in Markdown."""
    matplotlib.use("Agg")
    rounds, leaks = tables(folders)
    text = of_text(folders)
    made, keep = [], partial(save, formats=formats)
    with plt.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("error")
        learned = rounds["accuracy"].notna().any()
        if learned:
            made.append(keep(_accuracy(each_once(rounds)), out / "accuracy"))
            made.append(keep(_bytes(each_once(rounds)), out / "accuracy_against_bytes"))
        if costs := against_none(folders, rounds):
            made.append(keep(_differences(costs, in_order(rounds["defense"])), out / "accuracy_difference"))
        for attack in leaks["attack"].unique() if len(leaks) else ():
            made.append(keep(_leak(leaks, attack, TEXTS if text else IMAGES), out / f"leak_{attack}"))
            if text:
                made.append(_sentences(leaks, attack, out / f"stolen_{attack}.md"))
            else:
                pages = _pictures(folders, attack)
                names = [f"pictures_{attack}" + (f"_{i}" if len(pages) > 1 else "") for i in range(1, len(pages) + 1)]
                made += [keep(page(), out / name) for page, name in zip(pages, names, strict=True)]
                made += _traces(folders, attack, out / f"traces_{attack}", formats)
            if learned:
                what = "sentences" if text else "images"
                made.append(keep(_pareto(rounds, leaks, attack, what), out / f"accuracy_against_leak_{attack}"))
        made.append(keep(_partition(folders[0]), out / "partition"))
    return made


def _look(index: int) -> dict[str, Any]:
    # As many pairs as colours times markers, before one comes again.
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]}


def _band(axes: Axes, table: pd.DataFrame, x: str, y: str, name: str, index: int) -> None:
    """The mean over runs as a line, their range as a band; markers thinned to about ten."""
    by = table.dropna(subset=y).groupby(x)[y]
    mean, low, high = by.mean(), by.min(), by.max()
    seeds = table["seed"].nunique()
    told = f" ({seeds} seeds)" if seeds > 1 else ""
    axes.plot(mean.index, mean, label=name + told, markersize=5, markevery=max(1, len(mean) // 10), **_look(index))
    if seeds > 1:
        axes.fill_between(mean.index, low, high, color=COLOURS[index % len(COLOURS)], alpha=0.15, linewidth=0)


def _figure(width: float = 6.4, height: float = 4.0, entries: int = 0) -> tuple[Figure, Axes]:
    """Axes in a figure of their own, with room for a legend of so many entries beside them if they are many."""
    if entries > FEW:
        width, height = 6.4 + 3.2 * math.ceil(entries / COLUMN), max(height, 0.17 * min(entries, COLUMN) + 0.7)
    return plt.subplots(figsize=(width, height), layout="constrained")


def _legend(axes: Axes, beside: bool = False) -> None:
    """The legend, in the axes while it is short, else (or if told) beside them."""
    entries = len(axes.get_legend_handles_labels()[1])
    if entries > FEW:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7, ncols=math.ceil(entries / COLUMN))
    elif beside:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    else:
        axes.legend()


def _percent(axis: Any) -> None:
    axis.set_major_formatter(PercentFormatter(1.0))


def _accuracy(rounds: pd.DataFrame) -> Figure:
    figure, axes = _figure(entries=rounds["defense"].nunique())
    for i, defense in enumerate(in_order(rounds["defense"])):
        _band(axes, rounds[rounds["defense"] == defense], "round", "accuracy", defense, i)
    axes.set(xlabel="round", ylabel="accuracy on the test set", ylim=(0, None), title="What the defense costs: accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _percent(axes.yaxis)
    _legend(axes)
    return figure


def _bytes(rounds: pd.DataFrame) -> Figure:
    figure, axes = _figure(entries=rounds["defense"].nunique())
    for i, defense in enumerate(in_order(rounds["defense"])):
        of = rounds[rounds["defense"] == defense].sort_values(["run", "round"])
        of = of.assign(megabytes=of.groupby("run")["bytes_up"].cumsum() / 1e6)
        # Runs of one defense send nearly the same each round: their mean is drawn against the mean of their bytes.
        of["megabytes"] = of.groupby("round")["megabytes"].transform("mean")
        _band(axes, of[of["megabytes"] > 0], "megabytes", "accuracy", defense, i)
    axes.set(xlabel="sent by all clients so far (MB, log scale)", ylabel="accuracy on the test set", ylim=(0, None), xscale="log")
    axes.set_title("What the accuracy costs: bytes")
    _percent(axes.yaxis)
    _legend(axes)
    return figure


def _differences(costs: dict[str, Difference], defenses: list[str]) -> Figure:
    """A forest plot, in percentage points; colours are those the defenses have in other figures."""
    names = [textwrap.fill(defense, 30) for defense in costs]
    figure, axes = _figure(7.4, 1.5 + 0.2 * sum(name.count("\n") + 2 for name in names))
    axes.axvspan(-100 * MARGIN, 100 * MARGIN, color="#555555", alpha=0.12, linewidth=0)
    axes.axvline(0, color="#555555", linewidth=1)
    for row, (defense, cost) in enumerate(costs.items()):
        mean, low, high = 100 * cost.mean, 100 * cost.low, 100 * cost.high
        axes.errorbar(
            [mean],
            [row],
            xerr=[[mean - low], [high - mean]],
            markersize=7,
            capsize=3,
            linestyle="none",
            **_look(defenses.index(defense)),
        )
        axes.text(1.02, row, cost.verdict, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    axes.set_yticks(range(len(costs)), names)
    axes.grid(False, axis="y")
    shaded = f"shaded: {100 * MARGIN:.0f} points, the margin"
    axes.set(ylim=(len(costs) - 0.4, -0.6), xlabel=f"percentage points of accuracy\n90 % interval, {seeds_of(costs)}; {shaded}")
    axes.set_title("What the defense costs: accuracy against none")
    return figure


@dataclass(frozen=True)
class _Leak:
    """What a figure of leaks shows: a column, clipped at `most`; the bar of a theft, and the score of knowing nothing."""

    column: str
    axis: str
    most: float
    bar: float
    stolen: str
    trivial: str
    guess: str


IMAGES = _Leak(
    "psnr_db",
    "PSNR of the reconstruction (dB)",
    PERFECT,
    -10 * float(np.log10(STOLEN_MSE)),
    f"stolen: MSE < {STOLEN_MSE}",
    "mean_image_psnr_db",
    "the dataset's mean image",
)
TEXTS = _Leak(
    "token_accuracy",
    "share of a sentence's words in their places",
    1.0,
    STOLEN_TOKENS,
    f"stolen: {STOLEN_TOKENS:.0%} of its words",
    "typical_token_accuracy",
    "the usual words at each place",
)


def _leak(leaks: pd.DataFrame, attack: str, shown: _Leak) -> Figure:
    leaks = leaks[leaks["attack"] == attack]
    if (defenses := leaks["defense"].nunique()) > FEW:
        return (_leak_in_panels if defenses <= 2 * FEW else _leak_in_rows)(leaks, attack, shown)
    figure, axes = _figure(8.0, 4.0)
    every = sorted(leaks["round"].unique())
    for i, defense in enumerate(names := in_order(leaks["defense"])):
        place = {round: j + (i - (len(names) - 1) / 2) * 0.1 for j, round in enumerate(every)}
        _marks(axes, leaks[leaks["defense"] == defense], place, shown, defense, _look(i))
    for level, text, side in (
        (shown.bar, shown.stolen, "bottom"),
        (leaks[shown.trivial].median(), shown.guess, "top"),
    ):
        axes.axhline(level, color="#555555", linestyle="--" if side == "bottom" else ":", linewidth=1)
        axes.text(len(every) - 0.42, level, text, ha="right", va=side, fontsize=8, color="#555555")
    axes.set_xticks(range(len(every)), [str(round) for round in every])
    axes.set(xlim=(-0.6, len(every) - 0.4), xlabel="round", ylabel=shown.axis)
    axes.set_title(f"What leaks to {attack}: {LINES}", loc="left")
    _legend(axes, beside=True)
    return figure


def _marks(axes: Axes, victims: pd.DataFrame, place: dict[int, float], shown: _Leak, name: str, look: dict[str, Any]) -> None:
    """A mark for each victim, by its round's place, and the rounds' medians as a line."""
    for lost, fill in ((False, look["color"]), (True, "none")):
        some = victims[(victims["verdict"] == "not converged") == lost]
        axes.scatter(
            some["round"].map(place),
            some[shown.column].clip(upper=shown.most),
            s=22,
            marker=look["marker"],
            facecolor=fill,
            edgecolor=look["color"],
            alpha=0.6,
        )
    median = victims.groupby("round")[shown.column].median().clip(upper=shown.most)
    axes.plot([place[round] for round in median.index], median, label=name, markersize=6, **look)


def _leak_in_panels(leaks: pd.DataFrame, attack: str, shown: _Leak) -> Figure:
    """Of several defenses, a panel each with both attackers."""
    contenders = leaks["defense"].str.removesuffix(KNOWING)
    names, every = in_order(contenders), sorted(leaks["round"].unique())
    across = min(4, len(names))
    down = math.ceil(len(names) / across)
    figure, panels = plt.subplots(
        down, across, figsize=(2.6 * across, 2.1 * down + 1.1), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    said: dict[str, Any] = {}
    for i, (axes, name) in enumerate(zip(panels.flat, names, strict=False)):
        for who, says, colour, marker, shift in ATTACKERS:
            of = leaks[(contenders == name) & (leaks["attacker"] == who)]
            if len(of):
                place = {round: j + shift for j, round in enumerate(every)}
                _marks(axes, of, place, shown, says, {"color": colour, "marker": marker})
        for level, text, style in ((shown.bar, shown.stolen, "--"), (leaks[shown.trivial].median(), shown.guess, ":")):
            axes.axhline(level, color="#555555", linestyle=style, linewidth=1, label=text)
        axes.set_title("\n".join(textwrap.wrap(name, 30)), fontsize=8)
        axes.set_xticks(range(len(every)), [str(round) for round in every])
        axes.set_xlim(-0.6, len(every) - 0.4)
        if lowest := i + across >= len(names):  # nothing stands below
            axes.set_xlabel("round")
        axes.tick_params(labelbottom=lowest)
        handles, labels = axes.get_legend_handles_labels()
        said |= dict(zip(labels, handles, strict=True))
    figure.supylabel(shown.axis, fontsize=10)
    figure.suptitle(f"What leaks to {attack}: {LINES}", fontsize=11)
    figure.legend(said.values(), said.keys(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _leak_in_rows(leaks: pd.DataFrame, attack: str, shown: _Leak) -> Figure:
    """Of many defenses, a row each, all rounds together."""
    contenders = leaks["defense"].str.removesuffix(KNOWING)
    rows = in_order(contenders)
    names = 0.067 * max(map(len, rows))  # inches, at 8 points
    figure, axes = _figure(max(8.0, names + 5.0), 0.27 * len(rows) + 1.6)
    for who, says, colour, marker, shift in ATTACKERS:
        of = leaks[leaks["attacker"] == who]
        place = contenders[of.index].map({name: row + shift for row, name in enumerate(rows)})
        axes.scatter(of[shown.column].clip(upper=shown.most), place, s=12, marker=marker, color=colour, alpha=0.3, linewidth=0)
        median = of.groupby(place)[shown.column].median().clip(upper=shown.most)
        axes.scatter(median, median.index, s=45, marker=marker, color=colour, label=says)
    for level, text, style in ((shown.bar, shown.stolen, "--"), (leaks[shown.trivial].median(), shown.guess, ":")):
        axes.axvline(level, color="#555555", linestyle=style, linewidth=1, label=text)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel=shown.axis, title=f"What leaks to {attack}: large marks are medians")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _final(rounds: pd.DataFrame, victims: pd.DataFrame) -> pd.Series:
    """The last accuracy of each of the victims' runs; of those that came furthest, where some broke off."""
    of = rounds[rounds["run"].isin(victims["run"])].dropna(subset="accuracy").sort_values("round")
    return furthest(of).groupby("run")["accuracy"].last()


def _rate(victims: pd.DataFrame) -> tuple[Rate, list[list[float]]]:
    """How many were stolen, and how far its interval reaches below and above the share."""
    rate = Rate(int((victims["verdict"] == "stolen").sum()), len(victims), updates_of(victims))
    low, high = rate.interval
    return rate, [[max(0.0, rate.share - low)], [max(0.0, high - rate.share)]]


def _range(final: pd.Series) -> list[list[float]]:
    """How far the smallest and the largest are from the mean, which may round to beyond them where all are the same."""
    return [[max(0.0, final.mean() - final.min())], [max(0.0, final.max() - final.mean())]]


def _pareto(rounds: pd.DataFrame, leaks: pd.DataFrame, attack: str, what: str) -> Figure:
    leaks = leaks[leaks["attack"] == attack]
    if leaks["defense"].nunique() > 2 * FEW:
        return _pareto_in_rows(rounds, leaks, attack, what)
    figure, axes = _figure(8.0, 4.0, entries=leaks["defense"].nunique())
    for i, defense in enumerate(in_order(leaks["defense"])):
        victims = leaks[leaks["defense"] == defense]
        final, (rate, reach) = _final(rounds, victims), _rate(victims)
        axes.errorbar(
            [rate.share],
            [final.mean()],
            xerr=reach,
            yerr=_range(final),
            label=f"{defense}: {rate.passed}/{rate.n}",
            markersize=7,
            capsize=3,
            elinewidth=1,
            linestyle="none",
            **_look(i),
        )
    top = 1.1 * max(0.1, rounds["accuracy"].max())
    axes.set(xlim=(-0.02, 1.02), ylim=(0, top), xlabel=f"{what} stolen by {attack} (95 % interval)", ylabel="accuracy at the end")
    axes.set_title("Better is up and to the left")
    _percent(axes.xaxis)
    _percent(axes.yaxis)
    _legend(axes, beside=True)
    return figure


def _pareto_in_rows(rounds: pd.DataFrame, leaks: pd.DataFrame, attack: str, what: str) -> Figure:
    """Of many defenses, a row each: what its strongest attacker stole, the least first, beside its accuracy."""
    contenders = leaks["defense"].str.removesuffix(KNOWING)
    found = {
        name: (_final(rounds, of), {who: _rate(some) for who, some in of.groupby("attacker")})
        for name, of in leaks.groupby(contenders, sort=False)
    }
    rows = sorted(found, key=lambda name: (max(rate.share for rate, _ in found[name][1].values()), -found[name][0].mean()))
    names = 0.067 * max(map(len, rows))  # inches, at 8 points
    size = (names + 8.0, 0.27 * len(rows) + 1.6)
    figure, (left, right) = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    look = {"markersize": 5, "capsize": 2, "elinewidth": 1, "linestyle": "none"}
    for row, name in enumerate(rows):
        final = found[name][0]
        left.errorbar([final.mean()], [row], xerr=_range(final), color="#555555", marker="s", **look)
    for who, says, colour, marker, shift in ATTACKERS:
        for row, name in enumerate(rows):
            if who in found[name][1]:
                rate, reach = found[name][1][who]
                label = None if says in right.get_legend_handles_labels()[1] else says
                right.errorbar([rate.share], [row + shift], xerr=reach, color=colour, marker=marker, label=label, **look)
    left.set_yticks(range(len(rows)), rows, fontsize=8)
    left.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, None), xlabel="accuracy at the end (range over seeds)", title="Better is right")
    right.set(xlim=(-0.02, 1.02), xlabel=f"{what} stolen by {attack} (95 % interval)", title="Better is left")
    for axes in (left, right):
        _percent(axes.xaxis)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _sentences(leaks: pd.DataFrame, attack: str, path: Path, most: int = 24) -> Path:
    """What was written and what was read of it, despite each defense: a table in Markdown, `most` rows for each at most."""
    lines = [f"# What {attack} read", ""]
    for defense in in_order(leaks["defense"]):
        of = leaks[(leaks["attack"] == attack) & (leaks["defense"] == defense)].sort_values(["round", "client", "image"])
        some = of.iloc[np.unique(np.linspace(0, len(of) - 1, most).round().astype(int))] if len(of) else of
        lines += [f"## defense: {defense}", "", "| round | client | written | read | in place |", "| --- | --- | --- | --- | --- |"]
        for row in some.to_dict("records"):
            doubt = " ?" if row["verdict"] == "not converged" else ""
            cells = (row["round"], row["client"], row["truth"], row["recovered"], f"{row['token_accuracy']:.0%}{doubt}")
            lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    write_bytes(path, "\n".join([*lines, "?: the search did not converge", ""]).encode())
    return path


_Rows = dict[str, tuple[RunFolder, pd.DataFrame]]


def _pictures(folders: Sequence[RunFolder], attack: str, columns: int = 8) -> list[Callable[[], Figure]]:
    """Pages of what was stolen despite each defense, of the same victims on all."""
    seen: set[str] = set()
    of_same: dict[str, _Rows] = {}  # by where their originals come from
    for folder, name in named(folders):
        if not folder.pictured:
            continue
        leaks, config = leaks_of(folder, name), folder.config
        leaks = leaks[leaks["attack"] == attack] if len(leaks) else leaks
        whose = json.dumps([config[key] for key in ("data", "partition", "federation", "seed")], sort_keys=True)
        for label in in_order(leaks["defense"]) if len(leaks) else ():
            if label not in seen:  # the first of its seeds
                seen.add(label)
                of = leaks[leaks["defense"] == label].set_index(["round", "client", "image"])
                of_same.setdefault(whose, {})[label] = folder, of
    pages: list[Callable[[], Figure]] = []
    for rows in of_same.values():
        tables = [table for _, table in rows.values()]
        victims = tables[0].index
        for table in tables[1:]:
            # An attack on a few of a client's many images finds other ones despite each defense: then those of the first.
            victims = shared if len(shared := victims.intersection(table.index)) else victims
        victims = victims.sort_values()[np.unique(np.linspace(0, len(victims) - 1, columns).round().astype(int))]
        parts = [list(rows.items())[first : first + PAGE] for first in range(0, len(rows), PAGE)]
        pages += [partial(_page, dict(part), victims, attack) for part in parts]
    return pages


def _page(rows: _Rows, victims: pd.Index, attack: str) -> Figure:
    """Original, and what was stolen despite each defense; each row's median and worst leak are framed."""
    setup = next(iter(rows.values()))[0].setup()
    titles = 0.075 * max(len(word) for name in rows for word in name.split(" "))  # inches, at 8 points
    size = (1.05 * len(victims) + max(1.4, titles + 0.5), 1.25 * (len(rows) + 1) + 0.5)
    figure, grid = plt.subplots(len(rows) + 1, len(victims), figsize=size, squeeze=False, layout="compressed")
    for axes, (round, client, image) in zip(grid[0], victims, strict=True):
        picture(axes, setup.truth(round, client)[0][image].cpu())
        axes.set_title(f"round {round}\nclient {client}", fontsize=8)
    _row_title(grid[0][0], "original")
    for line, (name, (folder, table)) in zip(grid[1:], rows.items(), strict=True):
        undefended = without_defense(folder.config) and "secure aggregation" not in name
        _row_title(line[0], ("stolen,\n" if undefended else "despite\n") + name.replace(" ", "\n"))
        here = [victim for victim in victims if victim in table.index]
        order = sorted(here, key=lambda victim: table.loc[victim, "mse"])
        for axes, victim in zip(line, victims, strict=True):
            if victim not in here:
                axes.axis("off")
                continue
            leak = table.loc[victim]
            if leak["reconstruction"] < 0:  # the attack says that it has nothing of this one
                picture(axes, torch.ones(1, 1, 1))
                axes.set_xlabel("missed", fontsize=8, labelpad=1)
                continue
            picture(axes, folder.reconstructions(leak["made_by"], victim[0])[sender(leak, victim[1])][int(leak["reconstruction"])])
            doubt = " ?" if leak["verdict"] == "not converged" else ""
            axes.set_xlabel(f"{leak['psnr_db']:.1f} dB{doubt}", fontsize=8, labelpad=1)
            if victim == order[0]:
                frame(axes, WORST)
            elif victim == order[(len(order) - 1) // 2]:
                frame(axes, MEDIAN)
    legend = "orange: the worst leak of a row; blue: its median; ?: not converged"
    models = dict.fromkeys(folder.config["choices"]["model"] for folder, _ in rows.values())
    title = f"{setup.dataset.name}, {', '.join(models)}, {attack}; {legend}"
    figure.suptitle(textwrap.fill(title, int(14 * size[0])), fontsize=9)  # 14 letters an inch
    return figure


def _traces(folders: Sequence[RunFolder], attack: str, out: Path, formats: Sequence[str]) -> list[Path]:
    """How the worst and the median leak of each run came about, of those whose attack recorded it."""
    made = []
    for folder, name in named(folders):
        if not folder.pictured:
            continue
        leaks = leaks_of(folder, name)
        leaks = leaks[leaks["attack"] == attack].sort_values("mse") if len(leaks) else leaks
        for place in sorted({0, (len(leaks) - 1) // 2}) if len(leaks) else ():
            round, client, image, at = (int(leaks.iloc[place][key]) for key in ("round", "client", "image", "reconstruction"))
            whose = sender(leaks.iloc[place], client)
            trace = folder.traces(leaks.iloc[place]["made_by"], round).get(whose)
            if trace is not None:
                truth = folder.setup().truth(round, client)[0][image].cpu()
                through = "_sum" if whose == SUM else ""
                file = f"{folder.path.name}_round_{round:05d}_client_{client:05d}_image_{image}{through}"
                about = f"by {attack} from client {client}{' in a sum' * bool(through)} in round {round} of {folder.path.name}"
                made += draw_trace(trace, truth, out / file, about, at=at, formats=formats)
    return made


def _row_title(axes: Axes, text: str) -> None:
    size = min(8.0, 60 / (text.count("\n") + 1))  # many settings, each on a line of its own, are as high as a picture
    axes.set_ylabel(text, fontsize=size, rotation=0, ha="right", va="center")


def _partition(folder: RunFolder, most: int = 60) -> Figure:
    """Images of each class, or sentences of each topic, at each client, the first `most` clients."""
    setup = folder.setup()
    labels, classes = setup.dataset.train.labels, len(setup.dataset.classes)
    counts = torch.stack([torch.bincount(labels[shard], minlength=classes) for shard in setup.shards[:most]]).numpy()
    figure, axes = _figure(max(4.5, 1.8 + 0.16 * len(counts)), max(2.4, 1.2 + 0.2 * min(classes, 20)))
    cells = axes.imshow(counts.T, aspect="auto", cmap="cividis", vmin=0, interpolation="nearest")
    axes.grid(False)
    if classes <= 20:
        axes.set_yticks(range(classes), setup.dataset.classes)
    shown = "" if len(setup.shards) <= most else f" (the first {most} of {len(setup.shards)})"
    axes.set(xlabel=f"client{shown}", ylabel="class", title=f"Who holds what: {folder.config['choices']['partition']}")
    figure.colorbar(cells, ax=axes, label="sentences" if of_text([folder]) else "images")
    return figure
