"""Answers as rows of a stable schema, for scripts: what CSV and JSON hold. See docs/predict.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from client.predict.answers import Answer
from common.model_bundle.manifest import BundleManifest

SCHEMA = 1
"""Raised when a column is renamed, removed, or means something else; new columns may come without that."""

Status = Literal["judged", "cannot_judge", "unreadable"]

COLUMNS = (
    *("file", "study", "instance", "status", "finding", "probability", "low", "high", "threshold"),
    *("reasons", "explanation", "report", "overlay", "note"),
)
"""Of the CSV table, before one column `probability_CLASS` for each class and then `model`."""


@dataclass(frozen=True)
class Row:
    """One file. Numbers are None unless `status` is `judged`: what cannot be judged has no probability that anyone might read.

    Attributes:
        file: absolute path. It may name a patient: rows go where the user asks for them and nowhere else.
        study: Study Instance UID, or empty.
        instance: SOP Instance UID, or empty.
        status: what became of the file.
        finding: `pneumonia` or `normal` if judged, else empty.
        probability: calibrated P(pneumonia).
        low, high: its 95 % interval.
        threshold: the finding is pneumonia if the probability is at least this.
        classes: calibrated probability of each class.
        reasons: fixed words: values of `Reason`, or a `SkipReason`'s name in small letters.
        explanation: the reasons in plain English.
        scores: p-values of the suitability tests.
        report, overlay: the DICOM objects or pictures that were written, or empty.
        note: why one of them was not, or empty.
    """

    file: str
    study: str
    instance: str
    status: Status
    finding: str
    probability: float | None
    low: float | None
    high: float | None
    threshold: float
    classes: Mapping[str, float]
    reasons: tuple[str, ...]
    explanation: str
    scores: Mapping[str, float]
    report: str = ""
    overlay: str = ""
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with all of the row."""
        return {**vars(self), "classes": dict(self.classes), "scores": dict(self.scores), "reasons": list(self.reasons)}

    def to_csv(self) -> dict[str, str]:
        """Text by column: numbers with six digits, an empty text for what is not there, reasons with a blank between them."""
        values = vars(self) | {"reasons": " ".join(self.reasons)}
        probabilities = {f"probability_{name}": value for name, value in self.classes.items()}
        return {name: _text(value) for name, value in ({name: values[name] for name in COLUMNS} | probabilities).items()}


def row_of(answer: Answer, manifest: BundleManifest) -> Row:
    """The row of `answer`, before anything was written for the archive."""
    loaded, judgement = answer.loaded, answer.judgement
    judged = judgement if judgement and not judgement.reasons else None
    return Row(
        file=str(loaded.path),
        study=loaded.study,
        instance=loaded.instance,
        status="judged" if judged else "cannot_judge" if judgement else "unreadable",
        finding=judged.verdict if judged else "",
        probability=judged.probability if judged else None,
        low=judged.low if judged else None,
        high=judged.high if judged else None,
        threshold=manifest.threshold.value,
        classes=judged.classes if judged else {},
        reasons=_reasons(answer),
        explanation=_explanation(answer),
        scores=judgement.suitability_scores if judgement else {},
    )


def _reasons(answer: Answer) -> tuple[str, ...]:
    if answer.loaded.problem:
        return (answer.loaded.problem.name.lower(),)
    return tuple(reason.value for reason in answer.judgement.reasons) if answer.judgement else ()


def _explanation(answer: Answer) -> str:
    if answer.loaded.problem:
        return answer.loaded.problem.value
    return "; ".join(reason.sentence for reason in answer.judgement.reasons) if answer.judgement else ""


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6f}" if isinstance(value, float) else str(value)
