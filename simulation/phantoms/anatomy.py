"""A schematic frontal chest as maps of X-ray attenuation, and the soft shapes and smooth noise that it is drawn with.

What a radiograph shows is the integral of attenuation along each ray, on a logarithmic scale of exposure (Beer-Lambert), so a
chest is a sum of layers: the trunk, the air in the lungs (negative), the heart, bones. All shapes are soft-edged formulas on
a grid of coordinates; their numbers are measured by eye on public chest radiographs and mean nothing beyond the picture.

Coordinates: x to the right of the picture, which is the patient's left, y downward; one unit is half the picture's height.
All maps are float32 [H, W].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Map = NDArray[Any]
"""float32 [H, W]; not said to the type checker, to whom a float32 array times a Python float is float64."""

_HILUM = (0.16, -0.08)
_VESSEL_ANGLES = 160
_VESSEL_RADII = 48


@dataclass(frozen=True)
class Anatomy:
    """The build of one patient. Lengths in units of half the picture's height; attenuations relative to the trunk's 1."""

    trunk_width: float
    trunk_attenuation: float
    lung_width: float
    lung_apex: float
    lung_base: float
    liver_rise: float
    dome_curvature: float
    lung_air: float
    heart_width: float
    heart_shift: float
    heart_attenuation: float
    mediastinum_width: float
    scoliosis: float
    bone: float
    rib_spacing: float
    rib_slope: float
    rib_curvature: float
    rib_asymmetry: float
    clavicle_rise: float
    arm_angle: float
    stomach_gas: float
    vessels: float


CHILD_RANGES: dict[str, tuple[float, float]] = {
    "trunk_width": (0.80, 0.92),
    "trunk_attenuation": (0.90, 1.10),
    "lung_width": (0.66, 0.78),
    "lung_apex": (-0.80, -0.70),
    "lung_base": (0.32, 0.54),
    "liver_rise": (0.02, 0.10),
    "dome_curvature": (0.7, 1.7),
    "lung_air": (0.55, 0.80),
    "heart_width": (0.33, 0.46),
    "heart_shift": (0.05, 0.15),
    "heart_attenuation": (0.16, 0.30),
    "mediastinum_width": (0.12, 0.19),
    "scoliosis": (-0.03, 0.03),
    "bone": (0.12, 0.20),
    "rib_spacing": (0.125, 0.150),
    "rib_slope": (-0.12, 0.06),
    "rib_curvature": (0.30, 0.60),
    "rib_asymmetry": (-0.02, 0.02),
    "clavicle_rise": (0.02, 0.14),
    "arm_angle": (-0.9, 0.5),
    "stomach_gas": (-0.15, 0.30),
    "vessels": (0.08, 0.20),
}
"""Ranges of a child's build; each is drawn uniformly."""

ADULT_RANGES: dict[str, tuple[float, float]] = CHILD_RANGES | {
    "trunk_width": (0.88, 1.05),
    "trunk_attenuation": (1.00, 1.35),
    "lung_width": (0.72, 0.86),
    "lung_base": (0.36, 0.62),
    "lung_air": (0.50, 0.75),
    "heart_width": (0.30, 0.48),
    "bone": (0.10, 0.22),
    "rib_spacing": (0.150, 0.180),
    "rib_slope": (-0.05, 0.20),
    "vessels": (0.14, 0.30),
}
"""Ranges of an adult's build: wider, fewer ribs to the height, larger vessels."""


@dataclass(frozen=True)
class Chest:
    """A healthy chest, part by part.

    Attributes:
        body: attenuation of everything but the lungs' air and the vessels.
        air: how much air lowers the attenuation; at least 0, zero outside the lungs.
        lung: share of each pixel that is lung, in [0, 1].
        vessels: bronchovascular markings, in [0, 1]; meaningful inside the lungs.
        side: -1 over the picture's left half (the patient's right lung), +1 over the other.
        depth: position in the lung from apex 0 to base 1, beyond outside.
        hilum_distance: distance from the hilum of that side, in units.
    """

    body: Map
    air: Map
    lung: Map
    vessels: Map
    side: Map
    depth: Map
    hilum_distance: Map


