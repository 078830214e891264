"""DICOM files of drawn pictures: valid, pure, and read back as they were drawn."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from shutil import which

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.pixels import apply_voi_lut

from pneumofed.client.archive.deidentify import deidentify, is_burnt_in
from pneumofed.common.imaging.dicom_header import Pseudonyms
from pneumofed.common.imaging.images import read_image
from pneumofed.simulation.phantoms.scanners import Examination, encode_dicom, make_uid

DRAWN = Examination("one", "phantom", is_drawn=True, patient="A1", view="PA", sex="F", age_years=4)
REAL = Examination("two", "virtual scanner 2", is_drawn=False)


def draw(height: int = 40, width: int = 36, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((height, width), dtype=np.float32)


@settings(max_examples=30, deadline=None)
@given(height=st.integers(16, 60), width=st.integers(16, 60), seed=st.integers(0, 2**32), monochrome1=st.booleans())
def test_pixels_come_back_within_half_a_grey_level(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, seed: int, monochrome1: bool
) -> None:
    pixels = draw(height, width, seed)
    pixels[0, 0], pixels[-1, -1] = 0.0, 1.0
    path = tmp_path_factory.mktemp("dicom") / "a"
    path.write_bytes(encode_dicom(pixels, replace(DRAWN, monochrome1=monochrome1)))
    image = read_image(path)
    assert image.pixels.shape == pixels.shape and np.abs(image.pixels - pixels).max() <= 0.5 / 4095 + 1e-6
    assert image.pixels[0, 0] == 0.0 and image.pixels[-1, -1] == 1.0
    assert image.info.inverted == monochrome1 and (image.info.bits, image.info.modality) == (12, "DX")


@pytest.mark.parametrize("monochrome1", [False, True])
def test_another_reader_shows_the_same(monochrome1: bool) -> None:
    pixels = draw()
    dataset = dcmread(BytesIO(encode_dicom(pixels, replace(DRAWN, monochrome1=monochrome1))))
    shown = apply_voi_lut(dataset.pixel_array, dataset)
    shown = 4095 - shown if dataset.PhotometricInterpretation == "MONOCHROME1" else shown
    assert np.abs(shown / 4095 - pixels).max() <= 0.5 / 4095 + 1e-6


@pytest.mark.parametrize(("years", "text"), [(1.5, "018M"), (0.25, "003M"), (2, "002Y"), (89.9, "089Y")])
def test_tags_say_what_the_examination_says(years: float, text: str) -> None:
    dataset = dcmread(BytesIO(encode_dicom(draw(35, 70), replace(DRAWN, age_years=years))))
    assert (dataset.PatientID, dataset.PatientSex, dataset.PatientAge, dataset.ViewPosition) == ("A1", "F", text, "PA")
    assert dataset.ImagerPixelSpacing == dataset.PixelSpacing == [5.0, 5.0]
    assert dataset.SOPInstanceUID == DRAWN.sop_uid == dataset.file_meta.MediaStorageSOPInstanceUID


def test_files_are_pure_and_uids_differ_where_images_do() -> None:
    assert encode_dicom(draw(), DRAWN) == encode_dicom(draw(), DRAWN)
    uids = {make_uid(kind, image) for kind in ("image", "study") for image in ("one", "two")}
    assert len(uids) == 4 and all(uid.is_valid and uid.startswith("2.25.") for uid in uids)


def test_a_real_image_names_nobody_and_a_drawn_one_stays_marked_where_an_archive_is_read() -> None:
    real = dcmread(BytesIO(encode_dicom(draw(), REAL)))
    assert not real.PatientName and not real.PatientID and is_burnt_in(real)
    drawn = dcmread(BytesIO(encode_dicom(draw(), DRAWN)))
    assert drawn.PatientName and not is_burnt_in(drawn)
    clean = deidentify(drawn, Pseudonyms(bytes(32)))
    assert clean.Manufacturer == "phantom" and clean.PatientID != "A1"


@pytest.mark.skipif(which("dcm2pnm") is None, reason="needs dcm2pnm of dcmtk")
@pytest.mark.parametrize("monochrome1", [False, True])
def test_dcmtk_shows_it_the_right_way_round(tmp_path: Path, monochrome1: bool) -> None:
    pixels = np.tile(np.linspace(0.0, 1.0, 64, dtype=np.float32), (32, 1))
    (tmp_path / "a.dcm").write_bytes(encode_dicom(pixels, replace(DRAWN, monochrome1=monochrome1)))
    subprocess.run(["dcm2pnm", "+Wi", "1", "+on", "a.dcm", "a.png"], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert np.abs(read_image(tmp_path / "a.png").pixels - pixels).max() < 0.01
