"""Pixels that are not square, and 16-bit pictures of fewer bits."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import PIL.Image
import pytest

from pneumofed.common.errors import ImageError, SkipReason
from pneumofed.common.imaging.images import decode_image
from tests.dicom_factory import dicom_bytes, draw_radiograph


@pytest.mark.parametrize(
    ("tags", "shape"),
    [
        ({}, (40, 36)),
        ({"PixelSpacing": [0.2, 0.1]}, (80, 36)),
        ({"ImagerPixelSpacing": [0.1, 0.2]}, (40, 72)),
        ({"NominalScannedPixelSpacing": [0.1, 0.15]}, (40, 54)),
        ({"PixelAspectRatio": [2, 1]}, (80, 36)),
        ({"PixelAspectRatio": [2, 1], "PixelSpacing": [0.1, 0.1]}, (40, 36)),
        ({"PixelSpacing": [0.1, 0.1005]}, (40, 36)),
        ({"PixelSpacing": [0.1, 5]}, (40, 36)),
        ({"PixelSpacing": [0, 0.1]}, (40, 36)),
    ],
)
def test_an_image_has_square_pixels(tags: dict[str, Any], shape: tuple[int, int]) -> None:
    image = decode_image(dicom_bytes(draw_radiograph(), **tags))
    assert image.pixels.shape == shape == (image.info.height_px, image.info.width_px)


def test_an_image_taken_with_half_the_rows_is_stretched_back() -> None:
    square = np.repeat(draw_radiograph(), 2, axis=0).astype(float)
    image = decode_image(dicom_bytes(draw_radiograph(), PixelSpacing=[0.2, 0.1], WindowCenter=2048, WindowWidth=4096))
    assert np.abs(image.pixels - square / 4095).mean() < 0.02


def test_a_stretched_image_obeys_the_limits_before_it_is_decoded() -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(dicom_bytes(draw_radiograph(), Rows=9000, PixelSpacing=[0.3, 0.1]))
    assert caught.value.reason is SkipReason.TOO_LARGE


def test_images_for_processing_say_so() -> None:
    assert decode_image(dicom_bytes(draw_radiograph(), PresentationIntentType="FOR PROCESSING")).info.for_processing
    assert not decode_image(dicom_bytes(draw_radiograph(), PresentationIntentType="FOR PRESENTATION")).info.for_processing


def picture(values: np.ndarray, significant_bits: int = 0) -> bytes:
    buffer = BytesIO()
    PIL.Image.fromarray(values.astype(np.uint16)).save(buffer, "PNG")
    data = buffer.getvalue()
    if not significant_bits:
        return data
    body = b"sBIT" + bytes([significant_bits])
    chunk = struct.pack(">I", 1) + body + struct.pack(">I", zlib.crc32(body))
    return data[:33] + chunk + data[33:]


@pytest.mark.parametrize(
    ("most", "significant_bits", "levels"),
    [(4095, 0, 4095), (3000, 0, 4095), (1023, 0, 1023), (16_000, 0, 16_383), (65_535, 0, 65_535), (20_000, 0, 65_535),
     (900, 12, 4095), (65_520, 12, 65_535), (4095, 16, 4095)],
)  # fmt: skip
def test_a_16_bit_picture_is_scaled_by_the_bits_that_it_uses(most: int, significant_bits: int, levels: int) -> None:
    values = np.linspace(0, most, 400).astype(np.uint16).reshape(20, 20)
    image = decode_image(picture(values, significant_bits))
    np.testing.assert_allclose(image.pixels, values / levels, atol=1e-6)
    assert 2**image.info.bits - 1 == levels
