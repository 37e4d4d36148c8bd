"""Pictures of one theft: how an image came out of an update, and what in the update gave it away.

A `Trace` holds T moments of a reconstruction, (T, B, C, H, W); pictures are of the image `at` in its batch, beside the true image
`truth` (C, H, W). Figures are returned, `experiments.canvas.save` writes them as PNG and SVG.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from attacks import metrics
from experiments.canvas import AMOUNTS, COLOURS, SIGNED, bare, picture, save, styled
from fedsim.checks import one_of
from fedsim.files import write_with
from fedsim.observation import Trace

ANIMATIONS = (".gif", ".webp", ".mp4")
FRAME_INCHES, FRAME_DPI = (8.6, 2.7), 100  # 860 x 270 pixels: H.264 wants even numbers
FPS, LAST = 10, 2000  # frames a second; milliseconds that the last one stands
DEPTH = 0.9  # of the colours of amounts: the last tenth is too light for a line on white

Frame = np.ndarray[Any, np.dtype[np.uint8]]  # (H, W, 3)


# From noise to image.


def errors(trace: Trace, truth: Tensor, at: int = 0) -> Tensor:
    """MSE against the true image at each moment, (T,)."""
    images = trace.images[:, at]
    return metrics.mse(images, truth.to(images).expand_as(images))


def agreement(trace: Trace, truth: Tensor, at: int = 0) -> float:
    """Spearman's rank correlation of the attack's loss with the image's MSE over the moments; nan where one of them never changes.

    Near 1, who minimises the loss finds the image. Under noise or quantization the loss goes on falling after the image has stopped
    getting better, and the correlation is lower.
    """
    from scipy.stats import spearmanr

    loss, error = trace.losses.double().cpu().numpy(), errors(trace, truth, at).double().cpu().numpy()
    if len(loss) < 2 or np.ptp(loss) == 0 or np.ptp(error) == 0:
        return math.nan
    return float(spearmanr(loss, error).statistic)


def moments(trace: Trace, count: int = 30, every: int | None = None) -> list[int]:
    """Up to `count` places in a trace: each `every` evaluations from the first, or spread evenly from the first to the last."""
    if count < 1:
        raise ValueError(f"count must be >= 1, got {count}")
    if every is None:
        return [int(place) for place in np.unique(np.linspace(0, len(trace.evaluations) - 1, count).round())]
    if every < 1:
        raise ValueError(f"every must be >= 1 evaluation, got {every}")
    first, last = int(trace.evaluations[0]), int(trace.evaluations[-1])
    asked = torch.arange(first, last + 1, every)[:count].to(trace.evaluations)
    return torch.searchsorted(trace.evaluations, asked, right=True).sub(1).unique().tolist()


@styled
def panels(trace: Trace, *, at: int = 0, count: int = 30, every: int | None = None, normalise: bool = False) -> Figure:
    """The image at up to `count` moments, see `moments`, ten in a row, each with its number of evaluations below."""
    places = moments(trace, count, every)
    columns = min(10, len(places))
    rows = math.ceil(len(places) / columns)
    figure, grid = _grid(rows, columns, (max(4.5, columns + 0.2), 1.16 * rows + 0.3))
    for axes, place in zip(grid.flat, places, strict=False):
        picture(axes, _shown(trace.images[place, at], normalise))
        axes.set_xlabel(f"{int(trace.evaluations[place]):,}", fontsize=8, labelpad=2)
    for axes in grid.flat[len(places) :]:
        axes.remove()
    figure.suptitle("The stolen image after so many evaluations of the gradient", fontsize=10)
    return figure


@styled
def comparison(truth: Tensor, found: Tensor, normalise: bool = False) -> Figure:
    """Original, stolen image and their absolute difference, with the metrics of the theft."""
    figure, grid = _grid(1, 3, (6.0, 2.6))
    gap = (found.clamp(0, 1) - truth).abs()
    for axes, image, title in zip(
        grid.flat, (truth, _shown(found, normalise), gap), ("original", "stolen", "difference"), strict=True
    ):
        picture(axes, image)
        axes.set_title(title, fontsize=10)
    grid[0, 1].set_xlabel(f"MSE {float(metrics.mse(found[None], truth[None])):.3g}, {_db(found, truth)}", fontsize=9)
    return figure


class Scene:
    """One moment of a theft: original, image now, difference, and the loss so far; `show` moves on, `pixels` draws.

    figure  the whole
    loss    axes of the loss, over evaluations; logarithmic with `log`
    """

    @styled
    def __init__(self, trace: Trace, truth: Tensor, at: int = 0, log: bool = True, normalise: bool = False) -> None:
        self.trace, self.truth, self.at, self.normalise = trace, truth.to(trace.images), at, normalise
        self.figure = Figure(FRAME_INCHES, FRAME_DPI, layout="constrained")
        self.canvas = FigureCanvasAgg(self.figure)
        *three, self.loss = self.figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.9))
        start = trace.images[0, at]
        self._images = [picture(axes, image) for axes, image in zip(three, (self.truth, start, start), strict=True)]
        for axes, title in zip(three, ("original", "stolen", "difference"), strict=True):
            axes.set_title(title, fontsize=10)
        evaluations, losses = trace.evaluations.cpu().numpy(), trace.losses.cpu().numpy()
        self.loss.plot(evaluations, losses, color=COLOURS[0], alpha=0.25, linewidth=1)
        (self._line,) = self.loss.plot([], [], color=COLOURS[0], linewidth=2)
        (self._dot,) = self.loss.plot([], [], color=COLOURS[1], marker="o", markersize=5, linestyle="none")
        # Inside its own axes: the loss has fallen by the time it gets to the upper right.
        self._caption = self.loss.text(0.98, 0.97, "", transform=self.loss.transAxes, ha="right", va="top", fontsize=9)
        _scale(self.loss, log)
        self.loss.set(xlabel="evaluations of the gradient", ylabel="loss" + " (log scale)" * log)
        self.loss.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        self._curve = evaluations, losses
        self.show(len(evaluations) - 1)  # the widest caption and labels decide the layout
        self.canvas.draw()
        self.figure.set_layout_engine("none")

    def show(self, moment: int) -> None:
        """Goes to a place in the trace."""
        now = self.trace.images[moment, self.at]
        for drawn, image in zip(self._images[1:], (_shown(now, self.normalise), (now.clamp(0, 1) - self.truth).abs()), strict=True):
            pixels = image.clamp(0, 1).permute(1, 2, 0).cpu().numpy()
            drawn.set_data(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
        evaluations, losses = self._curve
        self._line.set_data(evaluations[: moment + 1], losses[: moment + 1])
        self._dot.set_data(evaluations[moment : moment + 1], losses[moment : moment + 1])
        self._caption.set_text(f"{evaluations[moment]:,} evaluations\nloss {losses[moment]:.1e}\n{_db(now, self.truth)}")

    def pixels(self) -> Frame:
        """The scene as it is now, (H, W, 3)."""
        self.canvas.draw()
        return np.asarray(self.canvas.buffer_rgba())[..., :3].copy()


def animate(
    trace: Trace,
    truth: Tensor,
    paths: Sequence[Path],
    *,
    at: int = 0,
    log: bool = True,
    normalise: bool = False,
    fps: int = FPS,
) -> None:
    """Writes the theft as animations, one frame for each recorded moment, in the formats the names of `paths` end with.

    .gif plays everywhere, .webp takes half its bytes; .mp4 needs PyAV, see `check_animation`. `log` is the loss axis.
    """
    for path in paths:
        check_animation(path.suffix)
    scene = Scene(trace, truth, at, log, normalise)
    frames = list(_film(scene, len(trace.evaluations)))
    for path in paths:
        write = _mp4 if path.suffix == ".mp4" else _pillow
        write_with(path, lambda name, write=write: write(name, frames, fps))  # type: ignore[misc]


def check_animation(suffix: str) -> None:
    """Raises ValueError for a kind of file that `animate` could not write."""
    one_of("kind of animation", suffix, ANIMATIONS)
    if suffix == ".mp4":
        _av()


def draw_trace(
    trace: Trace,
    truth: Tensor,
    folder: Path,
    about: str,
    animations: Sequence[str] = (".gif", ".webp"),
    *,
    at: int = 0,
    log: bool = True,
    normalise: bool = False,
    formats: Sequence[str] = ("png", "svg"),
) -> list[Path]:
    """All pictures of one trace, into `folder`; `about` says in words whose and by what. Returns the files to look at."""
    films = [folder / f"animation{suffix}" for suffix in animations]
    animate(trace, truth, films, at=at, log=log, normalise=normalise)
    keep = partial(save, formats=formats)
    return [
        keep(panels(trace, at=at, normalise=normalise), folder / "panels", f"The image at 30 moments of its theft {about}"),
        keep(layer_gaps(trace, truth, at), folder / "layers", f"Gap of each layer's gradient, loss and MSE over the theft {about}"),
        *films,
    ]


def _film(scene: Scene, count: int) -> Iterator[Frame]:
    for moment in range(count):
        scene.show(moment)
        yield scene.pixels()


def _pillow(name: str, frames: Sequence[Frame], fps: int) -> None:
    from PIL import Image

    first, *rest = [Image.fromarray(frame) for frame in frames]
    durations = [1000 // fps] * len(rest) + [LAST]
    # Pillow would merge equal frames; each has its own number of evaluations in it. minimize_size would drop frames of WebP.
    more = {"lossless": False, "quality": 85, "method": 4} if name.endswith(".webp") else {}
    first.save(name, save_all=True, append_images=rest, duration=durations if rest else LAST, loop=0, **more)  # type: ignore[arg-type]


def _mp4(name: str, frames: Sequence[Frame], fps: int) -> None:
    av = _av()
    with av.open(name, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=fps, options={"crf": "18"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"  # what every player plays
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise ValueError(
            "MP4 needs the package PyAV: pip install -e '.[video]' in fedsim's clone; or take GIF or WebP, which need nothing"
        ) from None
    return av


# What in the update gives it away.


@styled
def layer_gaps(trace: Trace, truth: Tensor, at: int = 0) -> Figure:
    """Squared distance of each layer's gradient from the observed one, over the evaluations, above the loss and the image's MSE."""
    figure = Figure((8.0, 6.0), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.6, 1))
    evaluations = trace.evaluations.cpu().numpy()
    for (name, gaps), look in zip(trace.layers.items(), _looks(list(trace.layers)), strict=True):
        above.plot(evaluations, gaps.cpu().numpy(), label=name, linewidth=1.5, **look)
    _scale(above, True)
    above.set(ylabel="squared distance of gradients", title="Layer by layer, the gradient approaches the observed one")
    blocks = _blocks(trace.layers)
    if len(blocks) <= len(COLOURS):
        above.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    else:
        bar = figure.colorbar(ScalarMappable(Normalize(0, 1 / DEPTH), AMOUNTS), ax=above, label="depth; biases are dashed")
        bar.ax.set_ylim(0, 1)
        bar.set_ticks([0, 1], labels=[blocks[0], blocks[-1]], fontsize=8)
    below.plot(evaluations, trace.losses.cpu().numpy(), color=COLOURS[6], label="loss")
    below.plot(evaluations, errors(trace, truth, at).cpu().numpy(), color=COLOURS[1], linestyle="--", label="MSE of the image")
    _scale(below, True)
    rank = agreement(trace, truth, at)
    below.set(xlabel="evaluations of the gradient", ylabel="loss, MSE")
    below.set_title(f"Spearman(loss, MSE) = {rank:.3f} over {len(evaluations)} moments", fontsize=9, loc="right")
    below.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    return figure


def convolutions(update: Mapping[str, Tensor]) -> list[str]:
    """Names of the convolutions' weights in an update, (O, I, h, w), in order, without those of one pixel."""
    return [name for name, t in update.items() if t.dim() == 4 and t.shape[-2:].numel() > 1]


