"""The data report of a party: how many images were found, used, and left out for which reason. Only counts may leave the site."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

from pneumofed.common.errors import SkipReason

K = TypeVar("K")


class DataWarning(StrEnum):
    """Something to know about images that are used all the same. The value is the sentence in the data report."""

    EMPTY_CLASS = "class without any image"
    PATIENT_FROM_FILE_NAME = "file name tells no patient; the image counts as a patient of its own"
    CONFLICTING_DUPLICATE = "same image content under another label or patient; the first was kept"
    NOT_IN_ARCHIVE = "label for an examination in which the archive has no such image"
    CACHE_IN_MEMORY = "disk full: decoded images are kept in memory and will be decoded again next time"


@dataclass(frozen=True)
class DataReport:
    """Counts of images; `used` and all of `skipped` together make `found`.

    Reports of disjoint data form a commutative monoid under `+` with `DataReport()` as its zero.

    Attributes:
        found: images that the source or manifest named.
        used: images that remain.
        skipped: images left out, by reason.
        classes: used images by class or label.
        patients: patients of the used images.
        warnings: how often each warning applies.
    """

    found: int = 0
    used: int = 0
    skipped: Counter[SkipReason] = field(default_factory=Counter)
    classes: Counter[str] = field(default_factory=Counter)
    patients: int = 0
    warnings: Counter[DataWarning] = field(default_factory=Counter)

    def __add__(self, other: DataReport) -> DataReport:
        """The report of both parties' data, which share no patient."""
        return DataReport(
            found=self.found + other.found,
            used=self.used + other.used,
            skipped=_sum(self.skipped, other.skipped),
            classes=_sum(self.classes, other.classes),
            patients=self.patients + other.patients,
            warnings=_sum(self.warnings, other.warnings),
        )

    def then(self, later: DataReport) -> DataReport:
        """Joins the reports of two steps in a row, where `later` was given what this one left (`later.found == self.used`)."""
        return DataReport(
            found=self.found,
            used=later.used,
            skipped=_sum(self.skipped, later.skipped),
            classes=later.classes,
            patients=later.patients,
            warnings=_sum(self.warnings, later.warnings),
        )

    def public(self) -> dict[str, Any]:
        """Writes what may leave the site as plain JSON values: counts and fixed sentences only."""
        return {
            "found": self.found,
            "used": self.used,
            "skipped": {reason.value: n for reason, n in sorted(self.skipped.items()) if n},
            "classes": dict(sorted(self.classes.items())),
            "patients": self.patients,
            "warnings": {warning.value: n for warning, n in sorted(self.warnings.items()) if n},
        }


def _sum(first: Counter[K], second: Counter[K]) -> Counter[K]:
    total = Counter(first)
    total.update(second)  # unlike Counter's `+`, keeps classes that count zero
    return total
