"""Compares two models on the same images: metrics, their covariance, and whether the new model is not worse by more than a margin.

- `ModelComparison`: what a site may report and a release is decided on. It holds counts, differences and variances, and no image.
- `paired` has the estimates and the variances of their differences.
- `judge_areas` and `judge_rates`: non-inferiority. The new model passes if the one-sided lower confidence bound of the difference lies
  above -margin. Where several comparisons must all pass, each is made at the full level: the test that all hypotheses are rejected
  together has that level itself (intersection-union test: Berger 1982, Technometrics 24:295, theorem 1).

Two bounds are computed and the lower one counts. The first is the usual one, difference - z * standard error. It collapses where both
models make no error on few images: then nothing varies, and five images would prove anything. The second does not: score limits, for
areas those of Newcombe 2006 (Statistics in Medicine 25:559, method 5) combined for a difference as in Zou and Donner 2008 (Statistics
in Medicine 27:1693), for shares those of Tango 1998 (Statistics in Medicine 17:891), both with patients for images. Where some patients
have more images than others, few of them may decide a share, so they count as `effective_number` says and not each as one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist
from typing import Annotated

from pydantic import Field, model_validator

from pneumofed.common.config.experiment import Fraction, NonNegative, Section
from pneumofed.common.evaluation.paired import (
    PairedAreas,
    PairedRates,
    paired_areas,
    sensitivity_and_specificity,
)
from pneumofed.common.evaluation.predictions import Predictions

AUROC, SENSITIVITY, SPECIFICITY = "auroc", "sensitivity", "specificity"
Whole = Annotated[int, Field(ge=0)]
_SLACK = 1e-9
PLANNED_AREA = 0.95
"""AUROC of both models that is assumed where a class is missing, so that none can be observed."""
_BISECTION_STEPS = 60
_LARGEST_FACTOR = 1e7


class Areas(Section):
    """`PairedAreas`, None for what is not known."""

    old: Fraction | None = None
    new: Fraction | None = None
    var_old: NonNegative | None = None
    var_new: NonNegative | None = None
    covariance: float | None = None

    def paired(self) -> PairedAreas:
        return PairedAreas(*(math.nan if value is None else value for value in vars(self).values()))

    @model_validator(mode="after")
    def _check_possible(self) -> Areas:
        known = self.paired()
        if abs(known.covariance) > math.sqrt(known.var_old * known.var_new) + _SLACK:
            raise ValueError("a covariance beyond both variances")
        return self


class Rates(Section):
    """`PairedRates`, None for a variance that is not known, and for effective patients in records of former versions: all count."""

    images: Whole
    patients: Whole
    effective_patients: NonNegative | None = None
    old: Whole
    new: Whole
    gained: Whole
    lost: Whole
    variance: NonNegative | None = None

    def paired(self) -> PairedRates:
        variance = math.nan if self.variance is None else self.variance
        count = self.patients if self.effective_patients is None else self.effective_patients
        return PairedRates(**{**vars(self), "variance": variance, "effective_patients": float(count)})

    @model_validator(mode="after")
    def _check_possible(self) -> Rates:
        if self.new - self.old != self.gained - self.lost or self.lost > self.old or self.gained > self.new:
            raise ValueError("gains and losses that do not lead from the old count to the new one")
        if max(self.old, self.new, self.patients) > self.images:
            raise ValueError("more hits or patients than images")
        check_effective(self.effective_patients, self.patients)
        return self


def check_effective(effective: float | None, patients: int) -> None:
    """Checks that so many patients can count as `effective` ones, whatever their images.

    Raises:
        ValueError: they cannot.
    """
    if effective is not None and not min(patients, 1) - _SLACK <= effective <= patients + _SLACK:
        raise ValueError("effective patients that no numbers of images give")


class Margins(Section):
    """By how much a new model may be worse, and the one-sided error of each test."""

    auroc: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.02
    point: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.05
    """Of sensitivity and of specificity, each model at its own operating point."""
    alpha: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.05


class ModelComparison(Section):
    """The new model against the old one on one set of images; sensitivity is of the images with pneumonia, specificity of the others."""

    auroc: Areas
    sensitivity: Rates
    specificity: Rates

    @property
    def patients(self) -> tuple[int, int]:
        """With pneumonia, and without; a patient with images of both counts in each."""
        return self.sensitivity.patients, self.specificity.patients

    @property
    def effective_patients(self) -> tuple[float, float]:
        """The same, as many as they count for (see `effective_number`)."""
        return self.sensitivity.paired().effective_patients, self.specificity.paired().effective_patients

    @property
    def images(self) -> int:
        return self.sensitivity.images + self.specificity.images

    def judge(self, margins: Margins) -> dict[str, MarginOutcome]:
        """What each metric shows against its margin."""
        return {
            AUROC: judge_areas(self.auroc.paired(), self.effective_patients, margins.auroc, margins.alpha),
            SENSITIVITY: judge_rates(self.sensitivity.paired(), margins.point, margins.alpha),
            SPECIFICITY: judge_rates(self.specificity.paired(), margins.point, margins.alpha),
        }


def compare_predictions(old: Predictions, new: Predictions, thresholds: tuple[float, float]) -> ModelComparison:
    """Compares two models' predictions of the same images.

    Args:
        old: predictions of the model in use, its scores not calibrated or calibrated by a monotone map.
        new: predictions of the model that may replace it.
        thresholds: operating point of the old and of the new model, each on its own scores.

    Raises:
        DataError: the two are not of the same images in the same order.
    """
    areas = Areas(**{name: _known(value) for name, value in vars(paired_areas(old, new)).items()})
    found, spared = (
        Rates(**{**vars(r), "variance": _known(r.variance)}) for r in sensitivity_and_specificity(old, new, thresholds)
    )
    return ModelComparison(auroc=areas, sensitivity=found, specificity=spared)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


class NonInferiority(StrEnum):
    """What a comparison shows."""

    NOT_WORSE = "not worse"
    WORSE = "worse"
    """The observed difference itself is beyond the margin: more cases help only if they are kinder."""
    TOO_FEW = "not enough data to tell"


@dataclass(frozen=True)
class MarginOutcome:
    """One comparison against its margin.

    Attributes:
        difference: new minus old; NaN where it cannot be computed.
        lower: its one-sided lower bound; -1 where nothing is known.
        factor: how many times the patients of each class would be needed to pass, were the difference to stay as observed;
            1 where it passes, None where no number helps.
    """

    difference: float
    lower: float
    margin: float
    verdict: NonInferiority
    factor: float | None


def judge_areas(areas: PairedAreas, patients: tuple[float, float], margin: float, alpha: float) -> MarginOutcome:
    """Judges whether the new model's AUROC is not worse by more than a margin.

    Args:
        areas: of both models; NaN areas give the bound -1 and no verdict.
        patients: (with pneumonia, without), as many as they count for (`effective_number`).
        margin: largest loss of AUROC that is accepted, above 0.
        alpha: one-sided error of the test, in (0, 0.5).
    """
    known = not math.isnan(areas.difference)
    return judge_bound(areas.difference, margin, lambda factor: area_bound(areas, patients, alpha, factor) if known else -1.0)


def judge_rates(rates: PairedRates, margin: float, alpha: float) -> MarginOutcome:
    """Judges whether the new model's sensitivity or specificity is not worse by more than a margin.

    Args:
        rates: of the images of one class; without images the bound is -1.
        margin: largest loss that is accepted, as a share of the images, above 0.
        alpha: one-sided error of the test, in (0, 0.5).
    """
    return judge_bound(rates.difference, margin, lambda factor: rate_bound(rates, alpha, factor) if rates.images else -1.0)


def area_bound(areas: PairedAreas, patients: tuple[float, float], alpha: float, factor: float = 1.0) -> float:
    """Computes the one-sided lower bound of the AUROC difference, new minus old, in [-1, 1].

    Args:
        areas: of both models, not NaN; where their variances are NaN only the score limits count.
        patients: (with pneumonia, without), as many as they count for (`effective_number`); -1 is returned where a class has none.
        alpha: one-sided error, in (0, 0.5).
        factor: the bound is computed as if there were so many times the patients, all else as observed.
    """
    z, (sick, well) = _z(alpha), (count * factor for count in patients)
    if sick <= 0 or well <= 0:
        return -1.0
    usual = areas.difference - z * math.sqrt(areas.variance / factor) if math.isfinite(areas.variance) else math.inf
    below = areas.new - area_limit(areas.new, sick, well, z, upper=False)
    above = area_limit(areas.old, sick, well, z, upper=True) - areas.old
    spread = below**2 + above**2 - 2.0 * areas.correlation * below * above
    return max(-1.0, min(usual, areas.difference - math.sqrt(max(spread, 0.0))))


def area_limit(area: float, sick: float, well: float, z: float, *, upper: bool) -> float:
    """Computes the limit t of an observed area with (t - area)^2 = z^2 V(t), Newcombe 2006, method 5.

    V(t) = t (1 - t) (1 + (N* - 1) ((1 - t) / (2 - t) + t / (1 + t))) / (sick * well) with N* = (sick + well) / 2: the variance of
    Hanley and McNeil 1982, whose exponential scores make it a careful one.

    Args:
        area: observed AUROC, in [0, 1].
        sick: patients with pneumonia, above 0; need not be whole.
        well: patients without, above 0; need not be whole.
        z: quantile of the normal distribution for the wanted confidence.
        upper: the limit above `area`, else the one below it.
    """

    def excess(t: float) -> float:
        middle = (sick + well) / 2.0 - 1.0
        variance = t * (1.0 - t) * (1.0 + middle * ((1.0 - t) / (2.0 - t) + t / (1.0 + t))) / (sick * well)
        return (t - area) ** 2 - z * z * variance

    return _root(excess, area, 1.0) if upper else _root(excess, area, 0.0)


def rate_bound(rates: PairedRates, alpha: float, factor: float = 1.0) -> float:
    """Computes the one-sided lower bound of the difference of two shares, new minus old, in [-1, 1].

    Args:
        rates: where the variance is NaN only Tango's limit counts; without a patient the bound is -1.
        alpha: one-sided error, in (0, 0.5).
        factor: the bound is computed as if there were so many times the patients, all else as observed.
    """
    z, n = _z(alpha), rates.effective_patients * factor
    if n <= 0:
        return -1.0
    usual = rates.difference - z * math.sqrt(rates.variance / factor) if math.isfinite(rates.variance) else math.inf
    scale = n / rates.images
    return max(-1.0, min(usual, tango_limit(rates.gained * scale, rates.lost * scale, n, z)))


def tango_limit(gained: float, lost: float, n: float, z: float) -> float:
    """Computes the lower score limit of (gained - lost) / n for `n` pairs (Tango 1998, section 3); without any change it is -z^2 /
    (n + z^2).

    Args:
        gained: pairs that only the new model gets right; need not be whole.
        lost: pairs that only the old model gets right.
        n: all pairs, above 0.
        z: quantile of the normal distribution for the wanted confidence.
    """
    observed = (gained - lost) / n

    def excess(delta: float) -> float:
        b = (2.0 * n - gained + lost) * delta - gained - lost
        q = (math.sqrt(max(b * b + 8.0 * n * lost * delta * (1.0 - delta), 0.0)) - b) / (4.0 * n)
        variance = n * max(2.0 * q + delta * (1.0 - delta), 0.0)
        return (gained - lost - n * delta) ** 2 - z * z * variance

    return _root(excess, observed, -1.0)


def patients_needed(outcome: MarginOutcome, patients: tuple[int, int], alpha: float) -> tuple[int, int] | None:
    """Computes how many patients with pneumonia and without would be needed to pass.

    Where a class is missing so far, as many of each as two models of AUROC `PLANNED_AREA` would need.

    Args:
        outcome: of the comparison that lacks data.
        patients: (with pneumonia, without) so far.
        alpha: one-sided error of the test, in (0, 0.5).

    Returns:
        (with pneumonia, without) in all, those so far included; None where no number helps.
    """
    if math.isnan(outcome.difference) or min(patients) == 0:
        same = PairedAreas(PLANNED_AREA, PLANNED_AREA, *[math.nan] * 3)
        planned = judge_areas(same, (1, 1), outcome.margin, alpha).factor or 1.0
        return max(patients[0], math.ceil(planned)), max(patients[1], math.ceil(planned))
    if outcome.factor is None:
        return None
    return math.ceil(patients[0] * outcome.factor), math.ceil(patients[1] * outcome.factor)


def judge_bound(difference: float, margin: float, bound: Callable[[float], float]) -> MarginOutcome:
    """Judges an observed difference by its bound.

    Args:
        difference: new minus old; NaN where it is not known.
        margin: largest loss that is accepted, above 0.
        bound: one-sided lower bound of the difference for so many times the patients.
    """
    lower = bound(1.0)
    if lower > -margin:
        return MarginOutcome(difference, lower, margin, NonInferiority.NOT_WORSE, 1.0)
    if difference <= -margin:
        return MarginOutcome(difference, lower, margin, NonInferiority.WORSE, None)
    if math.isnan(difference):
        return MarginOutcome(difference, lower, margin, NonInferiority.TOO_FEW, None)
    low, high = 0.0, math.log(_LARGEST_FACTOR)
    for _ in range(_BISECTION_STEPS):
        middle = (low + high) / 2.0
        low, high = (low, middle) if bound(math.exp(middle)) > -margin else (middle, high)
    return MarginOutcome(difference, lower, margin, NonInferiority.TOO_FEW, math.exp(high))


def _root(excess: Callable[[float], float], inside: float, outside: float) -> float:
    """Where `excess`, at most 0 at `inside`, rises above 0 on the way to `outside`; `outside` if it does not."""
    for _ in range(_BISECTION_STEPS):
        middle = (inside + outside) / 2.0
        if excess(middle) > 0.0:
            outside = middle
        else:
            inside = middle
    return outside


def _z(alpha: float) -> float:
    return NormalDist().inv_cdf(1.0 - alpha)
