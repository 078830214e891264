"""`read_image` on JPEG and PNG, and on files that are no image at all."""

from __future__ import annotations

import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from pneumofed.common.errors import ConfigError, ImageError, SkipReason
from pneumofed.common.imaging.images import read_image
from pneumofed.common.imaging.types import Image, Window
from tests.hostile import mutate, read_or_reason

ORIENTATION = 0x0112
Save = Callable[[bytes], Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def save(data: bytes) -> Path:
        path = tmp_path / "image"
        path.write_bytes(data)
        return path

    return save


def draw_ramp(height: int = 20, width: int = 30) -> np.ndarray:
    return (np.arange(height * width).reshape(height, width) % 256).astype(np.uint8)


def encode(image: np.ndarray | PIL.Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    image = PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reason_of(path: Path) -> SkipReason:
    with pytest.raises(ImageError) as caught:
        read_image(path)
    return caught.value.reason


def test_8_bit_grey_is_divided_by_255(save: Save) -> None:
    image = read_image(save(encode(draw_ramp())))
    np.testing.assert_array_equal(image.pixels, draw_ramp() / np.float32(255))
    assert (image.info.format, image.info.bits, image.info.height_px, image.info.width_px) == ("png", 8, 20, 30)


def test_16_bit_grey_is_divided_by_65535(save: Save) -> None:
    values = draw_ramp().astype(np.uint16) * 257
    image = read_image(save(encode(values)))
    np.testing.assert_array_equal(image.pixels, values / np.float32(65_535))
    assert image.info.bits == 16


def test_pixels_are_contiguous_float32(save: Save) -> None:
    pixels = read_image(save(encode(draw_ramp(), "JPEG"))).pixels
    assert pixels.dtype == np.float32
    assert pixels.flags.c_contiguous


def test_colour_becomes_luma(save: Save) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    luma = colour @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(read_image(save(encode(colour))).pixels * 255, luma, atol=0.51)


@pytest.mark.parametrize("mode", ["RGB", "P", "L", "LA", "RGBA"])
def test_a_grey_image_reads_alike_in_every_mode(save: Save, mode: str) -> None:
    image = PIL.Image.fromarray(draw_ramp()).convert(mode)
    np.testing.assert_array_equal(read_image(save(encode(image))).pixels, draw_ramp() / np.float32(255))


def test_one_bit_images_are_black_and_white(save: Save) -> None:
    bits = draw_ramp() % 2 == 0
    np.testing.assert_array_equal(read_image(save(encode(bits))).pixels, bits)


def test_transparent_parts_are_black(save: Save) -> None:
    alpha = np.where(np.arange(30) < 15, 0, 255) * np.ones((20, 1))
    image = np.dstack([np.full((20, 30), 200), alpha]).astype(np.uint8)
    pixels = read_image(save(encode(PIL.Image.fromarray(image, "LA")))).pixels
    assert (pixels[:, :15] == 0).all()
    np.testing.assert_allclose(pixels[:, 15:], 200 / 255)


@pytest.mark.parametrize("values", [draw_ramp(), draw_ramp().astype(np.uint16) * 257])
@pytest.mark.parametrize(
    ("orientation", "undo"), [(1, lambda a: a), (2, np.fliplr), (3, lambda a: np.rot90(a, 2)), (6, lambda a: np.rot90(a, -1))]
)
def test_the_exif_orientation_is_applied(save: Save, values: np.ndarray, orientation: int, undo: Any) -> None:
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = orientation
    image = read_image(save(encode(values, exif=exif)))
    np.testing.assert_array_equal(image.pixels, undo(values / np.float32(np.iinfo(values.dtype).max)))
    assert (image.info.height_px, image.info.width_px) == image.pixels.shape


def test_the_format_is_told_by_content_not_by_name(tmp_path: Path) -> None:
    path = tmp_path / "scan.dcm"
    path.write_bytes(encode(draw_ramp(), "JPEG"))
    assert read_image(path).info.format == "jpeg"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", SkipReason.EMPTY),
        (b"a letter to the radiologist", SkipReason.UNKNOWN_FORMAT),
        (encode(draw_ramp(), "GIF"), SkipReason.UNKNOWN_FORMAT),
        (encode(draw_ramp())[:-60], SkipReason.CORRUPT),
        (encode(draw_ramp(), "JPEG")[:-200], SkipReason.CORRUPT),
        (encode(draw_ramp(), "JPEG")[:20], SkipReason.CORRUPT),
        (encode(np.full((20, 30), 7, np.uint8)), SkipReason.CONSTANT),
        (encode(draw_ramp(15, 30)), SkipReason.TOO_SMALL),
        (encode(draw_ramp(20, 15)), SkipReason.TOO_SMALL),
    ],
)
def test_an_unusable_file_says_why(save: Save, data: bytes, reason: SkipReason) -> None:
    assert reason_of(save(data)) == reason


