"""Rows of one examination together: what a worklist asks of a DICOM study."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from client.predict.rows import Row


@dataclass
class Study:
    """The images of one Study Instance UID. The finding is that of the image with the highest probability: one is enough."""

    study: str
    images: int = 0
    judged: int = 0
    finding: str = ""
    probability: float | None = None
    instance: str = ""

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass
class Tally:
    """Counts of all rows, and their studies; memory grows with the number of studies, not of images.

    Attributes:
        statuses: rows by status.
        findings: judged rows by finding.
        studies: by Study Instance UID.
    """

    statuses: dict[str, int] = field(default_factory=lambda: {"judged": 0, "cannot_judge": 0, "unreadable": 0})
    findings: dict[str, int] = field(default_factory=lambda: {"pneumonia": 0, "normal": 0})
    studies: dict[str, Study] = field(default_factory=dict)

    @property
    def files(self) -> int:
        return sum(self.statuses.values())

    def add(self, row: Row) -> None:
        """Counts `row`."""
        self.statuses[row.status] += 1
        if row.finding:
            self.findings[row.finding] += 1
        if row.study:
            self._add_to_study(self.studies.setdefault(row.study, Study(row.study)), row)

    def _add_to_study(self, study: Study, row: Row) -> None:
        study.images += 1
        study.judged += row.status == "judged"
        if row.probability is not None and (study.probability is None or row.probability > study.probability):
            study.probability, study.finding, study.instance = row.probability, row.finding, row.instance

    def to_json(self) -> dict[str, Any]:
        """The counts, as plain JSON values."""
        return {"files": self.files, **self.statuses, "findings": dict(self.findings), "studies": len(self.studies)}
