"""Tables of any hospital: columns by their usual names or as given, rows that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pneumofed.client.data.readings import read_export
from pneumofed.common.config.experiment import ClinicalColumn, ClinicalConfig
from pneumofed.common.data.manifest import ImageRecord, read_manifest
from pneumofed.common.data.sources.dicom import read_labels
from pneumofed.common.data.sources.public_sets import read_nih
from pneumofed.common.data.sources.table import read_csv
from pneumofed.common.errors import ConfigError, DataError, SkipReason
from pneumofed.inference.predict.clinical_table import read_clinical_table
from tests.common.data.conftest import write_table


@pytest.mark.parametrize(
    "header",
    [
        "path,patient,label,view,sex,age",
        "filename,patient_id,label,view,sex,age",
        "Image,PatientID,Class,View Position,Patient Sex,Age",
    ],
)
def test_columns_are_known_by_their_usual_names(tmp_path: Path, header: str) -> None:
    table = write_table(tmp_path / "t.csv", header, "a/1.png, 7 ,Normal,PA,female,63")
    manifest, report = read_csv(table)
    assert manifest.records == (ImageRecord(tmp_path / "a" / "1.png", "7", "normal", "PA", "F", 63.0),)
    assert (report.found, report.used, report.patients) == (1, 1, 1)


def test_columns_and_labels_can_be_given(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", "X-ray,path,mrn,Result", "1.png,not this,7,Klebsiella", "2.png,nor this,8,Clear")
    columns = {"path": "X-Ray", "patient": "MRN", "label": "Result"}
    manifest, _ = read_csv(table, tmp_path / "images", columns, {"klebsiella": "bacterial", "CLEAR": "normal"})
    assert [(record.path.name, record.patient, record.label) for record in manifest.records] == [
        ("1.png", "7", "bacterial"),
        ("2.png", "8", "normal"),
    ]
    assert manifest.records[0].path.parent == tmp_path / "images"


def test_the_more_usual_of_two_columns_is_taken(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", "image,file,path,patient,label", "a,b,c,7,normal")
    assert read_csv(table)[0].records[0].path.name == "c"


def test_rows_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    rows = ["1.png,7,normal,PA", "2.png,,normal,", "3.png,7,,", "4.png,7,banana,", "5.png,7,viral,Lateral", ",7,normal,"]
    manifest, report = read_csv(write_table(tmp_path / "t.csv", "path,patient,label,view", *rows))
    assert len(manifest) == report.used == 1
    assert report.found == 6
    reasons = ["NO_PATIENT", "NO_LABEL", "UNKNOWN_LABEL", "NOT_FRONTAL", "MISSING"]
    assert report.skipped == {SkipReason[name]: 1 for name in reasons}


def test_an_unknown_age_or_sex_does_not_cost_the_image(tmp_path: Path) -> None:
    record = read_csv(write_table(tmp_path / "t.csv", "path,patient,label,sex,age", "1.png,7,normal,?,unknown"))[0].records[0]
    assert (record.sex, record.age_years) == (None, None)


@pytest.mark.parametrize("missing", ["path", "patient", "label"])
def test_a_column_that_is_not_recognized_is_named(tmp_path: Path, missing: str) -> None:
    table = write_table(tmp_path / "t.csv", ",".join(({"path", "patient", "label"} - {missing}) | {"note"}))
    with pytest.raises(DataError, match=f"no column looks like the {missing}.*note"):
        read_csv(table)


def test_arguments_that_name_nothing_are_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", "path,patient,label")
    with pytest.raises(DataError, match="column 'file' is missing"):
        read_csv(table, columns={"path": "file"})
    with pytest.raises(ConfigError, match="'colour' is no column of a manifest"):
        read_csv(table, columns={"colour": "path"})
    with pytest.raises(ConfigError, match="mapped to 'very sick': class 'very sick': expected a word"):
        read_csv(table, label_map={"ill": "very sick"})
    with pytest.raises(ConfigError, match="mapped to 'pneumona'; did you mean 'pneumonia'"):
        read_csv(table, label_map={"ill": "pneumona"})


def test_the_external_set_is_recognized(external_dir: Path) -> None:
    manifest, report = read_csv(external_dir / "labels.csv")
    assert report.classes == {"normal": 19, "pneumonia": 508}
    assert all(record.path.is_file() for record in manifest.records)


CLINICAL = ClinicalConfig(columns=(ClinicalColumn(name="fever", kind="binary"),))
ROW = ("mueller.png", "Mueller Hans 1950-03-01", "MRN-4711", "63", "Pneumonie")


@pytest.mark.parametrize(
    "read",
    [
        read_csv,
        lambda table: read_csv(table, columns={"path": "bild"}),
        lambda table: read_csv(table, columns={"label": "befund"}),
        read_labels,
        read_export,
        read_manifest,
        lambda table: read_nih(table, table.parent),
        lambda table: read_clinical_table(table, CLINICAL),
    ],
)
@pytest.mark.parametrize("separator", [",", ";"])
def test_no_cell_of_a_table_without_a_header_stands_in_the_error(
    tmp_path: Path, read: Callable[[Path], object], separator: str
) -> None:
    table = write_table(tmp_path / "t.csv", separator.join(ROW), separator.join(ROW))
    with pytest.raises(DataError, match="is the header missing") as raised:
        read(table)
    told = str(raised.value).replace(str(table), "").lower()
    assert not [cell for cell in ROW if cell.lower() in told]


def test_a_header_is_told_by_any_column_that_is_known_or_given(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", "Bild,Befund,Notiz")
    with pytest.raises(DataError, match="the patient; say which is; the columns there are: bild, befund, notiz"):
        read_csv(table, columns={"path": "Bild", "label": "Befund"})
    with pytest.raises(DataError, match="AccessionNumber or filename; the columns there are: label, notiz"):
        read_labels(write_table(tmp_path / "l.csv", "label,Notiz"))
