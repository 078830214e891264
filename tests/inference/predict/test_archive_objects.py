"""Structured Reports and secondary captures."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from pneumofed.common.imaging.images import fit_square, read_image
from pneumofed.common.model_bundle.predictor import Predictor
from pneumofed.inference.predict.dicom_contents import STATEMENT, place_map
from pneumofed.inference.predict.dicom_objects import ArchiveWriter
from pneumofed.inference.predict.predict import FileResult, judge_files
from tests.inference.predict.pictures import PATIENT, STUDY, write_phantom, write_png
from tests.orthanc import run_orthanc


def write(path: Path, predictor: Predictor, out: Path) -> FileResult:
    (result,) = judge_files([path], predictor, workers=1)
    return ArchiveWriter(predictor, out / "sr", out / "overlay").write(result)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, predictor: Predictor) -> FileResult:
    folder = tmp_path_factory.mktemp("written")
    return write(write_phantom(folder / "DOE_JANE.dcm", 1, SpecificCharacterSet="ISO_IR 100"), predictor, folder)


@pytest.fixture(scope="module")
def report(written: FileResult) -> Dataset:
    return dcmread(written.report)


@pytest.fixture(scope="module")
def capture(written: FileResult) -> Dataset:
    return dcmread(written.overlay)


def items(content: Any) -> list[Dataset]:
    """All content items of a report, parents first."""
    below = [item for child in content.get("ContentSequence", []) for item in items(child)]
    return [content, *below]


def named(report: Dataset, meaning: str) -> list[Dataset]:
    return [item for item in items(report) if item.ConceptNameCodeSequence[0].CodeMeaning == meaning]


def number(report: Dataset, meaning: str) -> float:
    (item,) = named(report, meaning)
    return float(item.MeasuredValueSequence[0].NumericValue)


def test_objects_belong_to_the_patient_and_study_of_the_image(report: Dataset, capture: Dataset) -> None:
    for made in (report, capture):
        for keyword, value in PATIENT.items():
            assert str(made[keyword].value) == value
        assert (made.StudyInstanceUID, made.AccessionNumber, made.StudyDate) == (STUDY, "ACC-9", "20240102")
        assert made.SeriesInstanceUID != f"{STUDY}.1"
        assert made.SOPInstanceUID != f"{STUDY}.1.2"
    assert report.SeriesInstanceUID != capture.SeriesInstanceUID


def test_the_report_holds_the_prediction(report: Dataset, written: FileResult, predictor: Predictor) -> None:
    found = written.prediction
    assert found is not None
    assert number(report, "Probability") == pytest.approx(100 * found.probability, abs=1e-3)
    assert number(report, "Lower limit of the 95 % interval of the probability") == pytest.approx(100 * found.low, abs=1e-3)
    assert number(report, "Threshold Value") == pytest.approx(100 * predictor.manifest.threshold.value, abs=1e-3)
    (presence,) = named(report, "Presence")
    expected = {"pneumonia": "Present", "normal": "Absent"}[found.decision]
    assert presence.ConceptCodeSequence[0].CodeMeaning == expected
    (finding,) = named(report, "Finding")
    assert (finding.ConceptCodeSequence[0].CodeValue, finding.ConceptCodeSequence[0].CodingSchemeDesignator) == (
        "233604007",
        "SCT",
    )
    assert predictor.bundle.digest in {item.get("TextValue") for item in items(report)}
    assert any("not a diagnosis" in item.get("TextValue", "") for item in items(report))


def test_the_report_names_the_image_and_claims_no_physician(report: Dataset) -> None:
    references = [item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for item in items(report) if item.ValueType == "IMAGE"]
    assert references == [f"{STUDY}.1.2"]
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    assert evidence.ReferencedSOPInstanceUID == f"{STUDY}.1.2"
    assert (report.VerificationFlag, report.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")


def test_an_image_that_cannot_be_judged_is_reported_without_numbers(tmp_path: Path, predictor: Predictor) -> None:
    row = write(write_phantom(tmp_path / "a.dcm", ViewPosition="LL"), predictor, tmp_path)
    report = dcmread(row.report)
    assert named(report, "Presence")[0].ConceptCodeSequence[0].CodeMeaning == "Undetermined"
    assert not [item for item in items(report) if item.ValueType == "NUM"]
    assert any("cannot be judged" in item.get("TextValue", "") for item in items(report))
    assert row.overlay == ""


def test_the_capture_shows_the_image_with_a_band_of_words(capture: Dataset, written: FileResult) -> None:
    source = read_image(written.loaded.path).pixels
    height, width = (length * capture.Columns // source.shape[1] for length in source.shape)
    assert (capture.Columns, max(height, width), capture.SamplesPerPixel) == (
        width,
        512,
        3,
    )  # a small image is enlarged for the words
    assert capture.Rows > height
    picture = capture.pixel_array[:height].astype(float) / 255
    enlarged = np.asarray(PIL.Image.fromarray(source).resize((width, height), PIL.Image.Resampling.BILINEAR))
    cold = np.ptp(picture, axis=2) == 0  # no heat: the image as it is
    assert cold.any()
    np.testing.assert_allclose(picture[cold].mean(axis=1), enlarged[cold], atol=0.01)
    assert capture.pixel_array[height:].max() > 100
    assert capture.ImageComments == STATEMENT
    assert capture.SourceImageSequence[0].ReferencedSOPInstanceUID == f"{STUDY}.1.2"
    assert "BurnedInAnnotation" not in capture


def test_a_second_run_adds_to_the_same_series(tmp_path: Path, predictor: Predictor, report: Dataset) -> None:
    again = dcmread(write(write_phantom(tmp_path / "a.dcm", 1), predictor, tmp_path).report)
    assert again.SeriesInstanceUID == report.SeriesInstanceUID
    assert again.SOPInstanceUID != report.SOPInstanceUID


def test_sparse_headers_are_enough_and_hopeless_ones_are_noted(tmp_path: Path, predictor: Predictor) -> None:
    empty: dict[str, Any] = dict.fromkeys(
        (*PATIENT, "StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName")
    )
    row = write(write_phantom(tmp_path / "sparse.dcm", **empty), predictor, tmp_path)
    assert dcmread(row.report).PatientID in (None, "")
    assert dcmread(row.overlay).PatientName in (None, "")
    row = write(write_phantom(tmp_path / "hopeless.dcm", SeriesInstanceUID=None), predictor, tmp_path)
    assert (row.report, row.overlay) == ("", "")
    assert row.note.count("header does not allow") == 2


def test_names_beyond_latin_survive(tmp_path: Path, predictor: Predictor) -> None:
    tags: dict[str, Any] = {"SpecificCharacterSet": "ISO_IR 192", "PatientName": "Wang^XiaoDong=王^小东"}
    row = write(write_phantom(tmp_path / "a.dcm", **tags), predictor, tmp_path)
    for path in (row.report, row.overlay):
        assert str(dcmread(path).PatientName) == "Wang^XiaoDong=王^小东"


def test_a_picture_gets_a_png(tmp_path: Path, predictor: Predictor) -> None:
    row = write(write_png(tmp_path / "a.png"), predictor, tmp_path)
    assert row.report == ""
    assert "no DICOM file" in row.note
    with PIL.Image.open(row.overlay) as picture:
        assert picture.mode == "RGB"


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(40, 200),
    width=st.integers(40, 200),
    row=st.floats(0.1, 0.9),
    column=st.floats(0.1, 0.9),
    fit=st.sampled_from(["pad", "crop"]),
)
def test_heat_lies_where_the_network_saw_it(height: int, width: int, row: float, column: float, fit: Any) -> None:
    """The oracle: a spot in the image, brought to the model's square and back by the map, lies where it was."""
    top, left = int(row * height), int(column * width)
    rows, columns = np.indices((height, width))
    image = np.exp(-((rows - top) ** 2 + (columns - left) ** 2) / 50).astype(np.float32)
    square = fit_square(image, 64, fit)
    placed = place_map(square, image.shape, fit)
    assert placed.shape == image.shape
    if square.max() > 0.5:
        found = np.unravel_index(placed.argmax(), placed.shape)
        assert abs(found[0] - top) <= 5
        assert abs(found[1] - left) <= 5


