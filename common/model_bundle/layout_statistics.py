"""An image's grey values and layout in few numbers. They are computed, compared and forgotten: none is kept of any image."""

from __future__ import annotations

import numpy as np
import PIL.Image

SIDE_PX = 64
"""The image is brought to this many pixels a side, so that the numbers do not depend on how finely it was taken."""

BLACK = 0.02
"""Five of 255 grey levels: rows and columns that stay below are padding or collimation, whose rim a JPEG file leaves a little uneven."""

LAYOUT_STATISTICS = (
    *("mean", "deviation", "skewness", "kurtosis"),
    *("dark_quantile", "median", "bright_quantile", "entropy", "black_fraction", "white_fraction"),
    *("mirror_correlation", "upside_down_correlation", "diagonal_correlation"),
    *("edge_energy", "fine_energy"),
    *("middle_minus_sides", "bottom_minus_top", "centre_minus_rim", "lungs_minus_middle", "shoulders_minus_lungs"),
)
"""What `statistics_of` gives, in order."""

CELLS = 8
_BINS = 32
_TINY = 1e-6


def thumbnail(square: np.ndarray) -> np.ndarray:
    """`square` float32 [S, S] without its black rim, squeezed to float64 [SIDE_PX, SIDE_PX]: padding and collimation do not count."""
    resized = PIL.Image.fromarray(_trim(square)).resize((SIDE_PX, SIDE_PX), PIL.Image.Resampling.BILINEAR)
    return np.clip(np.asarray(resized, np.float64), 0.0, 1.0)


def statistics_of(grey: np.ndarray) -> np.ndarray:
    """The `LAYOUT_STATISTICS` of a thumbnail, float32 [K]; finite for every picture."""
    return np.array([*_histogram(grey), *_symmetry(grey), *_texture(grey), *_layout(grey)], np.float32)


def cells_of(grey: np.ndarray) -> np.ndarray:
    """Mean greys of `CELLS` x `CELLS` cells of a thumbnail, in units of its deviation from its mean: float32 [CELLS**2]."""
    side = SIDE_PX // CELLS
    cells = grey.reshape(CELLS, side, CELLS, side).mean(axis=(1, 3)).ravel()
    return ((cells - grey.mean()) / max(grey.std(), _TINY)).astype(np.float32)


def _trim(square: np.ndarray) -> np.ndarray:
    rows, columns = (np.flatnonzero(square.max(axis=axis) > BLACK) for axis in (1, 0))
    if rows.size < 2 or columns.size < 2:
        return np.ascontiguousarray(square, np.float32)
    return np.ascontiguousarray(square[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], np.float32)


def _histogram(grey: np.ndarray) -> tuple[float, ...]:
    """Moments, quantiles, Shannon entropy in units of its maximum, and the ends of the scale."""
    mean, deviation = grey.mean(), grey.std()
    scaled = (grey - mean) / max(deviation, _TINY)
    shares = np.histogram(grey, _BINS, (0.0, 1.0))[0] / grey.size
    entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum() / np.log(_BINS)
    ends = (np.sqrt((grey < 0.05).mean()), np.sqrt((grey > 0.95).mean()))  # of a share near 0 the root is nearer to a Gaussian
    return (
        mean,
        deviation,
        (scaled**3).mean(),
        np.log((scaled**4).mean() + 1),
        *np.quantile(grey, (0.05, 0.5, 0.95)),
        entropy,
        *ends,
    )


def _symmetry(grey: np.ndarray) -> tuple[float, ...]:
    """How much the image is like its own mirror images: a frontal chest is to its left and right, a lateral one or a hand is not."""
    return tuple(_correlation(grey, other) for other in (grey[:, ::-1], grey[::-1], grey.T))


def _texture(grey: np.ndarray) -> tuple[float, ...]:
    """Logarithms of the mean step between neighbours, and of the mean second difference as a share of it."""
    steps = np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()
    bends = np.abs(np.diff(grey, 2, axis=0)).mean() + np.abs(np.diff(grey, 2, axis=1)).mean()
    return float(np.log(steps + _TINY)), float(np.log((bends + _TINY) / (steps + _TINY)))


def _layout(grey: np.ndarray) -> tuple[float, ...]:
    """Differences of mean grey in units of the deviation: spine against flanks, abdomen against shoulders, lungs against the rest."""
    scaled = (grey - grey.mean()) / max(grey.std(), _TINY)
    fifth, third, eighth = SIDE_PX // 5, SIDE_PX // 3, SIDE_PX // 8
    middle = scaled[:, 2 * fifth : -2 * fifth].mean()
    sides = (scaled[:, :fifth].mean() + scaled[:, -fifth:].mean()) / 2
    inner = scaled[eighth:-eighth, eighth:-eighth]
    rim = (scaled.sum() - inner.sum()) / (scaled.size - inner.size)
    lungs = (scaled[third:-third, fifth : 2 * fifth].mean() + scaled[third:-third, -2 * fifth : -fifth].mean()) / 2
    shoulders = (scaled[:eighth, :third].mean() + scaled[:eighth, -third:].mean()) / 2
    return (
        middle - sides,
        scaled[-third:].mean() - scaled[:third].mean(),
        inner.mean() - rim,
        lungs - middle,
        shoulders - lungs,
    )


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    first, second = first - first.mean(), second - second.mean()
    return float((first * second).sum() / max(np.sqrt((first**2).sum() * (second**2).sum()), _TINY))