def draw_anatomy(ranges: dict[str, tuple[float, float]], rng: np.random.Generator) -> Anatomy:
    """Draws a patient whose every measure is uniform in its range.

    Args:
        ranges: lowest and highest value of each field of `Anatomy`: `CHILD_RANGES` or `ADULT_RANGES`.
        rng: draws one number for each field, in their order.
    """
    return Anatomy(**{field.name: float(rng.uniform(*ranges[field.name])) for field in fields(Anatomy)})


def draw_chest(x: Map, y: Map, anatomy: Anatomy, rng: np.random.Generator) -> Chest:
    """Draws the chest of a patient.

    Args:
        x: float32 [H, W], horizontal coordinate of each pixel in the patient's frame.
        y: float32 [H, W], vertical coordinate.
        anatomy: the patient's build.
        rng: draws only the texture of tissue and vessels.
    """
    x = x - anatomy.scoliosis * np.sin(2.5 * y)
    side, across = np.where(x < 0, np.float32(-1), np.float32(1)), np.abs(x)
    inside = _lung_distance(across, y, side, anatomy)
    lung = soft_step(inside, 0.010)
    heart = _heart(x, y, anatomy)
    air = anatomy.lung_air * lung * (1.0 - 0.45 * np.exp(np.maximum(inside, 0.0) * -12.0)) * (1.0 - 1.8 * heart)
    arm, hilum = _arm_distance(across, y, anatomy), distance(across - _HILUM[0], y - _HILUM[1])
    trunk = anatomy.trunk_attenuation * _trunk(across, y, arm, anatomy) * (1.0 + 0.04 * smooth_noise(x.shape, (6, 6), rng))
    bones = _spine(x, y) + _clavicles(across, y, anatomy) + _arm_bones(arm)
    bones += _ribs(across, y - anatomy.rib_asymmetry * side, anatomy)
    organs = heart + _mediastinum(x, y, anatomy) - _stomach(x, y, anatomy)
    return Chest(
        body=(trunk + anatomy.bone * bones + organs).astype(np.float32),
        air=air.astype(np.float32),
        lung=lung,
        vessels=_vessels(across, y, side, hilum, rng),
        side=side,
        depth=((y - anatomy.lung_apex) / (anatomy.lung_base - anatomy.lung_apex)).astype(np.float32),
        hilum_distance=hilum.astype(np.float32),
    )


def soft_step(depth: Map, width: float) -> Map:
    """Computes a step with a soft edge: 0 well below zero, 1 well above, one half at zero with the slope 0.4 / `width`.

    It is a hyperbolic tangent, the cheapest in numpy.

    Args:
        depth: float32 [H, W], distance to the edge, positive inside.
        width: of the edge, in the unit of `depth`; above 0.
    """
    t = depth * np.float32(0.8 / width)
    np.tanh(t, out=t)
    t *= np.float32(0.5)
    t += np.float32(0.5)
    return t


def bump(offset: Map, width: float) -> Map:
    """Computes exp(-(offset / width)^2).

    Args:
        offset: float32 [H, W], distance to the ridge.
        width: in the unit of `offset`; above 0.
    """
    return np.exp(-np.square(offset * np.float32(1.0 / width)))


def distance(dx: Map, dy: Map) -> Map:
    """Computes the Euclidean length; `np.hypot` also guards against overflow, at several times the price.

    Args:
        dx: float32 [H, W], or a shape that broadcasts with `dy`.
        dy: likewise.
    """
    return np.sqrt(dx * dx + dy * dy)


def smooth_noise(shape: tuple[int, int], cells: tuple[int, int], rng: np.random.Generator) -> Map:
    """Draws Gaussian noise of unit variance whose features are about one cell large.

    White noise on a coarse grid, spread by Gaussian bumps along each axis in turn: two small matrix products, by einsum since
    BLAS would start its threads for them, which is slow on a busy machine and may round otherwise on another.

    Args:
        shape: rows and columns of the map, [H, W].
        cells: how many cells there are along the rows and the columns.
        rng: draws the white noise.
    """
    rows, columns = (bumps(side, count) for side, count in zip(shape, cells, strict=True))
    white = rng.standard_normal((rows.shape[1], columns.shape[1]), dtype=np.float32)
    return np.einsum("hi,iw->hw", np.einsum("hi,ij->hj", rows, white), np.ascontiguousarray(columns.T))


