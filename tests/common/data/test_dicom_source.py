"""Labels for a folder of DICOM files: by which keys they are found, and which files are counted as unusable."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from pneumofed.common.data.sources.dicom import read_dicom_folder
from pneumofed.common.errors import DataError, ImageError, SkipReason
from pneumofed.common.imaging.dicom_header import read_header
from tests.common.data.conftest import write_table
from tests.dicom_factory import dicom_bytes, draw_radiograph

DX_IMAGE = UID("1.2.840.10008.5.1.4.1.1.1.1")


def _write(path: Path, study: str = "1.1", **tags: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = DX_IMAGE
    meta.MediaStorageSOPInstanceUID = UID("1.2.3")
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID = DX_IMAGE
    dataset.StudyInstanceUID = study
    values = {"PatientID": "p", "PatientName": "DOE^JANE", "AccessionNumber": "", "SOPInstanceUID": "1.2.3", **tags}
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize(
    ("column", "key"),
    [("SOPInstanceUID", "9.9"), ("study_uid", "1.7"), ("Accession Number", "A7"), ("filename", "x"), ("file", "sub/x")],
)
def test_labels_are_found_by_any_usual_key(tmp_path: Path, column: str, key: str) -> None:
    tags = {"ViewPosition": "PA", "PatientSex": "F", "PatientAge": "063Y", "Manufacturer": "ACME"}
    path = _write(
        tmp_path / "dicom" / "sub" / "x", study="1.7", SOPInstanceUID="9.9", AccessionNumber="A7", PatientID="p7", **tags
    )
    manifest, report = read_dicom_folder(
        tmp_path / "dicom", write_table(tmp_path / "t.csv", f"{column},label", f"{key},PNEUMONIA")
    )
    record = manifest.records[0]
    assert (record.path, record.patient, record.label, record.view) == (path, "p7", "pneumonia", "PA")
    assert (record.sex, record.age_years, record.manufacturer) == ("F", 63.0, "ACME")
    assert report.used == report.found == 1


def test_the_most_exact_key_decides(tmp_path: Path) -> None:
    _write(tmp_path / "dicom" / "1", SOPInstanceUID="1.2.1", AccessionNumber="A")
    _write(tmp_path / "dicom" / "2", SOPInstanceUID="1.2.2", AccessionNumber="A")
    table = write_table(tmp_path / "t.csv", "sop_uid,accession,label", ",A,normal", "1.2.2,,viral")
    assert read_dicom_folder(tmp_path / "dicom", table)[0].labels == ("normal", "viral")


def test_a_bare_name_that_two_files_have_labels_neither(tmp_path: Path) -> None:
    _write(tmp_path / "dicom" / "a" / "IM1")
    _write(tmp_path / "dicom" / "b" / "IM1")
    table = write_table(tmp_path / "t.csv", "file,label", "IM1,normal", "b/IM1,viral")
    manifest, report = read_dicom_folder(tmp_path / "dicom", table)
    assert [(record.path.parent.name, record.label) for record in manifest.records] == [("b", "viral")]
    assert report.skipped == {SkipReason.NO_LABEL: 1}


def test_files_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "dicom"
    for name, tags in {"1": {}, "2": {"PatientID": ""}, "3": {"ViewPosition": "LL"}, "4": {}, "5": {}}.items():
        _write(folder / name, **tags)
    (folder / "letter.txt").write_text("no image")
    (folder / "empty").touch()
    (folder / "DICOMDIR").touch()
    (folder / ".hidden").touch()
    table = write_table(tmp_path / "t.csv", "file,label", "1,normal", "2,normal", "3,normal", "4,banana")
    manifest, report = read_dicom_folder(folder, table)
    assert [record.path.name for record in manifest.records] == ["1"]
    names = ["NO_PATIENT", "NOT_FRONTAL", "UNKNOWN_LABEL", "NO_LABEL", "UNKNOWN_FORMAT", "EMPTY"]
    assert report.skipped == {SkipReason[name]: 1 for name in names}
    assert report.found == 7
    assert len(read_dicom_folder(folder, table, frontal_only=False)[0]) == 2


def test_a_key_with_two_labels_is_named_by_its_row(tmp_path: Path) -> None:
    _write(tmp_path / "dicom" / "1")
    table = write_table(tmp_path / "t.csv", "accession,label", "SECRET,normal", "SECRET,normal", "SECRET,viral")
    with pytest.raises(DataError, match="row 4: column 'accession'") as caught:
        read_dicom_folder(tmp_path / "dicom", table)
    assert "SECRET" not in str(caught.value)


def test_a_table_without_a_key_says_what_is_expected(tmp_path: Path) -> None:
    _write(tmp_path / "dicom" / "1")
    with pytest.raises(DataError, match="expected one named SOPInstanceUID"):
        read_dicom_folder(tmp_path / "dicom", write_table(tmp_path / "t.csv", "number,label"))


def test_a_folder_that_is_missing_or_empty_says_so(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", "accession,label")
    with pytest.raises(DataError, match="cannot be listed"):
        read_dicom_folder(tmp_path / "none", table)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file found"):
        read_dicom_folder(tmp_path / "empty", table)


def test_links_between_folders_are_followed_once(tmp_path: Path) -> None:
    _write(tmp_path / "elsewhere" / "1")
    (tmp_path / "dicom").mkdir()
    (tmp_path / "dicom" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "dicom")
    manifest, _ = read_dicom_folder(tmp_path / "dicom", write_table(tmp_path / "t.csv", "file,label", "1,normal"))
    assert len(manifest) == 1


def test_a_header_is_read_without_preamble_and_from_a_cut_file(tmp_path: Path) -> None:
    whole = _write(tmp_path / "1", PatientID="p7").read_bytes()
    meta_bytes = int.from_bytes(whole[140:144], "little")
    bare, cut = tmp_path / "bare", tmp_path / "cut"
    bare.write_bytes(whole[132:])
    cut.write_bytes(whole[: 144 + meta_bytes + 60])
    assert read_header(bare).patient == "p7"
    assert read_header(cut).patient == ""


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0 a JPEG", bytes(range(256)) * 8, b"\0" * 400])
def test_what_is_no_dicom_has_a_reason_and_no_detail_of_its_content(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ImageError) as caught:
        read_header(tmp_path / "x")
    assert caught.value.reason == (SkipReason.UNKNOWN_FORMAT if content else SkipReason.EMPTY)
    with pytest.raises(ImageError, match="file not found"):
        read_header(tmp_path / "none")


def test_a_deflated_header_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deflated = dicom_bytes(draw_radiograph(), syntax=DeflatedExplicitVRLittleEndian, ImageComments="x" * 10_000)
    (tmp_path / "bomb").write_bytes(deflated)
    assert read_header(tmp_path / "bomb").patient
    monkeypatch.setattr("pneumofed.common.imaging.dicom_pixels.MAX_FILE_BYTES", 5000)
    with pytest.raises(ImageError) as caught:
        read_header(tmp_path / "bomb")
    assert caught.value.reason is SkipReason.TOO_LARGE
