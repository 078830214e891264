"""NIH ChestX-ray14 (Wang et al. 2017, CVPR): `Data_Entry_2017.csv` and the folders `images_001` to `images_012`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from common.data.manifest import ImageRecord, Manifest, read_age, read_sex
from common.data.report import DataReport
from common.data.sources.collect import collect, find_by_name
from common.data.tables import read_columns, read_rows
from common.errors import SkipReason

_REQUIRED = ("image index", "finding labels", "patient id")


def read_nih(table: Path, images: Path) -> tuple[Manifest, DataReport]:
    """The images of `table` found anywhere below `images`.

    Findings with `Pneumonia` among them are pneumonia, `No Finding` is normal. Images with other findings alone are neither and
    are counted as of no known label; images that are not there (the set comes in twelve parts) as missing.

    Raises:
        ConfigError: the table does not exist.
        DataError: it lacks a column, or the folder cannot be listed.
    """
    present = read_columns(table)
    sex = next((name for name in ("patient sex", "patient gender") if name in present), "")  # later releases say sex
    files = find_by_name(images)
    return collect(_record(row, files, sex) for _, row in read_rows(table, _REQUIRED))


def _record(row: Mapping[str, str], files: Mapping[str, Path], sex: str) -> ImageRecord | SkipReason:
    findings = {finding.strip() for finding in row["finding labels"].split("|")}
    if "Pneumonia" not in findings and findings != {"No Finding"}:
        return SkipReason.UNKNOWN_LABEL if any(findings) else SkipReason.NO_LABEL
    if not row["patient id"].strip():
        return SkipReason.NO_PATIENT
    path = files.get(row["image index"].strip())
    if path is None:
        return SkipReason.MISSING
    return ImageRecord(
        path=path.absolute(),
        patient=row["patient id"].strip(),
        label="pneumonia" if "Pneumonia" in findings else "normal",
        view=row.get("view position", "").strip() or None,
        sex=read_sex(row.get(sex, "")),
        age_years=read_age(row.get("patient age", "")),
    )
