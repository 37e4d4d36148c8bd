"""Metrics: closed forms, what clamping protects from, matching, intervals."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from attacks import metrics
from fedsim.models import ConvolutionalBottleneck, Precode, lenet, mlp
from fedsim.seeding import generator
from fedsim.training import split


def images(*shape: int, stream: str = "images") -> torch.Tensor:
    return torch.rand(shape, generator=generator(0, stream))


def test_a_constant_offset_has_its_square_as_mse_and_its_decibels_as_psnr() -> None:
    true = torch.full((3, 2, 5, 7), 0.25)
    offsets = torch.tensor([0.1, 0.01, 0.0]).reshape(3, 1, 1, 1)
    assert torch.allclose(metrics.mse(true + offsets, true), torch.tensor([1e-2, 1e-4, 0.0]), atol=1e-9)
    # 10 log10(1 / 0.1^2) = 20
    assert torch.allclose(metrics.psnr_db(true + offsets, true)[:2], torch.tensor([20.0, 40.0]), atol=1e-3)
    assert metrics.psnr_db(true, true).tolist() == [math.inf] * 3


def test_grey_scores_the_second_moment_of_uniform_noise() -> None:
    # E (u - 1/2)^2 = 1/12; over 3 * 64^2 pixels the standard error is sqrt(1/180 / 12288) = 7e-4
    noise = images(1, 3, 64, 64)
    assert metrics.mse(torch.full_like(noise, 0.5), noise).item() == pytest.approx(1 / 12, abs=3e-3)


def test_ssim_is_one_for_equal_images_and_the_luminance_term_for_flat_ones() -> None:
    true = images(2, 3, 17, 19)
    assert torch.allclose(metrics.ssim(true, true), torch.ones(2), atol=1e-5)
    # Flat images have no variance: SSIM = (2ab + C1) / (a^2 + b^2 + C1) with C1 = 0.01^2
    a, b = 0.2, 0.6
    flat = metrics.ssim(torch.full((1, 3, 17, 19), a), torch.full((1, 3, 17, 19), b)).item()
    assert flat == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4), abs=1e-4)


def test_ssim_of_negated_noise_is_negative_and_each_image_has_its_own() -> None:
    true = images(2, 1, 32, 32)
    guess = torch.stack([true[0], 1 - true[1]])
    same, negated = metrics.ssim(guess, true).tolist()
    assert same == pytest.approx(1, abs=1e-5)
    assert negated < -0.5


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_of_an_image_does_not_depend_on_those_beside_it(channels) -> None:
    guess, true = images(5, channels, 16, 17), images(5, channels, 16, 17, stream="others")
    alone = [metrics.ssim(a[None], b[None]) for a, b in zip(guess, true, strict=True)]
    assert torch.equal(metrics.ssim(guess, true), torch.cat(alone))


def test_ssim_says_so_when_images_are_smaller_than_its_window() -> None:
    with pytest.raises(ValueError, match="11 pixels"):
        metrics.ssim(images(1, 1, 8, 8), images(1, 1, 8, 8))


def test_without_clamping_a_perfect_reconstruction_would_fail() -> None:
    # A white image, recovered but for 0.4 % too much light: cast to 8 bits unclamped, 256 wraps around to 0, black.
    true = torch.ones(1, 3, 13, 11)
    reconstructed = true + 0.004
    wrapped = (reconstructed * 255).long().remainder(256).float() / 255
    assert (wrapped - true).square().mean() > 0.9
    assert metrics.mse(reconstructed, true).item() == 0


def test_shapes_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        metrics.mse(images(1, 3, 5, 7), images(3, 5, 7))


@pytest.mark.parametrize("size", [1, 2, 7])
def test_align_undoes_any_permutation(size: int) -> None:
    true = images(size, 3, 5, 7)
    for stream in range(5):
        shuffled = torch.randperm(size, generator=generator(stream, "shuffle"))
        noisy = true[shuffled] + 0.01 * torch.randn(true.shape, generator=generator(stream, "noise"))
        back = metrics.align(noisy, true)
        assert torch.equal(shuffled[back], torch.arange(size))


def test_align_prefers_the_best_total_to_the_best_single_pair() -> None:
    # Nearest first would pair 0.5 with 0.4 (cost .01) and leave 0.9 with 0.0 (.81). The best total: .25 + .25 = .50.
    true = torch.tensor([0.0, 0.4]).reshape(2, 1, 1, 1)
    guess = torch.tensor([0.9, 0.5]).reshape(2, 1, 1, 1)
    assert metrics.align(guess, true).tolist() == [1, 0]


def test_label_accuracy_counts_repetitions_in_any_order() -> None:
    assert metrics.label_accuracy(torch.tensor([3, 1, 1, 0]), torch.tensor([1, 3, 0, 1])) == 1
    assert metrics.label_accuracy(torch.tensor([1, 1, 1, 1]), torch.tensor([1, 1, 0, 2])) == 0.5


def test_wilson_gives_the_textbook_interval() -> None:
    assert metrics.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    # None of n: the upper end is z^2 / (n + z^2) = 3.8415 / 13.8415
    assert metrics.wilson(0, 10) == pytest.approx((0, 0.27753), abs=1e-4)
    assert metrics.wilson(10, 10) == pytest.approx((1 - 0.27753, 1), abs=1e-4)
    with pytest.raises(ValueError, match="11 of 10"):
        metrics.wilson(11, 10)


def test_wilson_covers_the_truth_about_as_often_as_promised() -> None:
    # 2,000 samples: the coverage of a 95 % interval at n = 30, p = 0.8 is 94-97 %, +- 1 % for 2,000 draws
    seen = torch.binomial(torch.full((2000,), 30.0), torch.tensor(0.8), generator=generator(0, "coverage")).int().tolist()
    covered = sum(low <= 0.8 <= high for low, high in (metrics.wilson(s, 30) for s in seen)) / 2000
    assert 0.93 < covered < 0.98


def test_success_is_counted_at_three_bars_with_n_and_an_interval() -> None:
    scores = {
        "mse": [0.01, 0.03, 0.5, 0.0],
        "psnr_db": torch.tensor([20.0, 15.2, 3.0, math.inf]),
        "ssim": [0.6, 0.59, math.nan, 1.0],
    }
    rates = metrics.success_rates(scores)
    # Below 0.03, above 20 dB, at least 0.6: the values on the bar are 0.03 (no), 20 dB (no) and 0.6 (yes).
    assert {name: (rate.passed, rate.n) for name, rate in rates.items()} == {
        "MSE < 0.03": (2, 4),
        "> 20 dB": (1, 4),
        "SSIM ≥ 0.6": (2, 4),
    }
    assert rates["> 20 dB"].share == 0.25
    assert rates["> 20 dB"].interval == metrics.wilson(1, 4)
    # z^2 = 3.8415: centre (1/4 + z^2 / 8) / (1 + z^2 / 4) = 0.3725, half width 0.3268
    assert str(rates["> 20 dB"]) == "1/4, 5-70 %"


def test_images_of_one_update_make_no_interval_narrower() -> None:
    scores = {"mse": [0.0] * 6 + [1.0] * 6}
    single, batched, whole = (metrics.success_rates(scores, updates=updates)["MSE < 0.03"] for updates in (None, 3, 12))
    assert single.interval == whole.interval == metrics.wilson(6, 12)
    assert batched.interval == metrics.wilson(1.5, 3)
    assert batched.share == 0.5
    assert str(metrics.Rate(12, 12, 3)) == "12/12, 44-100 %"


def test_success_of_a_baseline_is_counted_under_its_prefix_and_bars_without_scores_are_left_out() -> None:
    rates = metrics.success_rates({"mse": [1.0], "grey_mse": [0.01], "grey_psnr_db": [20.1]}, "grey_")
    assert {name: rate.passed for name, rate in rates.items()} == {"MSE < 0.03": 1, "> 20 dB": 1}
    with pytest.raises(ValueError, match="at least one"):
        metrics.success_rates({"mse": []})


def test_baselines_are_what_they_say() -> None:
    true = torch.stack([torch.full((3, 16, 16), 0.2), torch.full((3, 16, 16), 0.7)])
    found = metrics.baselines(true, true.mean(0))
    assert found["grey"]["mse"].tolist() == pytest.approx([0.09, 0.04])
    assert found["mean_image"]["mse"].tolist() == pytest.approx([0.0625, 0.0625])
    assert found["mean_colour"]["mse"].tolist() == pytest.approx([0, 0], abs=1e-12)
    assert set(found["grey"]) == {"mse", "psnr_db", "ssim"}


# Against other people's implementations -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """A smooth picture and a noisy copy with values outside [0, 1], for which clamping matters; 3 of them, 3x37x41."""
    ramp = torch.linspace(0, 1, 41) * torch.linspace(1, 0.2, 37)[:, None]
    true = torch.stack([ramp, 1 - ramp, ramp.square()])[:, None].expand(3, 3, 37, 41)
    noise = torch.randn(3, 3, 37, 41, generator=generator(0, "noise"))
    return true + noise * torch.tensor([0.02, 0.1, 0.3]).reshape(3, 1, 1, 1), true


def test_metrics_agree_with_scikit_image(pair) -> None:
    from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

    reconstructed, true = pair
    arrays = [t.clamp(0, 1).double().numpy() for t in pair]
    each = list(zip(*arrays, strict=True))
    assert reconstructed.max() > 1
    assert metrics.mse(reconstructed, true).tolist() == pytest.approx([mean_squared_error(b, a) for a, b in each], rel=1e-5)
    psnr = [peak_signal_noise_ratio(b, a, data_range=1) for a, b in each]
    assert metrics.psnr_db(reconstructed, true).tolist() == pytest.approx(psnr, rel=1e-5)
    # Wang et al.'s settings in scikit-image's words; 3.5 sigma there makes a window of 11. It leaves out the 5 pixels at the
    # border, whose windows reach beyond the image: given a margin of 5 mirrored ones it counts the pixels that ours does.
    margin = ((0, 0), (5, 5), (5, 5))
    ssim = [
        structural_similarity(
            *(np.pad(image, margin, mode="reflect") for image in (b, a)),
            data_range=1,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in each
    ]
    assert metrics.ssim(reconstructed, true).tolist() == pytest.approx(ssim, abs=1e-4)


def test_psnr_and_ssim_agree_with_torchmetrics(pair) -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    reconstructed, true = (t.clamp(0, 1) for t in pair)
    theirs = peak_signal_noise_ratio(reconstructed, true, data_range=1.0, reduction="none", dim=(1, 2, 3))
    assert torch.allclose(metrics.psnr_db(*pair), theirs, rtol=1e-5)
    theirs = structural_similarity_index_measure(reconstructed.double(), true.double(), data_range=1.0, reduction="none")
    assert torch.allclose(metrics.ssim(*pair).double(), theirs, atol=1e-7)


def test_scores_without_lpips_import_nothing_slow(tmp_path) -> None:
    slow = {"torchmetrics", "torchvision", "torch._dynamo"}
    ask = f"""import sys, torch; from attacks import metrics
