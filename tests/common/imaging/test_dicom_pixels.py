"""How pixels are stored: bit layouts, transfer syntaxes, and what is refused before it is decoded."""

from __future__ import annotations

import struct
import tracemalloc
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
from pydicom.uid import (
    MPEG4HP41,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    RLELossless,
)

from pneumofed.common.errors import ImageError, SkipReason
from pneumofed.common.imaging import dicom_pixels
from pneumofed.common.imaging.images import decode_image
from tests.dicom_factory import dicom_bytes, draw_radiograph, encode_jpeg_lossless

LOSSLESS = [
    *(ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian),
    *(RLELossless, JPEGLosslessSV1, JPEGLossless, JPEG2000Lossless),
]


def read_values(data: bytes) -> np.ndarray:
    dataset = dicom_pixels.parse(data)
    layout = dicom_pixels.read_layout(dataset)
    return layout.values_of(dicom_pixels.read_codes(dataset, layout))


def reason_of(data: bytes) -> SkipReason:
    with pytest.raises(ImageError) as caught:
        read_values(data)
    return caught.value.reason


def read_bundled(name: str) -> tuple[bytes, np.ndarray]:
    """(bytes, pixel values as pydicom decodes them) of a test file in pydicom's own package."""
    path = Path(str(get_testdata_file(name, download=False)))
    return path.read_bytes(), pydicom.dcmread(path).pixel_array


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.keyword)
@pytest.mark.parametrize(("dtype", "bits"), [("u1", 8), ("u2", 10), ("u2", 12), ("u2", 16), ("i2", 12), ("i2", 16)])
def test_every_lossless_syntax_keeps_every_value(syntax: UID, dtype: str, bits: int) -> None:
    stored = draw_radiograph(dtype, bits)
    np.testing.assert_array_equal(read_values(dicom_bytes(stored, syntax=syntax, BitsStored=bits)), stored)


def test_jpeg_baseline_is_near() -> None:
    stored = draw_radiograph("u1", 8)
    assert np.abs(read_values(dicom_bytes(stored, syntax=JPEGBaseline8Bit)) - stored).mean() < 4


def test_jpeg_ls_equals_the_uncompressed_file() -> None:
    compressed, _ = read_bundled("MR_small_jpeg_ls_lossless.dcm")
    _, expected = read_bundled("MR_small.dcm")
    np.testing.assert_array_equal(read_values(compressed), expected)


@pytest.mark.parametrize("name", ["JPGExtended.dcm", "J2K_pixelrep_mismatch.dcm", "JPEG2000.dcm", "examples_overlay.dcm"])
def test_other_writers_files_are_read_as_by_pydicom(name: str) -> None:
    data, expected = read_bundled(name)
    np.testing.assert_array_equal(read_values(data), expected)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_a_file_without_preamble_is_read(syntax: UID) -> None:
    stored = draw_radiograph()
    np.testing.assert_array_equal(read_values(dicom_bytes(stored, syntax=syntax, preamble=False)), stored)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
@pytest.mark.parametrize("dtype", ["u2", "i2"])
def test_bits_outside_of_the_stored_ones_are_ignored(syntax: UID, dtype: str) -> None:
    stored = draw_radiograph(dtype, 12)
    junk = np.random.default_rng(1).integers(0, 16, stored.shape).astype(np.uint16)
    low_end = (stored.view(np.uint16) & 0xFFF | junk << 12).view(dtype)
    np.testing.assert_array_equal(read_values(dicom_bytes(low_end, syntax=syntax, BitsStored=12)), stored)
    high_end = (stored.view(np.uint16) << 4 | junk).view(dtype)
    np.testing.assert_array_equal(read_values(dicom_bytes(high_end, syntax=syntax, BitsStored=12, HighBit=15)), stored)


@pytest.mark.parametrize("high_bit", [None, 0, 10, 99])
def test_a_high_bit_that_cannot_be_is_mended(high_bit: int | None) -> None:
    stored = draw_radiograph()
    np.testing.assert_array_equal(read_values(dicom_bytes(stored, BitsStored=12, HighBit=high_bit)), stored)


@pytest.mark.parametrize("frames", [1, None])
def test_one_frame_is_an_image(frames: int | None) -> None:
    assert read_values(dicom_bytes(draw_radiograph(), NumberOfFrames=frames)).shape == (40, 36)


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"NumberOfFrames": 2}, SkipReason.MULTI_FRAME),
        ({"SamplesPerPixel": 3}, SkipReason.COLOUR),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, SkipReason.COLOUR),
        ({"PhotometricInterpretation": None}, SkipReason.CORRUPT),
        ({"PixelData": None}, SkipReason.NO_PIXEL_DATA),
        ({"PixelData": b""}, SkipReason.NO_PIXEL_DATA),
        ({"BitsAllocated": 32, "BitsStored": 32}, SkipReason.UNSUPPORTED_BITS),
        ({"BitsAllocated": 1, "BitsStored": 1}, SkipReason.UNSUPPORTED_BITS),
        ({"BitsAllocated": 16, "BitsStored": 17}, SkipReason.UNSUPPORTED_BITS),
        ({"Rows": 15}, SkipReason.TOO_SMALL),
        ({"Rows": None}, SkipReason.CORRUPT),
        ({"Columns": 0}, SkipReason.TOO_SMALL),
    ],
)
def test_what_is_no_single_grey_image_is_refused(tags: dict[str, Any], reason: SkipReason) -> None:
    assert reason_of(dicom_bytes(draw_radiograph(), **tags)) == reason