@lru_cache(maxsize=256)
def bumps(side: int, cells: int) -> Map:
    """Computes Gaussian bumps [side, cells + 1], one at each border of a cell, scaled so that white noise on them keeps unit variance.

    Args:
        side: points along the axis.
        cells: along it.
    """
    position = (np.arange(side, dtype=np.float32)[:, None] + 0.5) / side * cells
    bumps = np.exp(-np.square((position - np.arange(cells + 1, dtype=np.float32)) / 0.8))
    return bumps / np.sqrt(np.sum(bumps * bumps, axis=1, keepdims=True))


def _chest_wall(y: Map, anatomy: Anatomy) -> Map:
    """Half the width inside the ribs at the height `y`."""
    depth = np.clip((y - anatomy.lung_apex) / (anatomy.lung_base - anatomy.lung_apex), 0.0, 1.2)
    return anatomy.lung_width * (0.70 + 0.42 * depth - 0.14 * depth**2)


def _lung_distance(across: Map, y: Map, side: Map, anatomy: Anatomy) -> Map:
    """About the distance to the lung's border; positive inside. Between apex, chest wall, mediastinum and diaphragm."""
    base = anatomy.lung_base + anatomy.liver_rise * np.minimum(side, 0.0)
    diaphragm = base + anatomy.dome_curvature * np.square(across - 0.34)
    apex = 0.5 * (y - anatomy.lung_apex - 2.4 * np.square(across - 0.27))
    wall = _chest_wall(y, anatomy) - across
    medial = across - 0.11 - 0.05 * np.square(y + 0.3)
    return np.minimum(np.minimum(apex, wall), np.minimum(medial, 0.7 * (diaphragm - y)))


def _trunk(across: Map, y: Map, arm: Map, anatomy: Anatomy) -> Map:
    """Thickness of the soft tissue: an elliptic trunk with shoulders, neck, jaw and arms."""
    shoulders = 0.16 * soft_step(-0.50 - y, 0.08)
    width = anatomy.trunk_width + shoulders - 0.06 * soft_step(y - 0.3, 0.2)
    profile = np.sqrt(np.clip(1.0 - np.square(across / width) * 0.85, 0.0, 1.0))
    outline = np.minimum(width - across, y + 0.98 - 0.32 * across)
    neck = np.minimum(0.24 - across, -0.6 - y)
    jaw = 0.40 * soft_step(1.0 - distance(across / 0.33, (y + 1.18) / 0.36), 0.03)
    torso = soft_step(np.maximum(outline, neck), 0.015) * profile * (0.92 + 0.16 * soft_step(y - 0.45, 0.12))
    return np.maximum(torso, 0.45 * soft_step(0.13 - arm, 0.015)) + jaw


def _arm_distance(across: Map, y: Map, anatomy: Anatomy) -> Map:
    """Distance to the axis of the upper arm, which leaves the shoulder at `arm_angle` (0 points sideways, negative up)."""
    dx, dy = across - anatomy.trunk_width, y + 0.62
    cos, sin = math.cos(anatomy.arm_angle), math.sin(anatomy.arm_angle)
    along = np.maximum(dx * cos + dy * sin, 0.0)
    return distance(dx - along * cos, dy - along * sin)


def _arm_bones(arm: Map) -> Map:
    return 1.3 * soft_step(0.045 - arm, 0.012) - 0.5 * soft_step(0.022 - arm, 0.010)


def _spine(x: Map, y: Map) -> Map:
    """Vertebral bodies and their discs, and the paler column of the neck and abdomen."""
    discs = 0.5 + 0.5 * np.cos(2.0 * np.pi / 0.125 * y)
    return (0.60 + 0.40 * discs) * soft_step(0.085 - np.abs(x), 0.012) + 0.35 * discs * bump(np.abs(x) - 0.05, 0.02)


def _ribs(across: Map, y: Map, anatomy: Anatomy) -> Map:
    """Posterior ribs, which fall toward the side, and the fainter anterior ones, which fall toward the middle."""
    wall = _chest_wall(y, anatomy) + 0.03
    u = across - 0.09
    bend = 0.22 * np.square(np.square(np.clip(across / wall, 0.0, 1.1)))
    posterior = _rib_rows(y - anatomy.rib_slope * u - anatomy.rib_curvature * u * u - bend, anatomy.rib_spacing, 0.22)
    anterior = _rib_rows(y + 0.75 * u - 0.5 * u * u + bend, 1.05 * anatomy.rib_spacing, 0.26)
    cage = (
        soft_step(wall - across, 0.008)
        * soft_step(y - anatomy.lung_apex - 1.6 * np.square(across - 0.25), 0.03)
        * soft_step(0.85 - y, 0.08)
    )
    return (
        cage * (posterior * soft_step(u, 0.01) + 0.45 * anterior * soft_step(across - 0.34, 0.06))
        + 0.7 * bump(across - wall, 0.022) * cage
    )