a = torch.zeros(1, 3, 11, 11); metrics.ssim(a, a), metrics.lpips_weights(); print(*{slow} & set(sys.modules))"""
    command = [sys.executable, "-c", ask]
    found = subprocess.run(command, env=os.environ | {"TORCH_HOME": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert found.stdout == "\n"


# What clamping protects from ------------------------------------------------------------------------------------------------------


def test_psnr_of_equal_images_is_infinite_and_of_what_lies_outside_it_is_that_of_the_clamped() -> None:
    true = torch.ones(1, 3, 5, 7)
    assert metrics.psnr_db(true, true).item() == math.inf
    assert metrics.psnr_db(true + 3, true).item() == math.inf  # white cannot be whiter; unclamped it would score -9.5 dB
    assert metrics.psnr_db(-true, 0.1 * true).item() == pytest.approx(20, abs=1e-4)


def test_l1_through_bytes_that_wrap_around_is_thirty_times_too_large() -> None:
    """A nearly perfect reconstruction, 41 dB, of a mostly white picture: 53 % of its pixels are white, the others mid-grey.

    Noise of deviation s = 10^(-41/20) = 0.0089 lifts a white pixel to level 256 or more, which 8 bits read as black, with the
    chance P(z > (256/255 - 1) / s) = P(z > 0.44) = 0.33, at the price of 1: L1 = 0.53 * 0.33 + ... = 0.18.
    Clamped, grey pixels are off by s sqrt(2/pi) and white ones by half of it: (0.47 + 0.53 / 2) 0.0071 = 0.0052.
    """
    rng = generator(0, "photograph")
    true = torch.full((1, 3, 64, 64), 0.5)
    true[torch.rand(true.shape, generator=rng) < 0.53] = 1.0
    reconstructed = true + 10 ** (-41 / 20) * torch.randn(true.shape, generator=rng)
    wrapped = (reconstructed * 255).long().remainder(256).float() / 255  # what a cast of floats to uint8 does
    # 12,288 pixels: the share of black ones has a standard error of sqrt(.18 * .82 / 12288) = 0.0035.
    assert metrics.l1(wrapped, true).item() == pytest.approx(0.18, abs=4 * 0.0035)
    assert metrics.l1(reconstructed, true).item() == pytest.approx(0.0052, rel=0.03)
    assert metrics.psnr_db(wrapped, true).item() < 8 < 41 < metrics.psnr_db(reconstructed, true).item()


# Features -------------------------------------------------------------------------------------------------------------------------


def halves() -> torch.nn.Module:
    """Its features are the means of an image's upper and lower half; no Classifier."""

    class Halves(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Linear(3, 3)
            self.last = torch.nn.Linear(2, 5)
            self.late = torch.nn.Dropout(0.5)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.last(self.late(torch.stack([images[:, :, :2].mean((1, 2, 3)), images[:, :, 2:].mean((1, 2, 3))], 1)))

    return Halves()


def test_features_are_what_the_last_linear_layer_is_given() -> None:
    model = halves()
    params, buffers = split(model)
    image = torch.cat([torch.full((2, 1, 2, 7), 0.3), torch.full((2, 1, 2, 7), 0.4)], 2)
    assert torch.allclose(metrics.features(model, params, buffers, image), torch.tensor([[0.3, 0.4]] * 2))  # dropout is off
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_feature_distance_is_relative_to_the_true_features() -> None:
    model = halves()
    params, buffers = split(model)
    true = torch.cat([torch.full((3, 1, 2, 7), 0.3), torch.full((3, 1, 2, 7), 0.4)], 2)
    found = true.clone()
    found[1, :, :2] = 0.8  # (0.8, 0.4) against (0.3, 0.4), whose norm is 0.5: 0.5 / 0.5
    found[2, 0, 0] = torch.linspace(0, 0.6, 7)  # another image with the same means
    assert torch.allclose(metrics.feature_distance(model, params, buffers, found, true), torch.tensor([0.0, 1.0, 0.0]), atol=1e-6)


@pytest.mark.parametrize("bottleneck", [Precode(width=2), ConvolutionalBottleneck()], ids=repr)
def test_features_end_where_a_bottleneck_begins(bottleneck):
    model = lenet((3, 8, 8), 11, bottleneck=bottleneck)
    image = images(2, 3, 8, 8)
    expected = model.features[: model.place](image).flatten(1)
    assert torch.equal(metrics.features(model, *split(model), image), expected)
    assert model.training


def test_features_of_a_classifier_are_those_in_front_of_its_bottleneck_at_the_parameters_given() -> None:
    class Noise(torch.nn.Module):
        def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.randn_like(features), features.sum()

    model = mlp((3, 5, 7), 11, hidden=(13,), rng=generator(0, "init"))
    model.bottleneck = Noise()
    params, buffers = split(model)
    image = images(2, 3, 5, 7)
    expected = model.features(image)
    assert torch.equal(metrics.features(model, params, buffers, image), expected)
    moved = {name: torch.zeros_like(t) for name, t in params.items()}
    assert metrics.features(model, moved, buffers, image).abs().max() == 0
    assert metrics.feature_distance(model, moved, buffers, image, 1 - image).tolist() == [0, 0]  # 0 / 0: the same features


def test_a_model_without_a_linear_layer_has_no_features() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.Flatten())
    with pytest.raises(ValueError, match="Sequential runs no linear layer"):
        metrics.features(model, *split(model), images(1, 3, 5, 7))