def test_colour_is_refused() -> None:
    assert reason_of(dicom_bytes(np.zeros((40, 36, 3), np.uint8))) == SkipReason.COLOUR


@pytest.mark.parametrize("syntax", [MPEG4HP41, UID("1.2.3.4")])
def test_a_syntax_that_nobody_decodes_is_refused(syntax: UID) -> None:
    data = dicom_bytes(draw_radiograph(), syntax=RLELossless)
    old, new = (f"{uid}\0"[: len(uid) + len(uid) % 2].encode() for uid in (RLELossless, syntax))
    replaced = data.replace(len(old).to_bytes(2, "little") + old, len(new).to_bytes(2, "little") + new)
    assert reason_of(replaced) == SkipReason.UNSUPPORTED_COMPRESSION


def test_rle_data_that_run_past_the_image_are_corrupt() -> None:
    segment = bytes([129, 7]) * 12  # PS3.5, G.3.1: 12 runs of 128 bytes, for 1440 pixels
    header = struct.pack("<16I", 2, 64, 64 + len(segment), *[0] * 13)
    data = dicom_bytes(draw_radiograph(), syntax=RLELossless)
    intact = pydicom.dcmread(BytesIO(data))["PixelData"].value
    assert reason_of(data.replace(intact, encapsulate([header + segment * 2]))) == SkipReason.CORRUPT


def test_a_missing_decoder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_pixels, "_PLUGIN", "gdcm")
    with pytest.raises(ImageError, match="gdcm has no decoder for RLE Lossless"):
        read_values(dicom_bytes(draw_radiograph(), syntax=RLELossless))


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, JPEGLosslessSV1])
def test_a_huge_declared_size_takes_no_memory(syntax: UID) -> None:
    stored = draw_radiograph()
    data = dicom_bytes(stored, syntax=syntax)
    for tag, length in ((b"\x28\x00\x10\x00", 40), (b"\x28\x00\x11\x00", 36)):
        element = tag + b"US\x02\x00" + length.to_bytes(2, "little")
        assert element in data
        data = data.replace(element, element[:-2] + (60_000).to_bytes(2, "little"))
    tracemalloc.start()
    assert reason_of(data) == SkipReason.TOO_LARGE
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, JPEGLosslessSV1, JPEG2000Lossless])
def test_a_codestream_of_another_size_never_reaches_the_decoder(syntax: UID, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_pixels, "_run", lambda *_, **__: pytest.fail("decoded"))
    data = dicom_bytes(draw_radiograph("u1", 8), syntax=syntax)
    shape = b"\0\0\0\x24\0\0\0\x28" if syntax == JPEG2000Lossless else b"\0\x28\0\x24"
    assert shape in data
    huge = bytes(byte or 0x7F for byte in shape)
    assert reason_of(data.replace(shape, huge)) == SkipReason.CORRUPT


def test_a_deflate_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_pixels, "MAX_FILE_BYTES", 50_000)
    flat = np.zeros((400, 400), np.uint8)
    data = dicom_bytes(flat, syntax=DeflatedExplicitVRLittleEndian)
    assert len(data) < 2000
    assert reason_of(data) == SkipReason.TOO_LARGE


def test_the_jpeg_header_is_found_behind_other_segments() -> None:
    frame = encode_jpeg_lossless(draw_radiograph(), 12)
    comment = b"\xff\xfe\x00\x08hello!"
    assert dicom_pixels._read_jpeg_header(frame[:2] + comment + b"\xff" + frame[2:]) == (40, 36, 1, 12)


@pytest.mark.parametrize("text", ["", "std::bad_alloc", "Unable to allocate 12.0 MiB for an array with shape (40, 36)"])
def test_too_little_memory_in_a_decoder_is_no_damage(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    def fail(source: bytes, runner: object) -> bytes:
        raise MemoryError(text)

    decoder = get_decoder(RLELossless)
    monkeypatch.setitem(decoder._available, "pylibjpeg", fail)
    with pytest.raises(ImageError) as caught:
        decode_image(dicom_bytes(draw_radiograph(), syntax=RLELossless))
    assert caught.value.reason is SkipReason.OUT_OF_MEMORY
