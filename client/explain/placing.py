"""From the network's square back to the picture that the radiologist sees."""

from __future__ import annotations

from typing import Literal

import numpy as np
import PIL.Image


def place_on_image(values: np.ndarray, shape: tuple[int, int], fit: Literal["pad", "crop"]) -> np.ndarray:
    """`values` float32 [S, S] over the square of `fit_square`, as float32 [H, W] over the image of `shape` that it was made of.

    Bilinear, so within the range of `values`. What `pad` added is cut off; what `crop` cut off is 0: the network has not seen it.
    """
    height, width = shape
    if fit == "crop":
        side = min(shape)
        top, left = (height - side) // 2, (width - side) // 2
        placed = np.zeros(shape, np.float32)
        placed[top : top + side, left : left + side] = _resize(values, side, side)
        return placed
    size = values.shape[0]
    inner = [max(1, round(length * size / max(shape))) for length in shape]
    top, left = ((size - length) // 2 for length in inner)
    return _resize(values[top : top + inner[0], left : left + inner[1]], height, width)


def _resize(values: np.ndarray, height: int, width: int) -> np.ndarray:
    image = PIL.Image.fromarray(np.ascontiguousarray(values, np.float32))
    return np.asarray(image.resize((width, height), PIL.Image.Resampling.BILINEAR))
