"""Metrics of a set of images from its statistics.

The primary view is pneumonia against normal. A metric that is undefined (no image, one class only, nothing called positive) is
NaN, never a number that could be mistaken for a result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.evaluation.curves import auroc, average_precision, calibration_error, ratio
from common.evaluation.statistics import FIXED_POINT, LOG_LOSS, SQUARED_ERROR, Statistics

Counts = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Tally:
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
    def of(cls, statistics: Statistics, threshold: float) -> Tally:
        """The counts of `statistics`, an image being called pneumonia if its score >= `threshold`."""
        first = statistics.grid.first_positive(threshold)
        return cls(list(statistics.histograms), first, statistics.confusion, statistics.calibration, statistics.losses)


def metrics(statistics: Statistics, threshold: float) -> dict[str, float]:
    """All metrics of `statistics`, an image being called pneumonia if its P(pneumonia) >= `threshold`.

    Returns:
        Counts `n`, `n_positive`, `tn`, `fp`, `fn`, `tp`; `threshold`; and the metrics of `metrics_of`. On a fixed grid the images
        of a bin that the threshold cuts are counted as called normal (see `ScoreGrid.first_positive`).
    """
    tally = Tally.of(statistics, threshold)
    tn, fp, fn, tp = (int(count) for count in _called(tally.histograms[0], tally.first_positive))
    counts = {"n": statistics.n, "n_positive": statistics.n_positive, "tn": tn, "fp": fp, "fn": fn, "tp": tp}
    return {**counts, "threshold": float(threshold), **{name: float(value) for name, value in metrics_of(tally).items()}}


def metrics_of(tally: Tally) -> dict[str, Reals]:
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


def _of_probabilities(tally: Tally) -> dict[str, Reals]:
    mean_losses = ratio(tally.losses / FIXED_POINT, tally.confusion.sum(axis=(-2, -1))[..., None])
    return {
        "brier": mean_losses[..., SQUARED_ERROR],
        "ece": calibration_error(tally.calibration),
        "log_loss": mean_losses[..., LOG_LOSS],
    }


def _of_classes(tally: Tally) -> dict[str, Reals]:
    """With more than two classes: accuracy of the most probable class, and each class against the rest."""
    classes = tally.confusion.shape[-1]
    if classes == 2:
        return {}
    areas = [auroc(histogram[..., 0, :], histogram[..., 1, :]) for histogram in tally.histograms]
    hits = np.trace(tally.confusion, axis1=-2, axis2=-1)
    return {
        "accuracy_three_class": ratio(hits, tally.confusion.sum(axis=(-2, -1))),
        "auroc_macro": np.mean(areas, axis=0),
        **{f"auroc_class_{k}": area for k, area in enumerate(areas)},
    }