# LPIPS ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty folder in place of torchvision's downloads, and no way to download."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.fixture(scope="module")
def backbone() -> dict[str, torch.Tensor]:
    """Random weights of the smallest backbone; the numbers mean nothing, their agreement does."""
    import torchvision

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torchvision.models.squeezenet1_1(weights=None).state_dict()


def test_lpips_without_weights_says_where_they_belong_and_downloads_nothing(hub) -> None:
    assert metrics.lpips_weights("squeeze") is None
    with pytest.raises(ValueError, match=r"needs its backbone's weights and .*squeezenet1_1-.*pth is not there: give weights=FILE"):
        metrics.lpips(images(1, 3, 17, 19), images(1, 3, 17, 19), net="squeeze")


def test_lpips_with_installed_weights_is_torchmetrics(hub, backbone) -> None:
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    torch.save(backbone, hub / "squeezenet1_1-b8a52dc0.pth")
    assert metrics.lpips_weights("squeeze") == hub / "squeezenet1_1-b8a52dc0.pth"
    a, b = images(3, 3, 19, 23), images(3, 3, 19, 23, stream="others")
    theirs = learned_perceptual_image_patch_similarity(a, b, net_type="squeeze", reduction="none", normalize=True)
    assert theirs.min() > 0
    assert torch.allclose(metrics.lpips(a, b, net="squeeze"), theirs)
    assert metrics.lpips(a, a, net="squeeze").tolist() == [0, 0, 0]
    assert torch.allclose(metrics.lpips(a + 5 * (a == 1), b, net="squeeze"), theirs)


