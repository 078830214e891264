"""The Kaggle pediatric set: patient and cause from file names, across its folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from pneumofed.common.data.manifest import DataReport, DataWarning, Manifest
from pneumofed.common.data.sources.public_sets import read_kaggle
from pneumofed.common.errors import DataError

NORMAL, PNEUMONIA = "NORMAL", "PNEUMONIA"


def _read(folder: Path, *files: str, splits: tuple[str, ...] = ("train", "val")) -> tuple[Manifest, DataReport]:
    for name in (NORMAL, PNEUMONIA):
        (folder / "train" / name).mkdir(parents=True, exist_ok=True)
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return read_kaggle(folder, splits)


@pytest.mark.parametrize(
    ("name", "patient", "label"),
    [
        ("person23_bacteria_77.jpeg", "person23", "bacterial"),
        ("person23_virus_77.jpeg", "person23", "viral"),
        ("person1_virus_9_2.JPEG", "person1", "viral"),
        ("Person0023_fungus_1.png", "person23", "pneumonia"),
        ("IM-0115-0001.jpeg", "IM-0115", "pneumonia"),
        ("scan7.jpeg", "scan7", "pneumonia"),
    ],
)
def test_patient_and_cause_come_from_the_file_name(tmp_path: Path, name: str, patient: str, label: str) -> None:
    record = _read(tmp_path, f"train/{PNEUMONIA}/{name}")[0].records[0]
    assert (record.patient, record.label) == (f"train/{patient}", label)


@pytest.mark.parametrize(
    "name", ["IM-0115-0001.jpeg", "IM-0115-0001-0002.jpeg", "NORMAL2-IM-0115-0001.jpeg", "NORMAL2-IM-0115-0001-0001.jpeg"]
)
def test_numbers_of_both_prefixes_are_one_patient(tmp_path: Path, name: str) -> None:
    record = _read(tmp_path, f"train/{NORMAL}/{name}")[0].records[0]
    assert (record.patient, record.label) == ("train/IM-0115", "normal")


def test_val_continues_the_numbers_of_train_and_test_does_not(tmp_path: Path) -> None:
    files = [f"{split}/{name}/person5_virus_1.jpeg" for split in ("train", "val", "test") for name in (NORMAL, PNEUMONIA)]
    manifest, _ = _read(tmp_path, *files, splits=("train", "val", "test"))
    assert set(manifest.patients) == {"train/person5", "test/person5"}
    assert len(manifest) == 6


def test_a_name_that_tells_no_patient_is_counted(tmp_path: Path) -> None:
    _, report = _read(tmp_path, f"train/{NORMAL}/IM-0001-0001.jpeg", f"train/{PNEUMONIA}/a.jpg", f"train/{PNEUMONIA}/b.jpg")
    assert report.warnings[DataWarning.PATIENT_FROM_FILE_NAME] == 2


def test_hidden_files_and_folders_are_ignored(tmp_path: Path) -> None:
    hidden = [f"train/{NORMAL}/{name}" for name in (".DS_Store", "._IM-0001-0001.jpeg", "folder/IM-0002-0001.jpeg")]
    manifest, report = _read(tmp_path, f"train/{NORMAL}/IM-0001-0001.jpeg", *hidden)
    assert [record.path.name for record in manifest.records] == ["IM-0001-0001.jpeg"]
    assert report.found == report.used == 1


def test_an_empty_class_is_a_line_in_the_report(tmp_path: Path) -> None:
    manifest, report = _read(tmp_path, f"train/{NORMAL}/IM-0001-0001.jpeg")
    assert len(manifest) == 1
    assert report.warnings[DataWarning.EMPTY_CLASS] == 1


def test_the_order_does_not_depend_on_the_file_system(tmp_path: Path) -> None:
    names = [f"train/{PNEUMONIA}/person{n}_virus_1.jpeg" for n in (3, 1, 2)]
    manifest, _ = _read(tmp_path, *names, f"train/{NORMAL}/IM-0009-0001.jpeg")
    assert manifest.patients == ("train/IM-0009", "train/person1", "train/person2", "train/person3")


def test_a_missing_class_folder_says_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "train" / NORMAL).mkdir(parents=True)
    with pytest.raises(
        DataError, match=r"train/PNEUMONIA is missing; give the folder that itself holds train/NORMAL and train/PNEUMONIA"
    ):
        read_kaggle(tmp_path)


def test_a_missing_data_folder_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is missing; give the folder"):
        read_kaggle(tmp_path / "none")


def test_folders_without_images_say_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image found"):
        _read(tmp_path)


def test_the_real_set_is_counted_and_no_patient_is_in_two_of_its_splits(kaggle_dir: Path) -> None:
    train, report = read_kaggle(kaggle_dir, ("train",))
    test, test_report = read_kaggle(kaggle_dir, ("test",))
    assert report.classes == {"normal": 1341, "bacterial": 2530, "viral": 1345}
    assert test_report.classes == {"normal": 234, "bacterial": 242, "viral": 148}
    assert report.warnings.total() == test_report.warnings.total() == 0
    assert not set(train.patients) & set(test.patients)
