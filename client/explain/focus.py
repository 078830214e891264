"""Whether a map looks where the finding can be: its weight outside the lungs, and on markers and text."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from client.explain.lungs import LungField

MOST_OUTSIDE, TIMES_CHANCE = 0.5, 1.5
"""More than half: what the map mainly points at is no lung. Or half as much again as a map without any preference would have there, which
is the stricter one for coarse maps: with the margin of a 4 x 4 map little of the picture is left outside. Both are ours."""
MOST_ON_MARKS = 0.2
"""A fifth: marks with their margin cover some hundredths of a picture, so this is several times what chance would put there. Twice the
share of the area is asked for as well, for pictures full of writing."""


class Misplaced(StrEnum):
    """What is wrong with where a map lies; the value is the sentence for the reader."""

    OUTSIDE = "Too much of the weight of this map lies outside the lungs."
    MARKS = "Much of the weight of this map lies on markers or text."
    NO_LUNGS = "The lungs were not found in this picture, so it is not known whether the map lies on them."
    EMPTY = "The map is empty: nothing in the picture speaks for this finding."


@dataclass(frozen=True)
class Focus:
    """Where the weight of a map lies, as shares of all of it; NaN where it cannot be told.

    Attributes:
        outside: of the weight, outside the lungs and a margin of half a cell of the map around them.
        outside_area: of the picture, likewise: what a map without any preference would have.
        on_marks: of the weight, on marks and the same margin.
        marks_area: of the picture, likewise.
        warnings: what the reader is told.
    """

    outside: float
    outside_area: float
    on_marks: float
    marks_area: float
    warnings: tuple[Misplaced, ...]


def judge_focus(weights: np.ndarray, lungs: LungField, marks: NDArray[np.bool_], margin_px: float) -> Focus:
    """Where the positive part of `weights` [H, W] lies; all arrays are of the same picture.

    The margin is half the side of the map's cell in pixels of the picture: a map of 4 x 4 cells cannot end at the pleura, and what it
    blurs over the border is not held against it.
    """
    mass = np.maximum(weights, 0.0).astype(np.float64)
    total = float(mass.sum())
    outside, near_marks = ~_within(lungs.lungs, margin_px), _within(marks, margin_px)
    shares = [float(mass[place].sum() / total) if total > 0 else float("nan") for place in (outside, near_marks)]
    if not lungs.found:
        shares[0] = float("nan")
    areas = float(outside.mean()), float(near_marks.mean())
    return Focus(shares[0], areas[0], shares[1], areas[1], _warnings(shares, areas, total, lungs))


def _warnings(shares: list[float], areas: tuple[float, float], total: float, lungs: LungField) -> tuple[Misplaced, ...]:
    told = {
        Misplaced.EMPTY: total <= 0,
        Misplaced.OUTSIDE: shares[0] > min(MOST_OUTSIDE, TIMES_CHANCE * areas[0]),
        Misplaced.MARKS: shares[1] > max(MOST_ON_MARKS, 2.0 * areas[1]),
        Misplaced.NO_LUNGS: not lungs.found,
    }
    return tuple(warning for warning, holds in told.items() if holds)


def _within(place: NDArray[np.bool_], margin_px: float) -> NDArray[np.bool_]:
    """`place` and what is at most `margin_px` from it."""
    return distance_transform_edt(~place) <= margin_px if place.any() else place
