"""What is learnt about a DICOM image, and how it stands malformed and hostile files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    RLELossless,
)

from pneumofed.common.errors import ImageError, SkipReason
from pneumofed.common.imaging.images import read_image
from pneumofed.common.imaging.types import Image
from tests.dicom_factory import PATIENT_ID, PATIENT_NAME, dicom_bytes, draw_radiograph, lut_item, write_dicom
from tests.hostile import mutate, read_or_reason

STORED = draw_radiograph()
PLAIN = (STORED - STORED.min()) / (STORED.max() - STORED.min())


def test_what_the_file_says_is_kept(tmp_path: Path) -> None:
    tags = {"ViewPosition": "PA", "PatientSex": "F", "Manufacturer": "Acme", "ManufacturerModelName": "Ray 2", "Modality": "CR"}
    info = read_image(write_dicom(tmp_path / "a.dcm", STORED, BitsStored=12, PatientAge="032Y", **tags)).info
    assert (info.format, info.height_px, info.width_px, info.bits) == ("dicom", 40, 36, 12)
    assert (info.modality, info.view, info.sex, info.age_years) == ("CR", "PA", "F", 32)
    assert (info.manufacturer, info.photometric, info.window, info.inverted) == ("Acme Ray 2", "MONOCHROME2", None, False)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_a_file_without_preamble_is_known_as_dicom(tmp_path: Path, syntax: UID) -> None:
    path = write_dicom(tmp_path / "a", STORED, syntax=syntax, preamble=False)
    np.testing.assert_allclose(read_image(path).pixels, PLAIN, atol=1e-6)


def test_what_the_file_does_not_say_is_none(tmp_path: Path) -> None:
    info = read_image(write_dicom(tmp_path / "a.dcm", STORED, Modality=None, PatientSex="O", ViewPosition="")).info
    assert (info.modality, info.view, info.sex, info.age_years, info.manufacturer) == (None,) * 5


@pytest.mark.parametrize(
    ("age", "years"),
    [
        ("010Y", 10),
        ("006M", 0.5),
        ("026W", 182 / 365.25),
        ("007D", 7 / 365.25),
        ("000Y", 0),
        ("12", None),
        ("old", None),
        ("", None),
    ],
)
def test_ages_become_years(tmp_path: Path, age: str, years: float | None) -> None:
    path = write_dicom(tmp_path / "a.dcm", STORED, syntax=ImplicitVRLittleEndian, text={"PatientAge": age})
    assert read_image(path).info.age_years == (None if years is None else pytest.approx(years))


def test_nothing_identifies_the_patient(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", STORED, ViewPosition="AP")
    shown = repr(read_image(path).info)
    assert PATIENT_NAME not in shown
    assert PATIENT_ID not in shown


@pytest.mark.parametrize(
    "text",
    [
        {"WindowCenter": "40", "WindowWidth": "0"},
        {"WindowCenter": "40", "WindowWidth": "-10"},
        {"WindowCenter": "wide", "WindowWidth": "narrow"},
        {"WindowCenter": "", "WindowWidth": ""},
        {"WindowCenter": "40"},
        {"WindowCenter": "nan", "WindowWidth": "inf"},
        {"RescaleSlope": "0", "RescaleIntercept": "none"},
        {"RescaleSlope": "1,5"},
        {"VOILUTFunction": "CUBIC"},
        {"NumberOfFrames": ""},
        {"NumberOfFrames": "one"},
        {"NumberOfFrames": "0"},
        {"PatientAge": "\\"},
        {"PatientSex": "M\\F\\O"},
    ],
)
def test_malformed_tags_count_as_absent(tmp_path: Path, text: dict[str, str]) -> None:
    path = write_dicom(tmp_path / "a.dcm", STORED, syntax=ImplicitVRLittleEndian, text=text)
    np.testing.assert_allclose(read_image(path).pixels, PLAIN, atol=1e-6)


def test_the_first_usable_window_is_applied(tmp_path: Path) -> None:
    text = {"WindowCenter": "5\\2000\\7", "WindowWidth": "0\\1000"}
    path = write_dicom(tmp_path / "a.dcm", STORED, syntax=ImplicitVRLittleEndian, text=text)
    window = read_image(path).info.window
    assert window is not None
    assert (window.center, window.width) == (2000, 1000)


@pytest.mark.parametrize("keyword", ["ModalityLUTSequence", "VOILUTSequence"])
def test_the_last_entry_goes_on_where_a_lookup_table_is_too_short(tmp_path: Path, keyword: str) -> None:
    item = lut_item(0, np.array([0, 100, 200]), 12)
    item.LUTDescriptor = [4096, 0, 12]
    path = write_dicom(tmp_path / "a.dcm", STORED % 6, **{keyword: [item]})
    full_scale = 200 if keyword == "ModalityLUTSequence" else 255
    np.testing.assert_allclose(read_image(path).pixels, np.minimum(STORED % 6, 2) * 100 / full_scale, atol=1e-6)


@pytest.mark.parametrize("malformed", [{"LUTDescriptor": None}, {"LUTData": None}, {"LUTData": b""}, {"LUTDescriptor": [9, 0]}])
def test_an_incomplete_lookup_table_counts_as_absent(tmp_path: Path, malformed: dict[str, Any]) -> None:
    item = lut_item(0, np.arange(4096)[::-1], 12)
    for keyword, value in malformed.items():
        item[keyword].value = value
    path = write_dicom(tmp_path / "a.dcm", STORED, VOILUTSequence=[item], ModalityLUTSequence=[])
    np.testing.assert_allclose(read_image(path).pixels, PLAIN, atol=1e-6)


def test_an_error_quotes_no_tag(tmp_path: Path) -> None:
    text = {"Rows": PATIENT_NAME, "Columns": PATIENT_NAME}
    with pytest.raises(ImageError) as caught:
        read_image(write_dicom(tmp_path / "a.dcm", STORED, syntax=ImplicitVRLittleEndian, text=text))
    assert "Doe" not in str(caught.value)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless, JPEGLosslessSV1])
def test_a_file_that_ends_within_its_pixels_is_corrupt(tmp_path: Path, syntax: UID) -> None:
    path = tmp_path / "a.dcm"
    path.write_bytes(dicom_bytes(STORED, syntax=syntax)[:-500])
    assert read_or_reason(path) == SkipReason.CORRUPT


def test_fewer_pixels_than_declared_are_corrupt(tmp_path: Path) -> None:
    assert read_or_reason(write_dicom(tmp_path / "a.dcm", STORED, Rows=41)) == SkipReason.CORRUPT


@pytest.mark.parametrize("name", ["MR_truncated.dcm", "rtplan.dcm", "no_meta.dcm", "liver_1frame.dcm", "zipMR.gz"])
def test_other_writers_unusable_files_are_refused(name: str) -> None:
    with pytest.raises(ImageError):
        read_image(str(get_testdata_file(name, download=False)))


@pytest.mark.parametrize(
    "syntax",
    [ImplicitVRLittleEndian, RLELossless, JPEGBaseline8Bit, JPEGLosslessSV1, JPEG2000Lossless],
    ids=lambda uid: uid.keyword,
)
def test_mutated_files_give_an_image_or_an_image_error(tmp_path: Path, syntax: UID) -> None:
    tags: dict[str, Any] = {"WindowCenter": [100, 50], "WindowWidth": [200, 90], "PixelPaddingValue": 0, "PatientAge": "012Y"}
    data = dicom_bytes(draw_radiograph("u1", 8), syntax=syntax, VOILUTSequence=[lut_item(0, np.arange(256), 8)], **tags)
    generator, path = np.random.default_rng(0), tmp_path / "a.dcm"
    for _ in range(80):
        path.write_bytes(mutate(data, generator))
        outcome = read_or_reason(path)
        if isinstance(outcome, Image):
            assert outcome.pixels.dtype == np.float32
            assert 0 <= outcome.pixels.min() < outcome.pixels.max() <= 1


def test_damaged_jpeg_ls_gives_an_image_or_an_image_error(tmp_path: Path) -> None:
    bundled, path = Path(str(get_testdata_file("MR_small_jpeg_ls_lossless.dcm", download=False))), tmp_path / "a.dcm"
    data, generator = bundled.read_bytes(), np.random.default_rng(0)
    header = len(data) - len(pydicom.dcmread(bundled).PixelData)
    for _ in range(50):
        path.write_bytes(data[:header] + mutate(data[header:], generator))
        read_or_reason(path)
