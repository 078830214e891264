"""`fit_square` keeps the aspect ratio, the range and constants, and scales as PyTorch's antialiased bilinear filter."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumofed.common.errors import ConfigError
from pneumofed.common.imaging.images import fit_square

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40))
PIXELS = st.builds(lambda shape, seed: np.random.default_rng(seed).random(shape, np.float32), SHAPES, st.integers(0, 100))
SIZES = st.integers(1, 33)
Fit = Literal["pad", "crop"]
FITS = st.sampled_from(get_args(Fit))


@settings(max_examples=30, deadline=None)
@given(PIXELS, SIZES, FITS)
def test_the_result_is_a_square_in_range(pixels: np.ndarray, size: int, fit: Fit) -> None:
    square = fit_square(pixels, size, fit)
    assert square.shape == (size, size)
    assert square.dtype == np.float32
    assert square.flags.c_contiguous
    assert 0 <= square.min() <= square.max() <= 1


@settings(max_examples=30, deadline=None)
@given(SHAPES, SIZES, st.floats(0, 1, width=32))
def test_crop_keeps_a_constant(shape: tuple[int, int], size: int, value: float) -> None:
    np.testing.assert_allclose(fit_square(np.full(shape, value, np.float32), size, "crop"), value, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(SHAPES, SIZES)
def test_pad_keeps_the_aspect_ratio_and_centres_the_image(shape: tuple[int, int], size: int) -> None:
    is_image = fit_square(np.ones(shape, np.float32), size, "pad") > 0.5
    rows, columns = np.flatnonzero(is_image.any(1)), np.flatnonzero(is_image.any(0))
    for found, length in ((rows, shape[0]), (columns, shape[1])):
        assert len(found) == pytest.approx(max(1, size * length / max(shape)), abs=0.5)
        assert abs(found[0] - (size - 1 - found[-1])) <= 1
    assert is_image.sum() == len(rows) * len(columns)


@settings(max_examples=30, deadline=None)
@given(PIXELS, FITS)
def test_a_square_of_the_right_size_is_unchanged(pixels: np.ndarray, fit: Fit) -> None:
    side = min(pixels.shape)
    square = pixels[:side, :side]
    np.testing.assert_array_equal(fit_square(square, side, fit), square)


@settings(max_examples=30, deadline=None)
@given(PIXELS, SIZES, FITS)
def test_fitting_commutes_with_transposition(pixels: np.ndarray, size: int, fit: Fit) -> None:
    np.testing.assert_allclose(fit_square(pixels.T, size, fit), fit_square(pixels, size, fit).T, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), SIZES, st.integers(0, 100))
def test_scaling_agrees_with_torch(side: int, size: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).random((side, side), np.float32)
    scaled = torch.nn.functional.interpolate(
        torch.from_numpy(pixels)[None, None], (size, size), mode="bilinear", antialias=True, align_corners=False
    )
    np.testing.assert_allclose(fit_square(pixels, size, "pad"), scaled[0, 0].numpy(), atol=1e-5)


def test_crop_takes_the_centre() -> None:
    pixels = np.zeros((10, 30), np.float32)
    pixels[:, 10:20] = 1
    assert (fit_square(pixels, 10, "crop") == 1).all()


def test_a_one_pixel_checkerboard_does_not_alias() -> None:
    board = (np.indices((128, 128)).sum(0) % 2).astype(np.float32)
    np.testing.assert_allclose(fit_square(board, 16, "pad"), 0.5, atol=0.02)


@pytest.mark.parametrize(("shape", "size", "fit"), [((4, 4), 8, "stretch"), ((4, 4), 0, "pad"), ((4, 4, 3), 8, "pad")])
def test_what_cannot_be_fitted_is_refused(shape: tuple[int, ...], size: int, fit: Any) -> None:
    with pytest.raises(ConfigError, match="fit_square"):
        fit_square(np.ones(shape, np.float32), size, fit)
