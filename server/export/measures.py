"""Calibrating on the hospitals' validation statistics, and measuring the result on the central sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from common.data.manifest import ImageRecord
from common.evaluation.bootstrap import Bootstrap, Interval, bootstrap
from common.evaluation.metrics import metrics
from common.evaluation.predictions import Predictions
from common.evaluation.statistics import CALIBRATION_BINS, Statistics
from common.model_bundle.calibration import Calibration, Method, fit_calibration
from common.model_bundle.manifest import IntervalEstimate, Measured
from server.export.source import Source
from server.judge import bootstrap_settings
from server.records import Metrics
from server.report_numbers import approximate

SHOWN = ("auroc", "sensitivity", "specificity", "accuracy", "ece", "brier", "log_loss", "accuracy_three_class", "auroc_macro")
LEAST_IN_SUBGROUP = 20
"""Images; of fewer no metric says anything."""
AGE_GROUPS = ((0, 18), (18, 40), (40, 65), (65, 200))
"""Years, from and below; 18 is the border of paediatrics."""

NOT_KEPT = "the run kept no validation statistics"
FEDBN = (
    "under FedBN validation, and so the choice of round and threshold, is of networks with each hospital's own normalisation layers; "
    "this one has their average, which no hospital trained with"
)

Reals = npt.NDArray[np.float64]


def calibrate(source: Source, method: Method) -> Calibration:
    """The calibration on the hospitals' validation patients, whose images stayed where they are: their counts by score suffice."""
    if source.validation is None:
        return Calibration(fitted_on=f"not fitted: {FEDBN if source.experiment.strategy.name == 'fedbn' else NOT_KEPT}")
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
    """(logit in the middle of each occupied bin, normal images, images of pneumonia in it), float64 [B].

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
    """`predictions` with calibrated probabilities."""
    logits = np.log(np.maximum(predictions.probabilities, np.finfo(np.float64).tiny))
    found = calibration.class_probabilities(logits)
    return Predictions(found, predictions.labels, predictions.patients, predictions.images)


def measure_central(source: Source, calibration: Calibration | None) -> list[Measured]:
    """The run's central sets with bootstrap intervals by patient; of the network's own probabilities where `calibration` is None."""
    threshold = source.threshold if calibration is None else calibration.move(source.threshold)
    found = []
    for name, predictions in source.run.predictions.items():
        shown = predictions if calibration is None else calibrate_predictions(predictions, calibration)
        found.append(_measure(name, shown, threshold, bootstrap_settings(source.experiment, name)))
    return found


def measure_subgroups(
    source: Source, calibration: Calibration, records: Mapping[str, Mapping[str, ImageRecord]]
) -> list[Measured]:
    """The central sets by sex, age and view, where the manifests know them and enough images are of a group."""
    threshold, found = calibration.move(source.threshold), []
    for name, predictions in source.run.predictions.items():
        known = [records.get(name, {}).get(image) for image in predictions.images]
        for group, belongs in _groups(known).items():
            rows = np.flatnonzero([record is not None and belongs(record) for record in known])
            if LEAST_IN_SUBGROUP <= len(rows) < len(known):
                part = calibrate_predictions(_rows(predictions, rows), calibration)
                found.append(_measure_group(f"{name}, {group}", part, threshold, bootstrap_settings(source.experiment, name)))
    return found


def measure_validation(source: Source, calibration: Calibration) -> list[Measured]:
    """The hospitals' validation patients from their statistics; intervals take images as independent."""
    if source.validation is None or not source.validation.n:
        return []
    told = Metrics.model_validate(metrics(source.validation, source.threshold))
    estimates = {name: IntervalEstimate(value=e.value, low=e.low, high=e.high) for name, e in approximate(told).items()}
    for name, value in _proper_scores(source.validation, calibration).items():
        estimates[name] = IntervalEstimate(value=value)
    shown = {name: estimates[name] for name in SHOWN if name in estimates}
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
        metrics={metric: _estimate(found[metric]) for metric in SHOWN if metric in found},
    )


def _estimate(interval: Interval) -> IntervalEstimate:
    value, low, high = (
        float(number) if np.isfinite(number) else None for number in (interval["value"], interval["low"], interval["high"])
    )
    return IntervalEstimate(value=value, low=low, high=high)


def _groups(known: list[ImageRecord | None]) -> dict[str, Callable[[ImageRecord], bool]]:
    records = [record for record in known if record is not None]
    groups: dict[str, Callable[[ImageRecord], bool]] = {}
    for sex in sorted({record.sex for record in records if record.sex}):
        groups[f"sex {sex}"] = lambda record, sex=sex: record.sex == sex  # type: ignore[misc]
    for low, high in AGE_GROUPS:
        name = f"age {low} to {high - 1}" if high < 200 else f"age {low} and over"
        groups[name] = lambda record, low=low, high=high: record.age_years is not None and low <= record.age_years < high  # type: ignore[misc]
    for view in sorted({record.view for record in records if record.view}):
        groups[f"view {view}"] = lambda record, view=view: record.view == view  # type: ignore[misc]
    return groups


def _rows(predictions: Predictions, rows: npt.NDArray[np.int64]) -> Predictions:
    patients, images = (tuple(names[row] for row in rows) for names in (predictions.patients, predictions.images))
    return Predictions(predictions.probabilities[rows], predictions.labels[rows], patients, images)
