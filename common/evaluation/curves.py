"""ROC, precision-recall and reliability curves of score histograms, and the areas under them.

`negatives` and `positives` are int64 [..., B], images by bin of increasing score. Functions of areas take any leading axes and
return one number for each, NaN where it is undefined, so that one image set and a thousand resamples share one code path.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.evaluation.statistics import COUNT, FIXED_POINT, POSITIVE, SCORE_SUM, Statistics

Counts = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]


def ratio(numerator: npt.ArrayLike, denominator: npt.ArrayLike) -> Reals:
    """`numerator / denominator`, NaN where the denominator is 0."""
    above, below = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    return np.divide(above, below, out=np.full(np.broadcast_shapes(above.shape, below.shape), np.nan), where=below != 0)


def auroc(negatives: Counts, positives: Counts) -> Reals:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting one half.

    The Mann-Whitney statistic of Hanley and McNeil 1982, Radiology 143:29, in whole numbers until the last division. NaN unless
    there are both positives and negatives.
    """
    at_or_below = np.cumsum(negatives, axis=-1)
    half_wins = (positives * (2 * at_or_below - negatives)).sum(axis=-1)
    return ratio(half_wins, 2 * positives.sum(axis=-1) * negatives.sum(axis=-1))


def average_precision(negatives: Counts, positives: Counts) -> Reals:
    """Sum over thresholds of precision times the step in recall (as scikit-learn). NaN unless there are both classes."""
    found, called = _at_or_above(positives), _at_or_above(negatives + positives)
    precision = np.divide(found, called, out=np.zeros(found.shape), where=called > 0)
    area = ratio((positives * precision).sum(axis=-1), positives.sum(axis=-1))
    return np.where(negatives.sum(axis=-1) > 0, area, np.nan)


def roc_curve(statistics: Statistics) -> tuple[Reals, Reals]:
    """(false, true) positive rate of P(pneumonia) by falling threshold, from (0, 0) to (1, 1); NaN for a class without images."""
    negatives, positives = _occupied(statistics)
    false, true = (np.append(0, _at_or_above(side)[::-1]) for side in (negatives, positives))
    return ratio(false, negatives.sum()), ratio(true, positives.sum())


def precision_recall_curve(statistics: Statistics) -> tuple[Reals, Reals]:
    """(recall, precision) of P(pneumonia) by falling threshold, one point a distinct score; recall is NaN without positives."""
    negatives, positives = _occupied(statistics)
    found, called = (_at_or_above(side)[::-1] for side in (positives, negatives + positives))
    return ratio(found, positives.sum()), ratio(found, called)


@dataclass(frozen=True)
class Reliability:
    """Reliability curve of P(pneumonia) over 15 equal bins, each array [15]; NaN in bins without images.

    Attributes:
        score: float64, mean score of a bin's images.
        frequency: float64, share of pneumonia among them.
        count: int64, their number.
    """

    score: Reals
    frequency: Reals
    count: Counts


def reliability(statistics: Statistics) -> Reliability:
    """The reliability curve of `statistics`."""
    count, positive, total = statistics.calibration.T
    return Reliability(ratio(total / FIXED_POINT, count), ratio(positive, count), count)


def calibration_error(calibration: Counts) -> Reals:
    """Expected calibration error of [..., 15, 3] calibration counts, in [0, 1]; NaN without images.

    The mean over images of |mean score - share of pneumonia| of their bin: Naeini et al. 2015, "Obtaining Well Calibrated
    Probabilities Using Bayesian Binning", section "Calibration Measures".
    """
    gap = np.abs(calibration[..., SCORE_SUM] / FIXED_POINT - calibration[..., POSITIVE]).sum(axis=-1)
    return ratio(gap, calibration[..., COUNT].sum(axis=-1))


def _at_or_above(counts: Counts) -> Counts:
    return np.flip(np.cumsum(np.flip(counts, axis=-1), axis=-1), axis=-1)


def _occupied(statistics: Statistics) -> Counts:
    histogram = statistics.histograms[0]
    return histogram[:, histogram.any(axis=0)]
