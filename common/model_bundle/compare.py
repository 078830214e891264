"""Compares two bundles on the same images."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pneumofed.common.config.classes import classes_of, task_words
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.errors import ConfigError, DataError
from pneumofed.common.evaluation.class_comparison import compare_classes
from pneumofed.common.evaluation.comparison import ModelComparison, compare_predictions
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.imaging.augment import to_model_input
from pneumofed.common.model_bundle.bundle import Bundle
from pneumofed.common.model_bundle.manifest import NETWORK
from pneumofed.common.model_bundle.predictor import graph_inputs, open_session
from pneumofed.common.models.compute import Compute
from pneumofed.common.models.features import predict_probabilities
from pneumofed.common.ops.study_code import is_study_code

BATCH = 64


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
