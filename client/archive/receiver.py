"""Images that an archive sends, over the association that asked for them (C-GET) or one of its own (C-MOVE)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import (
    JPEG2000,
    ComputedRadiographyImageStorage,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from pneumofed.common.errors import ImageError, SkipReason
from pneumofed.common.imaging.dicom_pixels import check_inflated_size
from pneumofed.common.imaging.dicom_tags import quiet_warnings

STORAGE_CLASSES = (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    SecondaryCaptureImageStorage,
)
TRANSFER_SYNTAXES = (
    *(ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit, JPEGExtended12Bit),
    *(JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEGLSNearLossless, JPEG2000Lossless, JPEG2000, RLELossless),
    ExplicitVRBigEndian,
)
"""All that the image reader decodes."""

_SUCCESS, _CANNOT_UNDERSTAND, _NOT_ASKED_FOR = 0x0000, 0xC000, 0x0124
"""PS3.4, table B.2-1, and PS3.7, C.5.16: not authorized."""


def parse_file(data: bytes) -> Dataset:
    """The data set of the DICOM file `data`, as an archive sent it, with preamble or without.

    Raises:
        ImageError: it is damaged, or grows beyond all measure when it is inflated.
    """
    try:
        with quiet_warnings():
            check_inflated_size(BytesIO(data))
            return dcmread(BytesIO(data), force=data.startswith((b"\x02\x00\x00\x00", b"\x08\x00")))
    except ImageError:
        raise
    except MemoryError:
        raise ImageError(SkipReason.OUT_OF_MEMORY) from None
    except Exception as error:  # damaged bytes make pydicom raise nearly any class
        raise ImageError(SkipReason.CORRUPT, type(error).__name__) from None


class Receiver:
    """Takes the one image that is expected and refuses all others, since anyone in the network can call an open port."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._expected = ""
        self._data: bytes | None = None

    @contextmanager
    def expect(self, sop_uid: str) -> Iterator[None]:
        """Within the block the image `sop_uid` is taken."""
        with self._lock:
            self._expected, self._data = sop_uid, None
        try:
            yield
        finally:
            with self._lock:
                self._expected, self._data = "", None

    def take(self) -> bytes | None:
        """The expected image as a DICOM file, if it has come."""
        with self._lock:
            return self._data

    def store(self, event: Any) -> int:
        """Answers a C-STORE request."""
        with self._lock:
            if not self._expected or str(event.request.AffectedSOPInstanceUID) != self._expected:
                return _NOT_ASKED_FOR
            try:
                self._data = event.encoded_dataset()
            except Exception:  # a command of the archive that pynetdicom cannot make a file of
                return _CANNOT_UNDERSTAND
            return _SUCCESS
