"""Where the weight of a map lies: on the lungs, outside them, or on markers and text.

`find_lungs` estimates the lungs without a trained network, by fitting a shape of two lungs to the borders in the picture. A lung full of
pneumonia is as bright as the tissue around it, so a threshold loses the very region that matters. A shape with nine measures cannot: what
one lung and the upper half of the other show places the rest. Its quality is in docs/explanations.md; it is for asking whether a map lies
on the lungs, not for measuring lungs.

`find_markers` finds letters and markers: what is small, bright, thin and sharp, which nothing in a chest is all at once. `judge_focus`
adds up the weight of a map on both. `quick_map` and `quick_focus` are for the reading room: Grad-CAM without a gradient and without
torch, from what the ONNX graph gives with the probability.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import (
    binary_dilation,
    distance_transform_edt,
    find_objects,
    gaussian_filter,
    grey_dilation,
    grey_erosion,
    grey_opening,
    label,
)
from scipy.optimize import differential_evolution

from pneumofed.common.imaging.images import fit_square
from pneumofed.inference.explain.methods import Attribution
from pneumofed.inference.explain.pictures import place_on_image

MOST_OUTSIDE, TIMES_CHANCE = 0.5, 1.5
"""More than half: what the map mainly points at is no lung. Or half as much again as a map without any preference would have there, which
is the stricter one for coarse maps: with the margin of a 4 x 4 map little of the picture is left outside. Both are ours."""
MIN_CELLS = 7
"""Cells of a map to a side of the network's square, below which nothing is claimed of its place. A lung is about a third of the square
wide: with fewer cells it is two of them, the margin of half a cell around it covers most of the picture, and nearly every map passes. At
4 x 4 a map with all its weight in a lower corner was flagged in 10 of 22 images. 7 x 7 is what a ResNet has at 224 px."""
MOST_ON_MARKS = 0.2
"""A fifth: marks with their margin cover some hundredths of a picture, so this is several times what chance would put there. Twice the
share of the area is asked for as well, for pictures full of writing."""

LUNG_GRID_PX = 48
_BORDER_BAND = 0.09
"""Width of the bands inside and outside the border that are compared; about a rib and its gap in a child."""
_BORDER_EDGE = 0.02
_BORDER_WEIGHTS = (0.3, 0.2, 0.3, 0.2)
"""Weights of chest wall, mediastinum, diaphragm and apex; the first and the third are the plainest in a radiograph."""

LUNG_BOUNDS = {
    "middle": (-0.25, 0.25),
    "tilt": (-0.15, 0.15),
    "apex": (-0.95, -0.40),
    "height": (0.70, 1.55),
    "width": (0.48, 0.98),
    "taper": (0.55, 0.90),
    "medial": (0.06, 0.20),
    "heart": (0.00, 0.30),
    "rise": (0.00, 0.15),
}
"""Range of each measure, in halves of the square's side: wide enough for every frontal chest that fills at least two thirds of it."""
_LUNG_TYPICAL = np.array([0.0, 0.0, -0.70, 1.15, 0.72, 0.70, 0.12, 0.14, 0.05])
_LUNG_SPREAD = np.array([0.10, 0.06, 0.15, 0.20, 0.15, 0.12, 0.05, 0.10, 0.06])
_HEIGHT_TO_WIDTH, _HEIGHT_SPREAD = 1.60, 0.18
"""Of a lung's height and half the thorax: an aspect that differs less between people than either. By eye on 24 public radiographs."""
_AIR_GREY, _AIR_RANK = 0.15, 0.25
"""Grey below which a pixel at the edge is no patient, and the rank that it gets instead."""
_PRIOR_COST = 0.007
"""Cost of a measure that is one spread off: a thirtieth of the contrast of a lung's border in a plain radiograph, so that it decides only
where the picture does not."""

MIN_LUNG_CONTRAST = 0.12

MARKS_MAX_PX = 384
"""Larger pictures are reduced to this side: a side marker of 1 cm on a film of 35 cm is then 11 pixels high."""
_MARK_STROKE = 1 / 24
"""Width of the widest stroke as a share of the side."""
_MARK_BRIGHTER = 0.25
"""By how much strokes must be brighter than what they stand on: lead and burnt-in text are white, ribs on lung are below 0.2."""
_MARK_EDGE = 0.30
"""Change of grey over three pixels at their borders; anatomy is blurred by the focal spot, lead and text less, or not at all."""
_MARK_SHARP = 0.5
"""Share of a mark's pixels with such an edge nearby."""
_MARK_HEIGHTS, _MARK_WIDTHS = (0.018, 0.14), (0.008, 0.80)
"""Of one letter or one line of text, as shares of the side."""
_MARK_FILL = (0.12, 0.92)
"""Share of its box that the strokes of a letter cover."""


