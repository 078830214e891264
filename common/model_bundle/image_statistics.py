"""Statistics of an image's grey levels and layout, and a density of such numbers.

- `pixel_statistics`: numbers that differ between scanners and processings and say nothing of a patient, for monitoring drift.
- `thumbnail`, `statistics_of`, `cells_of`: grey values and layout in few numbers, for suitability. They are computed, compared and
  dropped: none is kept of any image.
- `as_pictures`: a CT volume as the picture from the front that both are taken of.
- `Density`, `fit_density`: a Gaussian of few parameters, fitted to few points in many dimensions (probabilistic principal components).
"""

from __future__ import annotations

import base64
import binascii
from functools import cached_property
from math import prod

import numpy as np
import numpy.typing as npt
import PIL.Image
from pydantic import model_validator

from pneumofed.common.config.experiment import Positive, Section
from pneumofed.common.errors import DataError

PIXEL_STATISTICS = (
    "mean",
    "deviation",
    "quantile_01",
    "quantile_10",
    "quantile_25",
    "quantile_50",
    "quantile_75",
    "quantile_90",
    "quantile_99",
    "black_share",
    "white_share",
    "entropy_bits",
    "gradient",
    "laplacian",
    "left_right_difference",
    "border_mean",
)
"""The columns of `pixel_statistics`, in order."""

_QUANTILES = (0.01, 0.10, 0.25, 0.50, 0.75, 0.90, 0.99)
_ENTROPY_LEVELS = 32