def surfaces(gradient: Tensor) -> Tensor:
    """(O, h, w), for each kernel the magnitude of its gradient (O, I, h, w) averaged over input channels: its "surface"."""
    if gradient.dim() != 4:
        raise ValueError(f"a convolution's gradient is (O, I, h, w), got {tuple(gradient.shape)}")
    return gradient.mean(1).abs()


def roughness(surface: Tensor) -> float:
    """Geary's contiguity ratio (Geary 1954) of surfaces (O, h, w), the mean over kernels whose surface is not flat.

    Squared difference of neighbours over that of any two places: 0 for a smooth surface, 1 in expectation for one whose values are
    put in any order. nan when all are flat.
    """
    surface = surface.double()
    down, across = surface.diff(dim=1).square().flatten(1), surface.diff(dim=2).square().flatten(1)
    near = (down.sum(1) + across.sum(1)) / (down.shape[1] + across.shape[1])
    anywhere = 2 * surface.flatten(1).var(1)  # mean squared difference of two different places
    rough = anywhere > 0
    return float((near[rough] / anywhere[rough]).mean()) if bool(rough.any()) else math.nan


def zeros(gradient: Tensor) -> float:
    """Share of a gradient's entries that are exactly 0."""
    return float((gradient == 0).double().mean())


@styled
def kernel_surfaces(gradients: Mapping[str, Tensor], layer: str, most: int = 16) -> Figure:
    """The surfaces of a convolution's first `most` kernels as heat maps, a block for each of `gradients` (title -> (O, I, h, w)).

    What it is for: the gradient of one image in eval and in training mode of a network with BatchNorm, which normalises by the
    image itself. It is the shapes that differ, so each kernel is shown over its own largest magnitude.
    """
    rows = {title: surfaces(gradient.detach().cpu()) for title, gradient in gradients.items()}
    kernels = min(most, *(len(surface) for surface in rows.values()))
    lines = math.ceil(kernels / 8)
    columns = math.ceil(kernels / lines)
    figure, grid = _grid(len(rows), 1, (0.8 * columns + 1.4, len(rows) * (0.85 * lines + 0.35) + 0.4))
    for axes, (title, surface), gradient in zip(grid.flat, rows.items(), gradients.values(), strict=True):
        tiles = torch.full((lines * columns, *surface.shape[1:]), math.nan)
        largest = surface[:kernels].flatten(1).amax(1).reshape(-1, 1, 1)
        tiles[:kernels] = surface[:kernels] / torch.where(largest > 0, largest, 1)
        _mosaic(axes, tiles.reshape(lines, columns, *surface.shape[1:]), AMOUNTS, 0, 1)
        axes.set_title(f"{title}: roughness {roughness(surface):.2f}, {zeros(gradient):.0%} of entries zero", fontsize=9)
    figure.suptitle(f"{layer}: size of the gradient over {kernels} of {len(surface)} kernels", fontsize=10)
    return figure


