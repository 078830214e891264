"""NIH ChestX-ray14's table: findings to labels, image folders in parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from pneumofed.common.data.sources.public_sets import read_nih
from pneumofed.common.errors import DataError, SkipReason
from tests.common.data.conftest import write_table

HEADER = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,{sex},View Position,Width,Height,Spacing,y,"


def _write(folder: Path, *rows: str, sex: str = "Patient Gender") -> Path:
    return write_table(folder / "Data_Entry_2017.csv", HEADER.format(sex=sex), *rows)


def _row(image: str, findings: str, patient: str = "1") -> str:
    return f"{image},{findings},0,{patient},58,M,PA,2682,2749,0.143,0.143,"


def _add(folder: Path, part: int, name: str) -> None:
    images = folder / f"images_{part:03d}" / "images"
    images.mkdir(parents=True, exist_ok=True)
    (images / name).touch()


@pytest.mark.parametrize("sex", ["Patient Gender", "Patient Sex"])
def test_findings_decide_the_label_and_parts_are_searched(tmp_path: Path, sex: str) -> None:
    rows = [_row("1.png", "No Finding", "11"), _row("2.png", "Effusion|Pneumonia", "12"), _row("3.png", "Pneumonia", "12")]
    for part in (1, 2, 12):
        _add(tmp_path, part, f"{(1, 2, 12).index(part) + 1}.png")
    manifest, report = read_nih(_write(tmp_path, *rows, sex=sex), tmp_path)
    assert manifest.labels == ("normal", "pneumonia", "pneumonia")
    assert manifest.patients == ("11", "12", "12")
    assert [record.path.parent.parent.name for record in manifest.records] == ["images_001", "images_002", "images_012"]
    record = manifest.records[0]
    assert (record.view, record.sex, record.age_years) == ("PA", "M", 58.0)
    assert (report.found, report.used, report.patients) == (3, 3, 2)


def test_other_findings_and_parts_that_are_not_there_are_counted(tmp_path: Path) -> None:
    _add(tmp_path, 1, "1.png")
    rows = [
        _row("1.png", "Mass"),
        _row("1.png", "No Finding|Mass"),
        _row("1.png", ""),
        _row("1.png", "Pneumonia", ""),
        _row("2.png", "Pneumonia"),
    ]
    _, report = read_nih(_write(tmp_path, *rows), tmp_path)
    reasons = {SkipReason.UNKNOWN_LABEL: 2, SkipReason.NO_LABEL: 1, SkipReason.NO_PATIENT: 1, SkipReason.MISSING: 1}
    assert report.skipped == reasons
    assert (report.found, report.used) == (5, 0)


def test_another_table_is_refused_by_the_column_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column 'image index' is missing"):
        read_nih(write_table(tmp_path / "t.csv", "Path,Sex"), tmp_path)
