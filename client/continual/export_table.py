"""The reading room's export: a manifest's columns, and who said so, when, and of which case."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from client.continual.readings import Reading
from common.data.manifest import read_age, read_label, read_sex
from common.data.tables import read_rows
from common.errors import ConfigError, DataError

EXPORT = "labels.csv"
"""Name of the export where a folder is given."""
"""What a reading room's folder holds."""
REQUIRED = ("path", "label")


@dataclass(frozen=True)
class ReadRow:
    """One row: a reading, the file that was read, and what else is known of it; `patient` is the hospital's own number."""

    path: Path
    patient: str
    reading: Reading
    view: str | None
    sex: str | None
    age_years: float | None
    manufacturer: str | None


def read_export(table: Path) -> list[ReadRow]:
    """The rows of an export, or of `labels.csv` in the folder `table`.

    Columns are `path` (relative to the table's folder) and `label`, and where known `patient`, `view`, `sex`, `age`, `manufacturer`,
    `reader`, `time` (ISO 8601; without a zone it is UTC) and `case`. A row without a reader counts as that of a reader of its own.

    Raises:
        ConfigError: the file does not exist or cannot be opened.
        DataError: a column is missing, or a row has no path or a time that is none; the text never says what is in it.
    """
    file = table / EXPORT if table.is_dir() else table
    if not file.is_file():
        raise ConfigError(f"{file} does not exist; give the reading room's folder, or its export of labels (a CSV file)")
    return _read(file)


def _read(file: Path) -> list[ReadRow]:
    return [_row(file, number, cells) for number, cells in read_rows(file, REQUIRED)]


def _row(file: Path, number: int, cells: dict[str, str]) -> ReadRow:
    def cell(name: str) -> str:
        return cells.get(name, "").strip()

    if not cell("path"):
        raise DataError(f"{file}, row {number}: column 'path' is empty; each reading is of a file")
    reader = cell("reader") or f"unknown reader of row {number}"
    reading = Reading(reader, _time(file, number, cell("time")), read_label(cells["label"]), cell("case") or cell("case_id"))
    return ReadRow(
        path=file.absolute().parent / cell("path"),
        patient=cell("patient"),
        reading=reading,
        view=cell("view") or None,
        sex=read_sex(cell("sex")),
        age_years=read_age(cell("age")),
        manufacturer=cell("manufacturer") or None,
    )


def _time(file: Path, number: int, text: str) -> str:
    """`text` in UTC to the microsecond, so that texts sort by time; empty stays empty and sorts first."""
    if not text:
        return ""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise DataError(f"{file}, row {number}: column 'time' must be like 2026-03-01T14:05:00+01:00, or empty") from None
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return aware.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
