"""Views: rows of the database and judgements, in the form of the interface (`schema`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from pneumofed.common.config.classes import positive_word
from pneumofed.common.model_bundle.suitability import Judgement
from pneumofed.inference.reading_room import schema
from pneumofed.inference.reading_room.case_rows import view_values
from pneumofed.inference.reading_room.cases import Case, ClinicalRow, FindingRow, agrees
from pneumofed.inference.reading_room.clinical import ClinicalAnswer
from pneumofed.inference.reading_room.image_facts import FileFacts

T = TypeVar("T")

_LINE = (
    "id", "arrived", "study_date", "patient", "accession", "modality", "view", "sex", "age_years", "verdict", "reasons", "finding",
    "finding_by", "population",
)  # fmt: skip


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
            **{name: getattr(case, name) for name in ("threshold", "model", "model_digest", "has_map", "map_warnings")},
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


def view_map(values: np.ndarray, area: Sequence[float], warnings: Sequence[str]) -> schema.HeatMap:
    """Builds the view of a heat map.

    Args:
        values: float32 [h, w] in [0, 1].
        area: left, top, width and height of what the map covers, in parts of the image.
        warnings: what is wrong with where the map lies, as `schema.MapWarning`.
    """
    left, top, width, height = area
    return schema.HeatMap.model_validate(
        {
            "rows": values.shape[0],
            "columns": values.shape[1],
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
