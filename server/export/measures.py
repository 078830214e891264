"""What an export measures: calibration on the hospitals' validation statistics (`calibrate`), metrics of the result on validation, central
sets and subgroups (`measure_...`), and for whom the model was judged (`measure_population`): the groups of its held-out sets, and the mix
of hospitals that trained it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from pneumofed.common.config.classes import MOST_CLASSES
from pneumofed.common.data.manifest import ImageRecord
from pneumofed.common.errors import ConfigError, counted
from pneumofed.common.evaluation.bootstrap import Bootstrap, ConfidenceInterval, bootstrap
from pneumofed.common.evaluation.class_comparison import against_rest
from pneumofed.common.evaluation.metrics import metrics
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.evaluation.statistics import CALIBRATION_BINS, Statistics
from pneumofed.common.imaging.patient_groups import AGE, KINDS, AgeGroup, PatientGroups, groups_of
from pneumofed.common.model_bundle.calibration import Calibration, Method, fit_calibration, fit_class_lines
from pneumofed.common.model_bundle.manifest import Measured
from pneumofed.common.model_bundle.population import GroupKind, IntervalEstimate, JudgedGroup, JudgedPopulation, SiteMix
from pneumofed.server.export.source import Source
from pneumofed.server.federation.central_evaluation import bootstrap_settings, find_subgroups
from pneumofed.server.report.class_results import CLASS_METRICS
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
    "sensitivity_macro",
    *(f"{metric}_class_{k}" for k in range(MOST_CLASSES) for metric in CLASS_METRICS),
)

NO_STATISTICS = "the run kept no validation statistics"
FEDBN_HAS_NO_CALIBRATION = (
    "under FedBN validation, and so the choice of round and threshold, is of networks with each hospital's own normalisation layers; "
    "this one has their average, which no hospital trained with"
)

Reals = npt.NDArray[np.float64]

SHOWN_METRICS = ("auroc", "sensitivity", "specificity")
SHARE_STEP = 20
"""Shares of hospitals are rounded to a twentieth: the bundle goes to all of them, and a count would say how large each is."""

Records = Mapping[str, Mapping[str, ImageRecord]]
StatedAges = Mapping[str, Sequence[AgeGroup]]


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
    fit = fit_calibration(
        *score_histogram(source.validation),
        method,
        fitted_on=f"{counted(source.validation.n, 'image')} of the hospitals' validation patients, who were not trained on",
        design_effect=(effect := max(1.0, source.design_effect)),
    )
    views = [score_histogram(source.validation, view) for view in range(1, len(source.validation.histograms))]
    if fit.method == "none" or not views:
        return fit
    return fit.model_copy(update={"class_lines": fit_class_lines(views, method, effect)})


def score_histogram(statistics: Statistics, view: int = 0) -> tuple[Reals, Reals, Reals]:
    """Counts images by score: (logit in the middle of each occupied bin, images that are negative, that are positive in it), float64
    [B].

    A bin of the federated grid is 0.02 wide in the logit; scores beyond its ends count as being there.

    Args:
        statistics: of the hospitals' validation patients.
        view: 0 is pneumonia, or any finding, against normal; of more than two classes k is class k against the rest.
    """
    occupied = statistics.histograms[view].any(axis=0)
    negatives, positives = statistics.histograms[view][:, occupied].astype(np.float64)
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
        measured = _measure(name, shown, threshold, bootstrap_settings(source.experiment, name))
        found.append(measured.model_copy(update={"metrics": {**measured.metrics, **_class_errors(shown)}}))
    return found


def _class_errors(shown: Predictions) -> dict[str, IntervalEstimate]:
    """Calibration error of each class's own probability, of more than two classes."""
    classes = range(shown.classes) if shown.classes > 2 and len(shown) else ()
    errors = {f"ece_class_{k}": metrics(Statistics.of(against_rest(shown, k)), 0.5)["ece"] for k in classes}
    return {name: IntervalEstimate(value=float(value)) for name, value in errors.items()}


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


def read_stated_ages(texts: Sequence[str]) -> dict[str, tuple[AgeGroup, ...]]:
    """Reads `SET=GROUP,GROUP`: the age groups of all patients of a held-out set whose images do not state them.

    Raises:
        ConfigError: a text has another form, a group has no such name, or a set stands twice.
    """
    found: dict[str, tuple[AgeGroup, ...]] = {}
    for text in texts:
        name, _, words = text.partition("=")
        groups = words.replace(" ", "").split(",")
        if not name or name in found or not set(groups) <= set(AgeGroup):
            raise ConfigError(
                f"--ages {text}: expected SET=GROUP,GROUP once for a held-out set, with groups out of "
                f"{', '.join(AgeGroup)}; e.g. test=infant,child"
            )
        found[name] = tuple(group for group in AgeGroup if group in groups)
    return found