class Misplaced(StrEnum):
    """What is wrong with where a map lies; the value is the sentence for the reader."""

    OUTSIDE = "Too much of the weight of this map lies outside the lungs."
    MARKS = "Much of the weight of this map lies on markers or text."
    TOO_COARSE = "The map is too coarse to tell whether it lies on the lungs or on markers."
    NO_LUNGS = "The lungs were not found in this picture, so it is not known whether the map lies on them."
    EMPTY = "The map is empty: nothing in the picture speaks for this finding."


@dataclass(frozen=True)
class Focus:
    """Where the weight of a map lies, as shares of all of it; NaN where it is not known.

    Attributes:
        outside: of the weight, outside the lungs and a margin of half a cell of the map around them.
        outside_area: of the picture, likewise: what a map without any preference would have.
        on_marks: of the weight, on marks and the same margin.
        beyond_lungs: of the weight, outside the lungs themselves, without the margin: the number to quote.
        beyond_lungs_area: of the picture, likewise.
        marks_area: of the picture, likewise.
        warnings: what is wrong, for the reader.
    """

    outside: float
    outside_area: float
    on_marks: float
    marks_area: float
    warnings: tuple[Misplaced, ...]
    beyond_lungs: float = float("nan")
    beyond_lungs_area: float = float("nan")


def judge_focus(weights: np.ndarray, lungs: LungField, marks: NDArray[np.bool_], margin_px: float, *, cells: float) -> Focus:
    """Measures where the positive part of a map lies; all arrays are of the same picture.

    The margin is half the side of the map's cell in pixels of the picture: a map of 4 x 4 cells cannot end at the pleura, and what it
    blurs over the border is not held against it by the warnings. Below `MIN_CELLS` there are none of its place, but that it is too coarse.

    Args:
        weights: the map placed on the picture, float [H, W]; what is below zero does not count.
        lungs: of `find_lungs`.
        marks: of `find_markers`, bool [H, W].
        margin_px: around lungs and marks, in pixels of the picture.
        cells: of the map to a side of the network's square.
    """
    mass = np.maximum(weights, 0.0).astype(np.float64)
    total = float(mass.sum())
    outside, near_marks = ~_within(lungs.lungs, margin_px), _within(marks, margin_px)
    shares = [float(mass[place].sum() / total) if total > 0 else float("nan") for place in (outside, near_marks)]
    beyond = float(mass[~lungs.lungs].sum() / total) if total > 0 else float("nan")
    if not lungs.found:
        shares[0] = beyond = float("nan")
    areas = float(outside.mean()), float(near_marks.mean())
    warnings = _warnings(shares, areas, total, lungs, cells)
    return Focus(shares[0], areas[0], shares[1], areas[1], warnings, beyond, float((~lungs.lungs).mean()))


def _warnings(
    shares: list[float], areas: tuple[float, float], total: float, lungs: LungField, cells: float
) -> tuple[Misplaced, ...]:
    if total > 0 and cells < MIN_CELLS:
        return (Misplaced.TOO_COARSE,)
    warnings = {
        Misplaced.EMPTY: total <= 0,
        Misplaced.OUTSIDE: shares[0] > min(MOST_OUTSIDE, TIMES_CHANCE * areas[0]),
        Misplaced.MARKS: shares[1] > max(MOST_ON_MARKS, 2.0 * areas[1]),
        Misplaced.NO_LUNGS: not lungs.found,
    }
    return tuple(warning for warning, holds in warnings.items() if holds)


def _within(place: NDArray[np.bool_], margin_px: float) -> NDArray[np.bool_]:
    """`place` and what is at most `margin_px` from it."""
    return distance_transform_edt(~place) <= margin_px if place.any() else place


@dataclass(frozen=True)
class LungField:
    """An estimate of where the lungs are.

    Attributes:
        lungs: bool [H, W].
        contrast: how much brighter the tissue just outside the border is than the lung just inside, in ranks of grey from 0 to 1.
            Below `MIN_LUNG_CONTRAST` the shape was found on nothing and `lungs` is not to be used.
    """

    lungs: NDArray[np.bool_]
    contrast: float

    @property
    def found(self) -> bool:
        return self.contrast >= MIN_LUNG_CONTRAST


