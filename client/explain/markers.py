"""Where letters and markers stand in a radiograph: what is small, bright, thin and sharp, which nothing in a chest is all at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, find_objects, grey_dilation, grey_erosion, grey_opening, label

from client.explain.placing import place_on_image
from common.images import fit_square

LARGEST_PX = 384
"""Larger pictures are reduced to this side: a side marker of 1 cm on a film of 35 cm is then 11 pixels high."""
_STROKE = 1 / 24
"""Width of the widest stroke as a share of the side."""
_LEAST_BRIGHTER = 0.25
"""By how much strokes must be brighter than what they stand on: lead and burnt-in text are white, ribs on lung are below 0.2."""
_LEAST_EDGE = 0.30
"""Change of grey over three pixels at their borders; anatomy is blurred by the focal spot, lead and text less, or not at all."""
_LEAST_SHARP = 0.5
"""Share of a mark's pixels with such an edge nearby."""
_HEIGHTS, _WIDTHS = (0.018, 0.14), (0.008, 0.80)
"""Of one letter or one line of text, as shares of the side."""
_FILL = (0.12, 0.92)
"""Share of its box that the strokes of a letter cover."""


def find_markers(pixels: np.ndarray) -> NDArray[np.bool_]:
    """bool [H, W]: boxes around marks in a radiograph, `pixels` float32 [H, W] in [0, 1]; about 30 ms.

    Misses marks that are grey, larger than a seventh of the picture's side or blurred; takes small metal (leads, clips) for marks, which is
    as well: evidence does not lie there either.
    """
    side = min(LARGEST_PX, max(pixels.shape))
    grey = fit_square(pixels, side, "pad")
    strokes = grey - grey_opening(grey, size=max(3, round(_STROKE * side))) > _LEAST_BRIGHTER
    sharp = binary_dilation(grey_dilation(grey, size=3) - grey_erosion(grey, size=3) > _LEAST_EDGE)
    marks = np.zeros(grey.shape, np.float32)
    numbered, _ = label(binary_dilation(strokes))
    for number, box in enumerate(find_objects(numbered), start=1):
        mark = (numbered[box] == number) & strokes[box]
        if _is_mark(mark, sharp[box], side):
            marks[box] = 1.0
    return place_on_image(marks, (pixels.shape[0], pixels.shape[1]), "pad") > 0.5


def _is_mark(mark: np.ndarray, sharp: np.ndarray, side: int) -> bool:
    rows, columns = np.flatnonzero(mark.any(axis=1)), np.flatnonzero(mark.any(axis=0))
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    if not (_HEIGHTS[0] <= height / side <= _HEIGHTS[1] and _WIDTHS[0] <= width / side <= _WIDTHS[1]):
        return False
    return bool(_FILL[0] <= mark.sum() / (height * width) <= _FILL[1] and sharp[mark].mean() >= _LEAST_SHARP)
