"""How CT volumes are named: class folders, a table's rows, and DICOM series with a table of labels."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread

from pneumofed.client.data.volume_check import VOLUMES_FILE
from pneumofed.client.site.checks import check_files
from pneumofed.common.data.manifest import read_manifest, write_manifest
from pneumofed.common.data.sources.dicom import read_ct_folder
from pneumofed.common.data.sources.public_sets import read_kaggle
from pneumofed.common.data.sources.table import read_csv, series_folders
from pneumofed.common.errors import DataError, SkipReason
from pneumofed.common.imaging.dicom_header import Pseudonyms
from pneumofed.common.imaging.volumes import read_volume
from pneumofed.simulation.phantoms.ct_sets import encode_series
from pneumofed.simulation.phantoms.scanners import Examination
from pneumofed.simulation.phantoms.thorax import VoxelGrid
from tests.client.site_folder import make_site, manifest_of, run_data
from tests.common.data.conftest import write_table

GRID = VoxelGrid(4, 16, 16)


def save_series(folder: Path, patient: str = "P1", seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    volume = np.random.default_rng(seed).integers(-1000, 1000, GRID.shape).astype(np.int16)
    examination = Examination(f"{patient} {seed}", "phantom", is_drawn=True, patient=patient, sex="F", age_years=40)
    for number, data in enumerate(encode_series(volume, GRID, examination)):
        (folder / f"{number}.dcm").write_bytes(data)
    return folder


def kaggle(root: Path) -> Path:
    """Series, a NIfTI file, a patient of two series, and what is none of them."""
    save_series(root / "train" / "NORMAL" / "IM-0007-0001", seed=1)
    save_series(root / "train" / "NORMAL" / "anna" / "before", seed=2)
    save_series(root / "train" / "NORMAL" / "anna" / "after", seed=3)
    save_series(root / "train" / "PNEUMONIA" / "person3_virus_1", seed=4)
    save_series(root / "train" / "PNEUMONIA" / "v1.2", seed=5)
    (root / "train" / "PNEUMONIA" / "bert.nii.gz").write_bytes(b"not looked into")
    (root / "train" / "PNEUMONIA" / "notes").mkdir()
    (root / "train" / "PNEUMONIA" / "notes" / "read.txt").write_text("no series")
    return root


def test_class_folders_hold_series_patients_and_nifti_files(tmp_path: Path) -> None:
    manifest, report = read_kaggle(kaggle(tmp_path))
    found = {
        record.path.relative_to(tmp_path / "train").as_posix(): (record.patient, record.label) for record in manifest.records
    }
    assert found == {
        "NORMAL/IM-0007-0001": ("train/IM-0007", "normal"),
        "NORMAL/anna/before": ("train/anna", "normal"),
        "NORMAL/anna/after": ("train/anna", "normal"),
        "PNEUMONIA/person3_virus_1": ("train/person3", "viral"),
        "PNEUMONIA/v1.2": ("train/v1.2", "pneumonia"),
        "PNEUMONIA/bert.nii.gz": ("train/bert", "pneumonia"),
    }
    assert report.public()["warnings"] == {"file name tells no patient; the image counts as a patient of its own": 2}


def test_a_manifest_of_series_is_written_and_read_back(tmp_path: Path) -> None:
    manifest, _ = read_kaggle(kaggle(tmp_path))
    write_manifest(manifest, tmp_path / "manifest.csv")
    assert read_manifest(tmp_path / "manifest.csv") == manifest


@pytest.mark.parametrize("name", ["series one", "später"])
def test_a_table_names_series_by_their_folder(tmp_path: Path, name: str) -> None:
    save_series(tmp_path / "ct" / name)
    table = write_table(tmp_path / "t.csv", "filename,patient_id,label", f"ct/{name} ,7,PNEUMONIA", "ct/absent,8,NORMAL")
    manifest, _ = read_csv(table)
    assert manifest.records[0].path == tmp_path / "ct" / name
    assert read_volume(manifest.records[0].path).hounsfield.shape == GRID.shape


@pytest.mark.parametrize("column", ["SeriesInstanceUID", "StudyInstanceUID", "filename", "SOPInstanceUID"])
def test_a_series_has_the_label_that_a_table_gives_it(tmp_path: Path, column: str) -> None:
    folders = [save_series(tmp_path / "dicom" / "deep" / f"s{seed}", f"P{seed}", seed) for seed in range(2)]
    (tmp_path / "dicom" / "report.txt").write_text("no image")
    key = "deep/s1" if column == "filename" else str(dcmread(folders[1] / "0.dcm")[column].value)
    manifest, report = read_ct_folder(tmp_path / "dicom", write_table(tmp_path / "t.csv", f"{column},label", f"{key},PNEUMONIA"))
    record = manifest.records[0]
    assert (record.path, record.patient, record.label, record.sex, record.age_years) == (folders[1], "P1", "pneumonia", "F", 40.0)
    assert report.public()["skipped"] == {SkipReason.NO_LABEL.value: 1}


def test_a_folder_without_series_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dicom").mkdir()
    (tmp_path / "dicom" / "a.txt").write_text("no image")
    with pytest.raises(DataError, match="no series found"):
        read_ct_folder(tmp_path / "dicom", write_table(tmp_path / "t.csv", "filename,label", "a,NORMAL"))
    assert series_folders(tmp_path / "dicom") == []


def test_a_hospital_adds_its_series_by_a_table_of_labels(tmp_path: Path) -> None:
    save_series(tmp_path / "dicom" / "s0", "DOE", 0)
    table = write_table(tmp_path / "t.csv", "filename,label", "s0,PNEUMONIA")
    site = make_site(tmp_path / "site")
    code, report = run_data(site, "add", "dicom", str(tmp_path / "dicom"), "--labels", str(table), "--ct")
    assert (code, report["used"], report["total"]) == (0, 1, 1)
    record = manifest_of(site).records[0]
    assert record.path == tmp_path / "dicom" / "s0" and record.label == "pneumonia"
    assert Pseudonyms.is_pseudonym(record.patient)
    assert check_files(manifest_of(site)).level == "ok"


def test_a_check_says_of_each_volume_in_words_what_was_found(tmp_path: Path) -> None:
    site, data = make_site(tmp_path / "site"), tmp_path / "data"
    save_series(data / "whole", "A", 0)
    (save_series(data / "gap", "B", 1) / "1.dcm").unlink()
    (save_series(data / "mixed", "C", 2) / "other.dcm").write_bytes((data / "whole" / "0.dcm").read_bytes())
    (data / "whole" / "again.dcm").write_bytes((data / "whole" / "0.dcm").read_bytes())
    labels = [("whole", "normal"), ("gap", "viral"), ("mixed", "normal"), ("absent", "viral"), ("whole", "fracture")]
    rows = [f"{data / name},{number},{label}" for number, (name, label) in enumerate(labels)]
    (site / "data").mkdir()
    write_table(site / "data" / "manifest.csv", "path,patient,label", *rows)
    code, report = run_data(site, "check", "--ct", "--workers", "2")
    assert (code, report["found"], report["used"], report["classes"]) == (0, 5, 1, {"normal": 1, "pneumonia": 0})
    reasons = (SkipReason.MISSING_SLICES, SkipReason.MIXED_SERIES, SkipReason.MISSING, SkipReason.UNKNOWN_LABEL)
    assert report["skipped"] == {reason.value: 1 for reason in reasons}
    with (site / "work" / "cache" / VOLUMES_FILE).open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["used"] for row in found] == ["yes", "no", "no", "no", "no"]
    assert (found[0]["slices"], found[0]["slice_mm"], found[0]["words"]) == (
        "4",
        "80.0",
        "slices at a position that another one has: 1 set aside",
    )
    assert "1 positions without an image, the first between slices 2 and 3 of 3" in found[1]["words"]
    assert "2 series with 5 images" in found[2]["words"]


def test_a_site_without_a_usable_volume_is_told_so(tmp_path: Path) -> None:
    site = make_site(tmp_path / "site")
    (site / "data").mkdir()
    write_table(site / "data" / "manifest.csv", "path,patient,label", f"{tmp_path / 'absent'},1,normal")
    code, report = run_data(site, "check", "--ct")
    assert (code, report["used"], report["skipped"]) == (1, 0, {SkipReason.MISSING.value: 1})
