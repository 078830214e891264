"""Two bundles on the same images."""

from __future__ import annotations

import numpy as np

from pneumofed.common.data.dataset import Dataset
from pneumofed.common.data.manifest import CLASSES
from pneumofed.common.errors import ConfigError, DataError
from pneumofed.common.evaluation.comparison import ModelComparison, compare_predictions
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.model_bundle.bundle import Bundle
from pneumofed.common.models.compute import Compute
from pneumofed.common.models.features import predict_probabilities

BATCH = 64


def predictions_of(bundle: Bundle, dataset: Dataset, compute: Compute) -> Predictions:
    """What the bundle's network says of the images, which have its size, not calibrated: calibration changes no rank and no decision.

    Raises:
        BundleError: the weights do not fit.
    """
    task, channels = bundle.manifest.task, bundle.manifest.preprocessing.in_channels
    probabilities = np.empty((0, len(CLASSES[task])))
    if len(dataset):
        probabilities = predict_probabilities(compute.place(bundle.load_network()), dataset, compute, channels, BATCH)
    return Predictions(probabilities, dataset.labels, dataset.patients, dataset.digests)


def compare_bundles(old: Bundle, new: Bundle, datasets: tuple[Dataset, Dataset], compute: Compute) -> ModelComparison:
    """The new model against the old one, each on the images at its own size and at its own operating point.

    Raises:
        DataError: the two data sets are not of the same images.
        BundleError: weights do not fit.
    """
    if datasets[0].digests != datasets[1].digests:
        raise DataError("an image can be used at the size of one model and not at that of the other; mend or remove it")
    first, second = (predictions_of(bundle, data, compute) for bundle, data in zip((old, new), datasets, strict=True))
    return compare_predictions(first, second, (old.manifest.threshold.raw_value, new.manifest.threshold.raw_value))


def check_comparable(old: Bundle, new: Bundle) -> None:
    """Raises ConfigError unless the two are different models of the same task."""
    if old.digest == new.digest:
        raise ConfigError("the new bundle is the old one; give the bundle that was released last with --against")
    if old.manifest.task != new.manifest.task:
        raise ConfigError(
            f"the new model's task is {new.manifest.task}, the old one's {old.manifest.task}; they cannot be compared"
        )
