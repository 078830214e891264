"""CheXpert's table: uncertain labels by policy, patients, views."""

from __future__ import annotations

from pathlib import Path

import pytest

from pneumofed.common.data.sources.public_sets import read_chexpert
from pneumofed.common.data.sources.table import UncertainPolicy
from pneumofed.common.errors import ConfigError, SkipReason
from tests.common.data.conftest import write_table

HEADER = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Lung Opacity,Pneumonia,Pleural Effusion"


def _write(folder: Path, *findings: str, side: str = "Frontal") -> Path:
    rows = [
        f"CheXpert-v1.0-small/train/patient{n:05d}/study1/view1_frontal.jpg,Female,68,{side},AP,{marks}"
        for n, marks in enumerate(findings, start=1)
    ]
    return write_table(folder / "train.csv", HEADER, *rows)


@pytest.mark.parametrize(
    ("policy", "labels", "skipped"),
    [
        ("ignore", ("pneumonia", "normal"), {SkipReason.UNCERTAIN_LABEL: 2, SkipReason.UNKNOWN_LABEL: 1}),
        ("positive", ("pneumonia", "normal", "pneumonia", "pneumonia"), {SkipReason.UNKNOWN_LABEL: 1}),
        ("negative", ("pneumonia", "normal", "normal"), {SkipReason.UNKNOWN_LABEL: 2}),
    ],
)
def test_the_policy_decides_about_uncertain_labels(
    tmp_path: Path, policy: UncertainPolicy, labels: tuple[str, ...], skipped: dict[SkipReason, int]
) -> None:
    table = _write(tmp_path, ",,1.0,", "1.0,,,", "1.0,,-1.0,", ",1.0,-1.0,", ",1.0,0.0,1.0")
    manifest, report = read_chexpert(table, tmp_path, policy)
    assert manifest.labels == labels
    assert report.skipped == skipped
    assert report.found == 5


def test_patient_and_details_come_with_the_record(tmp_path: Path) -> None:
    record = read_chexpert(_write(tmp_path, "1.0,,,"), tmp_path)[0].records[0]
    assert (record.patient, record.view, record.sex, record.age_years) == ("patient00001", "AP", "F", 68.0)


@pytest.mark.parametrize("root", ["", "CheXpert-v1.0-small"])
def test_the_root_may_be_the_sets_own_folder_or_the_one_above(tmp_path: Path, root: str) -> None:
    image = tmp_path / "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg"
    image.parent.mkdir(parents=True)
    image.touch()
    assert read_chexpert(_write(tmp_path, "1.0,,,"), tmp_path / root)[0].records[0].path == image


def test_laterals_and_paths_without_a_patient_are_counted(tmp_path: Path) -> None:
    assert read_chexpert(_write(tmp_path, "1.0,,,", side="Lateral"), tmp_path)[1].skipped == {SkipReason.NOT_FRONTAL: 1}
    table = write_table(tmp_path / "t.csv", HEADER, "view.jpg,Male,68,Frontal,AP,1.0,,,")
    assert read_chexpert(table, tmp_path)[1].skipped == {SkipReason.NO_PATIENT: 1}


def test_an_unknown_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected one of ignore, positive, negative"):
        read_chexpert(_write(tmp_path), tmp_path, "maybe")  # type: ignore[arg-type]
