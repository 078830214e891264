"""Two models compared on one party's images, in numbers that show no image: what a site may tell and a release is decided on."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, model_validator

from common.config_types import Fraction, NonNegative, Section
from common.evaluation.noninferiority import Outcome, judge_areas, judge_rates
from common.evaluation.paired import PairedAreas, PairedRates, paired_areas, sensitivity_and_specificity
from common.evaluation.predictions import Predictions

AUROC, SENSITIVITY, SPECIFICITY = "auroc", "sensitivity", "specificity"
Whole = Annotated[int, Field(ge=0)]
_SLACK = 1e-9


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
    """`PairedRates`, None for a variance that is not known."""

    images: Whole
    patients: Whole
    old: Whole
    new: Whole
    gained: Whole
    lost: Whole
    variance: NonNegative | None = None

    def paired(self) -> PairedRates:
        return PairedRates(**{**vars(self), "variance": math.nan if self.variance is None else self.variance})

    @model_validator(mode="after")
    def _check_possible(self) -> Rates:
        if self.new - self.old != self.gained - self.lost or self.lost > self.old or self.gained > self.new:
            raise ValueError("gains and losses that do not lead from the old count to the new one")
        if max(self.old, self.new, self.patients) > self.images:
            raise ValueError("more hits or patients than images")
        return self


class Margins(Section):
    """By how much a new model may be worse, and the one-sided error of each test."""

    auroc: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.02
    point: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.05
    """Of sensitivity and of specificity, each model at its own operating point."""
    alpha: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.05


class Comparison(Section):
    """The new model against the old one on one set of images; sensitivity is of the images with pneumonia, specificity of the others."""

    auroc: Areas
    sensitivity: Rates
    specificity: Rates

    @property
    def patients(self) -> tuple[int, int]:
        """With pneumonia, and without; a patient with images of both counts in each."""
        return self.sensitivity.patients, self.specificity.patients

    @property
    def images(self) -> int:
        return self.sensitivity.images + self.specificity.images

    def judge(self, margins: Margins) -> dict[str, Outcome]:
        """What each metric shows against its margin."""
        return {
            AUROC: judge_areas(self.auroc.paired(), self.patients, margins.auroc, margins.alpha),
            SENSITIVITY: judge_rates(self.sensitivity.paired(), margins.point, margins.alpha),
            SPECIFICITY: judge_rates(self.specificity.paired(), margins.point, margins.alpha),
        }


def compare(old: Predictions, new: Predictions, thresholds: tuple[float, float]) -> Comparison:
    """The comparison of two models' predictions of the same images; `thresholds` of the old and of the new one.

    Raises:
        DataError: the two are not of the same images in the same order.
    """
    areas = Areas(**{name: _known(value) for name, value in vars(paired_areas(old, new)).items()})
    found, spared = (
        Rates(**{**vars(r), "variance": _known(r.variance)}) for r in sensitivity_and_specificity(old, new, thresholds)
    )
    return Comparison(auroc=areas, sensitivity=found, specificity=spared)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