def test_missing_files_and_folders_say_so(tmp_path: Path) -> None:
    assert reason_of(tmp_path / "none.png") == SkipReason.MISSING
    assert reason_of(tmp_path) == SkipReason.UNREADABLE


@pytest.mark.parametrize(("width", "height"), [(16_385, 20), (20, 16_385), (10_001, 10_000), (60_000, 60_000)])
def test_a_decompression_bomb_is_refused_by_its_header(save: Save, width: int, height: int) -> None:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    assert reason_of(save(header + struct.pack(">I", 1) + b"IDAT\0\0\0\0\0")) == SkipReason.TOO_LARGE


def test_a_file_beyond_the_limit_is_not_read(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pneumofed.common.imaging.images.MAX_FILE_BYTES", 50)
    assert reason_of(save(encode(draw_ramp()))) == SkipReason.TOO_LARGE


def test_an_error_names_no_file(tmp_path: Path) -> None:
    path = tmp_path / "DOE_JANE.png"
    path.write_bytes(encode(draw_ramp())[:-60])
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert "DOE" not in str(caught.value)


def test_an_error_does_not_quote_the_parser(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("invalid value 'Doe^Jane'")

    monkeypatch.setattr("pneumofed.common.imaging.images._decode_raster", fail)
    with pytest.raises(ImageError) as caught:
        read_image(save(encode(draw_ramp())))
    assert str(caught.value) == "image data truncated or corrupt: ValueError"


def test_no_warning_leaks(save: Save) -> None:
    broken_exif = encode(draw_ramp(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_image(save(broken_exif))
    assert not caught


def test_reading_in_threads_leaves_the_warning_filters_as_they_were(save: Save) -> None:
    path, before = save(encode(draw_ramp())), list(warnings.filters)
    threads = [threading.Thread(target=lambda: [read_image(path) for _ in range(20)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


@pytest.mark.parametrize(
    "data",
    [encode(draw_ramp()), encode(draw_ramp().astype(np.uint16)), encode(draw_ramp(), "JPEG")],
    ids=["png", "png16", "jpeg"],
)
def test_mutated_files_give_an_image_or_an_image_error(save: Save, data: bytes) -> None:
    generator = np.random.default_rng(0)
    outcomes = [read_or_reason(save(mutate(data, generator))) for _ in range(120)]
    assert any(isinstance(outcome, SkipReason) for outcome in outcomes)
    for outcome in outcomes:
        if isinstance(outcome, Image):
            assert 0 <= outcome.pixels.min() < outcome.pixels.max() <= 1


@pytest.mark.parametrize("width", [0.0, -5.0, float("nan"), float("inf")])
def test_a_window_without_a_width_is_refused(width: float) -> None:
    with pytest.raises(ConfigError, match="window"):
        Window(40.0, width)


def test_real_radiographs_are_read(kaggle_dir: Path) -> None:
    paths = sorted((kaggle_dir / "test" / "NORMAL").glob("*.jpeg"))[:5]
    for path in paths:
        pixels = read_image(path).pixels
        assert pixels.ndim == 2
        assert 0 <= pixels.min() < pixels.max() <= 1
