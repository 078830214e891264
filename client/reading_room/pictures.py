"""The pictures of a case for the viewer: the image through a window, its pixels, and the heat map in colour."""

from __future__ import annotations

import gzip
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from client.reading_room.reading import FULL_SCALE, MAP, PIXELS
from common.image_types import Window

MAP_SIDE_PX = 512
STRONGEST_ALPHA = 220
COLOURS = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], np.float64)
"""Five colours of matplotlib's `inferno`, whose lightness grows evenly, so that it is read rightly in grey and by the colour-blind."""


def read_pixels(folder: Path, height: int, width: int) -> np.ndarray:
    """uint16 [height, width] of a case.

    Raises:
        OSError: its files are damaged or gone.
    """
    with gzip.open(folder / PIXELS, "rb") as file:
        data = file.read(2 * height * width + 1)
    if len(data) != 2 * height * width:
        raise OSError("the pixels of a case are damaged")
    return np.frombuffer(data, "<u2").reshape(height, width)


def render_image(pixels: np.ndarray, window: Window, *, invert: bool, max_side: int) -> bytes:
    """PNG, 8 bits of grey, of uint16 `pixels` [H, W] through `window` (in parts of their full range), scaled down to `max_side`."""
    values = np.arange(FULL_SCALE + 1) / FULL_SCALE
    grey = np.clip((values - window.center) / window.width + 0.5, 0, 1)
    table = np.rint(255 * (1 - grey if invert else grey)).astype(np.uint8)
    image = PIL.Image.fromarray(table[pixels])
    if max(image.size) > max_side:
        image = image.resize(_within(image.size, max_side), PIL.Image.Resampling.BILINEAR)
    return _png(image)


def shrink(pixels: np.ndarray, max_side: int) -> np.ndarray:
    """uint16 [h, w] of `pixels` [H, W], scaled down to `max_side` with the aspect ratio kept; as they are if they fit."""
    height, width = pixels.shape
    if max(height, width) <= max_side:
        return pixels
    image = PIL.Image.fromarray(pixels.astype(np.float32))
    small = image.resize(_within((width, height), max_side), PIL.Image.Resampling.BILINEAR)
    return np.rint(np.clip(np.asarray(small), 0, FULL_SCALE)).astype("<u2")


def read_map(folder: Path) -> np.ndarray:
    """float32 [h, w] in [0, 1] of a case.

    Raises:
        OSError: it has none.
        ValueError: the file is damaged.
    """
    found: np.ndarray = np.load(folder / MAP, allow_pickle=False)
    return found


def render_map(values: np.ndarray, area: Sequence[float], height: int, width: int) -> bytes:
    """PNG, RGBA, of the map `values` [h, w] in [0, 1], in the shape of an image of `height` and `width`, of which it covers `area`."""
    columns, rows = _within((width, height), MAP_SIDE_PX)
    left, top, across, down = area
    size = (max(1, round(across * columns)), max(1, round(down * rows)))
    wide = PIL.Image.fromarray(values.astype(np.float32)).resize(size, PIL.Image.Resampling.BICUBIC)
    canvas = PIL.Image.new("F", (columns, rows))
    canvas.paste(wide, (round(left * columns), round(top * rows)))
    return _png(PIL.Image.fromarray(_coloured(np.clip(np.asarray(canvas), 0, 1))))


def _coloured(values: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 4]: colour by value, opacity as well."""
    stops = np.linspace(0, 1, len(COLOURS))
    levels = np.linspace(0, 1, 256)
    table = np.stack([np.interp(levels, stops, channel) for channel in COLOURS.T] + [levels * STRONGEST_ALPHA], axis=1)
    coloured: np.ndarray = np.rint(table).astype(np.uint8)[np.rint(values * 255).astype(np.uint8)]
    return coloured


def _within(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    scale = min(1.0, max_side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _png(image: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
