"""One phantom: a chest with or without an opacity, in a posture, exposed and framed as a radiograph."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
from scipy.ndimage import gaussian_filter

from simulation.anatomy import Anatomy, Chest, draw_chest
from simulation.fields import Map, soft_step
from simulation.opacities import bacterial, viral
from simulation.phantom_mark import draw_text

LEAST_SEVERITY = 0.3


@dataclass(frozen=True)
class Exposure:
    """How one radiograph is taken. Lengths in units of half the picture's height.

    Attributes:
        aspect: width over height.
        scale: magnification.
        shift_x: of the patient to the right.
        shift_y: of the patient downward.
        rotation_rad: of the patient in the picture.
        inspiration: air in the lungs relative to the patient's own.
        centre: attenuation that is shown as middle grey.
        latitude: attenuation over which the grey changes; larger is a flatter picture.
        tilt: slope of brightness from side to side, as of a turned patient or a grid off its centre.
        noise: standard deviation of the quantum noise in attenuation, where that is 1.
        blur: standard deviation of the blur.
        collimation: width of the black border.
        marker_x: place of the side marker, from the left border.
        marker_y: place of the side marker, from the top.
    """

    aspect: float
    scale: float
    shift_x: float
    shift_y: float
    rotation_rad: float
    inspiration: float
    centre: float
    latitude: float
    tilt: float
    noise: float
    blur: float
    collimation: float
    marker_x: float
    marker_y: float


EXPOSURES: dict[str, tuple[float, float]] = {
    "aspect": (1.00, 1.30),
    "scale": (1.02, 1.20),
    "shift_x": (-0.06, 0.06),
    "shift_y": (-0.04, 0.08),
    "rotation_rad": (-0.06, 0.06),
    "inspiration": (0.80, 1.10),
    "centre": (0.80, 1.00),
    "latitude": (0.24, 0.36),
    "tilt": (-0.06, 0.06),
    "noise": (0.010, 0.035),
    "blur": (0.004, 0.010),
    "collimation": (-0.04, 0.06),
    "marker_x": (0.08, 0.16),
    "marker_y": (0.15, 1.0),
}
"""Ranges of the settings; each is drawn uniformly."""


def draw_exposure(rng: np.random.Generator) -> Exposure:
    """An exposure whose every setting is uniform in its range."""
    return Exposure(**{field.name: float(rng.uniform(*EXPOSURES[field.name])) for field in fields(Exposure)})


def draw_phantom(anatomy: Anatomy, label: str, size_px: int, rng: np.random.Generator) -> Map:
    """One radiograph of the patient `anatomy`: float32 [H, W] in [0, 1], its longer side `size_px`, not yet marked.

    Args:
        anatomy: the patient's build.
        label: `normal`, `bacterial` or `viral`.
        size_px: the longer side.
        rng: draws everything else: exposure, severity, place of the opacity, noise.
    """
    exposure = draw_exposure(rng)
    x, y = _coordinates(exposure, size_px)
    chest = draw_chest(*_posture(x, y, exposure), anatomy, rng)
    air = chest.air * exposure.inspiration * (1.0 - _opacity(chest, label, rng))
    attenuation = chest.body - air + anatomy.vessels * chest.vessels * chest.lung
    pixels = _develop(attenuation + exposure.tilt * x, exposure, rng)
    return _frame(pixels, x, y, exposure)


def draw_lungs(anatomy: Anatomy, size_px: int, rng: np.random.Generator) -> Map:
    """Share of each pixel that is lung, float32 [H, W] in [0, 1], in the radiograph that `draw_phantom` draws from the same arguments."""
    exposure = draw_exposure(rng)
    return draw_chest(*_posture(*_coordinates(exposure, size_px), exposure), anatomy, rng).lung


def _opacity(chest: Chest, label: str, rng: np.random.Generator) -> Map:
    severity = float(rng.uniform(LEAST_SEVERITY, 1.0))
    if label == "normal":
        return np.zeros_like(chest.lung)
    return bacterial(chest, severity, rng) if label == "bacterial" else viral(chest, severity, rng)


def _coordinates(exposure: Exposure, size_px: int) -> tuple[Map, Map]:
    height, width = round(size_px / max(exposure.aspect, 1.0)), round(size_px * min(exposure.aspect, 1.0))
    row = (np.arange(height, dtype=np.float32) + 0.5) / height * 2.0 - 1.0
    column = ((np.arange(width, dtype=np.float32) + 0.5) / width * 2.0 - 1.0) * exposure.aspect
    y, x = np.meshgrid(row, column, indexing="ij")
    return x, y


def _posture(x: Map, y: Map, exposure: Exposure) -> tuple[Map, Map]:
    """The patient's own coordinates of the picture's points."""
    x, y = (x - exposure.shift_x) / exposure.scale, (y - exposure.shift_y) / exposure.scale
    cos, sin = math.cos(exposure.rotation_rad), math.sin(exposure.rotation_rad)
    return cos * x + sin * y, cos * y - sin * x


def _develop(attenuation: Map, exposure: Exposure, rng: np.random.Generator) -> Map:
    """Grey values of `attenuation`, bright where dense, with quantum noise.

    Fewer quanta pass where attenuation a is high, and the logarithm of a Poisson count has a deviation of 1 / sqrt(count), so the
    noise grows with exp(a / 2). The film's curve is a logistic of the logarithm of exposure, scaled to run from black air.
    """
    quanta = rng.standard_normal(attenuation.shape, dtype=np.float32)
    noisy = attenuation + exposure.noise * quanta * np.exp(0.5 * attenuation - 0.5)
    sharp = (noisy - exposure.centre) / exposure.latitude
    grey = 1.0 / (1.0 + np.exp(-gaussian_filter(sharp, exposure.blur * attenuation.shape[0] / 2.0)))
    black = 1.0 / (1.0 + math.exp(exposure.centre / exposure.latitude))
    return np.clip((grey - black) / (0.97 - black), 0.0, 1.0)


def _frame(pixels: Map, x: Map, y: Map, exposure: Exposure) -> Map:
    """`pixels` inside the collimator's border and with the marker R of the patient's right side."""
    columns = soft_step(exposure.aspect - np.abs(x[:1]) - exposure.collimation, 0.004)
    rows = soft_step(1.0 - np.abs(y[:, :1]) - exposure.collimation, 0.004)
    framed = pixels * rows * columns
    letter = draw_text("R", max(9, round(pixels.shape[0] / 12)))
    top, left = (round(place * pixels.shape[0] / 2.0) for place in (exposure.marker_y, exposure.marker_x))
    place = framed[top : top + letter.shape[0], left : left + letter.shape[1]]
    np.maximum(place, 0.9 * letter[: place.shape[0], : place.shape[1]], out=place)
    return framed
