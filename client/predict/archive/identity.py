"""Who made the object: the numbers and names that every derived object carries."""

from __future__ import annotations

import hashlib
from importlib.metadata import version

from highdicom.uid import UID
from pydicom.dataset import Dataset

from common.model_bundle.predictor import Predictor

MANUFACTURER = "pneumofed"
SERIES_DESCRIPTION = "AI result, not for primary diagnosis"
SERIES_NUMBERS = {"SR": 9401, "SC": 9402}
"""Series Number (0020,0011) tells series of a study apart for people; scanners count from 1."""


def series_uid(source: Dataset, predictor: Predictor, kind: str) -> UID:
    """Series Instance UID of all objects of one kind by one model in one study: a run that is repeated adds to the same series."""
    return _hashed_uid("series", source.StudyInstanceUID, predictor.bundle.digest, kind)


def model_uid(predictor: Predictor) -> UID:
    """The device's UID (121012, DCM): the same for the same bundle."""
    return _hashed_uid("model", predictor.bundle.digest)


def software_versions(predictor: Predictor) -> list[str]:
    """Software Versions (0018,1020): of this program, and the bundle's digest as one Long String."""
    return [f"pneumofed {version('pneumofed')}", f"bundle {predictor.bundle.digest[:48]}"]


def _hashed_uid(*parts: str) -> UID:
    """A UID below 2.25, made of a UUID (PS3.5, B.2) of version 8 (RFC 9562, 5.8); the same for the same parts."""
    digest = hashlib.sha256("\x1f".join(parts).encode()).digest()
    bits = int.from_bytes(digest[:16], "big") & ~(0xF << 76) & ~(0x3 << 62) | (0x8 << 76) | (0x2 << 62)
    return UID(f"2.25.{bits}")