def test_lpips_takes_a_file_of_weights_and_grey_images(hub, backbone, tmp_path) -> None:
    torch.save({name: t for name, t in backbone.items() if name.startswith("features.")}, tmp_path / "mine.pth")
    a, b = images(2, 1, 17, 19), images(2, 1, 17, 19, stream="others")
    found = metrics.lpips(a, b, net="squeeze", weights=tmp_path / "mine.pth")
    coloured = [t.expand(-1, 3, -1, -1) for t in (a, b)]
    assert torch.equal(found, metrics.lpips(*coloured, net="squeeze", weights=tmp_path / "mine.pth"))
    before = torch.get_rng_state()
    torch.save(backbone, tmp_path / "other.pth")
    metrics.lpips(a, b, net="squeeze", weights=tmp_path / "other.pth")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("shape", "net", "message"),
    [
        ((1, 3, 30, 31), "alex", "'alex' needs images of 31 pixels a side, got \\(30, 31\\)"),
        ((1, 2, 32, 32), "alex", "1 or 3 channels, got 2"),
        ((1, 3, 32, 32), "alexnet", "unknown net 'alexnet': did you mean 'alex'"),
    ],
)
def test_what_lpips_cannot_compare_is_told(hub, shape, net, message) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.lpips(images(*shape), images(*shape), net=net)


def test_a_file_that_holds_no_weights_is_named(hub, tmp_path) -> None:
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "part.pth")
    for name in ("text.pth", "part.pth"):
        with pytest.raises(ValueError, match=rf"{name} holds no weights of torchvision's squeezenet1_1"):
            metrics.lpips(images(1, 3, 17, 19), images(1, 3, 17, 19), net="squeeze", weights=tmp_path / name)
