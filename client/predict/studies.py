"""Results of one examination together: what a worklist asks of a DICOM study."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from client.predict.answers import FileResult


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
class PredictionSummary:
    """Counts of all files, and their studies; memory grows with the number of studies, not of images.

    Attributes:
        statuses: files by status.
        findings: judged files by decision.
        studies: by Study Instance UID.
    """

    statuses: dict[str, int] = field(default_factory=lambda: {"judged": 0, "cannot_judge": 0, "unreadable": 0})
    findings: dict[str, int] = field(default_factory=lambda: {"pneumonia": 0, "normal": 0})
    studies: dict[str, Study] = field(default_factory=dict)

    @property
    def files(self) -> int:
        return sum(self.statuses.values())

    def add(self, result: FileResult) -> None:
        """Counts one file."""
        self.statuses[result.status] += 1
        if result.prediction:
            self.findings[result.prediction.decision] += 1
        if name := result.loaded.study:
            self._add_to_study(self.studies.setdefault(name, Study(name)), result)

    def _add_to_study(self, study: Study, result: FileResult) -> None:
        study.images += 1
        found = result.prediction
        if found is None:
            return
        study.judged += 1
        if study.probability is None or found.probability > study.probability:
            study.probability, study.finding, study.instance = found.probability, found.decision, result.loaded.instance

    def to_json(self) -> dict[str, Any]:
        """The counts, as plain JSON values."""
        return {"files": self.files, **self.statuses, "findings": dict(self.findings), "studies": len(self.studies)}
