"""CheXpert (Irvin et al. 2019, AAAI): `train.csv` or `valid.csv` with 1, 0, -1 or nothing for each finding."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from common.data.manifest import ImageRecord, Manifest, read_age, read_sex
from common.data.report import DataReport
from common.data.sources.collect import UncertainPolicy, check_policy, collect, settle_uncertain
from common.data.tables import read_rows
from common.errors import SkipReason

_REQUIRED = ("path", "frontal/lateral", "no finding", "pneumonia")


def read_chexpert(table: Path, root: Path, uncertain: UncertainPolicy = "ignore") -> tuple[Manifest, DataReport]:
    """The frontal images of `table` with or without pneumonia.

    `Pneumonia` 1 is pneumonia; -1 is what `uncertain` says; otherwise `No Finding` 1 is normal, and an image with other
    findings alone is counted as of no known label. Laterals are left out. The patient is the folder `patient00001` of the path.
    Whether the files exist is seen when they are read.

    Args:
        table: the CSV file.
        root: the folder that holds `train` and `valid`, or the one above it.
        uncertain: `ignore` leaves uncertain images out, `positive` takes them as pneumonia, `negative` as without.

    Raises:
        ConfigError: the table does not exist or `uncertain` is none of the three.
        DataError: the table lacks a column.
    """
    check_policy(uncertain)
    root = root.absolute()
    is_inner = any((root / name).is_dir() for name in ("train", "valid"))
    return collect(_record(row, root, is_inner, uncertain) for _, row in read_rows(table, _REQUIRED))


def _record(row: Mapping[str, str], root: Path, is_inner: bool, uncertain: UncertainPolicy) -> ImageRecord | SkipReason:
    """`is_inner` tells that `root` is the folder that paths start with, e.g. `CheXpert-v1.0-small`."""
    if row["frontal/lateral"].strip().lower() == "lateral":
        return SkipReason.NOT_FRONTAL
    label = _label(row, uncertain)
    if isinstance(label, SkipReason):
        return label
    patient = re.search(r"(?:^|/)(patient\d+)/", row["path"])
    if patient is None:
        return SkipReason.NO_PATIENT
    return ImageRecord(
        path=root.joinpath(*PurePosixPath(row["path"].strip()).parts[is_inner:]),
        patient=patient[1],
        label=label,
        view=row.get("ap/pa", "").strip() or None,
        sex=read_sex(row.get("sex", "")),
        age_years=read_age(row.get("age", "")),
    )


def _label(row: Mapping[str, str], uncertain: UncertainPolicy) -> str | SkipReason:
    without = "normal" if _mark(row["no finding"]) == 1 else SkipReason.UNKNOWN_LABEL
    mark = _mark(row["pneumonia"])
    if mark == -1:
        return settle_uncertain(uncertain, without)
    return "pneumonia" if mark == 1 else without


def _mark(text: str) -> int:
    """1, -1, or 0, which also stands for a finding that is not mentioned."""
    return {"1": 1, "1.0": 1, "-1": -1, "-1.0": -1}.get(text.strip(), 0)
