"""Frames whose image data are whole, in the forms that archives hold: their pixels are those of the native file."""

from __future__ import annotations

import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import JPEG2000, UID, JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless

from pneumofed.common.errors import ImageError
from pneumofed.common.imaging import dicom_pixels
from pneumofed.common.imaging.dicom_pixels import mend_jpeg, mend_jpeg2000
from pneumofed.common.imaging.images import decode_image
from tests.dicom_factory import dicom_bytes, draw_radiograph

EOC = b"\xff\xd9"
COMMENT = b"\xff\x64\x00\x08\x00\x01abcd"
ENDINGS = {
    "no end": b"",
    "comment": COMMENT + EOC,
    "comment, no end": COMMENT,
    "zeros": bytes(6) + EOC,
    "ones": b"\xff" * 6 + EOC,
    "0x80": b"\x80\x80" + EOC,
    "padded": EOC + bytes(4),
    "intact": EOC,
}


def read_values(data: bytes) -> np.ndarray:
    dataset = dicom_pixels.parse(data)
    layout = dicom_pixels.read_layout(dataset)
    return layout.values_of(dicom_pixels.read_codes(dataset, layout))


def frame_of(data: bytes) -> tuple[bytes, bytes]:
    """(the whole Pixel Data, the frame in it)."""
    value = pydicom.dcmread(BytesIO(data))["PixelData"].value
    return value, get_frame(value, 0, number_of_frames=1)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("is_open", [False, True])
def test_what_stands_behind_the_tile_data_of_jpeg_2000_does_not_matter(ending: str, is_open: bool) -> None:
    stored = draw_radiograph()
    data = dicom_bytes(stored, syntax=JPEG2000Lossless, BitsStored=12)
    value, frame = frame_of(data)
    frame = frame[: frame.rindex(EOC)]
    if is_open:  # Psot of 0: the tile-part goes on to the end, so that only a missing end can be found
        if ending not in ("no end", "intact", "padded"):
            return
        start = frame.index(b"\xff\x90")
        frame = frame[: start + 6] + bytes(4) + frame[start + 10 :]
    changed = data.replace(value, encapsulate([frame + ENDINGS[ending]]))
    np.testing.assert_array_equal(read_values(changed), stored)


def test_tile_data_that_are_cut_are_refused() -> None:
    data = dicom_bytes(draw_radiograph(), syntax=JPEG2000Lossless, BitsStored=12)
    value, frame = frame_of(data)
    with pytest.raises(ImageError):
        decode_image(data.replace(value, encapsulate([frame[: len(frame) // 2]])))


def test_an_intact_frame_stays_as_it_is() -> None:
    for syntax in (JPEG2000Lossless, JPEGLosslessSV1):
        _, frame = frame_of(dicom_bytes(draw_radiograph(), syntax=syntax, BitsStored=12))
        frame = frame.rstrip(b"\0")
        assert mend_jpeg(frame) == mend_jpeg2000(frame) == frame


def test_jpeg_extended_with_an_end_of_spectral_selection_of_zero_is_read() -> None:
    path = Path(str(get_testdata_file("JPGExtended.dcm", download=False)))
    data = path.read_bytes()
    scan = b"\xff\xda\x00\x08\x01\x01\x00"
    intact = data.replace(scan + b"\x00\x00\x00", scan + b"\x00\x3f\x00")
    wrong = data.replace(scan + b"\x00\x3f\x00", scan + b"\x00\x00\x00")
    assert intact == data != wrong
    np.testing.assert_array_equal(read_values(wrong), read_values(data))


@pytest.mark.parametrize(
    "syntax", [JPEG2000Lossless, JPEG2000, JPEGLSLossless, JPEGLosslessSV1], ids=lambda syntax: syntax.keyword
)
@pytest.mark.parametrize("dtype", ["u2", "i2"])
def test_bits_above_bits_stored_are_no_part_of_the_value(syntax: UID, dtype: str) -> None:
    stored = draw_radiograph(dtype, 12)
    junk = np.random.default_rng(1).integers(0, 16, stored.shape).astype(np.uint16)
    dirty = (stored.view(np.uint16) & 0xFFF | junk << 12).view(dtype)
    data = dicom_bytes(dirty, syntax=JPEG2000Lossless if syntax == JPEG2000 else syntax, BitsStored=16)
    for tag, bits in ((b"\x28\x00\x01\x01", 12), (b"\x28\x00\x02\x01", 11)):
        start = data.index(tag + b"US\x02\x00") + 8
        data = data[:start] + struct.pack("<H", bits) + data[start + 2 :]
    if syntax == JPEG2000:  # a reversible codestream may come in the lossy transfer syntax
        data = data.replace(b"1.2.840.10008.1.2.4.90", b"1.2.840.10008.1.2.4.91")
    np.testing.assert_array_equal(read_values(data), stored)