def as_pictures(images: npt.NDArray[np.float32] | npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Shows images as statistics see them: radiographs as they are, volumes from the front.

    A volume in the lung window becomes its mean from front to back, with the head up: every place of the picture is the mean attenuation of
    a line through the patient, as in a frontal radiograph, and layout, symmetry and turns of the picture mean the same.

    Args:
        images: radiographs [N, S, S] or volumes [N, D, S, S] from foot to head, float32 in [0, 1] or uint8.

    Returns:
        float32 [N, S, S] in [0, 1], or [N, D, S].
    """
    if images.ndim == 3:
        found = np.asarray(images, np.float32)
        return found / np.float32(255.0) if images.dtype == np.uint8 else found
    scale = 255.0 if images.dtype == np.uint8 else 1.0
    seen = [(volume.mean(axis=1, dtype=np.float64)[::-1] / scale).astype(np.float32) for volume in images]
    return np.stack(seen) if seen else np.empty((0, images.shape[1], images.shape[3]), np.float32)


def pixel_statistics(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """float32 [N, K], K as in `PIXEL_STATISTICS`, of model inputs `images` float32 [N, S, S] in [0, 1], of volumes of their `as_pictures`.

    Shares are of pixels at most 0.02 and at least 0.98; the entropy is of a histogram of 32 levels; `gradient` and `laplacian` are
    mean absolute differences (sharpness and noise); `left_right_difference` is the mean grey of the left half minus that of the
    right one; `border_mean` that of the outermost tenth of the picture.
    """
    return (
        np.stack([_of_image(image) for image in as_pictures(images)])
        if len(images)
        else np.empty((0, len(PIXEL_STATISTICS)), np.float32)
    )


def _of_image(image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    half, edge = image.shape[1] // 2, max(1, image.shape[0] // 10)
    across, down = np.diff(image, axis=1), np.diff(image, axis=0)
    inner = image[edge:-edge, edge:-edge]
    return np.array(
        [
            image.mean(),
            image.std(),
            *np.quantile(image, _QUANTILES),
            (image <= 0.02).mean(),
            (image >= 0.98).mean(),
            _entropy_bits(image),
            (np.abs(across).mean() + np.abs(down).mean()) / 2,
            (np.abs(np.diff(across, axis=1)).mean() + np.abs(np.diff(down, axis=0)).mean()) / 2,
            image[:, :half].mean() - image[:, half:].mean(),
            (image.sum() - inner.sum()) / (image.size - inner.size),
        ],
        dtype=np.float32,
    )


def _entropy_bits(image: npt.NDArray[np.float32]) -> float:
    counts = np.bincount(
        np.minimum((image * _ENTROPY_LEVELS).astype(np.int64), _ENTROPY_LEVELS - 1).ravel(), minlength=_ENTROPY_LEVELS
    )
    shares = counts[counts > 0] / image.size
    return float(-(shares * np.log2(shares)).sum())


THUMBNAIL_PX = 64
"""The image is brought to this many pixels a side, so that the numbers do not depend on how finely it was taken."""

PADDING_GREY = 0.02
"""Five of 255 grey levels: rows and columns that stay below are padding or collimation, whose rim a JPEG file leaves a little uneven."""

LAYOUT_STATISTICS = (
    *("mean", "deviation", "skewness", "kurtosis"),
    *("dark_quantile", "median", "bright_quantile", "entropy", "black_fraction", "white_fraction"),
    *("mirror_correlation", "upside_down_correlation", "diagonal_correlation"),
    *("edge_energy", "fine_energy"),
    *("middle_minus_sides", "bottom_minus_top", "centre_minus_rim", "lungs_minus_middle", "shoulders_minus_lungs"),
)
"""What `statistics_of` gives, in order."""

CELLS_PER_SIDE = 8
"""Cells of `cells_of` along each side of a thumbnail."""
_LAYOUT_BINS = 32
_TINY = 1e-6


def thumbnail(square: np.ndarray) -> np.ndarray:
    """`square` float32 [S, S] without its black rim, squeezed to float64 [SIDE_PX, SIDE_PX]: padding and collimation do not count."""
    resized = PIL.Image.fromarray(_trim(square)).resize((THUMBNAIL_PX, THUMBNAIL_PX), PIL.Image.Resampling.BILINEAR)
    return np.clip(np.asarray(resized, np.float64), 0.0, 1.0)


def statistics_of(grey: np.ndarray) -> np.ndarray:
    """The `LAYOUT_STATISTICS` of a thumbnail, float32 [K]; finite for every picture."""
    return np.array([*_histogram(grey), *_symmetry(grey), *_texture(grey), *_layout(grey)], np.float32)


def cells_of(grey: np.ndarray) -> np.ndarray:
    """Computes mean greys of a thumbnail's cells, in units of its deviation from its mean: float32 [CELLS_PER_SIDE**2]."""
    side = THUMBNAIL_PX // CELLS_PER_SIDE
    cells = grey.reshape(CELLS_PER_SIDE, side, CELLS_PER_SIDE, side).mean(axis=(1, 3)).ravel()
    return ((cells - grey.mean()) / max(grey.std(), _TINY)).astype(np.float32)


def _trim(square: np.ndarray) -> np.ndarray:
    rows, columns = (np.flatnonzero(square.max(axis=axis) > PADDING_GREY) for axis in (1, 0))
    if rows.size < 2 or columns.size < 2:
        return np.ascontiguousarray(square, np.float32)
    return np.ascontiguousarray(square[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], np.float32)


def _histogram(grey: np.ndarray) -> tuple[float, ...]:
    """Moments, quantiles, Shannon entropy in units of its maximum, and the ends of the scale."""
    mean, deviation = grey.mean(), grey.std()
    scaled = (grey - mean) / max(deviation, _TINY)
    shares = np.histogram(grey, _LAYOUT_BINS, (0.0, 1.0))[0] / grey.size
    entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum() / np.log(_LAYOUT_BINS)
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
    fifth, third, eighth = THUMBNAIL_PX // 5, THUMBNAIL_PX // 3, THUMBNAIL_PX // 8
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


_VARIANCE_FLOOR = 1e-4
"""Variance of a direction in which the points do not differ, as a share of the mean variance: such a direction shows strange images."""


class Packed(Section):
    """An array of float32 as JSON takes it: its shape, and its numbers in base 64, little-endian, row by row."""

    shape: tuple[int, ...]
    float32: str

    @classmethod
    def of(cls, array: np.ndarray) -> Packed:
        """`array`, rounded to float32."""
        return cls(shape=array.shape, float32=base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode())

    @cached_property
    def array(self) -> np.ndarray:
        """float64 of `shape`."""
        return np.frombuffer(base64.b64decode(self.float32, validate=True), "<f4").astype(np.float64).reshape(self.shape)

    @model_validator(mode="after")
    def _check(self) -> Packed:
        try:
            size = len(base64.b64decode(self.float32, validate=True))
        except binascii.Error:
            raise ValueError("expected numbers in base 64") from None
        if min(self.shape, default=0) < 0 or size != 4 * prod(self.shape):
            raise ValueError(f"expected {prod(self.shape)} numbers of 4 bytes, got {size} bytes")
        return self


class Density(Section):
    """N(mean, C), in which C has the eigenvectors `axes` with `variances`, and the variance `rest` in all other directions."""

    mean: Packed
    """[D]"""
    scale: Packed
    """[D], by which points are divided first."""
    axes: Packed
    """[Q, D], orthonormal rows, of the scaled points."""
    variances: Packed
    """[Q]"""
    rest: Positive

    def distance(self, points: np.ndarray) -> np.ndarray:
        """Squared Mahalanobis distance of each of `points` [N, D] from the mean, divided by D: float64 [N], about 1 for a draw."""
        centred = (np.asarray(points, np.float64) - self.mean.array) / self.scale.array
        along = centred @ self.axes.array.T
        outside = np.maximum((centred**2).sum(axis=1) - (along**2).sum(axis=1), 0.0)
        return ((along**2 / self.variances.array).sum(axis=1) + outside / self.rest) / self.mean.shape[0]


def fit_density(points: np.ndarray, *, components: int, standardize: bool) -> Density:
    """The most likely `Density` of `points` [M, D] with at most `components` axes of their own variance.

    Tipping & Bishop 1999, section 3.2: the axes are the first principal components, `rest` the mean of the other eigenvalues. With as
    many axes as dimensions it is the Gaussian with the sample's covariance; with fewer it shrinks the small eigenvalues to their mean,
    so that fewer points than dimensions are enough.

    Args:
        points: at least two.
        components: at most a quarter of M axes are taken, whatever is asked.
        standardize: divide each dimension by its deviation, for points whose dimensions have different units.

    Raises:
        DataError: fewer than two points.
    """
    points = np.asarray(points, np.float64)
    if len(points) < 2:
        raise DataError(f"a density needs at least two points, got {len(points)}")
    deviation = points.std(axis=0)
    scale = np.maximum(deviation, deviation.mean() * 1e-3 + 1e-12) if standardize else np.ones(points.shape[1])
    mean = points.mean(axis=0)
    _, singular, axes = np.linalg.svd((points - mean) / scale, full_matrices=False)
    eigenvalues = singular**2 / len(points)
    count = min(components, max(1, len(points) // 4), len(axes))
    floor = _VARIANCE_FLOOR * max(eigenvalues.sum() / points.shape[1], 1e-12)
    others = points.shape[1] - count
    rest = eigenvalues[count:].sum() / others if others else eigenvalues.mean()
    return Density(
        mean=Packed.of(mean),
        scale=Packed.of(scale),
        axes=Packed.of(axes[:count]),
        variances=Packed.of(np.maximum(eigenvalues[:count], floor)),
        rest=float(max(rest, floor)),
    )
