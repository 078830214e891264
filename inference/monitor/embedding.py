"""The embedding of a network's features that drift is measured on: a few principal components, and how far an image lies off them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pneumofed.inference.monitor.two_sample import median_distance, rbf

Floats = npt.NDArray[np.float64]

COMPONENTS = 32


@dataclass(frozen=True)
class Embedding:
    """A map from features to E numbers, fitted on a part of the reference that no test uses, so that every test stays exact.

    Attributes:
        mean: float64 [D].
        axes: float64 [E - 1, D], orthonormal, those of largest variance first.
        rows: float64 [F, E], the part that it was fitted on, mapped.
        bandwidth: of the RBF kernel, the median distance of `rows`.
    """

    mean: Floats
    axes: Floats
    rows: Floats
    bandwidth: float

    @classmethod
    def fit(cls, features: Floats) -> Embedding:
        """Fits the map to `features` [F, D]."""
        mean = features.mean(axis=0)
        axes = np.linalg.svd(features - mean, full_matrices=False)[2][:COMPONENTS]
        axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])[:, None]
        rows = _map(features, mean, axes)
        return cls(mean, axes, rows, median_distance(rows))

    def map(self, features: npt.ArrayLike) -> Floats:
        """Maps `features` [N, D] to float64 [N, E]: coordinates on the axes, then the length of what they leave out."""
        return _map(np.atleast_2d(np.asarray(features, np.float64)), self.mean, self.axes)

    def likeness(self, rows: Floats) -> Floats:
        """float64 [N] in (0, 1]: mean kernel value between each of `rows` [N, E] and the rows of the fit; low where an image is unusual."""
        return rbf(rows, self.rows, self.bandwidth).mean(axis=1)


def _map(features: Floats, mean: Floats, axes: Floats) -> Floats:
    centred = features - mean
    coordinates = centred @ axes.T
    rest = np.square(centred).sum(axis=1) - np.square(coordinates).sum(axis=1)
    return np.concatenate([coordinates, np.sqrt(np.maximum(rest, 0.0))[:, None]], axis=1)