def find_lungs(pixels: np.ndarray) -> LungField:
    """Finds the lungs in a frontal radiograph, `pixels` float32 [H, W] in [0, 1]; deterministic, about a third of a second."""
    square = fit_square(pixels, LUNG_GRID_PX, "pad")
    grey = _ranks(gaussian_filter(square, 0.8))
    x, y = _grid()

    def cost(measures: np.ndarray) -> NDArray[np.float64]:
        off = (measures - _LUNG_TYPICAL[:, None]) / _LUNG_SPREAD[:, None]
        slim = (measures[3] / measures[4] - _HEIGHT_TO_WIDTH) / _HEIGHT_SPREAD
        return _PRIOR_COST * (np.square(off).sum(axis=0) + np.square(slim)) - _contrast(_depths(x, y, measures), grey)

    found = differential_evolution(
        cost, list(LUNG_BOUNDS.values()), x0=_LUNG_TYPICAL, rng=0, popsize=6, maxiter=45, tol=1e-4, vectorized=True, updating="deferred",
        polish=False,
    )  # fmt: skip
    depths = _depths(x, y, found.x[:, None])
    depth = np.min(depths, axis=0)[0].reshape(LUNG_GRID_PX, LUNG_GRID_PX)
    lungs = place_on_image(depth, (pixels.shape[0], pixels.shape[1]), "pad") > 0
    return LungField(lungs, float(_contrast(depths, grey)[0]))


def _grid() -> tuple[np.ndarray, np.ndarray]:
    middle = (np.arange(LUNG_GRID_PX, dtype=np.float32) + 0.5) / LUNG_GRID_PX * 2.0 - 1.0
    y, x = np.meshgrid(middle, middle, indexing="ij")
    return x.ravel(), y.ravel()


def _depths(x: np.ndarray, y: np.ndarray, measures: np.ndarray) -> tuple[np.ndarray, ...]:
    """About the distance of each pixel to each border of the lung on its side, each [P, pixels] for measures [9, P]; above 0 inside.

    The borders: chest wall, mediastinum with the heart on the picture's right, dome of the diaphragm, apex.
    """
    middle, tilt, apex, height, width, taper, medial, heart, rise = (measure[:, None] for measure in measures.astype(np.float32))
    turned, down = x - middle + tilt * y, y - tilt * (x - middle)
    across, is_heart_side = np.abs(turned), turned > 0
    part = np.clip((down - apex) / height, 0.0, 1.1)
    wall = width * (taper + (1.0 - taper) * np.sqrt(part)) - across
    inner = across - medial - is_heart_side * heart * np.square(np.clip(2.0 * part - 0.8, 0.0, 1.0))
    base = apex + height - rise * ~is_heart_side
    dome = 0.8 * (base + 0.9 * np.square(across - 0.5 * width) - down)
    top = 0.6 * (down - apex - 2.2 * np.square(across - 0.42 * width))
    return wall, inner, dome, top


def _contrast(depths: tuple[np.ndarray, ...], grey: np.ndarray) -> NDArray[np.float64]:
    """Mean grey of the band outside a border minus that of the band inside, [P], averaged over the borders.

    Each border counts the same, however long: the diaphragm is short, and what is below a lung that ends too early is lung again.
    """
    depth = np.minimum(np.minimum(depths[0], depths[1]), np.minimum(depths[2], depths[3]))
    inside = _step(depth)
    near, outside = inside * _step(_BORDER_BAND - depth), (1.0 - inside) * _step(_BORDER_BAND + depth)
    found = np.zeros(len(depth))
    for border, weight in zip(depths, _BORDER_WEIGHTS, strict=True):
        nearest = border == depth
        found += weight * (_mean(outside * nearest, grey) - _mean(near * nearest, grey))
    return found


def _mean(weight: np.ndarray, grey: np.ndarray) -> NDArray[np.float64]:
    return (weight @ grey).astype(np.float64) / (weight.sum(axis=1) + 1e-6)


def _step(depth: np.ndarray) -> np.ndarray:
    return np.clip(depth / (2 * _BORDER_EDGE) + 0.5, 0.0, 1.0)


