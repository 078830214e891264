"""Poisson sampling of privacy units: which images a private step sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.config_types import PrivacyUnit
from common.privacy.randomness import RandomStream


@dataclass(frozen=True)
class UnitSampler:
    """Draws units, each on its own with probability `rate`, and of each drawn unit one image, uniformly and anew.

    A patient's whole record moves one clipped gradient at most, however many images it holds: with one image a step, adding or
    removing the patient is adding or removing one term of the sum.

    Attributes:
        rows: int64 [N], the data set's rows, unit by unit.
        counts: int64 [units], how many rows each unit has.
        rate: probability of a unit, in (0, 1].
    """

    rows: np.ndarray
    counts: np.ndarray
    rate: float

    @classmethod
    def of(cls, patients: Sequence[str], unit: PrivacyUnit, rate: float) -> UnitSampler:
        """The sampler of a data set whose image i belongs to `patients[i]`."""
        if unit == "image":
            return cls(np.arange(len(patients)), np.ones(len(patients), dtype=np.int64), rate)
        _, owner, counts = np.unique(np.asarray(patients, dtype=object).astype(str), return_inverse=True, return_counts=True)
        return cls(np.argsort(owner, kind="stable"), counts, rate)

    def draw(self, stream: RandomStream) -> np.ndarray:
        """int64: one row of each drawn unit; may be empty. As many numbers are taken from `stream` whatever is drawn."""
        drawn = stream.uniform(len(self.counts)) < self.rate
        choice = np.floor(stream.uniform(len(self.counts)) * self.counts).astype(np.int64)
        starts = np.cumsum(self.counts) - self.counts
        return self.rows[(starts + choice)[drawn]]


def split_into_lots(rows: np.ndarray, views: int, images_at_once: int) -> list[np.ndarray]:
    """`rows`, each `views` times in a row, in lots of `images_at_once` images at most, but a whole unit at least."""
    units_at_once = max(1, images_at_once // views)
    return [np.repeat(rows[start : start + units_at_once], views) for start in range(0, len(rows), units_at_once)]


def count_units(patients: Sequence[str], unit: PrivacyUnit) -> int:
    """How many units a data set holds whose image i belongs to `patients[i]`."""
    return len(patients) if unit == "image" else len(set(patients))
