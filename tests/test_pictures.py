"""Pictures of a theft show what its trace holds: so many panels, so many frames, each at its evaluation."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from attacks import idlg, metrics
from attacks.optimizers import Stop
from experiments import pictures
from experiments.canvas import save
from fedsim.data import load
from fedsim.models import lenet, mcmahan_cnn
from fedsim.observation import Knowledge, Observation, Trace
from fedsim.seeding import generator
from fedsim.training import local_update, split
from fedsim.wire import pack

SHAPE = (3, 13, 11)
EVERY, MOMENTS = 5, 31


@pytest.fixture(scope="module")
def truth():
    """A bright square on a ramp, (3, 13, 11)."""
    image = torch.linspace(0.1, 0.6, 11).expand(SHAPE).clone()
    image[0, 3:8, 2:7] = 0.9
    return image


@pytest.fixture(scope="module")
def trace(truth) -> Trace:
    """A theft from DLG's LeNet that found its image: 31 moments, after 1, 6, …, 151 evaluations."""
    model = lenet(SHAPE, 5, rng=generator(0, "init"))
    params, buffers = split(model)
    update = local_update(model, params, buffers, [(truth[None], torch.tensor([3]))], lr=1.0).update
    attack = replace(idlg(evaluations=EVERY * (MOMENTS - 1) + 1, record=EVERY), stop=Stop())  # not as soon as it has the image
    (made,) = attack([Observation(params, pack(update), 1)], Knowledge(SHAPE, 5), model, generator(0, "attack"))
    assert made.trace is not None
    return made.trace


def flat(moments: int, losses: list[float], greys: list[float]) -> Trace:
    """A trace of grey images."""
    images = torch.tensor(greys).reshape(-1, 1, 1, 1, 1).expand(moments, 1, 1, 7, 5)
    return Trace(torch.arange(moments), torch.tensor(losses), images, {"head.weight": torch.tensor(losses)})


def frames_of(path: Path) -> list[Image.Image]:
    """Every frame of an animation, decoded."""
    if path.suffix == ".mp4":
        import av

        with av.open(str(path)) as file:
            return [frame.to_image() for frame in file.decode(video=0)]
    with Image.open(path) as file:
        found = []
        for place in range(file.n_frames):
            file.seek(place)
            found.append(file.convert("RGB"))
        return found


# From noise to image.


def test_the_grid_has_30_panels_each_with_its_evaluations_below(trace, tmp_path):
    figure = pictures.panels(trace)
    captions = [axes.get_xlabel() for axes in figure.axes]
    assert len(captions) == 30
    # 31 moments in 30 places leave one out: the ends stay.
    assert (captions[0], captions[-1]) == ("1", "151")
    path = save(figure, tmp_path / "panels", "in words")
    with Image.open(path) as file:
        file.load()
        assert file.text["Description"] == "in words"
        assert file.width > file.height > 100
    assert "in words" in path.with_suffix(".svg").read_text()
    assert ElementTree.parse(path.with_suffix(".svg")).getroot().tag.endswith("svg")


def test_panels_show_the_moments_they_name(trace):
    for axes in pictures.panels(trace, count=7).axes:
        moment = trace.evaluations.tolist().index(int(axes.get_xlabel()))
        shown = torch.as_tensor(axes.images[0].get_array()).permute(2, 0, 1)
        assert torch.equal(shown, trace.images[moment, 0].clamp(0, 1))


@pytest.mark.parametrize(
    ("count", "every", "evaluations"),
    [
        (30, 5, list(range(1, 150, 5))),
        (30, 35, [1, 36, 71, 106, 141]),
        (3, 50, [1, 51, 101]),
        (2, 9, [1, 6]),  # 10 was not recorded: the last moment before it
        (3, None, [1, 76, 151]),
        (1000, None, list(range(1, 152, 5))),
        (1, None, [1]),
    ],
)
def test_moments_lie_so_many_evaluations_apart(trace, count, every, evaluations):
    assert trace.evaluations[pictures.moments(trace, count, every)].tolist() == evaluations


