"""What a survey reads of an image: its size and year from the header, and a manufacturer from a list of known ones."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from pydicom import dcmread

from pneumofed.client.federation.survey import VOLUME_IMAGE, count_cells
from pneumofed.common.config.experiment import ImageConfig
from pneumofed.common.data.dataset import load_dataset
from pneumofed.common.data.manifest import ImageRecord, Manifest
from pneumofed.common.imaging.dicom_header import Acquisition, read_acquisition
from pneumofed.common.imaging.volumes import fit_volume, mean_hounsfield, read_volume
from pneumofed.common.wire.survey import NOT_STATED, manufacturer_of, survey_fields
from pneumofed.simulation.phantoms.ct_sets import encode_series
from pneumofed.simulation.phantoms.scanners import Examination
from pneumofed.simulation.phantoms.thorax import VoxelGrid
from tests.dicom_factory import dicom_bytes

PIXELS = np.random.default_rng(0).integers(0, 255, (300, 600)).astype(np.uint8)


def write_dicom(path: Path, **tags: Any) -> Path:
    path.write_bytes(dicom_bytes(PIXELS, Modality="DX", BodyPartExamined="CHEST", **tags))
    return path


def test_size_and_year_come_from_the_header(tmp_path: Path) -> None:
    dated = write_dicom(tmp_path / "a.dcm", StudyDate="20170304")
    assert read_acquisition(dated) == Acquisition(300, 600, 2017)
    assert read_acquisition(write_dicom(tmp_path / "b.dcm", StudyDate="")) == Acquisition(300, 600, None)
    PIL.Image.fromarray(PIXELS).save(tmp_path / "c.png")
    assert read_acquisition(tmp_path / "c.png") is None
    (tmp_path / "d.dcm").write_bytes(dated.read_bytes()[:200])
    assert read_acquisition(tmp_path / "d.dcm") is None
    assert read_acquisition(tmp_path / "missing.dcm") is None


def test_cells_of_a_dicom_file_and_of_a_picture(tmp_path: Path) -> None:
    dicom = ImageRecord(
        write_dicom(tmp_path / "a.dcm", StudyDate="20170304"), "one", "normal", view="PA", sex="F", age_years=70.0
    )
    PIL.Image.fromarray(np.kron(PIXELS[:, :300], np.ones((8, 8), np.uint8))).save(tmp_path / "b.png")
    picture = replace(dicom, path=tmp_path / "b.png", patient="two", label="viral", view="frontal", sex=None, age_years=None)
    dataset = load_dataset(Manifest((dicom, picture)), "binary", ImageConfig(size_px=32), tmp_path / "cache")
    assert set(count_cells(dataset, ["hounsfield"])["hounsfield"].values()) == {NOT_STATED}
    cells = count_cells(dataset, ["label", "view", "sex", "age", "year", "image_size", "manufacturer"])
    assert {field: (found["one"], found["two"]) for field, found in cells.items()} == {
        "label": ("normal", "viral"),
        "view": ("PA", NOT_STATED),
        "sex": ("F", NOT_STATED),
        "age": ("older_adult", NOT_STATED),
        "year": ("2015-2019", NOT_STATED),
        "image_size": ("256-511", "2048 and above"),
        "manufacturer": (NOT_STATED, NOT_STATED),
    }


def test_cells_of_a_ct_series(tmp_path: Path) -> None:
    hounsfield = np.full((12, 64, 64), -1000, np.int16)
    hounsfield[:, 8:56, 8:56] = -200
    grid = VoxelGrid(12, 64, 64)
    examination = Examination(image="a", manufacturer="SIEMENS", is_drawn=True, patient="P1", sex="F", age_years=70)
    (tmp_path / "series").mkdir()
    for number, data in enumerate(encode_series(hounsfield, grid, examination)):
        plane = dcmread(BytesIO(data))
        plane.StudyDate = "20170304"
        plane.save_as(tmp_path / "series" / f"{number}.dcm")
    record = ImageRecord(tmp_path / "series", "one", "viral", sex="F", age_years=70.0, manufacturer="SIEMENS")
    dataset = load_dataset(Manifest((record,)), "binary", VOLUME_IMAGE, tmp_path / "cache")
    cells = count_cells(dataset, survey_fields(volumes=True))
    assert {field: found["one"] for field, found in cells.items()} == {
        "label": "viral", "sex": "F", "age": "older_adult", "manufacturer": "Siemens", "year": "2015-2019", "image_size": "below 256",
        "images": "1", "slices": "below 50", "slice_step": "5 and above", "hounsfield": "-800 to -701",
    }  # fmt: skip
    others = count_cells(dataset, ["view", "grey_level", "contrast"])  # whoever asks for them is told none
    assert {cell for found in others.values() for cell in found.values()} == {NOT_STATED}
    exact = fit_volume(read_volume(tmp_path / "series"), 400, 400).astype(float)  # a millimetre a voxel
    assert mean_hounsfield(dataset.pixels[0]) == pytest.approx(-600 + (exact.mean() / 255 - 0.5) * 1500, abs=10)


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("GE Healthcare", "GE"),
        ('"GE MEDICAL SYSTEMS"', "GE"),
        ("FUJIFILM Corporation", "Fujifilm"),
        ("KONICA MINOLTA", "Konica Minolta"),
        ("Eastman Kodak Company", "Carestream"),
        ("SIEMENS Healthineers", "Siemens"),
        ("Agency of Dr. Doe", "another"),
        ("   ", None),
        (None, None),
    ],
)
def test_a_manufacturer_is_a_known_one_or_another(text: str | None, known: str | None) -> None:
    assert manufacturer_of(text) == known
