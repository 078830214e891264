"""Covers: a radiograph with its lungs, everything but its lungs, its borders or its markers blackened.

What a network still tells apart where the lungs are covered it does not see in the lungs (Maguolo and Nanni 2021, "A critic evaluation of
methods for COVID-19 automatic detection from X-ray images", Information Fusion 76:1-7, who cover them with a box). Places are found
once in the radiograph at its own resolution; a cover is a place filled with black, so that the rest of the picture stays as it is.

The outline is an estimate (`inference.explain.focus.find_lungs`), so both covers of lungs err on one side: `lungs` takes a margin along,
and `only_lungs` takes none. Black has a shape, and the outline's shape may tell something itself: `outline` is that shape and nothing
else, and what it gives is to be read beside the others.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from pneumofed.inference.explain.focus import LungField

Cover = Literal["none", "only_lungs", "lungs", "lung_box", "borders", "markers", "outline"]
COVERS: tuple[Cover, ...] = get_args(Cover)

LUNG_MARGIN = 0.05
"""Around the lungs, covered with them, as a share of the picture's longer side: the pleura, and about half a rib's gap of error."""
BORDER_WIDTH = 0.10
"""Of the borders, as a share of the picture's height and width."""
MARKER_REACH = 0.25
"""How far into the picture a side marker or a line of text lies, as a share of its height and width."""
USABLE_AREA = (0.08, 0.42)
"""Share of the picture that an outline of two lungs covers. By eye on 120 public radiographs those above ran over the chest wall."""


def is_usable(lungs: LungField) -> bool:
    """Says whether an outline is good enough to cover by: found with enough contrast, and of a size that lungs have in a radiograph.

    Outlines that end a third too high pass, since nothing in them says so.
    """
    return lungs.found and USABLE_AREA[0] <= float(lungs.lungs.mean()) <= USABLE_AREA[1]


def find_place(cover: Cover, lungs: NDArray[np.bool_], marks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Finds what a cover blackens.

    Args:
        cover: which; `outline` blackens what `only_lungs` does, and whitens the rest.
        lungs: of `find_lungs`, bool [H, W].
        marks: of `find_markers`, bool [H, W]; those near an edge and outside the lungs count.

    Returns:
        bool [H, W].
    """
    match cover:
        case "none":
            return np.zeros_like(lungs)
        case "only_lungs" | "outline":
            return ~lungs
        case "lungs":
            return _grow(lungs, LUNG_MARGIN * max(lungs.shape))
        case "lung_box":
            return _box(_grow(lungs, LUNG_MARGIN * max(lungs.shape)))
        case "borders":
            return _ring(lungs.shape, BORDER_WIDTH)
        case "markers":
            return marks & ~lungs & _ring(lungs.shape, MARKER_REACH)


def apply_cover(cover: Cover, pixels: np.ndarray, place: NDArray[np.bool_]) -> np.ndarray:
    """Blackens `place`; for `outline` the rest becomes white.

    Args:
        cover: whose place it is.
        pixels: of any type, [H, W]; white is 255 for integers and 1 else. Left as they are.
        place: bool [H, W], of `find_place`, or what scaling has made of it.

    Returns:
        Like `pixels`; what is not covered is as it was. Covered again at the same place it stays the same.
    """
    white = 255 if np.issubdtype(pixels.dtype, np.integer) else 1.0
    source = np.full_like(pixels, white) if cover == "outline" else pixels
    return np.where(place, np.zeros_like(pixels), source)


def _grow(place: NDArray[np.bool_], margin_px: float) -> NDArray[np.bool_]:
    return distance_transform_edt(~place) <= margin_px if place.any() else place


def _box(place: NDArray[np.bool_]) -> NDArray[np.bool_]:
    box = np.zeros_like(place)
    if place.any():
        rows, columns = np.nonzero(place)
        box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
    return box


def _ring(shape: tuple[int, ...], width: float) -> NDArray[np.bool_]:
    """What is nearer to an edge than the share `width` of the picture's height or width."""
    height, across = shape
    rows, columns = round(width * height), round(width * across)
    ring = np.ones((height, across), np.bool_)
    ring[rows : height - rows, columns : across - columns] = False
    return ring
