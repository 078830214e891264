"""Radiographs whose pixels are not square, stretched until they are."""

from __future__ import annotations

import math

import numpy as np
import PIL.Image
from pydicom.dataset import Dataset

from pneumofed.common.imaging.dicom_tags import numbers_of

ASPECT_TAGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio")
"""(0028,0030), (0018,1164), (0018,2010) and (0028,0034): the height and the width of a pixel (PS3.3, C.7.6.3 and 10.7.1.3). The ratio is
meant for files that have none of the three before it."""
MIN_DIFFERENCE = 0.01
"""Below 1 % the shape of a chest stays what it is, and each pixel keeps its value."""
MAX_RATIO = 4.0
"""Beyond this no detector goes: the values are wrong, and are not used."""


def square_shape(dataset: Dataset, rows: int, columns: int) -> tuple[int, int]:
    """Computes the (rows, columns) that an image has with square pixels; the longer side of a pixel is divided, so nothing is lost.

    Args:
        dataset: the file's tags.
        rows, columns: of the stored image.
    """
    ratio = _height_to_width(dataset)
    if abs(ratio - 1) < MIN_DIFFERENCE or not 1 / MAX_RATIO <= ratio <= MAX_RATIO:
        return rows, columns
    return (round(rows * ratio), columns) if ratio > 1 else (rows, round(columns / ratio))


def stretch_to(pixels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Stretches `pixels`, float32 [H, W] in [0, 1], to `shape` (rows, columns), bilinear; the same array where it has that shape."""
    if pixels.shape == shape:
        return pixels
    resized = PIL.Image.fromarray(pixels).resize(shape[::-1], PIL.Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.clip(np.asarray(resized), 0, 1), np.float32)


def _height_to_width(dataset: Dataset) -> float:
    for keyword in ASPECT_TAGS:
        values = numbers_of(dataset, keyword)
        if len(values) == 2 and not any(map(math.isnan, values)) and min(values) > 0:
            return values[0] / values[1]
    return 1.0
