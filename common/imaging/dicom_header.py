"""Whose image it is: the identifying tags of a DICOM file, from which a site makes its manifest, and the pseudonyms that stand for them.

Unlike the rest of this package this module reads a patient's number, so it is for tools that run inside a hospital and write only there.

A pseudonym is HMAC-SHA256 (RFC 2104) of the identifier with a key of the hospital's own, which stays in `data/pseudonym.key`. The
same identifier gives the same pseudonym at each call, so that a patient's images stay together whatever way they came; without
the key nobody can try out which identifier a pseudonym belongs to, which a plain hash would allow.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import BinaryIO

from pydicom import dcmread
from pydicom.dataset import Dataset

from pneumofed.common.data.tables import plain_text
from pneumofed.common.errors import ConfigError, ImageError, SkipReason
from pneumofed.common.files import drawn_once
from pneumofed.common.imaging.dicom_pixels import check_inflated_size
from pneumofed.common.imaging.dicom_tags import age_years_of, date_of, quiet_warnings, text_of
from pneumofed.common.imaging.dicom_views import VIEW_TAGS, read_body_part, read_view

logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # it logs the values of malformed tags

_TAGS = [
    *("PatientID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "AccessionNumber"),
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
        series_uid: Series Instance UID (0020,000E).
        accession: Accession Number (0008,0050), the hospital's number of the examination.
        view: its projection, a word of `common.imaging.patient_groups`, from all attributes that say it; else View Position (0018,5101).
        body_part: Anatomic Region Sequence (0008,2218), else Body Part Examined (0018,0015).
        sex: Patient's Sex (0010,0040).
        age_years: Patient's Age (0010,1010), or None.
        manufacturer: Manufacturer (0008,0070).
        study_date: Study Date (0008,0020), or None.
    """

    patient: str
    sop_uid: str
    study_uid: str
    series_uid: str
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


@dataclass(frozen=True)
class Acquisition:
    """How large an image is and when it was taken.

    Attributes:
        rows, columns: Rows (0028,0010) and Columns (0028,0011), as stored.
        year: of Study Date (0008,0020), or None.
        slices, step_mm: of a CT volume, else None.
    """

    rows: int
    columns: int
    year: int | None
    slices: int | None = None
    step_mm: float | None = None


def read_acquisition(path: Path) -> Acquisition | None:
    """Reads size and year of the DICOM file `path`, without its pixels; None where it is no such file or does not say its size."""
    try:
        with path.open("rb") as file, quiet_warnings():
            if file.read(132)[128:] != b"DICM":
                return None
            file.seek(0)
            check_inflated_size(file)
            file.seek(0)
            dataset = dcmread(file, stop_before_pixels=True, specific_tags=["Rows", "Columns", "StudyDate"])
            taken = date_of(dataset, "StudyDate")
            return Acquisition(int(dataset.Rows), int(dataset.Columns), taken.year if taken else None)
    except Exception:  # damaged bytes make pydicom raise nearly any class
        return None


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
        series_uid=text_of(dataset, "SeriesInstanceUID"),
        accession=text_of(dataset, "AccessionNumber"),
        view=read_view(dataset).word,
        body_part=read_body_part(dataset),
        sex=text_of(dataset, "PatientSex"),
        age_years=age_years_of(dataset),
        manufacturer=text_of(dataset, "Manufacturer"),
        study_date=date_of(dataset, "StudyDate"),
    )


KEY_FILE = "pseudonym.key"
_KEY_BYTES = 32


@dataclass(frozen=True)
class Pseudonyms:
    """Pseudonyms under one key. Blanks around an identifier do not count, since archives pad their texts, nor how Unicode spells it."""

    key: bytes = field(repr=False)

    def patient(self, patient_id: str) -> str:
        """Computes `P` and 24 hexadecimal digits for a Patient ID (0010,0020)."""
        return "P" + self._digest("patient", patient_id).hex()[:24]

    @staticmethod
    def is_pseudonym(text: str) -> bool:
        """Checks whether `text` has the form of a patient's pseudonym."""
        return re.fullmatch(r"P[0-9a-f]{24}", text) is not None

    def second_names(self, names: Iterable[str]) -> dict[str, str]:
        """Finds who stands in `names` twice, by number and by pseudonym: the pseudonym by the number."""
        known = set(names)
        numbers = (name for name in known if not self.is_pseudonym(name))
        return {name: pseudonym for name in numbers if (pseudonym := self.patient(name)) in known}

    def accession(self, number: str) -> str:
        """Computes `A` and 15 hexadecimal digits for an Accession Number (0008,0050), which has 16 characters (PS3.5, 6.2: SH)."""
        return "A" + self._digest("accession", number).hex()[:15]

    def uid(self, uid: str) -> str:
        """Computes a unique identifier below 2.25, made of a UUID (PS3.5, B.2) of version 8, which is free to fill (RFC 9562, 5.8)."""
        bits = int.from_bytes(self._digest("uid", uid)[:16], "big")
        bits = bits & ~(0xF << 76) & ~(0x3 << 62) | (0x8 << 76) | (0x2 << 62)
        return f"2.25.{uuid.UUID(int=bits).int}"

    def _digest(self, kind: str, text: str) -> bytes:
        """`kind` keeps a number that is both a patient's and an examination's from giving both the same pseudonym."""
        text = kind + "\0" + plain_text(text)
        return hmac.new(self.key, text.encode(errors="surrogateescape"), hashlib.sha256).digest()


def load_pseudonyms(folder: Path) -> Pseudonyms:
    """Loads the site's pseudonyms, with the key in `folder`, which is drawn at the first call.

    Raises:
        ConfigError: the key cannot be read or written, is damaged, or others may read it.
    """
    path = folder / KEY_FILE
    try:
        text = drawn_once(path, lambda: f"{secrets.token_hex(_KEY_BYTES)}\n".encode()).decode("ascii").strip()
        mode = path.stat().st_mode & 0o777
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read or written ({type(error).__name__}); check its owner and permissions") from None
    if mode & 0o077:
        raise ConfigError(f"{path} may be read by others (mode {mode:o}), who could then undo pseudonyms; run: chmod 600 {path}")
    return Pseudonyms(_read_key(path, text))


def _read_key(path: Path, text: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise ConfigError(
            f"{path} is damaged: expected {2 * _KEY_BYTES} hexadecimal digits. Restore it from a backup; with a new key the images "
            "that are there already would count as those of other patients"
        )
    return key
