"""Phantom radiographs as files, for tests of all that judges files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from tests.dicom_factory import write_dicom
from tests.model_bundles import phantom_images

STUDY = "1.2.826.0.1.3680043.8.498.1"
PATIENT = {"PatientID": "MRN-1001", "PatientName": "Doe^Jane", "PatientBirthDate": "19700101", "PatientSex": "F"}


def phantom(number: int, seed: int = 5) -> np.ndarray:
    """float32 [64, W] in [0, 1]: a phantom that the test bundle has not seen."""
    return phantom_images(24, seed)[number][0].pixels


def write_png(path: Path, number: int = 0) -> Path:
    PIL.Image.fromarray(np.rint(255 * phantom(number)).astype(np.uint8)).save(path)
    return path


def write_phantom(path: Path, number: int = 0, **tags: Any) -> Path:
    """The phantom as a complete DX image of the patient `PATIENT`; `tags` replace or (None) remove tags."""
    values = {
        **PATIENT,
        "StudyInstanceUID": STUDY,
        "SeriesInstanceUID": f"{STUDY}.1",
        "SOPInstanceUID": f"{STUDY}.1.{number + 1}",
        "StudyDate": "20240102",
        "StudyTime": "101500",
        "StudyID": "77",
        "AccessionNumber": "ACC-9",
        "ReferringPhysicianName": "Roe^Richard",
        "ViewPosition": "PA",
        "BodyPartExamined": "CHEST",
        "BitsStored": 12,
        **tags,
    }
    return write_dicom(path, np.rint(4095 * phantom(number)).astype(np.uint16), **values)
