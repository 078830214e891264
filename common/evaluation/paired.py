"""Estimates two models' AUROCs and rates of right decisions on the same images, with the variance of their differences.

Images of one patient are alike, so a patient is the unit of every variance. With one image a patient the areas' covariance is that of
DeLong, DeLong and Clarke-Pearson 1988, Biometrics 44:837.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from pneumofed.common.errors import DataError
from pneumofed.common.evaluation.predictions import Predictions

Reals = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class PairedAreas:
    """AUROC of the old and the new model on the same images.

    Attributes:
        old, new: the areas; NaN unless there are images of both classes.
        var_old, var_new, covariance: of the two areas; NaN unless both classes have images of two patients.
    """

    old: float
    new: float
    var_old: float
    var_new: float
    covariance: float

    @property
    def difference(self) -> float:
        return self.new - self.old

    @property
    def variance(self) -> float:
        """Of the difference; 0 at least, since rounding may take it below."""
        return float(np.fmax(self.var_old + self.var_new - 2.0 * self.covariance, 0.0))

    @property
    def correlation(self) -> float:
        """Of the two areas in [-1, 1]; 0 where a variance is 0 or unknown, which is the careful choice."""
        scale = np.sqrt(self.var_old * self.var_new)
        return float(np.clip(self.covariance / scale, -1.0, 1.0)) if scale > 0.0 else 0.0


@dataclass(frozen=True)
class PairedRates:
    """How many images of one class the old and the new model call rightly, each at its own threshold.

    Attributes:
        images, patients: of that class.
        effective_patients: see `effective_number`; `patients` where all have equally many images, else fewer.
        old, new: images that each model calls rightly.
        gained, lost: images that only the new, only the old model calls rightly.
        variance: of the difference of the two shares, by patient; NaN for fewer than two patients.
    """

    images: int
    patients: int
    effective_patients: float
    old: int
    new: int
    gained: int
    lost: int
    variance: float

    @property
    def difference(self) -> float:
        return (self.gained - self.lost) / self.images if self.images else float("nan")


def paired_areas(old: Predictions, new: Predictions) -> PairedAreas:
    """Computes the areas of two models' P(pneumonia), and their covariance by patient.

    The structural components come from midranks in O(n log n) (Sun and Xu 2014, IEEE Signal Processing Letters 21:1389, algorithm
    2); the covariance sums them by patient (Obuchowski 1997, Biometrics 53:567, section 3).

    Args:
        old: predictions of the one model.
        new: predictions of the other, of the same images in the same order.

    Raises:
        DataError: the two are not of the same images in the same order.
    """
    check_paired(old, new)
    sick, patients = old.labels != 0, patient_index(old)
    m, n = int(sick.sum()), int((~sick).sum())
    nothing = float("nan")
    if m == 0 or n == 0:
        return PairedAreas(nothing, nothing, nothing, nothing, nothing)
    found, spared = np.stack([np.stack(structural_components(model.scores, sick)) for model in (old, new)], axis=1)
    areas = found[:, sick].mean(axis=1)
    covariance = _covariance(found - areas[:, None], spared - areas[:, None], sick, patients)
    return PairedAreas(*map(float, (*areas, covariance[0, 0], covariance[1, 1], covariance[0, 1])))


def paired_rates(old: Flags, new: Flags, patients: npt.NDArray[np.int64]) -> PairedRates:
    """What two models get right of the same images of one class.

    The variance is that of a difference of proportions in clusters (Obuchowski 1998, Statistics in Medicine 17:1495): patients are
    drawn, images come with them.

    Args:
        old, new: whether the model calls each image rightly, [N].
        patients: the patient of each, numbered from 0.
    """
    gained, lost, n = int((new & ~old).sum()), int((old & ~new).sum()), len(old)
    known = np.unique(patients)
    variance = float("nan")
    if len(known) > 1:
        change = new.astype(np.float64) - old
        residuals = np.bincount(patients, change - change.mean())[known]
        variance = float(len(known) / (len(known) - 1) * (residuals**2).sum() / n**2)
    return PairedRates(n, len(known), effective_number(patients), int(old.sum()), int(new.sum()), gained, lost, variance)


def sensitivity_and_specificity(
    old: Predictions, new: Predictions, thresholds: tuple[float, float]
) -> tuple[PairedRates, PairedRates]:
    """Counts what each model, at its own threshold, gets right of the images with pneumonia and of those without.

    Args:
        old: predictions of the one model.
        new: predictions of the other, of the same images in the same order.
        thresholds: of the old and of the new model; an image is called pneumonia if its score >= threshold.

    Returns:
        (rates of the images with pneumonia, rates of the others).

    Raises:
        DataError: the two are not of the same images in the same order.
    """
    check_paired(old, new)
    sick, patients = old.labels != 0, patient_index(old)
    called = [model.scores >= threshold for model, threshold in zip((old, new), thresholds, strict=True)]
    found = paired_rates(called[0][sick], called[1][sick], patients[sick])
    return found, paired_rates(~called[0][~sick], ~called[1][~sick], patients[~sick])


def check_paired(old: Predictions, new: Predictions) -> None:
    """Checks that two sets of predictions are of the same images, with the same patients and labels, in the same order.

    Args:
        old: the one set.
        new: the other.

    Raises:
        DataError: they are not.
    """
    if (old.images, old.patients) != (new.images, new.patients) or not np.array_equal(old.labels, new.labels):
        raise DataError("paired comparison: expected two models' predictions of the same images in the same order, got others")


def patient_index(predictions: Predictions) -> npt.NDArray[np.int64]:
    """Numbers the patients from 0, int64 [N], one an image."""
    return np.unique(np.array(predictions.patients, dtype=str), return_inverse=True)[1].astype(np.int64)


def effective_number(patients: npt.ArrayLike) -> float:
    """Computes how many patients with equally many images each would tell as much: n^2 / sum(m_i^2) for n images, m_i of patient i (Kish
    1965, "Survey Sampling"). The mean of n images that agree within a patient has the variance of the mean of so many.

    Args:
        patients: the patient of each image, [N], as names or numbers.

    Returns:
        Exactly the number of patients where all have equally many images, else less; 0 without images.
    """
    sizes = np.unique(np.asarray(patients), return_counts=True)[1]
    return float(sizes.sum() ** 2 / np.square(sizes).sum()) if len(sizes) else 0.0


def structural_components(scores: Reals, sick: Flags) -> tuple[Reals, Reals]:
    """Computes for each image with pneumonia the share of the others that score below it, for each of the others the share with
    pneumonia that score above; ties count one half (Sun and Xu 2014, algorithm 2). Both are [N], 0 for images of the other class.

    Args:
        scores: float64 [N].
        sick: which images have pneumonia, [N]; there are both kinds.
    """
    m, n = sick.sum(), (~sick).sum()
    found, spared = np.zeros(len(scores)), np.zeros(len(scores))
    together = rankdata(scores)
    found[sick] = (together[sick] - rankdata(scores[sick])) / n
    spared[~sick] = 1.0 - (together[~sick] - rankdata(scores[~sick])) / m
    return found, spared


def _covariance(found: Reals, spared: Reals, sick: Flags, patients: npt.NDArray[np.int64]) -> Reals:
    """[2, 2] covariance of the areas of two models, whose centred components are [2, N] each."""
    m, n, count = sick.sum(), (~sick).sum(), int(patients.max()) + 1
    with_sick, with_well = len(np.unique(patients[sick])), len(np.unique(patients[~sick]))
    if min(with_sick, with_well) < 2:
        return np.full((2, 2), np.nan)
    x = np.stack([np.bincount(patients[sick], row[sick], count) for row in found])
    y = np.stack([np.bincount(patients[~sick], row[~sick], count) for row in spared])
    cross = count / (count - 1) * (x @ y.T)
    return (
        with_sick / (with_sick - 1) * (x @ x.T) / m**2
        + with_well / (with_well - 1) * (y @ y.T) / n**2
        + (cross + cross.T) / (m * n)
    )
