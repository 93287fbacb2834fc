from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import linalg

from elision.bench import metrics


def test_psnr_of_a_constant_offset_is_minus_twenty_log_of_it() -> None:
    reference = torch.full((2, 1, 16, 16), 0.5)
    images = torch.stack([reference[0] + 0.1, reference[1] - 0.01])
    assert metrics.psnr(images, reference) == pytest.approx([20.0, 40.0], abs=1e-4)


def test_psnr_of_identical_images_is_the_cap() -> None:
    images = torch.rand(1, 3, 16, 16)
    assert metrics.psnr(images, images) == [metrics.PSNR_CAP]


def test_psnr_averages_over_channels_and_pixels() -> None:
    reference = torch.zeros(1, 2, 8, 8)
    images = reference.clone()
    images[0, 0] = 0.2  # mean squared error 0.02
    assert metrics.psnr(images, reference)[0] == pytest.approx(-10 * math.log10(0.02), abs=1e-4)


def test_ssim_is_one_for_itself_and_the_closed_form_for_constants() -> None:
    images = torch.rand(2, 1, 32, 32)
    assert metrics.ssim(images, images) == pytest.approx([1.0, 1.0])
    a, b, c1 = 0.3, 0.6, 0.01**2
    expected = (2 * a * b + c1) / (a * a + b * b + c1)  # variances vanish
    got = metrics.ssim(torch.full((1, 1, 16, 16), a), torch.full((1, 1, 16, 16), b))
    assert got[0] == pytest.approx(expected, abs=1e-5)


def test_ssim_works_below_its_window() -> None:
    images = torch.rand(1, 1, 6, 6)
    assert metrics.ssim(images, images) == pytest.approx([1.0])


def test_frechet_of_shifted_sets_is_the_squared_shift() -> None:
    features = np.random.default_rng(0).normal(size=(400, 3))
    shift = np.array([1.0, -2.0, 0.5])
    assert metrics.frechet(features, features + shift) == pytest.approx(float(shift @ shift), abs=1e-6)


def test_frechet_of_scaled_sets_is_the_closed_form() -> None:
    features = np.random.default_rng(1).normal(size=(500, 4))
    features -= features.mean(0)
    # commuting covariances: sum of (sqrt(a) - sqrt(b))^2, which for b = 9 a is 4 trace(a)
    expected = 4 * np.trace(np.cov(features, rowvar=False))
    assert metrics.frechet(features, 3 * features) == pytest.approx(expected, rel=1e-6)


def test_frechet_is_what_the_matrix_root_gives() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(200, 6)) + 1
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.real(linalg.sqrtm(cov_a @ cov_b))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert metrics.frechet(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_itself_is_zero_even_with_fewer_samples_than_features() -> None:
    features = np.random.default_rng(2).normal(size=(5, 16))
    assert metrics.frechet(features, features) == pytest.approx(0.0, abs=1e-9)


def test_lpips_is_absent_with_a_reason_or_present_without(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    metric, note = metrics.lpips_metric()
    assert metric is None
    assert "LPIPS" in note
