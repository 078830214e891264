"""Compares two models of more than two classes on the same images: each class against the rest, and the mean of their AUROCs.

`ClassesComparison` is the `ModelComparison` of all classes but normal together, with these beside it. It is made of a coordinator's own
held-out sets; a site's verdict has no classes, since of a rare one it would tell how few patients the site has.

The mean's variance is by patient: each image's structural components (DeLong et al. 1988) add up over the classes to what it moves the
mean by, these to what its patient does, and the variance is that of the sum over patients (Obuchowski 1997 for one area). It collapses
where no image is misplaced, so as for one area a second bound is computed from score limits (Newcombe 2006, method 5, combined as in Zou
and Donner 2008), and the lower one counts. The distances of the classes' limits are averaged as they are, as if all classes erred
together, which is the careful choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from pydantic import model_validator

from pneumofed.common.config.experiment import NonNegative, Section
from pneumofed.common.evaluation.comparison import (
    Areas,
    MarginOutcome,
    Margins,
    ModelComparison,
    Whole,
    area_limit,
    check_effective,
    compare_predictions,
    judge_bound,
)
from pneumofed.common.evaluation.paired import (
    Flags,
    PairedAreas,
    effective_number,
    paired_areas,
    patient_index,
    structural_components,
)
from pneumofed.common.evaluation.predictions import Predictions

AUROC_MACRO = "auroc_macro"
Reals = npt.NDArray[np.float64]


class ClassAreas(Section):
    """AUROC of one class against the rest, and the patients with it and without; one with images of both counts in each.

    `effective_patients` are as many as they count for (`effective_number`); None in records of former versions: `patients`.
    """

    area: Areas
    patients: tuple[Whole, Whole]
    effective_patients: tuple[NonNegative, NonNegative] | None = None

    @property
    def counting(self) -> tuple[float, float]:
        """Patients with the class and without, as many as they count for."""
        return self.effective_patients or self.patients

    @model_validator(mode="after")
    def _check_possible(self) -> ClassAreas:
        for effective, patients in zip(self.counting, self.patients, strict=True):
            check_effective(effective, patients)
        return self


class ClassesComparison(ModelComparison):
    """The new model against the old one on one set, also by class. Sensitivity, specificity and `auroc` are of any finding."""

    macro: Areas
    """Mean of the classes' AUROCs; not known where a class has no patient, or all have it."""
    classes: dict[str, ClassAreas]
    """By class, in the order of the task."""

    @property
    def rarest(self) -> tuple[str, int]:
        """The class with the fewest patients, and how many they are."""
        return min(((name, found.patients[0]) for name, found in self.classes.items()), key=lambda one: one[1])

    def judge(self, margins: Margins) -> dict[str, MarginOutcome]:
        """What each metric shows against its margin, the mean over classes against that of AUROC."""
        macro = self.macro.paired()
        known = not math.isnan(macro.difference)

        def bound(factor: float) -> float:
            return macro_bound(self, margins.alpha, factor) if known else -1.0

        return {**super().judge(margins), AUROC_MACRO: judge_bound(macro.difference, margins.auroc, bound)}


def compare_classes(
    old: Predictions, new: Predictions, thresholds: tuple[float, float], probabilities: tuple[Reals, Reals], names: Sequence[str]
) -> ClassesComparison:
    """Compares two models' predictions of the same images, also by class.

    Args:
        old: predictions of the model in use, not calibrated.
        new: predictions of the model that may replace it, likewise.
        thresholds: operating point of the old and of the new model, each on its own scores.
        probabilities: calibrated, [N, C] of the old and of the new model: calibration moves the shares of the classes.
        names: of the classes, C of at least 3.

    Raises:
        DataError: the two are not of the same images in the same order.
    """
    plain = compare_predictions(old, new, thresholds)
    shown = [Predictions(one, old.labels, old.patients, old.images) for one in probabilities]
    areas = [paired_areas(*(against_rest(one, k) for one in shown)) for k in range(len(names))]
    macro = _mean_area(shown, areas)
    patients = np.array(old.patients, dtype=str)
    by_class = {
        name: _class_areas(one, patients, old.labels == k) for k, (name, one) in enumerate(zip(names, areas, strict=True))
    }
    return ClassesComparison(
        **{name: getattr(plain, name) for name in ModelComparison.model_fields}, macro=_known(macro), classes=by_class
    )


