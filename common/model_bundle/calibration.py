"""Calibrated probabilities: logit p = slope * s + intercept, where s is the logit of the network's own P(pneumonia).

With intercept 0 this is temperature scaling (Guo et al. 2017, section 4.2) with temperature 1 / slope; with one it is Platt's scaling
of s (Platt 1999, section 2), which also corrects a wrong prevalence. Either is monotone: no ranking and no decision changes. Both need
of the images only how many of each class have which score, which is what the hospitals' statistics hold.

The bias is fitted to the hospitals that took part, with their prevalence; elsewhere it can do harm, while a temperature cannot turn a
verdict of one half. Hence probabilities are those of the temperature, and their interval spans both.

With more than two classes this line is that of all classes but normal together, which the decision is made on. How these share its
probability is calibrated one against the rest: each has a line of its own for the logit of its own probability, fitted likewise on the
counts of its two-class view, and the calibrated probabilities are made to add up (Zadrozny and Elkan 2002, KDD, section 4). The one
temperature of Guo et al. for all classes would need each image's logits together, and these stay at the hospitals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logit, logsumexp

from pneumofed.common.config.experiment import Positive, Section

Reals = npt.NDArray[np.float64]

Method = Literal["none", "temperature", "temperature_and_bias"]
Z_95 = 1.959963984540054  # the 97.5 % point of the normal distribution
SLOPE_LIMITS = (1 / 50, 50.0)
"""Where classes are separated without a single error the likelihood has no maximum; the slope stops here."""
LEAST_OF_EACH_CLASS = 10
"""Fewer validation images of a class cannot fit even one number."""


class Line(Section):
    """One fit: logit p = slope * s + intercept, with the covariance of the two."""

    slope: Positive
    intercept: float = 0.0
    covariance: tuple[float, float, float]
    """Variance of the slope, covariance, variance of the intercept; already times the design effect."""

    def band(self, scores: Reals) -> tuple[Reals, Reals]:
        """(low, high) of the logit of p with 95 % confidence, by the delta method."""
        slope, both, intercept = self.covariance
        half = Z_95 * np.sqrt(np.maximum(slope * scores**2 + 2 * both * scores + intercept, 0.0))
        middle = self.slope * scores + self.intercept
        return middle - half, middle + half


class ClassLine(Section):
    """Of one class but normal: logit of its calibrated probability = slope * logit of the network's own + intercept."""

    slope: Positive = 1.0
    intercept: float = 0.0
    positives: Annotated[int, Field(ge=0)] = 0
    """Images of the class that it was fitted on; 0 where they were too few, and the network's own probability stands."""


