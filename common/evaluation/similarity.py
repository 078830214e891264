"""How alike two pictures are to the eye (`ssim`), and how far histograms lie apart (`stability_index`, `mean_divergence`).

Histograms are counts on the same bins: the monitor compares a day with the reference by them, a survey one site with the others, and a
simulation its hospitals with the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.ndimage import correlate1d
from scipy.spatial.distance import jensenshannon

_EMPTY_BIN = 0.5
"""Count that stands for none in the stability index, whose logarithm would be infinite."""

Histogram = npt.NDArray[np.int64] | npt.NDArray[np.float64]


def stability_index(reference: Histogram, found: Histogram) -> float:
    """Computes the population stability index of two histograms: sum of (q - p) log(q / p).

    By custom below 0.1 counts as quiet and above 0.25 as moved (Siddiqi 2006, "Credit Risk Scorecards"), but without any change it is
    about (bins - 1) (1/n + 1/m) (Yurdakul & Naranjo 2020), so with few images it says nothing: no alarm rests on it.

    Args:
        reference: int64 or float64 [B], counts p; an empty bin counts as half an image.
        found: [B], counts q on the same bins, likewise.
    """
    p, q = np.maximum(reference, _EMPTY_BIN), np.maximum(found, _EMPTY_BIN)
    p, q = p / p.sum(), q / q.sum()
    return float(((q - p) * np.log(q / p)).sum())


def mean_divergence(histograms: Sequence[Sequence[float]]) -> float:
    """Computes the mean Jensen-Shannon divergence of histograms from their sum, in bits, in [0, 1] (Lin 1991, IEEE Trans. Inf. Theory
    37(1), eq. 4.1).

    0 means that all have the same shares; each weighs alike, whatever its size, and those of nothing do not count.
    """
    counts = np.array([histogram for histogram in histograms if sum(histogram)], dtype=np.float64)
    if not counts.size:
        return 0.0
    pooled = counts.sum(axis=0)
    return float(np.mean([jensenshannon(count, pooled, base=2.0) ** 2 for count in counts]))


Images = npt.NDArray[np.float64]

WINDOW, WINDOW_SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03
"""Wang et al. 2004, section III-B: the window, its deviation in pixels, and the constants for images in [0, 1]."""


def ssim(image: Images, other: Images) -> float:
    """Computes the mean structural similarity of two images; 1 for equal ones (Wang et al. 2004, eq. 13).

    Over the windows that lie inside the image as a whole.

    Args:
        image: float64 [H, W] in [0, 1], 11 pixels a side at least.
        other: of the same shape; the measure is symmetric.
    """
    mean_a, mean_b = _smooth(image), _smooth(other)
    var_a, var_b = _smooth(image**2) - mean_a**2, _smooth(other**2) - mean_b**2
    covariance = _smooth(image * other) - mean_a * mean_b
    light = (2 * mean_a * mean_b + K1**2) / (mean_a**2 + mean_b**2 + K1**2)
    structure = (2 * covariance + K2**2) / (var_a + var_b + K2**2)
    return float((light * structure).mean())


def _smooth(image: Images) -> Images:
    """Gaussian means of the whole windows, float64 [H - 10, W - 10]."""
    reach = WINDOW // 2
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * WINDOW_SIGMA**2))
    weights /= weights.sum()
    smooth = correlate1d(correlate1d(image, weights, axis=0), weights, axis=1)
    return smooth[reach:-reach, reach:-reach]
