"""What an export measures: calibration on the hospitals' validation statistics (`calibrate`), and metrics of the result on validation,
central sets and subgroups (`measure_...`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from pneumofed.common.data.manifest import ImageRecord
from pneumofed.common.evaluation.bootstrap import Bootstrap, ConfidenceInterval, bootstrap
from pneumofed.common.evaluation.metrics import metrics
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.evaluation.statistics import CALIBRATION_BINS, Statistics
from pneumofed.common.model_bundle.calibration import Calibration, Method, fit_calibration
from pneumofed.common.model_bundle.manifest import Measured
from pneumofed.common.model_bundle.population import IntervalEstimate
from pneumofed.server.export.source import Source
from pneumofed.server.federation.central_evaluation import bootstrap_settings, find_subgroups
from pneumofed.server.report.numbers import approximate
from pneumofed.server.runs.records import Metrics

CARD_METRICS = (
    "auroc",
    "sensitivity",
    "specificity",
    "accuracy",
    "ece",
    "brier",
    "log_loss",
    "accuracy_three_class",
    "auroc_macro",
)

NO_STATISTICS = "the run kept no validation statistics"
FEDBN_HAS_NO_CALIBRATION = (
    "under FedBN validation, and so the choice of round and threshold, is of networks with each hospital's own normalisation layers; "
    "this one has their average, which no hospital trained with"
)

Reals = npt.NDArray[np.float64]


def calibrate(source: Source, method: Method) -> Calibration:
    """Fits the calibration on the hospitals' validation patients, whose images stayed where they are: their counts by score
    suffice.

    Args:
        source: the finished run; without validation statistics nothing is fitted, and the result says why.
        method: what is fitted.
    """
    if source.validation is None:
        return Calibration(
            fitted_on=f"not fitted: {FEDBN_HAS_NO_CALIBRATION if source.experiment.strategy.name == 'fedbn' else NO_STATISTICS}"
        )
    scores, negatives, positives = score_histogram(source.validation)
    return fit_calibration(
        scores,
        negatives,
        positives,
        method,
        fitted_on=f"{source.validation.n} images of the hospitals' validation patients, who were not trained on",
        design_effect=max(1.0, source.images_per_patient),
    )


def score_histogram(statistics: Statistics) -> tuple[Reals, Reals, Reals]:
    """Counts images by score: (logit in the middle of each occupied bin, normal images, images of pneumonia in it), float64
    [B].

    A bin of the federated grid is 0.02 wide in the logit; scores beyond its ends count as being there.
    """
    occupied = statistics.histograms[0].any(axis=0)
    negatives, positives = statistics.histograms[0][:, occupied].astype(np.float64)
    with np.errstate(divide="ignore"):
        lower, upper = (
            np.log(edge) - np.log1p(-edge) for edge in (statistics.grid.lower[occupied], statistics.grid.upper[occupied])
        )
    middle = np.where(np.isfinite(lower) & np.isfinite(upper), (lower + upper) / 2, np.where(np.isfinite(upper), upper, lower))
    return middle, negatives, positives


def calibrate_predictions(predictions: Predictions, calibration: Calibration) -> Predictions:
    """Replaces the probabilities by calibrated ones.

    Args:
        predictions: of the network itself.
        calibration: the one that the bundle holds.
    """
    logits = np.log(np.maximum(predictions.probabilities, np.finfo(np.float64).tiny))
    found = calibration.class_probabilities(logits)
    return Predictions(found, predictions.labels, predictions.patients, predictions.images)


def measure_central(source: Source, calibration: Calibration | None) -> list[Measured]:
    """Measures the run's central sets with bootstrap intervals by patient.

    Args:
        source: the finished run with its predictions.
        calibration: applied before measuring; None measures the network's own probabilities.
    """
    threshold = source.threshold if calibration is None else calibration.move(source.threshold)
    found = []
    for name, predictions in source.run.predictions.items():
        shown = predictions if calibration is None else calibrate_predictions(predictions, calibration)
        found.append(_measure(name, shown, threshold, bootstrap_settings(source.experiment, name)))
    return found


def measure_subgroups(
    source: Source, calibration: Calibration, records: Mapping[str, Mapping[str, ImageRecord]]
) -> list[Measured]:
    """Measures the groups of the central sets that `find_subgroups` finds.

    Args:
        source: the finished run with its predictions.
        calibration: applied before measuring.
        records: by set, its manifest rows by the first 16 digits of their file's SHA-256.
    """
    threshold, found = calibration.move(source.threshold), []
    for name, predictions in source.run.predictions.items():
        known = [records.get(name, {}).get(image) for image in predictions.images]
        for group, rows in find_subgroups(known).items():
            part = calibrate_predictions(predictions.rows(rows), calibration)
            found.append(_measure_group(f"{name}, {group}", part, threshold, bootstrap_settings(source.experiment, name)))
    return found


def measure_validation(source: Source, calibration: Calibration) -> list[Measured]:
    """Measures the hospitals' validation patients from their statistics; intervals take images as independent.

    Args:
        source: the finished run.
        calibration: applied before calibration error, Brier score and log loss are computed; the threshold's metrics do not
            depend on it.

    Returns:
        One set, or none where the run kept no validation statistics.
    """
    if source.validation is None or not source.validation.n:
        return []
    counted = Metrics.model_validate(metrics(source.validation, source.threshold))
    estimates = {name: IntervalEstimate(value=e.value, low=e.low, high=e.high) for name, e in approximate(counted).items()}
    for name, value in _proper_scores(source.validation, calibration).items():
        estimates[name] = IntervalEstimate(value=value)
    shown = {name: estimates[name] for name in CARD_METRICS if name in estimates}
    return [Measured(name="validation", images=source.validation.n, positives=source.validation.n_positive, metrics=shown)]


def _proper_scores(statistics: Statistics, calibration: Calibration) -> dict[str, float]:
    """Calibration error, Brier score and log loss of the calibrated probabilities, each bin's images at its middle."""
    scores, negatives, positives = score_histogram(statistics)
    p, n = expit(calibration.slope * scores + calibration.intercept), negatives.sum() + positives.sum()
    z = calibration.slope * scores + calibration.intercept
    bins = np.minimum((p * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    gap = np.bincount(bins, weights=(negatives + positives) * p - positives, minlength=CALIBRATION_BINS)
    return {
        "ece": float(np.abs(gap).sum() / n),
        "brier": float((negatives * p**2 + positives * (1 - p) ** 2).sum() / n),
        "log_loss": float((positives * np.logaddexp(0, -z) + negatives * np.logaddexp(0, z)).sum() / n),
    }


def _measure_group(name: str, predictions: Predictions, threshold: float, settings: Bootstrap) -> Measured:
    """As `_measure`, but the counts of a group may be so small that a bootstrap finds no width; Wilson's and Newcombe's intervals do."""
    measured = _measure(name, predictions, threshold, settings)
    closed = approximate(Metrics.model_validate(metrics(Statistics.of(predictions), threshold)))
    estimates = {
        metric: IntervalEstimate(value=e.value, low=e.low, high=e.high)
        for metric, e in closed.items()
        if metric in measured.metrics
    }
    return measured.model_copy(update={"metrics": {**measured.metrics, **estimates}})


def _measure(name: str, predictions: Predictions, threshold: float, settings: Bootstrap) -> Measured:
    found = bootstrap(predictions, threshold, settings)
    return Measured(
        name=name,
        images=len(predictions),
        positives=int((predictions.labels != 0).sum()),
        patients=len(set(predictions.patients)),
        metrics={metric: _estimate(found[metric]) for metric in CARD_METRICS if metric in found},
    )


def _estimate(interval: ConfidenceInterval) -> IntervalEstimate:
    value, low, high = (
        float(number) if np.isfinite(number) else None for number in (interval["value"], interval["low"], interval["high"])
    )
    return IntervalEstimate(value=value, low=low, high=high)
