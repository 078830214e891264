"""PadChest (Bustos et al. 2020, Medical Image Analysis 66): one CSV file with a list of labels an image."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

from common.data.manifest import ImageRecord, Manifest, read_sex
from common.data.report import DataReport
from common.data.sources.collect import UncertainPolicy, check_policy, collect, find_by_name, settle_uncertain
from common.data.tables import read_rows
from common.errors import SkipReason

_REQUIRED = ("imageid", "patientid", "projection", "labels")
_FRONTAL = frozenset({"PA", "AP", "AP_HORIZONTAL"})
_UNUSABLE = frozenset({"suboptimal study", "exclude", "unchanged"})
"""`unchanged` refers to an earlier report that the set does not give."""


def read_padchest(table: Path, images: Path, uncertain: UncertainPolicy = "ignore") -> tuple[Manifest, DataReport]:
    """The frontal images of `table` found anywhere below `images`.

    `pneumonia` among the labels is pneumonia, `normal` alone is normal, other labels alone are counted as of no known label.
    `atypical pneumonia` without `pneumonia` counts as uncertain. Images whose labels hold `suboptimal study`, `exclude` or
    `unchanged` are left out as uncertain under every policy.

    Args:
        table: the CSV file.
        images: searched with all folders below it.
        uncertain: `ignore` leaves uncertain images out, `positive` takes them as pneumonia, `negative` as without.

    Raises:
        ConfigError: the table does not exist or `uncertain` is none of the three.
        DataError: the table lacks a column, or the folder cannot be listed.
    """
    check_policy(uncertain)
    files = find_by_name(images)
    return collect(_record(row, files, uncertain) for _, row in read_rows(table, _REQUIRED))


def _record(row: Mapping[str, str], files: Mapping[str, Path], uncertain: UncertainPolicy) -> ImageRecord | SkipReason:
    if row["projection"].strip().upper() not in _FRONTAL:
        return SkipReason.NOT_FRONTAL
    label = _label(_read_list(row["labels"]), uncertain)
    if isinstance(label, SkipReason):
        return label
    if not row["patientid"].strip():
        return SkipReason.NO_PATIENT
    path = files.get(row["imageid"].strip())
    if path is None:
        return SkipReason.MISSING
    return ImageRecord(
        path=path.absolute(),
        patient=row["patientid"].strip(),
        label=label,
        view=row["projection"].strip(),
        sex=read_sex(row.get("patientsex_dicom", "")),
        age_years=_age_years(row),
        manufacturer=row.get("manufacturer_dicom", "").strip() or None,
    )


def _label(labels: set[str], uncertain: UncertainPolicy) -> str | SkipReason:
    if not labels:
        return SkipReason.NO_LABEL
    if labels & _UNUSABLE:
        return SkipReason.UNCERTAIN_LABEL
    if "pneumonia" in labels:
        return "pneumonia"
    if "atypical pneumonia" in labels:
        return settle_uncertain(uncertain, SkipReason.UNKNOWN_LABEL)
    return "normal" if labels == {"normal"} else SkipReason.UNKNOWN_LABEL


def _read_list(text: str) -> set[str]:
    """The labels in a text such as `['normal', 'pneumonia ']`; none for `nan` or anything else."""
    try:
        labels = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return set()
    return {str(label).strip().lower() for label in labels} - {""} if isinstance(labels, list) else set()


def _age_years(row: Mapping[str, str]) -> float | None:
    """Years from the year of birth, e.g. `1930.0`, to that of the study, e.g. `20140915`; right to within one year."""
    try:
        age = int(row.get("studydate_dicom", "").strip()[:4]) - int(float(row.get("patientbirth", "")))
    except (ValueError, OverflowError):
        return None
    return float(age) if 0 <= age <= 120 else None
