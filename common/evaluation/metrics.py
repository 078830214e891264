"""Computes metrics, curves and thresholds of a set of images from its statistics.

- `metrics` and `metrics_of`: the numbers. The primary view is pneumonia against normal.
- `auroc`, `average_precision`, `roc_curve`, `precision_recall_curve`, `reliability`: curves of score histograms and the areas under them.
  `negatives` and `positives` are int64 [..., B], images by bin of increasing score. Functions of areas take any leading axes and return one
  number for each, so that one image set and a thousand resamples share one code path.
- `choose_threshold`: a threshold on P(pneumonia), chosen on validation statistics and applied to other sets unchanged.

A metric that is undefined (no image, one class only, nothing called positive) is NaN, never a number that could be mistaken for a result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pneumofed.common.config.choices import ThresholdPolicyName
from pneumofed.common.evaluation.statistics import (
    CALIBRATION_COUNT,
    CALIBRATION_POSITIVE,
    CALIBRATION_SCORE_SUM,
    FIXED_POINT,
    LOG_LOSS,
    SQUARED_ERROR,
    Statistics,
)

Counts = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]

FALLBACK_THRESHOLD = 0.5


@dataclass(frozen=True)
class ConfusionCounts:
    """The counts that metrics are computed from, of one set of images or, with leading axes, of many at once.

    Attributes:
        histograms: K views, each [..., 2, B_k]: images by truth (negative, positive) and increasing score.
        first_positive: first bin of view 0 that is called pneumonia.
        confusion, calibration, losses: as in `Statistics`, with the same leading axes.
    """

    histograms: Sequence[Counts]
    first_positive: int
    confusion: Counts
    calibration: Counts
    losses: Counts

    @classmethod
    def of(cls, statistics: Statistics, threshold: float) -> ConfusionCounts:
        """Computes the counts of `statistics`.

        Args:
            statistics: of one set of images.
            threshold: an image is called pneumonia if its score >= threshold.
        """
        first = statistics.grid.first_positive(threshold)
        return cls(list(statistics.histograms), first, statistics.confusion, statistics.calibration, statistics.losses)


def metrics(statistics: Statistics, threshold: float) -> dict[str, float]:
    """Computes all metrics of one set of images.

    Args:
        statistics: of the images.
        threshold: an image is called pneumonia if its P(pneumonia) >= threshold.

    Returns:
        Counts `n`, `n_positive`, `tn`, `fp`, `fn`, `tp`; `threshold`; and the metrics of `metrics_of`. On a fixed grid the images
        of a bin that the threshold cuts are counted as called normal (see `ScoreGrid.first_positive`).
    """
    tally = ConfusionCounts.of(statistics, threshold)
    tn, fp, fn, tp = (int(count) for count in _called(tally.histograms[0], tally.first_positive))
    counts = {"n": statistics.n, "n_positive": statistics.n_positive, "tn": tn, "fp": fp, "fn": fn, "tp": tp}
    return {**counts, "threshold": float(threshold), **{name: float(value) for name, value in metrics_of(tally).items()}}


def metrics_of(tally: ConfusionCounts) -> dict[str, Reals]:
    """Each metric of `tally`, with its leading axes: of the scores, of the threshold, of the probabilities, of the classes."""
    negatives, positives = np.moveaxis(tally.histograms[0], -2, 0)
    return {
        "auroc": auroc(negatives, positives),
        "average_precision": average_precision(negatives, positives),
        **_of_threshold(*_called(tally.histograms[0], tally.first_positive)),
        **_of_probabilities(tally),
        **_of_classes(tally),
    }


def without_nan(value: object) -> object:
    """`value` with every NaN or infinite float in its dicts, lists and tuples turned into None, which JSON writes as null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _called(histogram: Counts, first_positive: int) -> tuple[Counts, Counts, Counts, Counts]:
    """(true negatives, false positives, false negatives, true positives) of [..., 2, B]."""
    called = histogram[..., first_positive:].sum(axis=-1)
    rest = histogram.sum(axis=-1) - called
    return rest[..., 0], called[..., 0], rest[..., 1], called[..., 1]


def _of_threshold(tn: Counts, fp: Counts, fn: Counts, tp: Counts) -> dict[str, Reals]:
    sensitivity, specificity = ratio(tp, tp + fn), ratio(tn, tn + fp)
    return {
        "accuracy": ratio(tp + tn, tp + tn + fp + fn),
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "precision": ratio(tp, tp + fp),
        "f1": np.where(tp + fn > 0, ratio(2 * tp, 2 * tp + fp + fn), np.nan),
        "mcc": _mcc(tn, fp, fn, tp),
    }


