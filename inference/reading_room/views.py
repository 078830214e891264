"""Rows and views: a judged file as rows of the database, and rows and judgements in the form of the interface (`schema`).

Rows of clinical values are added and never changed, but for the evidence, which is computed when somebody asks for it; the latest row of
a case counts, and its answer is the case's (`CaseValues`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, TypeVar

import numpy as np
from sqlalchemy import Engine, select, update
from sqlalchemy.orm import sessionmaker

from pneumofed.common.config.classes import positive_word
from pneumofed.common.model_bundle.suitability import Judgement
from pneumofed.inference.reading_room import schema
from pneumofed.inference.reading_room.cases import NO_NUMBER, Case, ClinicalRow, FindingRow, agrees
from pneumofed.inference.reading_room.clinical import ClinicalAnswer, ClinicalView
from pneumofed.inference.reading_room.image_facts import FileFacts
from pneumofed.inference.reading_room.viewing import JudgedFile

T = TypeVar("T")

_LINE = (
    "id", "arrived", "study_date", "patient", "accession", "modality", "view", "sex", "age_years", "verdict", "reasons", "finding",
    "finding_by", "population", "threshold",
)  # fmt: skip


class CaseValues:
    """The values that cases were judged with."""

    def __init__(self, engine: Engine) -> None:
        self._session = sessionmaker(engine, expire_on_commit=False).begin

    def latest(self, case: Case) -> ClinicalRow | None:
        """Finds the row that counts; None where no value of the case was ever known."""
        newest = select(ClinicalRow).where(ClinicalRow.case == case.number).order_by(ClinicalRow.id.desc()).limit(1)
        with self._session() as session:
            return session.scalar(newest)

    def give(self, identifier: str, row: ClinicalRow, file: JudgedFile) -> bool:
        """Adds a row, and makes its answer the case's.

        Args:
            identifier: of the case.
            row: of `values_row`.
            file: the case's image, judged with the row's values.

        Returns:
            False if there is no such case any more.
        """
        with self._session() as session:
            case = session.scalar(select(Case).where(Case.id == identifier))
            if case is None:
                return False
            row.case = case.number
            session.add(row)
            for name, value in {**answer_columns(file.judgement), **map_columns(file)}.items():
                setattr(case, name, value)
            return True

    def keep_evidence(self, row: ClinicalRow, evidence: Mapping[str, Any]) -> None:
        """Keeps what the answer rests on.

        Args:
            row: whose answer it is; nothing happens where it is gone.
            evidence: of `clinical.view_evidence`.
        """
        with self._session() as session:
            session.execute(update(ClinicalRow).where(ClinicalRow.id == row.id).values(evidence=dict(evidence)))


def case_row(identifier: str, sha256: str, size: int, file: JudgedFile) -> Case:
    """Builds the database's row of a new case.

    Args:
        identifier: of the case.
        sha256: of the file.
        size: of all files of the case, in bytes.
        file: its content, read and judged.
    """
    facts = ("format", "bits", "modality", "view", "sex", "age_years", "manufacturer")
    judgement = file.judgement
    return Case(
        id=identifier,
        sha256=sha256,
        bytes=size,
        arrived=datetime.now(UTC),
        **asdict(file.header),
        **{name: getattr(file.info, name) for name in facts},
        height=file.info.height_px,
        width=file.info.width_px,
        window_center=file.window.center,
        window_width=file.window.width,
        **answer_columns(judgement),
        **map_columns(file),
        model=judgement.model,
        model_digest=judgement.model_digest,
        population=judgement.population.to_json(),
    )


def values_row(by: str, known: list[dict[str, Any]], judgement: Judgement) -> ClinicalRow:
    """Builds the row of values that a case was judged with; the case is set by who adds it.

    Args:
        by: who gave them, or added the file that states them.
        known: of `clinical.describe_sources`.
        judgement: of the image with these values.
    """
    found = judgement.prediction
    return ClinicalRow(
        by=by,
        at=datetime.now(UTC),
        known=known,
        image_only=found.image_only if found else None,
        verdict=judgement.verdict,
        probability=found.probability if found else None,
    )


def answer_columns(judgement: Judgement) -> dict[str, Any]:
    """Returns the columns of a case that say what the model answers."""
    found = judgement.prediction
    return {
        "verdict": judgement.verdict,
        "probability": found.probability if found else NO_NUMBER,
        "low": found.low if found else NO_NUMBER,
        "high": found.high if found else NO_NUMBER,
        "classes": dict(found.classes) if found else {},
        "reasons": [reason.value for reason in judgement.reasons],
        "threshold": min(judgement.threshold, 1.0),  # at which it was judged, also where that is done anew
    }


def map_columns(file: JudgedFile) -> dict[str, Any]:
    """Returns the columns of a case about its heat map."""
    viewing = file.viewing
    return {"has_map": viewing.map is not None, "map_area": list(viewing.area), "map_warnings": list(viewing.warnings)}


def view_values(row: ClinicalRow | None) -> ClinicalView | None:
    """Builds the view of a case's values; None where none was ever known."""
    if row is None:
        return None
    return ClinicalView.model_validate(
        {"values": row.known, "image_only": row.image_only, "given_by": row.by, "given_at": row.at}
    )


