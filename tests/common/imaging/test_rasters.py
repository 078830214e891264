"""`read_image` on TIFF, BMP and WebP: the values that a PNG of the same picture has, and refusals by what the header says."""

from __future__ import annotations

import struct
from io import BytesIO
from typing import Any, Literal

import numpy as np
import PIL.Image
import pytest

from pneumofed.common.errors import ImageError, SkipReason
from pneumofed.common.imaging.images import decode_image
from tests.common.imaging.test_images import draw_ramp, encode
from tests.hostile import mutate

LOSSLESS = [
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"big_tiff": True}),
    ("BMP", {}),
    ("WEBP", {"lossless": True}),
]


def reason_of(data: bytes) -> SkipReason:
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    return caught.value.reason


def tiff(values: np.ndarray, order: Literal["<", ">"] = "<", **tags: int) -> bytes:
    """An uncompressed TIFF of one grey channel by the letter of TIFF 6.0, with `tags` by name in the place of the usual ones."""
    pixels = values.astype(values.dtype.newbyteorder(order)).tobytes()
    height, width = values.shape
    known = {"width": 256, "height": 257, "bits": 258, "compression": 259, "photometric": 262, "offset": 273, "samples": 277,
             "rows": 278, "bytes": 279, "tile_width": 322, "tile_height": 323, "format": 339}  # fmt: skip
    usual = {"width": width, "height": height, "bits": 8 * values.itemsize, "compression": 1, "photometric": 1, "offset": 8,
             "samples": 1, "rows": height, "bytes": len(pixels)}  # fmt: skip
    entries = sorted((known[name], value) for name, value in (usual | tags).items())
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(pixels))
    # A SHORT stands in the left half of the four bytes, so the byte order matters; all values here are LONG.
    lines = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in entries)
    return head + pixels + struct.pack(f"{order}H", len(entries)) + lines + b"\0\0\0\0"


@pytest.mark.parametrize(("kind", "options"), LOSSLESS)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_picture_has_the_values_that_it_has_as_png(kind: str, options: dict[str, Any], mode: str) -> None:
    picture = PIL.Image.fromarray(draw_ramp()).convert(mode)
    image = decode_image(encode(picture, kind, **options))
    np.testing.assert_array_equal(image.pixels, draw_ramp() / np.float32(255))
    assert (image.info.format, image.info.bits, image.info.colour) == (kind.lower(), 8, 0.0)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_16_bit_tiff_keeps_its_depth(order: Literal["<", ">"]) -> None:
    values = draw_ramp().astype(np.uint16) * 257
    image = decode_image(tiff(values, order))
    np.testing.assert_array_equal(image.pixels, values / np.float32(65_535))
    assert image.info.bits == 16
    np.testing.assert_array_equal(
        decode_image(tiff(draw_ramp().astype(np.uint16) * 16, order)).pixels.max(), np.float32(4080 / 4095)
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_whose_0_is_white_is_turned_round(dtype: type) -> None:
    values: np.ndarray = (draw_ramp().astype(np.uint32) * (np.iinfo(dtype).max // 255)).astype(dtype)
    black, white = (decode_image(tiff(values, photometric=photometric)).pixels for photometric in (1, 0))
    np.testing.assert_allclose(white, 1 - black, atol=1e-6)


def test_the_orientation_of_a_tiff_is_applied_once() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    np.testing.assert_array_equal(
        decode_image(encode(draw_ramp(), "TIFF", exif=exif)).pixels, np.rot90(draw_ramp() / np.float32(255), -1)
    )


def test_several_pages_or_frames_are_refused() -> None:
    frames = [PIL.Image.fromarray(np.roll(draw_ramp(), step)) for step in range(2)]
    for kind in ("TIFF", "WEBP"):
        assert reason_of(encode(frames[0], kind, save_all=True, append_images=frames[1:])) == SkipReason.MULTI_FRAME


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(draw_ramp().astype(np.float32), format=3), SkipReason.UNSUPPORTED_BITS),
        (tiff(draw_ramp().astype(np.uint32)), SkipReason.UNSUPPORTED_BITS),
        (encode(PIL.Image.fromarray(draw_ramp()).convert("CMYK"), "TIFF"), SkipReason.COLOUR),
        (tiff(draw_ramp(), width=60_000, height=60_000), SkipReason.TOO_LARGE),
        (tiff(draw_ramp(), tile_width=40_000, tile_height=40_000), SkipReason.TOO_LARGE),
        (encode(draw_ramp(15, 30), "BMP"), SkipReason.TOO_SMALL),
        (encode(np.full((20, 30), 7, np.uint8), "WEBP", lossless=True), SkipReason.CONSTANT),
        (encode(draw_ramp(), "BMP")[:-60], SkipReason.CORRUPT),
        (encode(draw_ramp(), "TIFF")[:30], SkipReason.CORRUPT),
        (b"BMI of the patients: 21, 24, 30, 19 and so on", SkipReason.UNKNOWN_FORMAT),
        (b"RIFF\x10\0\0\0WAVEfmt and a sound", SkipReason.UNKNOWN_FORMAT),
    ],
)
def test_an_unusable_file_says_why(data: bytes, reason: SkipReason) -> None:
    assert reason_of(data) == reason


@pytest.mark.parametrize(("kind", "options"), LOSSLESS)
def test_mutated_files_give_an_image_or_a_reason(kind: str, options: dict[str, Any]) -> None:
    good, generator = encode(draw_ramp(), kind, **options), np.random.default_rng(7)
    outcomes: set[str] = set()
    for _ in range(150):
        data = mutate(good, generator)
        try:
            outcomes.add(str(decode_image(data).pixels.dtype))
        except ImageError as error:
            outcomes.add(error.reason)
    assert len(outcomes) > 1


def test_a_tiff_with_a_million_directories_is_refused_at_the_second() -> None:
    one = BytesIO(tiff(draw_ramp()))
    data = bytearray(one.getvalue())
    data[-4:] = struct.pack("<I", len(data))
    for _ in range(200_000):  # directories without an entry
        data += struct.pack("<HI", 0, len(data) + 6)
    assert reason_of(bytes(data)) in (SkipReason.MULTI_FRAME, SkipReason.CORRUPT)
