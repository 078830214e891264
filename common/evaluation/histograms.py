"""How far two histograms lie apart: the stability index in common use, and the Jensen-Shannon divergence of several from all together.

Both take counts on the same bins. The monitor compares a day with the reference by them, a survey one site with the others, and a
simulation its hospitals with the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
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
