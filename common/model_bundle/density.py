"""A Gaussian of few parameters, fitted to few points in many dimensions: probabilistic principal components."""

from __future__ import annotations

import base64
import binascii
from functools import cached_property
from math import prod

import numpy as np
from pydantic import model_validator

from common.config import Positive, Section
from common.errors import DataError

_FLOOR = 1e-4
"""Variance of a direction in which the points do not differ, as a share of the mean variance: such a direction tells strangers."""


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
    floor = _FLOOR * max(eigenvalues.sum() / points.shape[1], 1e-12)
    others = points.shape[1] - count
    rest = eigenvalues[count:].sum() / others if others else eigenvalues.mean()
    return Density(
        mean=Packed.of(mean),
        scale=Packed.of(scale),
        axes=Packed.of(axes[:count]),
        variances=Packed.of(np.maximum(eigenvalues[:count], floor)),
        rest=float(max(rest, floor)),
    )
