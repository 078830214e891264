"""Results as rows of a stable schema, for scripts: what CSV and JSON hold. See docs/predict.md."""

from __future__ import annotations

from typing import Any

from client.predict.answers import FileResult

SCHEMA = 1
"""Raised when a column is renamed, removed, or means something else; new columns may come without that."""

COLUMNS = (
    *("file", "study", "instance", "status", "finding", "probability", "low", "high", "threshold"),
    *("reasons", "explanation", "report", "overlay", "note"),
)
"""Of the CSV table, before one column `probability_CLASS` for each class and then `model`."""


def json_row(result: FileResult, threshold: float) -> dict[str, Any]:
    """One file as plain JSON values. What cannot be judged has no number that anybody might read.

    Args:
        result: of the file. Its absolute path may name a patient: rows go where the user asks for them and nowhere else.
        threshold: of the bundle; a file that cannot be read has it too.
    """
    loaded, found = result.loaded, result.prediction
    return {
        "file": str(loaded.path),
        "study": loaded.study,
        "instance": loaded.instance,
        "status": result.status,
        "finding": found.decision if found else "",
        "probability": found.probability if found else None,
        "low": found.low if found else None,
        "high": found.high if found else None,
        "threshold": threshold,
        "classes": dict(found.classes) if found else {},
        "reasons": list(result.reasons),
        "explanation": result.explanation,
        "scores": dict(result.judgement.suitability) if result.judgement else {},
        "report": result.report,
        "overlay": result.overlay,
        "note": result.note,
    }


def csv_row(result: FileResult, threshold: float) -> dict[str, str]:
    """Text by column: numbers with six digits, an empty text for what is not there, reasons with a blank between them.

    Args:
        result: of the file.
        threshold: of the bundle.
    """
    row = json_row(result, threshold)
    values = {name: row[name] for name in COLUMNS} | {"reasons": " ".join(row["reasons"])}
    probabilities = {f"probability_{name}": value for name, value in row["classes"].items()}
    return {name: _text(value) for name, value in (values | probabilities).items()}


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6f}" if isinstance(value, float) else str(value)
