"""Any CSV file with a row an image: columns are found by their usual names or given by the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from common.data.manifest import COLUMNS, LABELS, ImageRecord, Manifest, read_age, read_label, read_sex
from common.data.report import DataReport
from common.data.sources.collect import collect, is_frontal
from common.data.tables import check_columns, read_columns, read_rows
from common.errors import ConfigError, DataError, SkipReason

_USUAL_NAMES = {
    "path": ("path", "filename", "file", "filepath", "imagepath", "image", "imageid", "imageindex"),
    "patient": ("patient", "patientid", "subject", "subjectid"),
    "label": ("label", "class", "diagnosis"),
    "view": ("view", "viewposition", "projection"),
    "sex": ("sex", "gender", "patientsex", "patientgender"),
    "age": ("age", "ageyears", "patientage"),
    "manufacturer": ("manufacturer", "vendor"),
}


def read_csv(
    table: Path,
    folder: Path | None = None,
    columns: Mapping[str, str] | None = None,
    label_map: Mapping[str, str] | None = None,
) -> tuple[Manifest, DataReport]:
    """The images that the CSV file `table` names.

    Rows without a label or patient, with a label outside the manifest's vocabulary, or with a view that is not frontal are left
    out and counted. Whether the files exist is seen when they are read.

    Args:
        table: the CSV file.
        folder: what relative paths are relative to; by default the table's folder.
        columns: the table's column for some of `path`, `patient`, `label`, `view`, `sex`, `age`, `manufacturer`; the others
            are found by their usual names, e.g. `filename` or `PatientID`.
        label_map: the table's labels, regardless of case, to `normal`, `pneumonia`, `bacterial` or `viral`; other labels are
        taken
            as they are.

    Raises:
        ConfigError: the file does not exist, or `columns` or `label_map` names something that no manifest has.
        DataError: a column is not there, or none is known for the path, the patient or the label.
    """
    found = find_columns(table, columns or {})
    labels = _read_label_map(label_map or {})
    base = (folder or table.parent).absolute()
    rows = (row for _, row in read_rows(table, list(found.values())))
    return collect(_record({name: row[column] for name, column in found.items()}, base, labels) for row in rows)


def find_columns(table: Path, columns: Mapping[str, str]) -> dict[str, str]:
    """The lower-case column of `table` for each column of a manifest that it has; `columns` as in `read_csv`."""
    present = read_columns(table)
    found = {name: find_column(present, usual) for name, usual in _USUAL_NAMES.items()}
    for name, column in columns.items():
        if name not in COLUMNS:
            raise ConfigError(f"columns: '{name}' is no column of a manifest; expected some of {', '.join(COLUMNS)}")
        check_columns(table, present, [column.strip().lower()])
        found[name] = column.strip().lower()
    for name in COLUMNS[:3]:
        if found[name] is None:
            raise DataError(f"{table}: no column looks like the {name}; say which is. Columns there: {', '.join(present)}")
    return {name: column for name, column in found.items() if column is not None}


def find_column(present: Sequence[str], usual: Sequence[str]) -> str | None:
    """The first of `present` that is one of the `usual` names, the more usual first, without regard to `_`, `-` and spaces."""
    plain = {column.translate({ord(mark): None for mark in "_- "}): column for column in reversed(present)}
    return next((plain[name] for name in usual if name in plain), None)


def _read_label_map(label_map: Mapping[str, str]) -> dict[str, str]:
    labels = {given.strip().lower(): read_label(label) for given, label in label_map.items()}
    for given, label in labels.items():
        if label not in LABELS:
            raise ConfigError(f"label_map: '{given}' is mapped to '{label}'; expected one of {', '.join(LABELS)}")
    return labels


def _record(cells: Mapping[str, str], base: Path, labels: Mapping[str, str]) -> ImageRecord | SkipReason:
    given = cells["label"].strip().lower()
    label = labels.get(given, read_label(given))
    view = cells.get("view", "").strip()
    reason = _refuse(cells, label, view)
    if reason is not None:
        return reason
    return ImageRecord(
        path=base / cells["path"],
        patient=cells["patient"].strip(),
        label=label,
        view=view or None,
        sex=read_sex(cells.get("sex", "")),
        age_years=read_age(cells.get("age", "")),
        manufacturer=cells.get("manufacturer", "").strip() or None,
    )


def _refuse(cells: Mapping[str, str], label: str, view: str) -> SkipReason | None:
    if not cells["path"].strip():
        return SkipReason.MISSING
    if not cells["patient"].strip():
        return SkipReason.NO_PATIENT
    if label not in LABELS:
        return SkipReason.UNKNOWN_LABEL if label else SkipReason.NO_LABEL
    return None if is_frontal(view) else SkipReason.NOT_FRONTAL