@pytest.mark.parametrize("tool", ["dsrdump", "dcmdump"])
def test_dcmtk_reads_what_was_written(written: FileResult, tool: str) -> None:
    program = shutil.which(tool)
    if program is None:
        pytest.skip("needs dcmtk")
    files = [written.report] if tool == "dsrdump" else [written.report, written.overlay]
    for path in files:
        found = subprocess.run([program, path], capture_output=True, text=True, timeout=30, check=False)
        assert found.returncode == 0, found.stderr
        assert not [line for line in found.stderr.splitlines() if line.startswith(("E:", "F:"))]
        assert "AI result" in found.stdout or "Pneumonia" in found.stdout


@pytest.mark.slow
def test_an_archive_takes_both_into_the_study(written: FileResult, tmp_path: Path) -> None:
    with run_orthanc(tmp_path) as archive:
        for path in (written.loaded.path, written.report, written.overlay):
            archive.upload(Path(path).read_bytes())
        (study,) = archive.ask("/studies")
        series = [archive.ask(f"/series/{name}")["MainDicomTags"] for name in archive.ask(f"/studies/{study}")["Series"]]
        assert sorted(tags["Modality"] for tags in series) == ["DX", "OT", "SR"]
        assert archive.ask(f"/studies/{study}")["PatientMainDicomTags"]["PatientID"] == "MRN-1001"


