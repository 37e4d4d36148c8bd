"""Figures and the summary table of one run or of several, compared by defense; runs that differ in the seed alone are one defense.

Every figure is written as PNG and as SVG. Colours are those of Okabe and Ito (2008), which colour-blind readers tell apart, and each
defense has a marker of its own as well.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from attacks.metrics import wilson
from experiments.config import label
from experiments.progress import size
from experiments.scoring import STOLEN_MSE
from fedsim.files import write_with
from fedsim.run import RunFolder
from fedsim.setup import setup_of

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
MARKERS = "osD^vPX*"
MEDIAN, WORST = "#0072B2", "#D55E00"

STYLE = {
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "fedsim",  # the same figure is the same file
}


def draw(folders: Sequence[RunFolder], out: Path) -> list[Path]:
    """Draws every figure the runs have data for, and returns the PNG files."""
    matplotlib.use("Agg")
    rounds, leaks = tables(folders)
    made = []
    with plt.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("error")
        if rounds["accuracy"].notna().any():
            made.append(_save(_accuracy(rounds), out / "accuracy"))
            made.append(_save(_bytes(rounds), out / "accuracy_against_bytes"))
        if len(leaks):
            made.append(_save(_leak(leaks), out / "leak"))
            if rounds["accuracy"].notna().any():
                made.append(_save(_pareto(rounds, leaks), out / "accuracy_against_leak"))
            made.append(_save(_pictures(folders, leaks), out / "pictures"))
        made.append(_save(_partition(folders[0]), out / "partition"))
    return made


def tables(folders: Sequence[RunFolder]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rounds and leaks of all runs, with the columns `run`, `defense` (a label) and `seed`."""
    rounds, leaks = [], []
    for folder in folders:
        config = folder.config
        about = {"run": str(folder.path), "defense": label(config), "seed": config["seed"]}
        rounds.append(folder.rounds().assign(**about))
        leaks.append(folder.leaks().assign(**about))
    all_rounds = pd.concat(
        [table for table in rounds if len(table)] or [pd.DataFrame(columns=["accuracy", "defense"])], ignore_index=True
    )
    all_rounds["accuracy"] = all_rounds["accuracy"].astype(float)
    return all_rounds, pd.concat([table for table in leaks if len(table)] or [pd.DataFrame()], ignore_index=True)


def summary(folders: Sequence[RunFolder]) -> Table:
    """What each defense costs and what it stops, with n and 95 % Wilson intervals."""
    rounds, leaks = tables(folders)
    attacks = sorted(leaks["attack"].unique()) if len(leaks) else [None]
    table = Table(
        title=f"stolen: MSE < {STOLEN_MSE} on pixels in [0, 1]; the attacker does not know the defense", title_justify="left"
    )
    for column in (
        "defense",
        "attack",
        "accuracy",
        "sent",
        "stolen",
        "95 % interval",
        "not converged",
        "median PSNR",
        "SSIM",
        "labels",
    ):
        table.add_column(column, justify="left" if column in ("defense", "attack") else "right")
    for defense in _in_order(rounds["defense"]):
        of = rounds[rounds["defense"] == defense]
        final = of.dropna(subset="accuracy").sort_values("round").groupby("run")["accuracy"].last()
        sent, dense = of["bytes_up"].sum(), of["bytes_up_dense"].sum()
        cells = [f"{final.mean():.1%}" if len(final) else "", f"{size(sent)} ({sent / max(1, dense):.1%})"]
        for attack in attacks:
            victims = leaks[(leaks["defense"] == defense) & (leaks["attack"] == attack)] if attack else leaks
            table.add_row(defense, attack or "none", *cells, *_leak_cells(victims))
    for attack in attacks if len(leaks) else []:
        first = leaks[(leaks["attack"] == attack) & (leaks["defense"] == leaks["defense"].iloc[0])]
        for name, what in (("grey", "a grey card"), ("mean_image", "the dataset's mean image")):
            if f"{name}_mse" in first:
                passed = int((first[f"{name}_mse"] < STOLEN_MSE).sum())
                low, high = wilson(passed, len(first))
                psnr = f"{first[f'{name}_psnr_db'].median():.1f} dB"
                ssim = f"{first[f'{name}_ssim'].median():.2f}"
                row = ["", "", f"{passed}/{len(first)}", f"{low:.0%} to {high:.0%}", "", psnr, ssim, ""]
                table.add_row(what, "none at all", *row, style="dim")
        break
    return table


def _leak_cells(victims: pd.DataFrame) -> list[str]:
    n = len(victims)
    if not n:
        return ["", "", "", "", "", ""]
    stolen = int((victims["verdict"] == "stolen").sum())
    low, high = wilson(stolen, n)
    unfinished = int((victims["verdict"] == "not converged").sum())
    labels = int(victims["label_right"].sum())
    return [
        *(f"{stolen}/{n}", f"{low:.0%} to {high:.0%}", f"{unfinished}/{n}"),
        *(f"{victims['psnr_db'].median():.1f} dB", f"{victims['ssim'].median():.2f}", f"{labels}/{n}"),
    ]