def _mcc(tn: Counts, fp: Counts, fn: Counts, tp: Counts) -> Reals:
    """Matthews correlation; NaN for one class; 0, its limit, where all are called alike (Chicco 2020, BMC Genomics 21:6)."""
    scale = np.sqrt((tp + fp) * 1.0 * (tn + fn)) * np.sqrt((tp + fn) * 1.0 * (tn + fp))
    alike = (tp + fp == 0) | (tn + fn == 0)
    one_class = (tp + fn == 0) | (tn + fp == 0)
    return np.where(one_class, np.nan, np.where(alike, 0.0, ratio(tp * 1.0 * tn - fp * 1.0 * fn, scale)))


def _of_probabilities(tally: ConfusionCounts) -> dict[str, Reals]:
    mean_losses = ratio(tally.losses / FIXED_POINT, tally.confusion.sum(axis=(-2, -1))[..., None])
    return {
        "brier": mean_losses[..., SQUARED_ERROR],
        "ece": calibration_error(tally.calibration),
        "log_loss": mean_losses[..., LOG_LOSS],
    }


def _of_classes(tally: ConfusionCounts) -> dict[str, Reals]:
    """With more than two classes: accuracy of the most probable class (under its first name), and each class against the rest.

    Sensitivity and specificity are of "k is the most probable class"; `sensitivity_macro` is the balanced accuracy of several classes
    (Brodersen et al. 2010). A mean is NaN where a class has no image.
    """
    if (classes := tally.confusion.shape[-1]) == 2:
        return {}
    areas = [auroc(histogram[..., 0, :], histogram[..., 1, :]) for histogram in tally.histograms]
    total = tally.confusion.sum(axis=(-2, -1))
    right = np.diagonal(tally.confusion, axis1=-2, axis2=-1)
    of_class, called = tally.confusion.sum(axis=-1), tally.confusion.sum(axis=-2)
    found = ratio(right, of_class)
    spared = ratio(total[..., None] - of_class - called + right, total[..., None] - of_class)
    return {
        "accuracy_three_class": ratio(right.sum(axis=-1), total),
        "auroc_macro": np.mean(areas, axis=0),
        "sensitivity_macro": found.mean(axis=-1),
        **{f"auroc_class_{k}": area for k, area in enumerate(areas)},
        **{f"sensitivity_class_{k}": found[..., k] for k in range(classes)},
        **{f"specificity_class_{k}": spared[..., k] for k in range(classes)},
    }


def ratio(numerator: npt.ArrayLike, denominator: npt.ArrayLike) -> Reals:
    """Computes `numerator / denominator` in float64, NaN where the denominator is 0.

    Args:
        numerator: of any shape.
        denominator: of a shape that broadcasts with it.
    """
    above, below = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    return np.divide(above, below, out=np.full(np.broadcast_shapes(above.shape, below.shape), np.nan), where=below != 0)


def auroc(negatives: Counts, positives: Counts) -> Reals:
    """Computes the area under the ROC curve: the chance that a positive scores above a negative, ties counting one half.

    The Mann-Whitney statistic of Hanley and McNeil 1982, Radiology 143:29, in whole numbers until the last division.

    Args:
        negatives: int64 [..., B], images by bin of increasing score.
        positives: int64 [..., B], on the same bins.

    Returns:
        float64 [...], NaN unless there are both positives and negatives.
    """
    at_or_below = np.cumsum(negatives, axis=-1)
    half_wins = (positives * (2 * at_or_below - negatives)).sum(axis=-1)
    return ratio(half_wins, 2 * positives.sum(axis=-1) * negatives.sum(axis=-1))


def average_precision(negatives: Counts, positives: Counts) -> Reals:
    """Computes the sum over thresholds of precision times the step in recall (as scikit-learn).

    Args:
        negatives: int64 [..., B], images by bin of increasing score.
        positives: int64 [..., B], on the same bins.

    Returns:
        float64 [...], NaN unless there are both classes.
    """
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
    return np.abs(calibration_gaps(calibration)).sum(axis=-1)


def calibration_gaps(calibration: Counts) -> Reals:
    """Mean score minus share of pneumonia of each bin, times its share of all images: [..., 15] of [..., 15, 3] calibration counts."""
    gaps = calibration[..., CALIBRATION_SCORE_SUM] / FIXED_POINT - calibration[..., CALIBRATION_POSITIVE]
    return ratio(gaps, calibration[..., CALIBRATION_COUNT].sum(axis=-1, keepdims=True))


def _at_or_above(counts: Counts) -> Counts:
    return np.flip(np.cumsum(np.flip(counts, axis=-1), axis=-1), axis=-1)


