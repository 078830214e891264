"""Statistics of two samples: tests of one day against the reference, and the share of pneumonia without labels.

`compare_values` and `compare_rows` test scalars and embeddings, `holm` corrects for the number of tests. `estimate_prevalence` is
black-box shift estimation (Lipton, Wang & Smola 2018). `Embedding` maps a network's features to the rows that are compared: a few
principal components, and how far an image lies off them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist, pdist
from scipy.special import kolmogorov

Floats = npt.NDArray[np.float64]

PERMUTATIONS = 999
EXCEEDANCES = 20
DECILE_BINS = 10

NORMAL_QUANTILE_975 = 1.959963984540054
_LEAST_SEPARATION = 0.05

COMPONENTS = 32


def compare_values(reference: Floats, found: Floats) -> float:
    """Computes the p-value of the two-sample Kolmogorov-Smirnov test; with ties it is larger than it need be.

    From the limit law with Stephens' correction for small samples (Stephens 1970; Press et al. 2007, "Numerical Recipes", section
    14.3.3), which is within a few per cent of the exact p-value from eight values on.

    Args:
        reference: float64 [N], N at least 1.
        found: float64 [M], M at least 1.
    """
    both = np.concatenate([reference, found])
    below = [np.searchsorted(np.sort(values), both, side="right") / len(values) for values in (reference, found)]
    root = np.sqrt(len(reference) * len(found) / len(both))
    return float(kolmogorov((root + 0.12 + 0.11 / root) * np.abs(below[0] - below[1]).max()))


def median_distance(rows: Floats) -> float:
    """Computes the median Euclidean distance between rows [N, E], the usual bandwidth of an RBF kernel (Gretton et al. 2012, section 8)."""
    distances = pdist(rows[:500])
    return float(np.median(distances[distances > 0])) if np.any(distances > 0) else 1.0


def rbf(a: Floats, b: Floats, bandwidth: float) -> Floats:
    """Computes the RBF kernel exp(-|a - b|^2 / (2 bandwidth^2)) of each pair of rows, float64 [N, M].

    Args:
        a: float64 [N, E].
        b: float64 [M, E].
        bandwidth: above 0, in units of the rows; usually `median_distance`.
    """
    return np.exp(-cdist(a, b, "sqeuclidean") / (2.0 * bandwidth**2))


def compare_rows(reference: Floats, found: Floats, bandwidth: float, rng: np.random.Generator) -> float:
    """Computes the p-value of the kernel two-sample test (maximum mean discrepancy, Gretton et al. 2012, equation 5) by permutation.

    Exact for exchangeable rows at any size. Permutations end early after `EXCEEDANCES` of them were as extreme, which keeps the
    p-value valid (Besag & Clifford 1991, "Sequential Monte Carlo p-values"); the smallest is 1 / (`PERMUTATIONS` + 1).

    Args:
        reference: float64 [N, E].
        found: float64 [M, E]. Time and memory grow with (N + M)^2.
        bandwidth: of the RBF kernel; must not depend on `found`, or the test is not exact.
        rng: draws the permutations.
    """
    rows = np.concatenate([reference, found])
    kernel, n, m = rbf(rows, rows, bandwidth), len(found), len(reference)
    weights = np.where(np.arange(n + m) < m, -1.0 / m, 1.0 / n)
    observed = weights @ kernel @ weights
    exceeded = drawn = 0
    while drawn < PERMUTATIONS:
        size = min(111, PERMUTATIONS - drawn)
        permuted = rng.permuted(np.tile(weights, (size, 1)), axis=1)
        found_or_more = np.cumsum(np.einsum("bi,bi->b", permuted @ kernel, permuted) >= observed * (1.0 - 1e-9))
        if exceeded + found_or_more[-1] >= EXCEEDANCES:
            return EXCEEDANCES / (drawn + 1 + int(np.argmax(exceeded + found_or_more >= EXCEEDANCES)))
        exceeded, drawn = exceeded + int(found_or_more[-1]), drawn + size
    return (exceeded + 1) / (PERMUTATIONS + 1)


def holm(p_values: Sequence[float]) -> Floats:
    """Adjusts p-values by Holm 1979, float64 [N]: under any dependence, calling those up to a leaves a chance of a false one of a."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def decile_edges(values: Floats) -> Floats:
    """Computes the inner edges, float64 [9], of ten bins that hold equal parts of `values`."""
    return np.quantile(values, np.arange(1, DECILE_BINS) / DECILE_BINS)


def bin_counts(values: Floats, edges: Floats) -> npt.NDArray[np.int64]:
    """Counts the values in each bin, int64 [B]; a value on an edge belongs to the bin above.

    Args:
        values: float64 [N].
        edges: float64 [B - 1], the inner edges, not decreasing; the first and the last bin have no outer edge.
    """
    return np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1).astype(np.int64)


@dataclass(frozen=True)
class Prevalence:
    """An estimated share with its 95 % interval, all within [0, 1]."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Separation:
    """What the model's score does in each class of the reference: enough to turn a mean score into a share.

    Attributes:
        normal, pneumonia: mean probability in each class.
        normal_error, pneumonia_error: standard errors of these means.
        prevalence: share of pneumonia in the reference.
    """

    normal: float
    pneumonia: float
    normal_error: float
    pneumonia_error: float
    prevalence: float

    @classmethod
    def of(cls, probabilities: Floats, labels: npt.NDArray[np.int64] | None) -> Separation:
        """Computes the separation of the reference from its scores.

        Args:
            probabilities: float64 [M], calibrated P(pneumonia).
            labels: int64 [M], 1 for pneumonia; without them each image counts for both classes by its calibrated probability.
        """
        chance = probabilities if labels is None else labels.astype(np.float64)
        normal, normal_error = _weighted_mean(probabilities, 1.0 - chance)
        pneumonia, pneumonia_error = _weighted_mean(probabilities, chance)
        return cls(normal, pneumonia, normal_error, pneumonia_error, float(chance.mean()))


def estimate_prevalence(mean: float, variance: float, n: int, separation: Separation) -> Prevalence | None:
    """Estimates the share q that solves `mean` = q pneumonia + (1 - q) normal, with an interval by the delta method.

    Holds if only the share has changed and not how each class looks; with the score's mean in place of the confusion matrix it is the
    soft form of the estimator, of smaller variance. None without images, or where the score does not separate the classes.

    Args:
        mean: of the calibrated probabilities of `n` images.
        variance: of one of them.
        n: number of images, which count as independent.
        separation: of the reference.
    """
    width = separation.pneumonia - separation.normal
    if n < 1 or width < _LEAST_SEPARATION:
        return None
    share = (mean - separation.normal) / width
    spread = variance / n + (share * separation.pneumonia_error) ** 2 + ((1.0 - share) * separation.normal_error) ** 2
    reach = NORMAL_QUANTILE_975 * float(np.sqrt(spread)) / width
    low, value, high = np.clip([share - reach, share, share + reach], 0.0, 1.0)
    return Prevalence(float(value), float(low), float(high))


def _weighted_mean(values: Floats, weights: Floats) -> tuple[float, float]:
    """(mean, its standard error by the delta method for a ratio)."""
    total = max(float(weights.sum()), 1e-12)
    mean = float((weights * values).sum()) / total
    return mean, float(np.sqrt((np.square(weights * (values - mean))).sum())) / total


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
