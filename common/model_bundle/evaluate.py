"""Evaluates bundles on labelled images: two of them compared, and where the patients of a hospital put the threshold of one."""

from __future__ import annotations

from datetime import datetime

import numpy as np
import numpy.typing as npt
from scipy.stats import beta

from pneumofed.common.config.choices import ThresholdPolicyName
from pneumofed.common.config.classes import classes_of, in_words, task_words
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.errors import ConfigError, DataError, EmptySiteError, PneumofedError
from pneumofed.common.evaluation.bootstrap import ConfidenceInterval, bootstrap
from pneumofed.common.evaluation.class_comparison import compare_classes
from pneumofed.common.evaluation.comparison import ModelComparison, compare_predictions
from pneumofed.common.evaluation.metrics import choose_threshold, metrics
from pneumofed.common.evaluation.paired import effective_number
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.evaluation.statistics import Statistics
from pneumofed.common.imaging.augment import to_model_input
from pneumofed.common.model_bundle.bundle import Bundle
from pneumofed.common.model_bundle.manifest import NETWORK, OperatingPoint
from pneumofed.common.model_bundle.population import MIN_JUDGED_PATIENTS, IntervalEstimate
from pneumofed.common.model_bundle.predictor import graph_inputs, open_session
from pneumofed.common.models.compute import Compute
from pneumofed.common.models.features import predict_probabilities
from pneumofed.common.ops.study_code import is_study_code
from pneumofed.common.release import SitePoint

BATCH = 64
YOUDEN_TAIL = 0.005
"""Of the interval of a rate at the threshold that Youden's index chose on the same images, so that it holds at 95 %."""


def predictions_of(bundle: Bundle, dataset: Dataset, compute: Compute) -> Predictions:
    """Predicts the images with the bundle's network, not calibrated: calibration changes no rank and no decision.

    Args:
        bundle: whose network predicts.
        dataset: at the bundle's own image size; may be empty.
        compute: device and number type.

    Raises:
        BundleError: the weights do not fit.
    """
    task, channels = bundle.manifest.task, bundle.manifest.preprocessing.in_channels
    probabilities = np.empty((0, len(classes_of(task))))
    if len(dataset):
        if is_study_code(bundle.manifest.model.name):
            probabilities = _graph_probabilities(bundle, dataset)
        else:
            probabilities = predict_probabilities(compute.place(bundle.load_network()), dataset, compute, channels, BATCH)
    return Predictions(probabilities, dataset.labels, dataset.patients, dataset.digests)


def _graph_probabilities(bundle: Bundle, dataset: Dataset) -> npt.NDArray[np.float64]:
    """By the ONNX graph: a study's own network needs code of the bundle, which nobody has agreed to run here."""
    session = open_session(bundle.read(NETWORK))
    lots = [to_model_input(dataset.pixels[start : start + BATCH]).numpy() for start in range(0, len(dataset), BATCH)]
    known = [
        None if dataset.clinical is None else dataset.clinical[start : start + BATCH] for start in range(0, len(dataset), BATCH)
    ]
    given = [graph_inputs(session, images, values) for images, values in zip(lots, known, strict=True)]
    logits = np.concatenate([session.run(["logits"], one)[0] for one in given]).astype(np.float64)
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def compare_bundles(
    old: Bundle, new: Bundle, datasets: tuple[Dataset, Dataset], compute: Compute, *, by_class: bool = False
) -> ModelComparison:
    """Compares the new model with the old one, each on the images at its own size and at its own operating point.

    Args:
        old: the bundle in use.
        new: the bundle that may replace it.
        datasets: the same images at the size of the old and of the new model.
        compute: device and number type of both.
        by_class: also each class against the rest, of more than two; what comes back is then a `ClassesComparison`.

    Raises:
        DataError: the two data sets are not of the same images.
        BundleError: weights do not fit.
    """
    if datasets[0].digests != datasets[1].digests:
        raise DataError("an image can be used at the size of one model and not at that of the other; fix or remove it")
    first, second = (predictions_of(bundle, data, compute) for bundle, data in zip((old, new), datasets, strict=True))
    thresholds = old.manifest.threshold.raw_value, new.manifest.threshold.raw_value
    if not by_class or len(new.manifest.classes) < 3:
        return compare_predictions(first, second, thresholds)
    tiny = np.finfo(np.float64).tiny
    shown = [
        bundle.manifest.calibration.class_probabilities(np.log(np.maximum(found.probabilities, tiny)))
        for bundle, found in ((old, first), (new, second))
    ]
    return compare_classes(first, second, thresholds, (shown[0], shown[1]), new.manifest.classes)


def check_comparable(old: Bundle, new: Bundle) -> None:
    """Checks that two bundles are different models of the same task.

    Args:
        old: the bundle in use.
        new: the bundle that may replace it.

    Raises:
        ConfigError: they are the same bundle, or of different tasks.
    """
    if old.digest == new.digest:
        raise ConfigError("the new bundle is the old one; give the bundle that was released last with --against")
    tasks = [task_words(bundle.manifest.task) for bundle in (new, old)]
    if tasks[0] != tasks[1]:
        raise ConfigError(f"the new model's task is {tasks[0]}, the old one's {tasks[1]}; they cannot be compared")