CHARACTER_SETS = {
    "\\ISO 2022 IR 87": ("Yamada^Tarou=\u5c71\u7530^\u592a\u90ce", ["", "ISO 2022 IR 87"]),
    "\\ISO 2022 IR 149": ("Hong^Gildong=\u6d2a^\u5409\u6d1e=\ud64d^\uae38\ub3d9", ["", "ISO 2022 IR 149"]),
    "ISO_IR 100": ("M\u00fcller^J\u00f6rg", "ISO_IR 100"),
    "GB18030": ("Wang^XiaoDong=\u738b^\u5c0f\u4e1c", "GB18030"),
    "GB2312": ("Wang^XiaoDong=\u738b^\u5c0f\u4e1c", "GB18030"),
}


@pytest.mark.parametrize("name", CHARACTER_SETS)
def test_names_in_any_character_set_are_written_in_utf_8(name: str, tmp_path: Path, predictor: Predictor) -> None:
    person, encoding = CHARACTER_SETS[name]
    path = write_phantom(tmp_path / "a.dcm", 1, PatientName=person, SpecificCharacterSet=encoding)
    if name == "GB2312":  # as some writers call it
        path.write_bytes(path.read_bytes().replace(b"CS\x08\x00GB18030 ", b"CS\x06\x00GB2312"))
    result = write(path, predictor, tmp_path)
    assert not result.note
    for made in (dcmread(result.report), dcmread(result.overlay)):
        assert (str(made.PatientName), made.SpecificCharacterSet) == (person, "ISO_IR 192")


@pytest.mark.parametrize(
    ("keyword", "value", "kept"),
    [
        ("PatientSex", "U", ""),
        ("PatientSex", "O", "O"),
        ("PatientBirthDate", "00000000", ""),
        ("PatientBirthDate", "19510230", ""),
        ("PatientBirthDate", "1951.03.17", "19510317"),
        ("StudyTime", "10:11:12", "101112"),
        ("StudyTime", "25:99", ""),
        ("StudyDate", "yesterday", ""),
    ],
)
def test_a_bad_value_is_left_empty_and_costs_nothing_else(
    keyword: str, value: str, kept: str, tmp_path: Path, predictor: Predictor
) -> None:
    data = write_phantom(tmp_path / "a.dcm", 1)
    dataset = dcmread(data)
    dataset[keyword] = DataElement(Tag(keyword), dictionary_VR(keyword), value, validation_mode=0)
    dataset.save_as(tmp_path / "b.dcm")
    result = write(tmp_path / "b.dcm", predictor, tmp_path)
    assert not result.note
    for made in (dcmread(result.report), dcmread(result.overlay)):
        assert str(made.get(keyword) or "") == kept
        assert (made.PatientID, made.AccessionNumber) == (dataset.PatientID, dataset.AccessionNumber)
