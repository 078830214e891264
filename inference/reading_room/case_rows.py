"""Rows of the room's database as they come from a judged file: a new case, and the clinical values that a case was judged with.

Rows of values are added and never changed, but for the evidence, which is computed when somebody asks for it; the latest row of a case
counts, and its answer is the case's (`CaseValues`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Engine, select, update
from sqlalchemy.orm import sessionmaker

from pneumofed.common.model_bundle.suitability import Judgement
from pneumofed.inference.reading_room.cases import NO_NUMBER, Case, ClinicalRow
from pneumofed.inference.reading_room.clinical import ClinicalView
from pneumofed.inference.reading_room.viewing import JudgedFile


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
        threshold=min(judgement.threshold, 1.0),
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