class Calibration(Section):
    """The fitted line, what it was fitted on, and how well that determines it."""

    method: Method = "none"
    slope: Positive = 1.0
    intercept: float = 0.0
    lines: tuple[Line, ...] = ()
    """The fits that the interval spans: this one, and for a temperature also the one with a bias."""
    design_effect: Annotated[float, Field(ge=1.0)] = 1.0
    """How many images count as one, since images of one patient are alike."""
    fitted_on: str = ""
    """In words, for the card."""
    images: Annotated[int, Field(ge=0)] = 0
    positives: Annotated[int, Field(ge=0)] = 0
    class_lines: tuple[ClassLine, ...] = ()
    """Of more than two classes, one for each but normal, in their order; empty where the network's own shares stand."""

    @model_serializer(mode="wrap")
    def _leave_out_class_lines(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = write(self)
        if not self.class_lines:  # a bundle of two classes is written as before
            values.pop("class_lines", None)
        return values

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

        The lowest and the highest end of the 95 % bands of `lines`. Guaranteed in large samples for patients like those that the
        calibration was fitted on, if a line with a bias is the right shape. It says how well those images determine the
        probability; it says nothing of other populations. Uncalibrated it is (0, 1): nothing is known.
        """
        s = np.asarray(scores, np.float64)
        if not self.lines:
            return np.zeros_like(s), np.ones_like(s)
        bands = [line.band(s) for line in self.lines]
        low, high = np.min([low for low, _ in bands], axis=0), np.max([high for _, high in bands], axis=0)
        return np.asarray(expit(low)), np.asarray(expit(high))

    def class_probabilities(self, logits: npt.ArrayLike) -> Reals:
        """float64 [N, C] of logits [N, C]: class 0 is 1 - P(pneumonia), the others share P(pneumonia) in proportion to their calibrated
        probabilities against the rest, or as the network does where there are no `class_lines`."""
        z = np.asarray(logits, np.float64)
        p = self.probability(pneumonia_score(z))[:, None]
        weights = z[:, 1:]
        if self.class_lines:
            slopes, intercepts = (np.array([getattr(line, name) for line in self.class_lines]) for name in ("slope", "intercept"))
            weights = log_expit(slopes * class_scores(z) + intercepts)
        shares = np.exp(weights - logsumexp(weights, axis=1, keepdims=True))
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


def class_scores(logits: npt.ArrayLike) -> Reals:
    """The logit of each class's own probability but normal's, float64 [N, C - 1], of logits [N, C]."""
    z = np.asarray(logits, np.float64)
    others = [np.delete(z, k, axis=1) for k in range(1, z.shape[1])]
    return np.stack([z[:, k + 1] - logsumexp(rest, axis=1) for k, rest in enumerate(others)], axis=1)


def fit_class_lines(
    views: Sequence[tuple[Reals, Reals, Reals]], method: Method, design_effect: float = 1.0
) -> tuple[ClassLine, ...]:
    """Fits the line of each class but normal; the network's own where a class has fewer than `LEAST_OF_EACH_CLASS` images.

    Args:
        views: (logits of the class's own probability [B], images of other classes [B], images of the class [B]), one a class.
        method: `temperature`, or `temperature_and_bias`.
        design_effect: how many images count as one.
    """
    fits = [fit_calibration(*view, method, fitted_on="", design_effect=design_effect) for view in views]
    return tuple(ClassLine(slope=fit.slope, intercept=fit.intercept, positives=fit.positives) for fit in fits)


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

    methods: tuple[Method, ...] = ("temperature", "temperature_and_bias") if method == "temperature" else (method,)
    lines = tuple(
        _fit_line(scores, negatives, positives, with_bias=one != "temperature", effect=design_effect) for one in methods
    )
    return Calibration(
        method=method,
        slope=lines[0].slope,
        intercept=lines[0].intercept,
        lines=lines,
        design_effect=design_effect,
        fitted_on=fitted_on,
        images=n,
        positives=n_positive,
    )


def _fit_line(scores: Reals, negatives: Reals, positives: Reals, *, with_bias: bool, effect: float) -> Line:
    counts = negatives + positives

    def loss(parameters: Reals) -> tuple[float, Reals]:
        """Negative log-likelihood and its gradient; the slope is exp(parameters[0]), so that it stays positive."""
        z = math.exp(parameters[0]) * scores + (parameters[1] if with_bias else 0.0)
        value = (positives * np.logaddexp(0.0, -z) + negatives * np.logaddexp(0.0, z)).sum()
        residual = counts * expit(z) - positives
        gradient = np.array([(residual * scores).sum() * math.exp(parameters[0]), residual.sum()])
        return float(value) / counts.sum(), gradient[: len(parameters)] / counts.sum()

    size = 2 if with_bias else 1
    limits = [tuple(math.log(limit) for limit in SLOPE_LIMITS), (-20.0, 20.0)][:size]
    found = minimize(loss, np.zeros(size), jac=True, method="L-BFGS-B", bounds=limits, options={"ftol": 1e-14, "gtol": 1e-10}).x
    slope, intercept = math.exp(found[0]), float(found[1]) if with_bias else 0.0
    return Line(slope=slope, intercept=intercept, covariance=_covariance(scores, counts, slope, intercept, size, effect))


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
