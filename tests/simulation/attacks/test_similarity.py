"""Measures of likeness against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from pneumofed.common.evaluation.similarity import K1, K2, ssim
from pneumofed.simulation.attacks.inversion import correlations, match, psnr, ranks

GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.random((6, 16, 16))


def _slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, eqs. 13 to 16, one window after the other."""
    axis = np.arange(11) - 5
    window = np.exp(-(axis[:, None] ** 2 + axis[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    found = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            pq = (window * (p - mp) * (q - mq)).sum()
            found.append((2 * mp * mq + K1**2) * (2 * pq + K2**2) / ((mp**2 + mq**2 + K1**2) * (vp + vq + K2**2)))
    return float(np.mean(found))


def test_ssim_is_that_of_its_definition() -> None:
    noisy = np.clip(IMAGES[0] + 0.2 * GENERATOR.standard_normal((16, 16)), 0, 1)
    assert ssim(IMAGES[0], noisy) == pytest.approx(_slow_ssim(IMAGES[0], noisy), abs=1e-9)
    assert ssim(IMAGES[0], IMAGES[1]) == pytest.approx(_slow_ssim(IMAGES[0], IMAGES[1]), abs=1e-9)


def test_equal_images_have_the_highest_scores() -> None:
    assert ssim(IMAGES[0], IMAGES[0]) == pytest.approx(1.0)
    assert psnr(IMAGES[0], IMAGES[0]) == 100.0
    assert psnr(IMAGES[0], IMAGES[0] + 0.1) == pytest.approx(20.0)


def test_correlation_is_that_of_numpy_and_ignores_brightness_and_contrast() -> None:
    found = correlations(0.3 * IMAGES[:2] + 0.1, IMAGES)
    assert found[0, 3] == pytest.approx(np.corrcoef(IMAGES[0].ravel(), IMAGES[3].ravel())[0, 1])
    assert found[0, 0] == pytest.approx(1.0)
    assert correlations(np.zeros((1, 16, 16)), IMAGES).tolist() == [[0.0] * 6]


def test_the_true_image_ranks_first_and_a_tie_does_not_flatter() -> None:
    found = correlations(IMAGES, IMAGES)
    assert (ranks(found, np.arange(6)) == 1).all()
    assert ranks(np.zeros((1, 6)), np.array([0])).tolist() == [6]


def test_a_shuffled_batch_is_matched_back() -> None:
    order = np.array([2, 0, 1])
    assert np.array_equal(IMAGES[:3][order][match(IMAGES[:3][order], IMAGES[:3])], IMAGES[:3])
