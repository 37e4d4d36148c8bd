"""What all figures share: colours, style, an image in its axes, and files as PNG, SVG and PDF.

Colours are those of Okabe and Ito (2008), which colour-blind readers tell apart; maps of colours are cividis for amounts and
PuOr for signed values, for the same reason.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fedsim.files import write_with

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
MARKERS = "osD^vPX*"
AMOUNTS, SIGNED = "cividis", "PuOr"
FORMATS = ("png", "svg", "pdf")

STYLE: Any = {
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "fedsim",  # the same figure is the same file
    "pdf.fonttype": 42,  # TrueType: many a publisher refuses Type 3
}

P = ParamSpec("P")
R = TypeVar("R")


def styled(make: Callable[P, R]) -> Callable[P, R]:
    """`make`, with figures in this style."""

    @functools.wraps(make)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with plt.rc_context(STYLE):
            return make(*args, **kwargs)

    return inside


def picture(axes: Axes, image: Tensor) -> Any:
    """Shows an image (C, H, W), clamped to [0, 1], pixel by pixel; returns what matplotlib drew."""
    pixels = image.detach().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
    shown = axes.imshow(
        pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest"
    )
    bare(axes)
    return shown


def bare(axes: Axes) -> None:
    """Takes grid, ticks and frame away."""
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])
    frame(axes, "none")


def frame(axes: Axes, colour: str) -> None:
    """A frame around an image; "none" takes it away."""
    for spine in axes.spines.values():
        spine.set(visible=colour != "none", color=colour, linewidth=3)


# What a file says of itself: no date and no version, so that the same figure is the same file.
_METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


@styled
def save(figure: Figure, path: Path, alt: str = "", formats: Sequence[str] = ("png", "svg")) -> Path:
    """Writes a figure in each of `formats` with `alt`, what it shows in words, as its description; returns the first file."""
    figure.draw_without_rendering()  # lays it out, once for all formats
    figure.set_layout_engine(None)  # not "none", for which matplotlib draws each once more
    for form in formats:
        about = _METADATA[form] | ({"Subject" if form == "pdf" else "Description": alt} if alt else {})
        write_with(path.with_suffix(f".{form}"), lambda name, about=about: figure.savefig(name, metadata=about))  # type: ignore[misc]
    plt.close(figure)
    return path.with_suffix(f".{formats[0]}")
