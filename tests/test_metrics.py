"""Metrics: closed forms, what clamping protects from, matching, intervals."""

import math

import pytest
import torch

from attacks import metrics
from fedsim.seeding import generator


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


def test_success_rate_counts_strictly_below_the_bar() -> None:
    assert metrics.success_rate(torch.tensor([0.01, 0.03, 0.5, 0.0])) == 0.5
    with pytest.raises(ValueError, match="at least one"):
        metrics.success_rate(torch.tensor([]))


def test_baselines_are_what_they_say() -> None:
    true = torch.stack([torch.full((3, 16, 16), 0.2), torch.full((3, 16, 16), 0.7)])
    found = metrics.baselines(true, true.mean(0))
    assert found["grey"]["mse"].tolist() == pytest.approx([0.09, 0.04])
    assert found["mean_image"]["mse"].tolist() == pytest.approx([0.0625, 0.0625])
    assert found["mean_colour"]["mse"].tolist() == pytest.approx([0, 0], abs=1e-12)
    assert set(found["grey"]) == {"mse", "psnr_db", "ssim"}