def _in_order(values: pd.Series) -> list[str]:
    return list(dict.fromkeys(values))


def _look(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def _band(axes: Axes, table: pd.DataFrame, x: str, y: str, name: str, index: int) -> None:
    """The mean over runs as a line, their range as a band; markers thinned to about ten."""
    by = table.dropna(subset=y).groupby(x)[y]
    mean, low, high = by.mean(), by.min(), by.max()
    runs = table["run"].nunique()
    axes.plot(
        mean.index, mean, label=name + (f" ({runs} seeds)" if runs > 1 else ""), markersize=5, **_look(index), **_thin(len(mean))
    )
    if runs > 1:
        axes.fill_between(mean.index, low, high, color=COLOURS[index % len(COLOURS)], alpha=0.15, linewidth=0)


def _thin(points: int) -> dict[str, Any]:
    return {"markevery": max(1, points // 10)}


def _figure(width: float = 6.4, height: float = 4.0) -> tuple[Figure, Axes]:
    return plt.subplots(figsize=(width, height), layout="constrained")


def _percent(axis: Any) -> None:
    axis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))


def _accuracy(rounds: pd.DataFrame) -> Figure:
    figure, axes = _figure()
    for i, defense in enumerate(_in_order(rounds["defense"])):
        _band(axes, rounds[rounds["defense"] == defense], "round", "accuracy", defense, i)
    axes.set(xlabel="round", ylabel="accuracy on the test set", ylim=(0, None), title="What the defense costs: accuracy")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _percent(axes.yaxis)
    axes.legend()
    return figure


def _bytes(rounds: pd.DataFrame) -> Figure:
    figure, axes = _figure()
    for i, defense in enumerate(_in_order(rounds["defense"])):
        of = rounds[rounds["defense"] == defense].sort_values(["run", "round"])
        of = of.assign(megabytes=of.groupby("run")["bytes_up"].cumsum() / 1e6)
        # Runs of one defense send nearly the same each round; the mean over runs at each round is drawn against the mean of the bytes.
        of["megabytes"] = of.groupby("round")["megabytes"].transform("mean")
        _band(axes, of[of["megabytes"] > 0], "megabytes", "accuracy", defense, i)
    axes.set(xlabel="sent by all clients so far (MB, log scale)", ylabel="accuracy on the test set", ylim=(0, None), xscale="log")
    axes.set_title("What the accuracy costs: bytes")
    _percent(axes.yaxis)
    axes.legend()
    return figure


def _leak(leaks: pd.DataFrame) -> Figure:
    figure, axes = _figure()
    every = sorted(leaks["round"].unique())
    place = {round: i for i, round in enumerate(every)}
    defenses = _in_order(leaks["defense"])
    for i, defense in enumerate(defenses):
        of = leaks[leaks["defense"] == defense]
        x = of["round"].map(place) + (i - (len(defenses) - 1) / 2) * 0.12
        look = _look(i)
        done = of["converged"].astype(bool)
        axes.scatter(x[done], of["psnr_db"][done], s=22, color=look["color"], marker=look["marker"], alpha=0.6, linewidth=0)
        axes.scatter(
            x[~done], of["psnr_db"][~done], s=22, facecolor="none", edgecolor=look["color"], marker=look["marker"], alpha=0.8
        )
        median = of.groupby("round")["psnr_db"].median()
        axes.plot(
            [place[r] + (i - (len(defenses) - 1) / 2) * 0.12 for r in median.index],
            median,
            label=defense,
            color=look["color"],
            marker=look["marker"],
            markersize=6,
        )
    bar = -10 * np.log10(STOLEN_MSE)
    axes.axhline(bar, color="#444444", linestyle="--", linewidth=1)
    axes.text(len(every) - 0.5, bar, f"stolen: MSE < {STOLEN_MSE} ", ha="right", va="bottom", fontsize=8, color="#444444")
    if "mean_image_psnr_db" in leaks:
        trivial = leaks["mean_image_psnr_db"].median()
        axes.axhline(trivial, color="#888888", linestyle=":", linewidth=1)
        axes.text(len(every) - 0.5, trivial, "the dataset's mean image ", ha="right", va="top", fontsize=8, color="#888888")
    axes.set_xticks(range(len(every)), [str(round) for round in every])
    axes.set(xlim=(-0.6, len(every) - 0.4), xlabel="round", ylabel="PSNR of the reconstruction (dB)")
    axes.set_title("What leaks: lines are medians, open marks did not converge")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.set_size_inches(8.0, 4.0)
    return figure


def _pareto(rounds: pd.DataFrame, leaks: pd.DataFrame) -> Figure:
    figure, axes = _figure()
    for i, defense in enumerate(_in_order(leaks["defense"])):
        of = rounds[rounds["defense"] == defense].dropna(subset="accuracy").sort_values("round")
        final = of.groupby("run")["accuracy"].last()
        victims = leaks[leaks["defense"] == defense]
        stolen = int((victims["verdict"] == "stolen").sum())
        rate = stolen / len(victims)
        low, high = wilson(stolen, len(victims))
        spread = [[final.mean() - final.min()], [final.max() - final.mean()]]
        axes.errorbar(
            [rate], [final.mean()], yerr=spread, xerr=[[max(0.0, rate - low)], [max(0.0, high - rate)]], label=f"{defense}: {stolen}/{len(victims)}",
            markersize=7, capsize=3, elinewidth=1, linestyle="none", **_look(i),
        )  # fmt: skip
    axes.set(xlim=(-0.02, 1.02), ylim=(0, None), xlabel="images stolen (95 % interval)", ylabel="accuracy after the last round")
    axes.set_title("Better is up and to the left")
    _percent(axes.xaxis)
    _percent(axes.yaxis)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.set_size_inches(8.0, 4.0)
    return figure


def _pictures(folders: Sequence[RunFolder], leaks: pd.DataFrame, columns: int = 8) -> Figure:
    """Original, and what was stolen despite each defense, of the same victims; the median and the worst leak of each row are framed."""
    first: dict[str, RunFolder] = {}
    for folder in folders:
        if len(folder.leaks()):
            first.setdefault(label(folder.config), folder)
    attack = leaks["attack"].iloc[0]
    shown = [
        (name, f, f.leaks()[f.leaks()["attack"] == attack].set_index(["round", "client", "image"])) for name, f in first.items()
    ]
    victims = shown[0][2].index
    for _, _, table in shown[1:]:
        victims = victims.intersection(table.index)
    victims = victims.sort_values()[np.unique(np.linspace(0, len(victims) - 1, columns).round().astype(int))]
    setup = setup_of(shown[0][1].config)
    figure, grid = plt.subplots(
        len(shown) + 1,
        len(victims),
        figsize=(1.05 * len(victims) + 1.3, 1.22 * (len(shown) + 1) + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for row, (name, folder, table) in enumerate(shown, 1):
        errors = table.loc[victims, "mse"].to_numpy()
        worst, median = int(errors.argmin()), int(np.argsort(errors)[(len(errors) - 1) // 2])
        for column, (round, client, image) in enumerate(victims):
            axes = grid[row][column]
            made = folder.reconstructions(attack, round)[client][image]
            _picture(axes, made)
            leak = table.loc[(round, client, image)]
            axes.set_xlabel(
                f"{leak['psnr_db']:.1f} dB" + ("" if leak["converged"] or leak["verdict"] == "stolen" else " ?"),
                fontsize=8,
                labelpad=1,
            )
            if column in (worst, median):
                _frame(axes, WORST if column == worst else MEDIAN)
            truth = setup.truth(round, client)[0].cpu()
            if row == 1:
                # The truth in the order in which the reconstructions were matched to it.
                from attacks.metrics import align

                images = folder.reconstructions(attack, round)[client]
                _picture(grid[0][column], truth[align(images, truth)][image])
                grid[0][column].set_title(f"round {round}\nclient {client}", fontsize=8)
        grid[row][0].set_ylabel(
            f"stolen\n{name}" if name == "none" else f"despite\n{name.replace(' ', chr(10))}",
            fontsize=8,
            rotation=0,
            ha="right",
            va="center",
        )
    grid[0][0].set_ylabel("original", fontsize=8, rotation=0, ha="right", va="center")
    config = shown[0][1].config
    figure.suptitle(
        f"{setup.dataset.name}, {config['choices']['model']}, {attack}. Orange: worst leak of the row; blue: median; ?: not converged",
        fontsize=9,
    )
    return figure


def _picture(axes: Axes, image: torch.Tensor) -> None:
    pixels = image.clamp(0, 1).permute(1, 2, 0).numpy()
    axes.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])
    _frame(axes, "none")


def _frame(axes: Axes, colour: str) -> None:
    for spine in axes.spines.values():
        spine.set(visible=colour != "none", color=colour, linewidth=3)


def _partition(folder: RunFolder, most: int = 60) -> Figure:
    """Images of each class at each client, the first `most` clients."""
    setup = setup_of(folder.config)
    labels, classes = setup.dataset.train.labels, setup.dataset.num_classes
    counts = torch.stack([torch.bincount(labels[shard], minlength=classes) for shard in setup.shards[:most]]).numpy()
    figure, axes = _figure(max(4.5, 1.8 + 0.16 * len(counts)), max(2.4, 1.2 + 0.2 * min(classes, 20)))
    picture = axes.imshow(counts.T, aspect="auto", cmap="cividis", vmin=0, interpolation="nearest")
    axes.grid(False)
    if classes <= 20:
        axes.set_yticks(range(classes), setup.dataset.classes)
    shown = "" if len(setup.shards) <= most else f" (the first {most} of {len(setup.shards)})"
    axes.set(xlabel=f"client{shown}", ylabel="class", title=f"Who holds what: {folder.config['choices']['partition']}")
    figure.colorbar(picture, ax=axes, label="images")
    return figure


def _save(figure: Figure, path: Path) -> Path:
    for suffix in (".svg", ".png"):
        metadata = {"Date": None} if suffix == ".svg" else {"Software": None}
        write_with(path.with_suffix(suffix), lambda name, metadata=metadata: figure.savefig(name, metadata=metadata))  # type: ignore[misc]
    plt.close(figure)
    return path.with_suffix(".png")