def _ranks(grey: np.ndarray) -> np.ndarray:
    """Each pixel's place by grey among those of the body, from 0 to 1, float32 [pixels]: exposure and window fall out.

    What is black and reaches the picture's edge is air beside the patient, collimation or padding. It is given a rank between: as dark as
    it is the chest wall would look like the far side of a lung, and as bright as tissue the skin would look like a lung's border.
    """
    body = ~_reaches_edge(grey < _AIR_GREY).ravel()
    ranks = np.full(grey.size, _AIR_RANK, np.float32)
    order = np.argsort(np.argsort(grey.ravel()[body], kind="stable"), kind="stable")
    ranks[body] = order / max(1, len(order) - 1)
    return ranks


def _reaches_edge(dark: NDArray[np.bool_]) -> NDArray[np.bool_]:
    numbered, _ = label(dark)
    at_edge = np.concatenate([numbered[0], numbered[-1], numbered[:, 0], numbered[:, -1]])
    return dark & np.isin(numbered, at_edge)


def find_markers(pixels: np.ndarray) -> NDArray[np.bool_]:
    """Finds marks in a radiograph, `pixels` float32 [H, W] in [0, 1], as boxes, bool [H, W]; about 30 ms.

    Misses marks that are grey, larger than a seventh of the picture's side or blurred; takes small metal (leads, clips) for marks, which is
    as well: evidence does not lie there either.
    """
    side = min(MARKS_MAX_PX, max(pixels.shape))
    grey = fit_square(pixels, side, "pad")
    strokes = grey - grey_opening(grey, size=max(3, round(_MARK_STROKE * side))) > _MARK_BRIGHTER
    sharp = binary_dilation(grey_dilation(grey, size=3) - grey_erosion(grey, size=3) > _MARK_EDGE)
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
    if not (_MARK_HEIGHTS[0] <= height / side <= _MARK_HEIGHTS[1] and _MARK_WIDTHS[0] <= width / side <= _MARK_WIDTHS[1]):
        return False
    return bool(_MARK_FILL[0] <= mark.sum() / (height * width) <= _MARK_FILL[1] and sharp[mark].mean() >= _MARK_SHARP)


def quick_map(activation_map: np.ndarray, score: float, side: int) -> Attribution:
    """Computes Grad-CAM of P(pneumonia) from `Prediction.activation_map` float32 [h, w] and `Prediction.score`; under a millisecond.

    The activation map is sum_k v_k A_k with v the gradient of the score by the features (Zhou et al. 2016, eq. 2). The features are
    averages of the maps A, so the gradient by each place of map k is v_k / (h w), and so is its mean: this is Grad-CAM
    (Selvaraju et al. 2017, eq. 1-2) times h w. For a network without averages there is no activation map, and none is to be had here.

    Args:
        activation_map: of one image.
        score: its log-odds of pneumonia.
        side: of the square that the network saw.
    """
    values = Image.fromarray(np.maximum(activation_map, 0.0).astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR)
    return Attribution(np.asarray(values), "grad-cam", "pneumonia", score, side / activation_map.shape[-1])


def quick_focus(pixels: np.ndarray, activation_map: np.ndarray, fit: Literal["pad", "crop"]) -> Focus:
    """Measures where the weight of the map lies in the image that it was made of; about 0.15 s, most of it the search for the lungs.

    Asked of the image at the resolution at which marks are looked for, so that its cost does not grow with the detector's.

    Args:
        pixels: float32 [H, W] in [0, 1].
        activation_map: `Prediction.activation_map` float32 [h, w]; what is above zero speaks for pneumonia.
        fit: how the network's square was made.
    """
    small = _reduced(pixels)
    side = max(small.shape) if fit == "pad" else min(small.shape)
    values = quick_map(activation_map, 0.0, side).values
    shape = (small.shape[0], small.shape[1])
    placed = place_on_image(values, shape, fit)
    cells = activation_map.shape[-1]
    return judge_focus(placed, find_lungs(small), find_markers(small), side / cells / 2, cells=cells)


def _reduced(pixels: np.ndarray) -> np.ndarray:
    scale = MARKS_MAX_PX / max(pixels.shape)
    if scale >= 1:
        return pixels
    height, width = (max(1, round(scale * length)) for length in pixels.shape)
    image = Image.fromarray(np.ascontiguousarray(pixels, np.float32))
    return np.clip(np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)), 0.0, 1.0)