def _class_areas(area: PairedAreas, patients: npt.NDArray[np.str_], sick: Flags) -> ClassAreas:
    """The areas of the class that the images `sick` [N] are of."""
    of = patients[sick], patients[~sick]
    return ClassAreas(
        area=_known(area),
        patients=(len(np.unique(of[0])), len(np.unique(of[1]))),
        effective_patients=(effective_number(of[0]), effective_number(of[1])),
    )


def macro_bound(found: ClassesComparison, alpha: float, factor: float = 1.0) -> float:
    """Computes the one-sided lower bound of the difference of the mean AUROC, new minus old, in [-1, 1].

    Args:
        found: with a mean that is known.
        alpha: one-sided error, in (0, 0.5).
        factor: the bound is computed as if there were so many times the patients, all else as observed.
    """
    z, macro = NormalDist().inv_cdf(1.0 - alpha), found.macro.paired()
    usual = macro.difference - z * math.sqrt(macro.variance / factor) if math.isfinite(macro.variance) else math.inf
    below, above = _distance(found, z, factor, upper=False), _distance(found, z, factor, upper=True)
    spread = below**2 + above**2 - 2.0 * macro.correlation * below * above
    return max(-1.0, min(usual, macro.difference - math.sqrt(max(spread, 0.0))))


def class_lower_ends(found: ClassesComparison) -> dict[str, tuple[float, float]]:
    """Computes (value, lower end of its 95 % interval) of the new model's mean AUROC, under `AUROC_MACRO`, and of each class's, under its
    name; NaN where it is not known."""
    z = NormalDist().inv_cdf(0.975)
    ends = {AUROC_MACRO: (math.nan, math.nan)}
    if found.macro.new is not None:
        low = found.macro.new - _distance(found, z, 1.0, upper=False)
        ends[AUROC_MACRO] = found.macro.new, _lower(low, found.macro.new, found.macro.var_new, z)
    for name, one in found.classes.items():
        value = one.area.new
        known = value is not None and min(one.patients) > 0
        low = area_limit(value or 0.0, *one.counting, z, upper=False) if known else math.nan
        ends[name] = (value, _lower(low, value, one.area.var_new, z)) if known and value is not None else (math.nan, math.nan)
    return ends


def _lower(limit: float, value: float, variance: float | None, z: float) -> float:
    return limit if variance is None else min(limit, value - z * math.sqrt(variance))


def _distance(found: ClassesComparison, z: float, factor: float, *, upper: bool) -> float:
    """Mean distance of the classes' score limits from their areas: of the new model downwards, of the old one upwards."""
    distances = []
    for one in found.classes.values():
        value = one.area.old if upper else one.area.new
        if value is None:
            return math.inf
        sick, well = (count * factor for count in one.counting)
        distances.append(abs(area_limit(value, sick, well, z, upper=upper) - value))
    return float(np.mean(distances))


def against_rest(predictions: Predictions, k: int) -> Predictions:
    """Makes the two-class predictions of whether an image is of class k.

    Args:
        predictions: of C classes.
        k: the class, 0 to C - 1.
    """
    own = predictions.probabilities[:, k]
    return Predictions(
        np.stack([1.0 - own, own], axis=1), (predictions.labels == k).astype(np.int64), predictions.patients, predictions.images
    )


def _mean_area(shown: Sequence[Predictions], areas: Sequence[PairedAreas]) -> PairedAreas:
    """Mean of the classes' areas of both models, and its covariance by patient."""
    old, new = (float(np.mean([getattr(one, name) for one in areas])) for name in ("old", "new"))
    if math.isnan(old) or any(math.isnan(one.covariance) for one in areas):
        return PairedAreas(old, new, math.nan, math.nan, math.nan)
    index, labels = patient_index(shown[0]), shown[0].labels
    moved = np.zeros((2, int(index.max()) + 1))
    for model, predictions in enumerate(shown):
        for k, area in enumerate(areas):
            sick, value = labels == k, (area.old, area.new)[model]
            found, spared = structural_components(predictions.probabilities[:, k], sick)
            by_image = np.where(sick, (found - value) / sick.sum(), (spared - value) / (~sick).sum())
            moved[model] += np.bincount(index, by_image, moved.shape[1]) / len(areas)
    covariance = moved.shape[1] / (moved.shape[1] - 1) * (moved @ moved.T)
    return PairedAreas(old, new, *map(float, (covariance[0, 0], covariance[1, 1], covariance[0, 1])))


def _known(areas: PairedAreas) -> Areas:
    return Areas(**{name: value if math.isfinite(value) else None for name, value in vars(areas).items()})