def test_moments_that_cannot_be_meant_are_told(trace):
    with pytest.raises(ValueError, match="every must be >= 1 evaluation, got 0"):
        pictures.moments(trace, every=0)
    with pytest.raises(ValueError, match="count must be >= 1, got 0"):
        pictures.moments(trace, 0)


def test_an_animation_has_one_frame_for_each_recorded_moment(trace, truth, tmp_path):
    some = Trace(*(t[::3] for t in (trace.evaluations, trace.losses, trace.images)), {})  # 11 of 31 moments
    paths = [tmp_path / f"theft{suffix}" for suffix in pictures.ANIMATIONS]
    pictures.animate(some, truth, paths)
    width, height = (round(inches * pictures.FRAME_DPI) for inches in pictures.FRAME_INCHES)
    last = pictures.Scene(some, truth).pixels().astype(float)
    for path in paths:
        frames = frames_of(path)
        assert len(frames) == 11, path.suffix
        assert {frame.size for frame in frames} == {(width, height)}
        # A palette or a codec costs some of the 255 levels; another moment costs more.
        gap = [abs(np.asarray(frame, float) - last).mean() for frame in (frames[0], frames[-1])]
        assert gap[1] < 4 < gap[0], path.suffix


def test_a_frame_of_a_still_theft_is_kept(tmp_path):
    # Encoders merge equal frames: an attack that stands still still has its frames, since their evaluations differ.
    still = flat(5, [0.5] * 5, [0.3] * 5)
    paths = [tmp_path / f"still{suffix}" for suffix in pictures.ANIMATIONS]
    pictures.animate(still, torch.full((1, 7, 5), 0.3), paths)
    assert [len(frames_of(path)) for path in paths] == [5, 5, 5]


def test_the_scene_shows_the_image_and_the_loss_so_far(trace, truth):
    scene = pictures.Scene(trace, truth)
    scene.show(4)
    early = scene.pixels()
    assert scene.loss.lines[1].get_xdata().tolist() == [1, 6, 11, 16, 21]
    assert "21 evaluations" in scene.loss.texts[0].get_text()
    shown = torch.as_tensor(scene.figure.axes[1].images[0].get_array()).permute(2, 0, 1)
    assert torch.equal(shown, trace.images[4, 0].clamp(0, 1))
    gap = torch.as_tensor(scene.figure.axes[2].images[0].get_array()).permute(2, 0, 1)
    assert torch.equal(gap, (trace.images[4, 0].clamp(0, 1) - truth).abs())
    scene.show(MOMENTS - 1)
    assert (scene.pixels() != early).any()


@pytest.mark.parametrize(("log", "scale"), [(True, "log"), (False, "linear")])
def test_the_log_flag_changes_the_axis_of_the_loss(trace, truth, log, scale):
    scene = pictures.Scene(trace, truth, log=log)
    assert scene.loss.get_yscale() == scale
    assert ("log" in scene.loss.get_ylabel()) == log


def test_normalising_stretches_an_image_to_black_and_white():
    dull = flat(1, [0.5], [0.0])
    dull = Trace(dull.evaluations, dull.losses, torch.linspace(0.4, 0.5, 35).reshape(1, 1, 1, 7, 5), dull.layers)
    for normalise, ends in ((False, (0.4, 0.5)), (True, (0.0, 1.0))):
        (axes,) = pictures.panels(dull, normalise=normalise).axes
        shown = axes.images[0].get_array()
        assert (shown.min(), shown.max()) == pytest.approx(ends)