@styled
def kernel_strips(kernels: Mapping[str, Tensor], layer: str, most: int = 16, channels: int = 3) -> Figure:
    """A convolution's kernels as small images, blocks of `channels` rows (input channels) and `most` columns (kernels).

    kernels  title -> (O, I, h, w): filters, their gradient, what was sent of it, …; each block has a scale of its own, with 0 white
    """
    shape = next(iter(kernels.values())).shape
    columns, lines = min(most, shape[0]), min(channels, shape[1])
    figure, grid = _grid(len(kernels), 1, (0.5 * columns + 1.8, len(kernels) * (0.5 * lines + 0.45) + 0.4))
    for axes, (title, values) in zip(grid.flat, kernels.items(), strict=True):
        tiles = values[:columns, :lines].detach().cpu().transpose(0, 1)
        high = float(tiles.abs().max()) or 1.0
        _mosaic(axes, tiles, SIGNED, -high, high)
        axes.set_title(title, fontsize=9)
    figure.suptitle(f"{layer}: {columns} of {shape[0]} kernels (columns), {lines} of {shape[1]} input channels (rows)", fontsize=10)
    return figure


def _mosaic(axes: Axes, tiles: Tensor, colours: str, low: float, high: float) -> None:
    """Tiles (lines, columns, h, w) as one image, a gap of half an entry between them, with a bar of its colours."""
    lines, columns, h, w = tiles.shape
    fine = tiles.repeat_interleave(2, 2).repeat_interleave(2, 3)
    gaps = torch.nn.functional.pad(fine, (0, 1, 0, 1), value=math.nan)
    whole = gaps.permute(0, 2, 1, 3).reshape(lines * (2 * h + 1), columns * (2 * w + 1))[:-1, :-1]
    shown = axes.imshow(whole.numpy(), cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    bare(axes)
    bar = axes.figure.colorbar(shown, ax=axes, shrink=0.9, aspect=15)
    bar.ax.tick_params(labelsize=7)


def _grid(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    figure = Figure(size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _shown(image: Tensor, normalise: bool) -> Tensor:
    """The image as it is, or stretched so that its darkest and brightest values are 0 and 1."""
    low, high = image.min(), image.max()
    return (image - low) / (high - low) if normalise and high > low else image


def _scale(axes: Axes, log: bool) -> None:
    if log:
        axes.set_yscale("log", nonpositive="clip")
    else:
        axes.set_ylim(bottom=0)


def _db(found: Tensor, truth: Tensor) -> str:
    decibels = float(metrics.psnr_db(found[None], truth[None]))
    return "an exact copy" if decibels == math.inf else f"{decibels:.1f} dB"


def _looks(names: Sequence[str]) -> list[dict[str, Any]]:
    """Weights solid, biases dashed; few layers in the colours that all can tell apart, many from dark to light with their depth."""
    blocks = _blocks(names)
    few = len(blocks) <= len(COLOURS)
    depth = colormaps[AMOUNTS](np.linspace(0, DEPTH, len(blocks)))
    return [
        {"color": COLOURS[place] if few else depth[place], "linestyle": "--" if name.endswith("bias") else "-"}
        for name in names
        for place in [blocks.index(name.rpartition(".")[0])]
    ]


def _blocks(names: Iterable[str]) -> list[str]:
    """Layers that parameters belong to, in order."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))
