"""PadChest's list: labels, atypical pneumonia by policy, projections."""

from __future__ import annotations

from pathlib import Path

import pytest

from pneumofed.common.data.sources.public_sets import read_padchest
from pneumofed.common.data.sources.table import UncertainPolicy
from pneumofed.common.errors import ConfigError, SkipReason
from tests.common.data.conftest import write_table

HEADER = ",ImageID,ImageDir,StudyDate_DICOM,PatientID,PatientBirth,PatientSex_DICOM,Projection,Manufacturer_DICOM,Labels"


def _read(
    folder: Path, *labels: str, projection: str = "PA", policy: UncertainPolicy = "ignore"
) -> tuple[tuple[str, ...], dict[SkipReason, int]]:
    rows = [f'{n},{n}.png,0,20140915,P{n},1930.0,F,{projection},ACME,"{text}"' for n, text in enumerate(labels)]
    for n in range(len(labels)):
        (folder / "0").mkdir(exist_ok=True)
        (folder / "0" / f"{n}.png").touch()
    manifest, report = read_padchest(write_table(folder / "t.csv", HEADER, *rows), folder, policy)
    assert report.found == len(labels) == report.used + report.skipped.total()
    return manifest.labels, dict(report.skipped)


def test_labels_are_read_from_the_list(tmp_path: Path) -> None:
    labels = [
        "['normal']",
        "['pneumonia', 'infiltrates']",
        "[' Pneumonia ', '']",
        "['normal', 'scoliosis']",
        "nan",
        "[]",
        "['",
        "7",
        "",
    ]
    found, skipped = _read(tmp_path, *labels)
    assert found == ("normal", "pneumonia", "pneumonia")
    assert skipped == {SkipReason.UNKNOWN_LABEL: 1, SkipReason.NO_LABEL: 5}


@pytest.mark.parametrize(
    ("policy", "found", "reason"),
    [("ignore", (), "UNCERTAIN_LABEL"), ("positive", ("pneumonia",), None), ("negative", (), "UNKNOWN_LABEL")],
)
def test_the_policy_decides_about_atypical_pneumonia(
    tmp_path: Path, policy: UncertainPolicy, found: tuple[str, ...], reason: str | None
) -> None:
    skipped = {SkipReason[reason]: 1} if reason else {}
    assert _read(tmp_path, "['atypical pneumonia']", policy=policy) == (found, skipped)


@pytest.mark.parametrize("policy", ["ignore", "positive", "negative"])
@pytest.mark.parametrize("word", ["suboptimal study", "exclude", "unchanged"])
def test_unusable_studies_are_left_out_under_every_policy(tmp_path: Path, word: str, policy: UncertainPolicy) -> None:
    assert _read(tmp_path, f"['pneumonia', '{word}']", policy=policy) == ((), {SkipReason.UNCERTAIN_LABEL: 1})


@pytest.mark.parametrize(
    ("projection", "frontal"), [("PA", True), ("AP_horizontal", True), ("L", False), ("COSTAL", False), ("", False)]
)
def test_frontal_projections_alone_are_taken(tmp_path: Path, projection: str, frontal: bool) -> None:
    found, skipped = _read(tmp_path, "['normal']", projection=projection)
    assert (found, skipped) == ((("normal",), {}) if frontal else ((), {SkipReason.NOT_FRONTAL: 1}))


def test_details_come_with_the_record_and_a_missing_file_is_counted(tmp_path: Path) -> None:
    (tmp_path / "1.png").touch()
    rows = ["0,1.png,0,20140915,P1,1930.0,F,PA,ACME,['normal']", "1,2.png,0,2014,P1,,F,PA,ACME,['normal']"]
    manifest, report = read_padchest(write_table(tmp_path / "t.csv", HEADER, *rows), tmp_path)
    record = manifest.records[0]
    assert (record.patient, record.view, record.sex, record.age_years, record.manufacturer) == ("P1", "PA", "F", 84.0, "ACME")
    assert report.skipped == {SkipReason.MISSING: 1}


def test_an_unknown_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="policy for uncertain labels"):
        _read(tmp_path, policy="maybe")  # type: ignore[arg-type]
