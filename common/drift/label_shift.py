"""The share of pneumonia among images without labels: black-box shift estimation (Lipton, Wang & Smola 2018)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

Z_95 = 1.959963984540054
_LEAST_SEPARATION = 0.05


@dataclass(frozen=True)
class Prevalence:
    """An estimated share with its 95 % interval, all within [0, 1]."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Separation:
    """What the model's score does in each class of the reference: enough to turn a mean score into a share.

    Attributes:
        normal, pneumonia: mean probability in each class.
        normal_error, pneumonia_error: standard errors of these means.
        prevalence: share of pneumonia in the reference.
    """

    normal: float
    pneumonia: float
    normal_error: float
    pneumonia_error: float
    prevalence: float

    @classmethod
    def of(cls, probabilities: Floats, labels: npt.NDArray[np.int64] | None) -> Separation:
        """Of the reference, by its labels (1 pneumonia); without them each image counts for both classes by its calibrated probability."""
        chance = probabilities if labels is None else labels.astype(np.float64)
        normal, normal_error = _weighted_mean(probabilities, 1.0 - chance)
        pneumonia, pneumonia_error = _weighted_mean(probabilities, chance)
        return cls(normal, pneumonia, normal_error, pneumonia_error, float(chance.mean()))


def estimate_prevalence(mean: float, variance: float, n: int, separation: Separation) -> Prevalence | None:
    """The share q that solves `mean` = q pneumonia + (1 - q) normal, with an interval by the delta method.

    Holds if only the share has changed and not how each class looks; with the score's mean in place of the confusion matrix it is the
    soft form of the estimator, of smaller variance. None without images, or where the score does not tell the classes apart.

    Args:
        mean: of the calibrated probabilities of `n` images.
        variance: of one of them.
        n: number of images, which count as independent.
        separation: of the reference.
    """
    width = separation.pneumonia - separation.normal
    if n < 1 or width < _LEAST_SEPARATION:
        return None
    share = (mean - separation.normal) / width
    spread = variance / n + (share * separation.pneumonia_error) ** 2 + ((1.0 - share) * separation.normal_error) ** 2
    reach = Z_95 * float(np.sqrt(spread)) / width
    low, value, high = np.clip([share - reach, share, share + reach], 0.0, 1.0)
    return Prevalence(float(value), float(low), float(high))


def _weighted_mean(values: Floats, weights: Floats) -> tuple[float, float]:
    """(mean, its standard error by the delta method for a ratio)."""
    total = max(float(weights.sum()), 1e-12)
    mean = float((weights * values).sum()) / total
    return mean, float(np.sqrt((np.square(weights * (values - mean))).sum())) / total