def test_a_video_without_its_package_says_how_to_get_it(trace, truth, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # what an import of something not installed meets
    with pytest.raises(ValueError, match=r"pip install -e '\.\[video\]' in fedsim's clone; or take GIF or WebP"):
        pictures.animate(trace, truth, [tmp_path / "a.gif", tmp_path / "a.mp4"])
    assert list(tmp_path.iterdir()) == []  # told before anything is drawn


def test_an_unknown_kind_of_animation_is_told(trace, truth, tmp_path):
    with pytest.raises(ValueError, match=r"unknown kind of animation '.mp5': did you mean '.mp4'"):
        pictures.animate(trace, truth, [tmp_path / "a.mp5"])


# Agreement of loss and image.


def test_loss_and_error_fall_together_where_the_attack_converges(trace, truth):
    assert float(pictures.errors(trace, truth)[-1]) < 1e-3
    assert pictures.agreement(trace, truth) > 0.9


def test_errors_are_those_of_the_image_asked_for():
    images = torch.stack([torch.zeros(2, 1, 7, 5), torch.stack([torch.full((1, 7, 5), 0.5), torch.full((1, 7, 5), 7.0)])])
    two = Trace(torch.tensor([1, 2]), torch.tensor([2.0, 1.0]), images, {})
    truth = torch.ones(1, 7, 5)
    assert pictures.errors(two, truth, at=0).tolist() == [1.0, 0.25]
    assert pictures.errors(two, truth, at=1).tolist() == [1.0, 0.0]  # clamped: 7 is white


@pytest.mark.parametrize(
    ("greys", "rank"),
    [
        ([0.0, 0.1, 0.2, 0.3], 1.0),  # towards the truth, 0.5, as the loss falls
        ([0.3, 0.2, 0.1, 0.0], -1.0),  # and away from it
        # Errors rank 4, 1, 3, 2 beside losses of rank 4, 3, 2, 1: 1 - 6 (0 + 4 + 1 + 1) / (4 * 15) = 0.4
        ([0.0, 0.4, 0.1, 0.2], 0.4),
        ([0.2, 0.2, 0.2, 0.2], math.nan),
    ],
)
def test_agreement_is_spearmans(greys, rank):
    made = flat(4, [8.0, 4.0, 2.0, 1.0], greys)
    assert pictures.agreement(made, torch.full((1, 7, 5), 0.5)) == pytest.approx(rank, nan_ok=True)


def test_the_layers_figure_has_a_line_for_each_layer_and_says_how_loss_and_error_agree(trace, truth):
    above, below = pictures.layer_gaps(trace, truth).axes
    assert [line.get_label() for line in above.lines] == list(trace.layers)
    assert torch.equal(torch.as_tensor(above.lines[0].get_ydata()), trace.layers["features.0.weight"])
    assert above.get_yscale() == below.get_yscale() == "log"
    assert f"Spearman(loss, MSE) = {pictures.agreement(trace, truth):.3f} over 31 moments" in below.get_title("right")


def test_many_layers_are_told_apart_by_depth(truth):
    gaps = {f"block{i}.{kind}": torch.tensor([2.0, 1.0]) for i in range(23) for kind in ("weight", "bias")}
    deep = Trace(torch.tensor([1, 2]), torch.tensor([2.0, 1.0]), torch.zeros(2, 1, *SHAPE), gaps)
    above, _, bar = pictures.layer_gaps(deep, truth).axes
    assert [text.get_text() for text in bar.get_yticklabels()] == ["block0", "block22"]
    assert above.get_legend() is None
    weights = [line for line in above.lines if line.get_linestyle() == "-"]
    assert len(weights) == 23
    assert len({tuple(line.get_color()) for line in weights}) == 23


# Kernels.


def test_a_surface_is_the_magnitude_of_the_mean_over_input_channels():
    gradient = torch.tensor([[1.0, -3.0], [-5.0, 2.0]]).reshape(2, 2, 1, 1).expand(2, 2, 3, 5)
    assert pictures.surfaces(gradient).shape == (2, 3, 5)
    assert pictures.surfaces(gradient)[:, 0, 0].tolist() == [1.0, 1.5]
    with pytest.raises(ValueError, match=r"\(O, I, h, w\), got \(7, 5\)"):
        pictures.surfaces(torch.zeros(7, 5))


def test_roughness_of_a_ramp_and_of_a_checkerboard():
    # 5x5 ramp: half of the 40 pairs of neighbours differ by 1, 2 var = 2 * 50 / 24: 0.5 / (25 / 6) = 0.12
    ramp = torch.arange(5.0).expand(1, 5, 5)
    assert pictures.roughness(ramp) == pytest.approx(0.12)
    # 4x4 of 0 and 1: all neighbours differ by 1, 2 var = 2 * (16 / 4) / 15 = 8 / 15
    board = (torch.arange(4)[:, None] + torch.arange(4)).remainder(2).double()[None]
    assert pictures.roughness(board) == pytest.approx(15 / 8)
    assert math.isnan(pictures.roughness(torch.ones(3, 5, 5)))
    assert pictures.roughness(torch.cat([torch.ones(1, 5, 5), ramp])) == pytest.approx(0.12)  # the flat one does not count


def test_roughness_of_any_order_is_one_in_expectation():
    values = torch.rand(25, generator=generator(0, "values")).square()
    rng = generator(0, "orders")
    orders = torch.stack([values[torch.randperm(25, generator=rng)].reshape(5, 5) for _ in range(2000)])
    # The ratio's deviation over orders is 0.15: of the mean of 2,000 it is 0.0034.
    assert pictures.roughness(orders) == pytest.approx(1, abs=4 * 0.0034)


def test_batch_normalisation_by_the_image_itself_roughens_the_gradient():
    data = load("synthetic", train_size=20, test_size=1, progress=False)
    model = mcmahan_cnn(data.image_shape, 10, norm="batch", rng=generator(0, "init"))
    params, buffers = split(model)
    image, label = data.train.batch(torch.tensor([3]))
    rough = {}
    for training in (False, True):
        update = local_update(model.train(training), params, buffers, [(image, label)], lr=1.0).update
        assert pictures.convolutions(update) == ["features.0.weight", "features.4.weight"]
        rough[training] = pictures.roughness(pictures.surfaces(update["features.4.weight"]))
    assert rough[False] < 0.8 * rough[True]


def test_kernels_are_drawn_block_by_block(tmp_path):
    weights = torch.randn(13, 5, 3, 3, generator=generator(0, "kernels"))
    strips = pictures.kernel_strips({"filters": weights, "gradient": torch.zeros_like(weights)}, "conv.weight", most=7)
    filters, gradient = (axes.images[0].get_array() for axes in strips.axes if axes.images)
    # 3 input channels down, 7 kernels across; an entry is 2x2, a gap 1.
    assert filters.shape == gradient.shape == (3 * 7 - 1, 7 * 7 - 1)
    assert torch.equal(torch.as_tensor(filters.data[7:13:2, 14:20:2]), weights[2, 1])
    assert gradient.max() == 0
    heat = pictures.kernel_surfaces({"eval mode": weights, "training mode": torch.zeros_like(weights)}, "conv.weight", most=11)
    smooth, zero = (axes.images[0].get_array() for axes in heat.axes if axes.images)
    # 11 kernels in 2 lines of 6, each over its own largest magnitude; the last place is empty.
    assert smooth.shape == (2 * 7 - 1, 6 * 7 - 1)
    surface = weights[7].mean(0).abs()
    assert torch.allclose(torch.as_tensor(smooth.data[7:13:2, 7:13:2]), surface / surface.max())
    assert smooth.mask[7:, 35:].all()
    assert zero.max() == 0
    for name, figure in (("strips", strips), ("heat", heat)):
        with Image.open(save(figure, tmp_path / name)) as file:
            assert file.convert("RGB").getextrema() != ((255, 255),) * 3


def test_the_comparison_says_how_good_the_theft_is(truth):
    found = (truth + 0.1).clamp(0, 1)  # no pixel is above 0.9
    figure = pictures.comparison(truth, found)
    assert [axes.get_title() for axes in figure.axes] == ["original", "stolen", "difference"]
    assert figure.axes[1].get_xlabel() == "MSE 0.01, 20.0 dB"
    assert pictures.comparison(truth, truth).axes[1].get_xlabel() == "MSE 0, an exact copy"
    assert float(metrics.mse(found[None], truth[None])) == pytest.approx(0.01, rel=1e-5)