def _rib_rows(height: Map, spacing: float, half_width: float) -> Map:
    """Bands that repeat every `spacing`, denser at their cortical edges."""
    phase = height * (1.0 / spacing)
    offset = np.abs(phase - np.floor(phase) - 0.5)
    return 0.65 * soft_step(half_width - offset, 0.04) + 0.35 * bump(offset - half_width, 0.07)


def _clavicles(across: Map, y: Map, anatomy: Anatomy) -> Map:
    course = (
        anatomy.lung_apex + 0.20 - anatomy.clavicle_rise * np.sin(np.clip((across - 0.08) / 0.6, 0.0, 1.0) * 2.6) - 0.15 * across
    )
    band = soft_step(0.030 - np.abs(y - course), 0.008) + 0.4 * bump(np.abs(y - course) - 0.03, 0.012)
    return 1.1 * band * soft_step(across - 0.08, 0.012) * soft_step(0.74 - across, 0.02)


def _heart(x: Map, y: Map, anatomy: Anatomy) -> Map:
    """A tilted ellipse to the patient's left, resting on the diaphragm."""
    dx, dy = x - anatomy.heart_shift, y - (anatomy.lung_base - 0.22)
    along, across = 0.85 * dx + 0.53 * dy, -0.53 * dx + 0.85 * dy
    radius = distance(along / (1.05 * anatomy.heart_width), across / (0.82 * anatomy.heart_width))
    thickness = np.sqrt(np.clip(1.0 - 0.8 * np.square(radius), 0.0, 1.0))
    return anatomy.heart_attenuation * thickness * soft_step(1.0 - radius, 0.035)


def _mediastinum(x: Map, y: Map, anatomy: Anatomy) -> Map:
    """The band of great vessels with the aortic knob, and the air of the trachea down to its bifurcation."""
    width = anatomy.mediastinum_width * (1.0 + 0.25 * soft_step(y + 0.35, 0.1))
    band = 0.22 * soft_step(width - np.abs(x), 0.02)
    knob = 0.14 * soft_step(0.075 - distance(x - anatomy.mediastinum_width, y + 0.36), 0.015)
    hila = 0.10 * bump(distance(np.abs(x) - 0.18, 0.7 * (y + 0.06)), 0.09)
    branch = np.abs(np.abs(x) - 0.55 * np.maximum(y + 0.30, 0.0))
    trachea = 0.20 * soft_step(0.030 - branch, 0.010) * soft_step(-0.12 - y, 0.04)
    return (band + knob + hila) * soft_step(0.75 - y, 0.1) - trachea


def _stomach(x: Map, y: Map, anatomy: Anatomy) -> Map:
    """Gas under the left dome; none where `stomach_gas` is negative."""
    radius = distance((x - 0.40) / 0.20, (y - anatomy.lung_base - 0.20) / 0.10)
    return max(anatomy.stomach_gas, 0.0) * soft_step(1.0 - radius, 0.10)


def _vessels(across: Map, y: Map, side: Map, hilum: Map, rng: np.random.Generator) -> Map:
    """Branching lines that run out from each hilum and fade: the ridges of smooth noise drawn in polar coordinates."""
    noise = smooth_noise((2 * _VESSEL_ANGLES, _VESSEL_RADII), (72, 7), rng)
    angle = (np.arctan2(y - _HILUM[1], across - _HILUM[0]) * (0.5 / np.pi) + 0.5) * (_VESSEL_ANGLES - 1) + np.where(
        side > 0, np.float32(_VESSEL_ANGLES), 0
    )
    value = noise[angle.astype(np.intp), np.minimum(hilum * 45.0, _VESSEL_RADII - 1).astype(np.intp)]
    return np.exp(-np.square(value / 0.35)) * np.exp(-1.8 * hilum)