def view_case_line(case: Case) -> schema.CaseLine:
    """Builds the view of the case in the worklist."""
    return schema.CaseLine.model_validate(_line(case))


def view_case(
    case: Case, facts: FileFacts, values: ClinicalRow | None, findings: Sequence[FindingRow], previous: Sequence[Case]
) -> schema.CaseDetail:
    """Builds the view of all of the case.

    Args:
        case: of the database.
        facts: of its file.
        values: clinical ones that it was judged with; None where none was ever known.
        findings: of this case, oldest first.
        previous: other cases of the patient, newest first.
    """
    window = {"center": case.window_center, "width": case.window_width}
    return schema.CaseDetail.model_validate(
        {
            **_line(case),
            **{name: getattr(case, name) for name in ("model", "model_digest", "has_map", "map_warnings")},
            "classes": _if_judged(case.verdict, case.classes, {}),
            "image": {name: getattr(case, name) for name in ("height", "width", "bits", "format", "manufacturer")}
            | {"window": window, "facts": facts},
            "clinical": view_values(values),
            "findings": [view_finding(row, case) for row in findings],
            "previous": [view_case_line(other) for other in previous],
        }
    )


def view_finding(row: FindingRow, case: Case) -> schema.ReaderFinding:
    """Builds the view of a finding, with whether it agrees with the model.

    Args:
        row: of the database.
        case: that it is about.
    """
    values = {name: getattr(row, name) for name in ("id", "by", "at", "label", "note")}
    return schema.ReaderFinding.model_validate({**values, "agrees": agrees(case.verdict, row.label, likeliest(case))})


def view_judgement(judgement: Judgement, values: ClinicalAnswer | None = None) -> schema.JudgementOut:
    """Builds the view of the model's answer for one image.

    Args:
        judgement: of the image.
        values: clinical ones that it was judged with; None where none is known.
    """
    found = judgement.prediction
    return schema.JudgementOut(
        verdict=judgement.verdict,
        probability=found.probability if found else None,
        low=found.low if found else None,
        high=found.high if found else None,
        threshold=min(judgement.threshold, 1.0),  # as `ModelInfo` has it: a bundle's may lie a rounding error above 1
        classes=dict(found.classes) if found else {},
        reasons=[reason.value for reason in judgement.reasons],
        population=schema.PopulationView.model_validate(judgement.population.to_json()),
        clinical=values,
    )


def view_map(
    values: np.ndarray, area: Sequence[float], warnings: Sequence[str], span: tuple[float, float] | None = None
) -> schema.HeatMap:
    """Builds the view of a heat map.

    Args:
        values: float32 [h, w] in [0, 1], or of a whole series [d, h, w].
        area: left, top, width and height of what the map covers, in parts of the image.
        warnings: what is wrong with where the map lies, as `schema.MapWarning`.
        span: of a whole series, as `Viewing.span`.
    """
    left, top, width, height = area
    return schema.HeatMap.model_validate(
        {
            "planes": 1 if values.ndim == 2 else len(values),
            "span": span,
            "rows": values.shape[-2],
            "columns": values.shape[-1],
            "values": values.ravel().tolist(),
            "area": {"left": left, "top": top, "width": width, "height": height},
            "warnings": list(warnings),
        }
    )


def likeliest(case: Case) -> str | None:
    """Finds the most probable class but normal of a case with the verdict `finding`; None of any other."""
    others = _not_normal(case)
    return max(others, key=lambda name: others[name]) if case.verdict == "finding" and others else None


def _not_normal(case: Case) -> dict[str, float]:
    return {name: value for name, value in case.classes.items() if name != "normal"}


def _line(case: Case) -> dict[str, Any]:
    of_classes = {"positive": positive_word(("normal", *_not_normal(case))), "likeliest": likeliest(case)}
    numbers = {name: _if_judged(case.verdict, getattr(case, name), None) for name in ("probability", "low", "high")}
    return {
        "status": "open" if case.finding is None else "read",
        **numbers,
        **of_classes,
        **{name: getattr(case, name) for name in _LINE},
    }


def _if_judged(verdict: str, value: T, nothing: T) -> T:
    """`value`, or `nothing` of an image that cannot be judged: rows of earlier versions hold the network's number, which nobody should
    see."""
    return nothing if verdict == "cannot judge" else value
