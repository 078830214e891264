"""Calibrated probabilities: logit p = slope * s + intercept, where s is the logit of the network's own P(pneumonia).

With intercept 0 this is temperature scaling (Guo et al. 2017, section 4.2) with temperature 1 / slope; with one it is Platt's scaling
of s (Platt 1999, section 2), which also mends a wrong prevalence. Either is monotone: no ranking and no decision changes. Both need
of the images only how many of each class have which score, which is what the hospitals' statistics hold.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy.optimize import minimize
from scipy.special import expit, logit, logsumexp

from common.config import Positive, Section

Reals = npt.NDArray[np.float64]

Method = Literal["none", "temperature", "temperature_and_bias"]
Z_95 = 1.959963984540054  # the 97.5 % point of the normal distribution
SLOPE_LIMITS = (1 / 50, 50.0)
"""Where classes are separated without a single error the likelihood has no maximum; the slope stops here."""
LEAST_OF_EACH_CLASS = 10
"""Fewer validation images of a class cannot fit even one number."""


class Calibration(Section):
    """The fitted line, what it was fitted on, and how well that determines it."""

    method: Method = "none"
    slope: Positive = 1.0
    intercept: float = 0.0
    covariance: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Variance of the slope, covariance, variance of the intercept; already times `design_effect`."""
    design_effect: Annotated[float, Field(ge=1.0)] = 1.0
    """How many images count as one, since images of one patient are alike."""
    fitted_on: str = ""
    """In words, for the card."""
    images: Annotated[int, Field(ge=0)] = 0
    positives: Annotated[int, Field(ge=0)] = 0

    @property
    def temperature(self) -> float:
        return 1.0 / self.slope

    @property
    def prevalence(self) -> float | None:
        """Share of pneumonia among the images that it was fitted on: the probability holds where it is about the same."""
        return self.positives / self.images if self.images else None

    def probability(self, scores: npt.ArrayLike) -> Reals:
        """Calibrated P(pneumonia) of logits `scores`; same shape."""
        return np.asarray(expit(self.slope * np.asarray(scores, np.float64) + self.intercept))

    def interval(self, scores: npt.ArrayLike) -> tuple[Reals, Reals]:
        """(low, high): where the calibrated probability of `scores` lies with 95 % confidence.

        The delta method on the logit: guaranteed in large samples for patients like those that the calibration was fitted on, if the
        line is the right shape. It tells how well those images determine the probability; it says nothing of other
        populations. Uncalibrated it is (0, 1): nothing is known.
        """
        s = np.asarray(scores, np.float64)
        if self.method == "none":
            return np.zeros_like(s), np.ones_like(s)
        slope, both, intercept = self.covariance
        half = Z_95 * np.sqrt(np.maximum(slope * s**2 + 2 * both * s + intercept, 0.0))
        middle = self.slope * s + self.intercept
        return np.asarray(expit(middle - half)), np.asarray(expit(middle + half))

    def class_probabilities(self, logits: npt.ArrayLike) -> Reals:
        """float64 [N, C] of logits [N, C]: class 0 is 1 - P(pneumonia), the others share P(pneumonia) as the network does."""
        z = np.asarray(logits, np.float64)
        p = self.probability(pneumonia_score(z))[:, None]
        shares = np.exp(z[:, 1:] - logsumexp(z[:, 1:], axis=1, keepdims=True))
        return np.concatenate([1.0 - p, p * shares], axis=1)

    def move(self, threshold: float) -> float:
        """The threshold on the calibrated probability that decides as `threshold` does on the network's own; 0 and 1 stay."""
        if not 0.0 < threshold < 1.0:
            return threshold
        return float(self.probability(logit(threshold)))


def pneumonia_score(logits: npt.ArrayLike) -> Reals:
    """The logit of P(pneumonia) = 1 - P(class 0), float64 [N], of logits [N, C]; exact also where P is next to 0 or 1."""
    z = np.asarray(logits, np.float64)
    return np.asarray(logsumexp(z[:, 1:], axis=1) - z[:, 0])


def fit_calibration(
    scores: Reals, negatives: Reals, positives: Reals, method: Method, *, fitted_on: str, design_effect: float = 1.0
) -> Calibration:
    """The calibration of highest likelihood; method `none` where a class has fewer than `LEAST_OF_EACH_CLASS` images.

    Args:
        scores: finite logits [B], one a bin or an image.
        negatives: how many normal images have each score, [B].
        positives: how many images of pneumonia, [B].
        method: `temperature`, or `temperature_and_bias`.
        fitted_on: the images in words.
        design_effect: how many images count as one.
    """
    n, n_positive = int(negatives.sum() + positives.sum()), int(positives.sum())
    if method == "none" or min(n_positive, n - n_positive) < LEAST_OF_EACH_CLASS:
        return Calibration(fitted_on=f"not fitted: too few of a class among {fitted_on}" if method != "none" else "not fitted")

    def loss(parameters: Reals) -> tuple[float, Reals]:
        """Negative log-likelihood and its gradient; the slope is exp(parameters[0]), so that it stays positive."""
        z = math.exp(parameters[0]) * scores + (parameters[1] if len(parameters) > 1 else 0.0)
        value = (positives * np.logaddexp(0.0, -z) + negatives * np.logaddexp(0.0, z)).sum()
        residual = (positives + negatives) * expit(z) - positives
        gradient = np.array([(residual * scores).sum() * math.exp(parameters[0]), residual.sum()])
        return float(value) / n, gradient[: len(parameters)] / n

    start = np.zeros(2 if method == "temperature_and_bias" else 1)
    limits = [tuple(math.log(limit) for limit in SLOPE_LIMITS), (-20.0, 20.0)][: len(start)]
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=limits, options={"ftol": 1e-14, "gtol": 1e-10}).x
    slope, intercept = math.exp(found[0]), float(found[1]) if len(found) > 1 else 0.0
    return Calibration(
        method=method,
        slope=slope,
        intercept=intercept,
        covariance=_covariance(scores, negatives + positives, slope, intercept, len(start), design_effect),
        design_effect=design_effect,
        fitted_on=fitted_on,
        images=n,
        positives=n_positive,
    )


def _covariance(
    scores: Reals, counts: Reals, slope: float, intercept: float, parameters: int, design_effect: float
) -> tuple[float, float, float]:
    """The inverse of Fisher's information of logistic regression, sum of p (1 - p) x x^T with x = (score, 1), times the effect."""
    p = expit(slope * scores + intercept)
    x = np.stack([scores, np.ones_like(scores)])[:parameters]
    inverse = np.linalg.pinv((x * (counts * p * (1.0 - p))) @ x.T) * design_effect
    if parameters == 1:
        return float(inverse[0, 0]), 0.0, 0.0
    return float(inverse[0, 0]), float(inverse[0, 1]), float(inverse[1, 1])