def measure_population(source: Source, records: Records, stated: StatedAges) -> JudgedPopulation:
    """Measures each group of each held-out set at the run's threshold; calibration changes none of these numbers.

    Args:
        source: the finished run with its predictions.
        records: by set, its manifest rows by the first 16 digits of their file's SHA-256.
        stated: by set, the age groups of those of its patients whose age no row states.

    Raises:
        ConfigError: ages are stated for a set that the run was not judged on, or whose rows all state them.
    """
    groups: list[JudgedGroup] = []
    unknown = 0
    _check_sets(stated, source.run.predictions)
    for name, predictions in source.run.predictions.items():
        known = [_groups(records.get(name, {}).get(image)) for image in predictions.images]
        groups += _measure_set(name, predictions, known, source.threshold)
        without = np.flatnonzero([found.age is None for found in known]).astype(np.int64)
        if name in stated and not len(without):
            raise ConfigError(f"--ages {name}: the manifest of this set states the age of every image; leave the option out")
        if name in stated:
            groups.append(_judge_group((name, AGE, stated[name]), predictions.rows(without), source.threshold, stated=True))
        else:
            unknown += len(without)
    return JudgedPopulation(groups=tuple(groups), unknown_age=unknown, mix=_site_mix(source))


def _check_sets(stated: StatedAges, sets: Mapping[str, Predictions]) -> None:
    for name in stated:
        if name not in sets:
            raise ConfigError(
                f"--ages {name}: the run was not judged on such a set; its held-out sets: {', '.join(sets) or 'none'}"
            )


def _groups(record: ImageRecord | None) -> PatientGroups:
    return groups_of(record.age_years, record.sex, record.view) if record else PatientGroups()


def _measure_set(name: str, predictions: Predictions, known: Sequence[PatientGroups], threshold: float) -> list[JudgedGroup]:
    found = []
    of_image = [dict(groups.known()) for groups in known]
    for kind, groups in KINDS.items():
        for group in groups:
            rows = np.flatnonzero([one.get(kind) == group for one in of_image]).astype(np.int64)
            if len(rows):
                found.append(_judge_group((name, kind, (group,)), predictions.rows(rows), threshold))
    return found


def _judge_group(
    which: tuple[str, str, Sequence[str]], predictions: Predictions, threshold: float, stated: bool = False
) -> JudgedGroup:
    name, kind, groups = which
    positive = predictions.labels != 0
    counted = Metrics.model_validate(metrics(Statistics.of(predictions), threshold))
    closed = approximate(counted)
    return JudgedGroup(
        held_out=name,
        kind=cast("GroupKind", kind),
        groups=tuple(map(str, groups)),
        stated=stated,
        images=len(predictions),
        patients=len(set(predictions.patients)),
        patients_with_pneumonia=_patients(predictions, positive),
        patients_without=_patients(predictions, ~positive),
        images_with_pneumonia=int(positive.sum()),
        metrics={
            one: IntervalEstimate(value=closed[one].value, low=closed[one].low, high=closed[one].high) for one in SHOWN_METRICS
        },
    )


def _patients(predictions: Predictions, rows: npt.NDArray[np.bool_]) -> int:
    return len({patient for patient, inside in zip(predictions.patients, rows, strict=True) if inside})


def _site_mix(source: Source) -> SiteMix:
    """Under masks, or with noise on what a site reports, there are no single counts, and so no shares."""
    reports = source.run.site_reports().values()
    counts = [report.used if report.train is None else report.train for report in reports]
    total = sum(count or 0 for count in counts)
    if not total or any(count is None for count in counts):
        return SiteMix(sites=len(counts))
    shares = sorted((round(SHARE_STEP * (count or 0) / total) / SHARE_STEP for count in counts), reverse=True)
    return SiteMix(sites=len(counts), shares=tuple(shares))


def first_of_each(patients: Sequence[Hashable]) -> list[int]:
    """Finds the position of the first image of each patient, in order."""
    first = {patient: position for position, patient in reversed(list(enumerate(patients)))}
    return sorted(first.values())