def _occupied(statistics: Statistics) -> Counts:
    histogram = statistics.histograms[0]
    return histogram[:, histogram.any(axis=0)]


@dataclass(frozen=True)
class ChosenThreshold:
    """A threshold and how it came about.

    Attributes:
        value: an image is called pneumonia if its score >= value. In [0, 1], or just above 1 if none is to be.
        policy: the policy asked for.
        reason_of_fallback: why `value` is 0.5 in spite of the policy; None if the policy was followed.
        sensitivity, specificity: on the validation statistics; NaN where a class is missing.
    """

    value: float
    policy: ThresholdPolicyName
    reason_of_fallback: str | None
    sensitivity: float
    specificity: float


@dataclass(frozen=True)
class _Cuts:
    """All ways to cut M occupied bins in two: cut c in 0..M calls the bins from c on positive. Arrays are [M + 1]."""

    sensitivity: npt.NDArray[np.float64]
    specificity: npt.NDArray[np.float64]
    gain: npt.NDArray[np.int64]
    """Youden's J times both class sizes: in whole numbers, so that ties are exact."""
    below: npt.NDArray[np.float64]
    """Highest score that may lie under the cut."""
    above: npt.NDArray[np.float64]
    """Lowest score that may lie over it."""


def choose_threshold(statistics: Statistics, policy: ThresholdPolicyName, target: float = 0.95) -> ChosenThreshold:
    """Chooses the threshold of `policy` on `statistics`, in the middle of the gap between the scores that it separates.

    Without images of both classes, or if `youden` finds no J above 0, it is 0.5 and `reason_of_fallback` says why.

    Args:
        statistics: of the validation images, never of the images that are then judged at the threshold.
        policy: `half`: 0.5. `youden`: highest J = sensitivity + specificity - 1 (Youden 1950, Cancer 3:32); among equals the
            widest gap, then the highest sensitivity. `sensitivity`: highest specificity of those with sensitivity >= `target`;
            among equals the highest sensitivity. `specificity`: the same with the two exchanged.
        target: sensitivity or specificity to hold, in (0, 1]; the other policies do not use it.
    """
    positive, total = statistics.n_positive, statistics.n
    if policy == "half":
        return _at_half(statistics, policy, None)
    if positive in (0, total):
        missing = "images" if total == 0 else "pneumonia" if positive == 0 else "normal images"
        return _at_half(statistics, policy, f"validation has no {missing}")
    cuts = _cuts(statistics)
    if policy == "youden" and cuts.gain.max() <= 0:
        return _at_half(statistics, policy, "no threshold is better than chance on validation")
    best = _best(cuts, policy, target)
    value = _middle(float(cuts.below[best]), float(cuts.above[best]))
    return ChosenThreshold(value, policy, None, float(cuts.sensitivity[best]), float(cuts.specificity[best]))


def _at_half(statistics: Statistics, policy: ThresholdPolicyName, reason: str | None) -> ChosenThreshold:
    at_half = metrics(statistics, FALLBACK_THRESHOLD)
    return ChosenThreshold(FALLBACK_THRESHOLD, policy, reason, at_half["sensitivity"], at_half["specificity"])


def _cuts(statistics: Statistics) -> _Cuts:
    occupied = statistics.histograms[0].any(axis=0)
    negatives, positives = np.cumsum(np.pad(statistics.histograms[0][:, occupied], ((0, 0), (1, 0))), axis=1)
    found, spared = positives[-1] - positives, negatives
    return _Cuts(
        sensitivity=ratio(found, positives[-1]),
        specificity=ratio(spared, negatives[-1]),
        gain=found * negatives[-1] + spared * positives[-1] - positives[-1] * negatives[-1],
        below=np.append(0.0, statistics.grid.upper[occupied]),
        above=np.append(statistics.grid.lower[occupied], 1.0),
    )


def _best(cuts: _Cuts, policy: ThresholdPolicyName, target: float) -> int:
    sensitivity, specificity = cuts.sensitivity, cuts.specificity
    keys: dict[str, tuple[npt.NDArray, ...]] = {  # the last key weighs most
        "youden": (sensitivity, cuts.above - cuts.below, cuts.gain),
        "sensitivity": (sensitivity, specificity, sensitivity >= target),
        "specificity": (specificity, sensitivity, specificity >= target),
    }
    return int(np.lexsort(keys[policy])[-1])


def _middle(below: float, above: float) -> float:
    """The middle of the gap; `above` where nothing lies between, and just above 1 where a score of 1 must stay under the cut."""
    middle = (below + above) / 2
    if middle > below:
        return middle
    return above if below < 1.0 else float(np.nextafter(1.0, 2.0))
