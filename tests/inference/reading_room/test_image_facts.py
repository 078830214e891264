"""What the viewer is told of a file: window and level in the file's own units, the size of a pixel and where it holds, attributes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pneumofed.common.imaging.images import read_image
from pneumofed.inference.reading_room.image_facts import FACTS_FILE, FileFacts, read_facts
from pneumofed.inference.reading_room.viewing import whole_range
from tests.dicom_factory import PATIENT_ID, dicom_bytes, draw_radiograph
from tests.inference.reading_room.stage import Stage, phantom_dicom, phantom_png, upload


def facts_of(path: Path, stored: np.ndarray | None = None, **tags: Any) -> tuple[FileFacts, tuple[float, float]]:
    """The facts of a file, and (level, width) that the page begins with, in the file's units."""
    path.write_bytes(dicom_bytes(draw_radiograph() if stored is None else stored, **tags))
    image = read_image(path)
    _, window, ends = whole_range(path, image)
    facts, _ = read_facts(path, image, ends)
    if facts.values is None:
        return facts, (0, 0)
    low, high = facts.values.low, facts.values.high
    return facts, (low + window.center * (high - low), window.width * abs(high - low))


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("rescale", [(1, 0), (1, -1024), (0.5, 100)])
def test_the_page_begins_with_the_file_s_own_window_and_level(
    tmp_path: Path, photometric: str, rescale: tuple[float, float]
) -> None:
    shown = []
    for least in (0, 700):  # files of one window whose values differ: one reader, one number
        stored = np.maximum(draw_radiograph(), least).astype(np.uint16)
        tags = {"WindowCenter": 300, "WindowWidth": 900, "RescaleSlope": rescale[0], "RescaleIntercept": rescale[1]}
        shown.append(facts_of(tmp_path / "x", stored, PhotometricInterpretation=photometric, **tags)[1])
    np.testing.assert_allclose(shown, [(300, 900)] * 2, atol=0.05)


def test_without_a_window_the_ends_are_the_least_and_greatest_values(tmp_path: Path) -> None:
    stored = np.clip(draw_radiograph(), 41, 3000).astype(np.uint16)
    stored[0, 0] = 40
    tags = {"RescaleSlope": 1, "RescaleIntercept": -1000, "RescaleType": "HU", "WindowCenter": None, "WindowWidth": None}
    facts, _ = facts_of(tmp_path / "x", stored, **tags)
    assert facts.values is not None
    assert (facts.values.low, facts.values.high, facts.values.unit) == (
        pytest.approx(-959.5, abs=0.05),
        pytest.approx(2000.5, abs=0.05),
        "HU",
    )


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"ImagerPixelSpacing": [0.2, 0.2]}, (0.2, "detector")),
        ({"PixelSpacing": [0.2, 0.2], "ImagerPixelSpacing": [0.2, 0.2]}, (0.2, "detector")),
        ({"PixelSpacing": [0.17, 0.17], "ImagerPixelSpacing": [0.2, 0.2]}, (0.17, "calibrated")),
        ({"PixelSpacing": [0.2, 0.2], "PixelSpacingCalibrationType": "GEOMETRY"}, (0.2, "calibrated")),
        ({"PixelSpacing": [0.2, 0.2]}, (0.2, "detector")),
        ({"PixelSpacing": [0.7, 0.7], "Modality": "CT"}, (0.7, "patient")),
        ({"NominalScannedPixelSpacing": [0.1, 0.1]}, (0.1, "film")),
        ({"ImagerPixelSpacing": [0.0, 0.0]}, None),
        ({}, None),
    ],
)
def test_the_size_of_a_pixel_says_where_it_holds(
    tmp_path: Path, tags: dict[str, Any], expected: tuple[float, str] | None
) -> None:
    pixel = facts_of(tmp_path / "x", **tags)[0].pixel
    assert (pixel and (pixel.row_mm, pixel.column_mm, pixel.kind)) == (expected and (expected[0], *expected))


def test_the_size_is_that_of_the_stretched_pixels(tmp_path: Path) -> None:
    pixel = facts_of(tmp_path / "x", ImagerPixelSpacing=[0.4, 0.2])[0].pixel
    assert pixel is not None
    assert (pixel.row_mm, pixel.column_mm) == (pytest.approx(0.2), pytest.approx(0.2))


def test_what_is_kept_names_nobody_and_the_name_goes_to_the_sender_only(stage: Stage) -> None:
    secret = {
        "PatientName": "Doe^Jane", "ReferringPhysicianName": "House^G", "InstitutionName": "Doe Clinic", "ProtocolName": "JANE DOE",
        "BodyPartExamined": "DOE JANE", "ImageComments": "of Jane", "StudyDescription": "Jane", "StationName": "JANE", "KVP": 117,
    }  # fmt: skip
    with stage.signed_in() as client:
        (sent,) = upload(client, phantom_dicom(0, **secret))
        assert sent["patient_name"] == "Doe Jane"
        found = client.get(f"/api/cases/{sent['case']}").json()
        text = (stage.room.store.path(sent["case"]) / FACTS_FILE).read_text()
        for word in ("jane", "doe", "house", PATIENT_ID.lower()):
            assert word not in text.lower()
        attributes = {one["name"]: one["value"] for one in found["image"]["facts"]["attributes"]}
        assert attributes["KVP"] in ("117", "117.0")
        assert "Jane" not in client.get(f"/api/cases/{sent['case']}").text


def test_other_files_have_grey_levels_and_cases_of_earlier_versions_nothing(stage: Stage) -> None:
    with stage.signed_in() as client:
        (sent,) = upload(client, phantom_png())
        of_png = client.get(f"/api/cases/{sent['case']}").json()["image"]["facts"]
        (stage.room.store.path(sent["case"]) / FACTS_FILE).unlink()
        of_old = client.get(f"/api/cases/{sent['case']}").json()["image"]["facts"]
    assert of_png == {"values": {"low": 0, "high": 255, "unit": ""}, "pixel": None, "attributes": [], "series": None}
    assert of_old == {"values": None, "pixel": None, "attributes": [], "series": None}
