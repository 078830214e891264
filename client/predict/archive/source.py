"""The image that a judgement is about, as the archive knows it: its header, complete enough to derive objects from."""

from __future__ import annotations

from pathlib import Path

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import UID

from common.dicom.header import read_header
from common.quiet import quiet_warnings

_NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
"""Type 1 of the Study, Series and SOP Common modules (PS3.3, C.7.2.1, C.7.3.1, C.12.1): nothing can refer to an image without them."""
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
)
"""Type 2 of the Patient and General Study modules (PS3.3, C.7.1.1 and C.7.2.1): empty where the source lacks them."""


def read_source_header(path: Path) -> Dataset:
    """The header of the DICOM file `path` without its pixels; tags of type 2 that it lacks are there and empty.

    Raises:
        ImageError: the file is no DICOM file any more.
        ValueError: it lacks a UID that a derived object must name; the text holds the tag's keyword alone.
    """
    read_header(path)  # checks the size of a deflated header first
    with quiet_warnings():
        dataset = dcmread(path, stop_before_pixels=True, force=True)
    for keyword in _NEEDED:
        if not UID(str(dataset.get(keyword) or "")).is_valid:
            raise ValueError(f"the image has no valid {keyword}")
    for keyword in _MAY_BE_EMPTY:
        if keyword not in dataset:
            setattr(dataset, keyword, None)
    return dataset
