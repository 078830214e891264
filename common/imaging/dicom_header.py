"""The identifying tags of a DICOM file, from which a site makes its own manifest.

Unlike the rest of this package this module reads a patient's number, so it is for tools that run inside a hospital and write only there.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import BinaryIO

from pydicom import dcmread
from pydicom.dataset import Dataset

from pneumofed.common.errors import ImageError, SkipReason
from pneumofed.common.imaging.dicom_pixels import check_inflated_size
from pneumofed.common.imaging.dicom_tags import age_years_of, date_of, quiet_warnings, text_of
from pneumofed.common.imaging.dicom_views import VIEW_TAGS, read_body_part, read_view

logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # it logs the values of malformed tags

_TAGS = [
    *("PatientID", "SOPInstanceUID", "StudyInstanceUID", "AccessionNumber"),
    *("PatientSex", "PatientAge", "Manufacturer", "StudyDate"),
    *VIEW_TAGS,
]


@dataclass(frozen=True)
class DicomHeader:
    """Tags as text, empty where the file does not have them.

    Attributes:
        patient: Patient ID (0010,0020).
        sop_uid: SOP Instance UID (0008,0018), of this image only.
        study_uid: Study Instance UID (0020,000D).
        accession: Accession Number (0008,0050), the hospital's number of the examination.
        view: its projection, a word of `common.imaging.views`, from all attributes that say it; else View Position (0018,5101).
        body_part: Anatomic Region Sequence (0008,2218), else Body Part Examined (0018,0015).
        sex: Patient's Sex (0010,0040).
        age_years: Patient's Age (0010,1010), or None.
        manufacturer: Manufacturer (0008,0070).
        study_date: Study Date (0008,0020), or None.
    """

    patient: str
    sop_uid: str
    study_uid: str
    accession: str
    view: str
    body_part: str
    sex: str
    age_years: float | None
    manufacturer: str
    study_date: date | None


def read_header(path: Path) -> DicomHeader:
    """Reads the header of the DICOM file `path`, without its pixels.

    Raises:
        ImageError: the file is missing, empty, cannot be opened, or is no DICOM file or a damaged one.
    """
    try:
        with path.open("rb") as file:
            return _parse(file)
    except FileNotFoundError:
        raise ImageError(SkipReason.MISSING) from None
    except OSError as error:
        raise ImageError(SkipReason.UNREADABLE, type(error).__name__) from None


def _parse(file: BinaryIO) -> DicomHeader:
    start = file.read(132)
    file.seek(0)
    if not start:
        raise ImageError(SkipReason.EMPTY)
    is_certain = start[128:] == b"DICM"  # PS3.10, 7.1; files without it are recognised by their tags
    try:
        with quiet_warnings():  # they quote tag values
            if is_certain:
                check_inflated_size(file)
                file.seek(0)
            header = _describe(dcmread(file, stop_before_pixels=True, force=True, specific_tags=list(_TAGS)))
    except (OSError, ImageError):
        raise
    except MemoryError:
        raise ImageError(SkipReason.OUT_OF_MEMORY) from None
    except Exception as error:  # damaged bytes make pydicom raise nearly any class
        raise ImageError(SkipReason.CORRUPT if is_certain else SkipReason.UNKNOWN_FORMAT, type(error).__name__) from None
    if not is_certain and not header.sop_uid:
        raise ImageError(SkipReason.UNKNOWN_FORMAT)
    return header


def _describe(dataset: Dataset) -> DicomHeader:
    return DicomHeader(
        patient=text_of(dataset, "PatientID"),
        sop_uid=text_of(dataset, "SOPInstanceUID"),
        study_uid=text_of(dataset, "StudyInstanceUID"),
        accession=text_of(dataset, "AccessionNumber"),
        view=read_view(dataset).word,
        body_part=read_body_part(dataset),
        sex=text_of(dataset, "PatientSex"),
        age_years=age_years_of(dataset),
        manufacturer=text_of(dataset, "Manufacturer"),
        study_date=date_of(dataset, "StudyDate"),
    )