def choose_point(
    found: Predictions,
    bundle: Bundle,
    policy: ThresholdPolicyName | None,
    target: float | None,
    *,
    site: str,
    time: datetime,
    refused: int,
) -> SitePoint:
    """Chooses a bundle's threshold on images of a site, and says what new patients may expect at it and at the bundle's.

    Args:
        found: the network's own P(pneumonia) of each image, not calibrated.
        bundle: the model.
        policy: how the threshold is chosen; None: as the bundle's own was.
        target: sensitivity or specificity to hold; None: the bundle's.
        site: name of the hospital.
        time: of the choice.
        refused: images that could not be judged.

    Raises:
        EmptySiteError: fewer than `MIN_JUDGED_PATIENTS` patients with or without pneumonia.
        DataError: the model does not tell these patients apart, so that no threshold is of use.
    """
    counts, own = _patients_of(found), bundle.manifest.threshold
    area = bootstrap(found, own.raw_value)["auroc"] if min(counts) >= MIN_JUDGED_PATIENTS else None
    if area is None or not area["low"] > 0.5:
        raise _no_point(site, bundle, counts, area)
    policy, target = policy or own.policy, own.target if target is None else target
    raw = choose_threshold(Statistics.of(found), policy, target).value
    value = bundle.manifest.calibration.move(raw)
    return SitePoint(
        site=site,
        time=time,
        bundle=bundle.digest,
        point=OperatingPoint(value=value, policy=policy, target=target, raw_value=raw, site=site),
        images=len(found),
        patients=counts,
        refused=refused,
        auroc=IntervalEstimate(value=area["value"], low=area["low"], high=area["high"]),
        at_bundle=rates_at(found, own.raw_value),
        at_own=rates_at(found, raw, policy),
    )


def _no_point(site: str, bundle: Bundle, counts: tuple[int, int], area: ConfidenceInterval | None) -> PneumofedError:
    """Why there is none: too few patients, or a model that does not tell them apart."""
    if area is None:
        noun = in_words("pneumonia", bundle.manifest.classes)
        return EmptySiteError(
            f"{site}: {counts[0]} patients with {noun} and {counts[1]} without could be judged of those the model was not trained on; "
            f"a threshold of the site's own needs {MIN_JUDGED_PATIENTS} of each"
        )
    return DataError(
        f"{site}: the model does not tell these patients apart (AUROC {area['value']:.3f}, {area['low']:.3f} to {area['high']:.3f}): "
        "no threshold makes it of use here"
    )


def _patients_of(found: Predictions) -> tuple[int, int]:
    """How many patients have an image with pneumonia, and how many one without."""
    sick, well = ({found.patients[row] for row in np.flatnonzero(found.labels == label)} for label in (1, 0))
    return len(sick), len(well)


def rates_at(found: Predictions, threshold: float, chosen_by: ThresholdPolicyName | None = None) -> dict[str, IntervalEstimate]:
    """Computes sensitivity and specificity, each with a 95 % interval of what new patients may expect.

    That of Clopper and Pearson 1934, Biometrika 26:404, is exact for a fixed threshold, and for one that the very images put where a given
    share of them is found or spared: it is an order statistic of a rank that is fixed beforehand, and the share of new patients above the
    k-th of n has the Beta distribution that the interval is made of, whatever the scores are like (Wilks 1941, Annals of Mathematical
    Statistics 12:91). Youden's index picks the luckiest rank of all: its interval is the exact one at 99 %, and no more than that. In
    simulations (normal scores, AUROC 0.64 to 0.98, 20 to 1000 patients of each class) it held the truth in 95 % or more; that at 95 % did
    so in 86 to 99 %. Images of one patient count as one, and patients with unequally many as `effective_number` says.

    Args:
        found: of the images.
        threshold: an image is called pneumonia if its score >= threshold.
        chosen_by: how it was chosen on these images; None where it was not.
    """
    tail = YOUDEN_TAIL if chosen_by == "youden" else 0.025
    values, patients, sick = metrics(Statistics.of(found), threshold), np.array(found.patients, dtype=str), found.labels != 0
    counts = {"sensitivity": effective_number(patients[sick]), "specificity": effective_number(patients[~sick])}
    return {name: _exact(values[name], n, tail) for name, n in counts.items()}


def _exact(share: float, n: float, tail: float) -> IntervalEstimate:
    hits = share * n
    low = beta.ppf(tail, hits, n - hits + 1) if hits > 0 else 0.0
    high = beta.ppf(1.0 - tail, hits + 1, n - hits) if hits < n else 1.0
    return IntervalEstimate(value=share, low=float(low), high=float(high))
