"""Where the lungs are, without a trained network: a shape of two lungs that is fitted to the borders in the picture.

A lung full of pneumonia is as bright as the tissue around it, so a threshold loses the very region that matters. A shape with nine
measures cannot: what one lung and the upper half of the other show places the rest. It is an estimate, and its quality is in
docs/explanations.md; it is for asking whether a map lies on the lungs, not for measuring lungs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, label
from scipy.optimize import differential_evolution

from client.explain.placing import place_on_image
from common.images import fit_square

GRID_PX = 48
_BAND = 0.09
"""Width of the bands inside and outside the border that are compared; about a rib and its gap in a child."""
_EDGE = 0.02
_BORDERS = (0.3, 0.2, 0.3, 0.2)
"""Weights of chest wall, mediastinum, diaphragm and apex; the first and the third are the plainest in a radiograph."""

BOUNDS = {
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
_TYPICAL = np.array([0.0, 0.0, -0.70, 1.15, 0.72, 0.70, 0.12, 0.14, 0.05])
_SPREAD = np.array([0.10, 0.06, 0.15, 0.20, 0.15, 0.12, 0.05, 0.10, 0.06])
_HEIGHT_TO_WIDTH, _HEIGHT_SPREAD = 1.60, 0.18
"""Of a lung's height and half the thorax: an aspect that differs less between people than either. By eye on 24 public radiographs."""
_BLACK, _NEITHER = 0.15, 0.25
"""Grey below which a pixel at the edge is no patient, and the rank that it gets instead."""
_PRIOR = 0.007
"""Cost of a measure that is one spread off: a thirtieth of the contrast of a lung's border in a plain radiograph, so that it decides only
where the picture does not."""


@dataclass(frozen=True)
class LungField:
    """An estimate of where the lungs are.

    Attributes:
        lungs: bool [H, W].
        contrast: how much brighter the tissue just outside the border is than the lung just inside, in ranks of grey from 0 to 1.
            Below `LEAST_CONTRAST` the shape was found on nothing and `lungs` is not to be used.
    """

    lungs: NDArray[np.bool_]
    contrast: float

    @property
    def found(self) -> bool:
        return self.contrast >= LEAST_CONTRAST


LEAST_CONTRAST = 0.12


def find_lungs(pixels: np.ndarray) -> LungField:
    """The lungs in a frontal radiograph, `pixels` float32 [H, W] in [0, 1]; deterministic, about a third of a second."""
    square = fit_square(pixels, GRID_PX, "pad")
    grey = _ranks(gaussian_filter(square, 0.8))
    x, y = _grid()

    def cost(measures: np.ndarray) -> NDArray[np.float64]:
        off = (measures - _TYPICAL[:, None]) / _SPREAD[:, None]
        slim = (measures[3] / measures[4] - _HEIGHT_TO_WIDTH) / _HEIGHT_SPREAD
        return _PRIOR * (np.square(off).sum(axis=0) + np.square(slim)) - _contrast(_depths(x, y, measures), grey)

    found = differential_evolution(
        cost, list(BOUNDS.values()), x0=_TYPICAL, rng=0, popsize=6, maxiter=45, tol=1e-4, vectorized=True, updating="deferred",
        polish=False,
    )  # fmt: skip
    depths = _depths(x, y, found.x[:, None])
    depth = np.min(depths, axis=0)[0].reshape(GRID_PX, GRID_PX)
    lungs = place_on_image(depth, (pixels.shape[0], pixels.shape[1]), "pad") > 0
    return LungField(lungs, float(_contrast(depths, grey)[0]))


def _grid() -> tuple[np.ndarray, np.ndarray]:
    middle = (np.arange(GRID_PX, dtype=np.float32) + 0.5) / GRID_PX * 2.0 - 1.0
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
    near, outside = inside * _step(_BAND - depth), (1.0 - inside) * _step(_BAND + depth)
    found = np.zeros(len(depth))
    for border, weight in zip(depths, _BORDERS, strict=True):
        nearest = border == depth
        found += weight * (_mean(outside * nearest, grey) - _mean(near * nearest, grey))
    return found


def _mean(weight: np.ndarray, grey: np.ndarray) -> NDArray[np.float64]:
    return (weight @ grey).astype(np.float64) / (weight.sum(axis=1) + 1e-6)


def _step(depth: np.ndarray) -> np.ndarray:
    return np.clip(depth / (2 * _EDGE) + 0.5, 0.0, 1.0)


def _ranks(grey: np.ndarray) -> np.ndarray:
    """Each pixel's place by grey among those of the body, from 0 to 1, float32 [pixels]: exposure and window fall out.

    What is black and reaches the picture's edge is air beside the patient, collimation or padding. It is given a rank between: as dark as
    it is the chest wall would look like the far side of a lung, and as bright as tissue the skin would look like a lung's border.
    """
    body = ~_reaches_edge(grey < _BLACK).ravel()
    ranks = np.full(grey.size, _NEITHER, np.float32)
    order = np.argsort(np.argsort(grey.ravel()[body], kind="stable"), kind="stable")
    ranks[body] = order / max(1, len(order) - 1)
    return ranks


def _reaches_edge(dark: NDArray[np.bool_]) -> NDArray[np.bool_]:
    numbered, _ = label(dark)
    at_edge = np.concatenate([numbered[0], numbered[-1], numbered[:, 0], numbered[:, -1]])
    return dark & np.isin(numbered, at_edge)
