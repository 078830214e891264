"""A schematic thorax in three dimensions, in Hounsfield units, and the radiograph that is its projection: one patient, seen both ways.

Body, fat, rib cage, lungs above two diaphragms, heart, spine, ribs, breastbone, windpipe and the lungs' vessels are solids with soft edges,
formulas of a point's place in mm, so that the same patient can be drawn on any grid. Bacterial pneumonia is one lobar consolidation near
the density of soft tissue, viral pneumonia ground glass in patches of both lungs (Hansell et al. 2008, Fleischner Society glossary,
Radiology 246:697). Sizes and densities are those of an adult's CT, rounded; they mean nothing beyond the picture.

A radiograph is the same tissue under the law of Beer and Lambert: what is left of the beam is exp(-integral of mu along the ray), with rays
from back to front and mu = mu_water (1 + HU / 1000), which is what a Hounsfield unit says.

Coordinates in mm from the middle: x to the patient's left, y to the back, z to the head. All maps are float32 [slices, rows, columns].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

from pneumofed.simulation.phantoms.anatomy import Map, bump, bumps, soft_step
from pneumofed.simulation.phantoms.image import LEAST_SEVERITY

EXTENT_MM = (320.0, 360.0, 360.0)
"""Of the drawn box along z, y and x: the usual height and reconstruction of a chest."""
AIR, FAT, MUSCLE, BONE = -1000.0, -100.0, 45.0, 420.0
MU_WATER_PER_MM = 0.0206
"""Of water at 60 keV, about the mean energy of a chest radiograph (Hubbell and Seltzer 1995, NISTIR 5632: 0.2059 cm^2/g)."""
_VESSELS_PER_LUNG = 60
_RIBS = 10


@dataclass(frozen=True)
class VoxelGrid:
    """Where a thorax is drawn: so many points along each axis of `EXTENT_MM`."""

    slices: int
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.slices, self.rows, self.columns

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Between slices, rows and columns."""
        z, y, x = (extent / count for extent, count in zip(EXTENT_MM, self.shape, strict=True))
        return z, y, x

    def axes(self) -> tuple[Map, Map, Map]:
        """Coordinates z [S, 1, 1], y [1, R, 1] and x [1, 1, C]."""
        z, y, x = (
            ((np.arange(count, dtype=np.float32) + 0.5) / count - 0.5) * np.float32(extent)
            for extent, count in zip(EXTENT_MM, self.shape, strict=True)
        )
        return z[:, None, None], y[None, :, None], x[None, None, :]


@dataclass(frozen=True)
class Build:
    """The build of one patient. Lengths in mm, densities in Hounsfield units."""

    half_width: float
    half_depth: float
    fat: float
    apex: float
    base: float
    dome: float
    liver_rise: float
    heart_size: float
    heart_shift: float
    lung_density: float
    gravity: float
    rib_spacing: float
    rib_slope: float
    bone: float
    vessels: float


BUILD_RANGES: dict[str, tuple[float, float]] = {
    "half_width": (142.0, 168.0),
    "half_depth": (92.0, 116.0),
    "fat": (8.0, 20.0),
    "apex": (112.0, 136.0),
    "base": (-128.0, -100.0),
    "dome": (28.0, 52.0),
    "liver_rise": (5.0, 18.0),
    "heart_size": (0.88, 1.18),
    "heart_shift": (14.0, 28.0),
    "lung_density": (-880.0, -820.0),
    "gravity": (15.0, 45.0),
    "rib_spacing": (23.0, 28.0),
    "rib_slope": (0.20, 0.38),
    "bone": (0.8, 1.15),
    "vessels": (0.75, 1.2),
}
"""Ranges of an adult's build; each is drawn uniformly."""


@dataclass(frozen=True)
class Thorax:
    """A drawn patient on a grid.

    Attributes:
        hounsfield: without noise, float32 [slices, rows, columns], from feet to head, front to back, the patient's right to left.
        opacity: share of each voxel's lung that is pneumonia, in [0, 1]: where an explanation should point.
        lung: share of each voxel that is lung.
        grid: that it is drawn on.
    """

    hounsfield: Map
    opacity: Map
    lung: Map
    grid: VoxelGrid


def draw_build(rng: np.random.Generator) -> Build:
    """Draws a patient whose every measure is uniform in its range."""
    return Build(**{field.name: float(rng.uniform(*BUILD_RANGES[field.name])) for field in fields(Build)})


def draw_thorax(label: str, grid: VoxelGrid, rng: np.random.Generator) -> Thorax:
    """Draws a patient. From generators in the same state every grid shows the same one.

    Args:
        label: `normal`, `bacterial` or `viral`.
        grid: where.
        rng: draws the build, the texture, the vessels and the opacity.
    """
    build = draw_build(rng)
    z, y, x = grid.axes()
    edge = max(2.0, 0.4 * max(grid.spacing_mm[1:]))
    wall = (build.half_width - build.fat - 14.0, build.half_depth - build.fat - 12.0)
    body = _body(z, y, x, build, edge)
    lung = _lungs(z, y, x, build, wall, edge)
    tissue = FAT + (MUSCLE - FAT) * soft_step(
        (1.0 - _radius(y, x, build.half_width, build.half_depth)) * build.half_depth - build.fat, edge
    )
    density = build.lung_density + build.gravity * y / wall[1] + 12.0 * _noise(grid, 14, rng)
    density = density + build.vessels * 800.0 * _vessels(z, y, x, lung, edge, rng)
    opacity, target = _opacity(label, z, y, x, build, wall, grid, rng)
    density = density + opacity * (target + 15.0 * _noise(grid, 20, rng) - density)
    tissue = tissue + lung * (density - tissue)
    tissue = tissue + np.minimum(1.0, _bones(z, y, x, build, wall, edge)) * (BONE * build.bone - tissue)
    tissue = tissue + _windpipe(z, y, x, edge) * (AIR - tissue)
    hounsfield = AIR + body * (tissue - AIR)
    return Thorax(hounsfield.astype(np.float32), (opacity * lung).astype(np.float32), lung.astype(np.float32), grid)


def project(thorax: Thorax) -> Map:
    """Integrates the attenuation of a thorax along y, from back to front.

    Args:
        thorax: the patient.

    Returns:
        float32 [slices, columns] with the head's slice first: -log of the share of the beam that passes, 0 in air.
    """
    mu = MU_WATER_PER_MM * np.maximum(1.0 + thorax.hounsfield / 1000.0, 0.0)
    return np.ascontiguousarray(mu.sum(axis=1)[::-1]) * np.float32(thorax.grid.spacing_mm[1])


def develop(attenuation: Map, quanta: float, rng: np.random.Generator) -> Map:
    """Shows a projection as a radiograph: Poisson noise of the quanta, and a film whose grey is a logistic of the logarithm of exposure.

    Args:
        attenuation: of `project`, float32 [H, W].
        quanta: that reach a pixel in air; a count N has the deviation sqrt(N), and its logarithm 1 / sqrt(N).
        rng: draws the noise.

    Returns:
        float32 [H, W] in [0, 1], air black; the patient's right is at the left.
    """
    noise = rng.standard_normal(attenuation.shape, dtype=np.float32) * np.exp(0.5 * attenuation) / np.float32(math.sqrt(quanta))
    inside = attenuation[attenuation > 0.5]
    centre, latitude = float(np.percentile(inside, 45)), 0.45 * float(np.percentile(inside, 80) - np.percentile(inside, 15))
    grey = 1.0 / (1.0 + np.exp(np.clip(-(attenuation + noise - centre) / max(latitude, 0.1), -40.0, 40.0)))
    black = 1.0 / (1.0 + math.exp(centre / max(latitude, 0.1)))
    return np.clip((grey - black) / (1.0 - black), 0.0, 1.0).astype(np.float32)


def _radius(y: Map, x: Map, half_width: Map | float, half_depth: Map | float) -> Map:
    """Distance from the axis of an elliptic cylinder, 1 on its surface; of the fourth power in x, as a trunk is flat in front."""
    return (np.abs(x / half_width) ** 2.5 + np.abs(y / half_depth) ** 2.5) ** 0.4


def _body(z: Map, y: Map, x: Map, build: Build, edge: float) -> Map:
    """The trunk, which narrows to the neck above the lungs' apex."""
    neck = np.clip((z - build.apex + 10.0) / 60.0, 0.0, 1.0)
    width = build.half_width * (1.0 - 0.45 * neck)
    depth = build.half_depth * (1.0 - 0.30 * neck)
    return soft_step((1.0 - _radius(y, x, width, depth)) * depth, edge)


def _lungs(z: Map, y: Map, x: Map, build: Build, wall: tuple[float, float], edge: float) -> Map:
    """Inside the chest wall, above the diaphragm, outside heart and mediastinum."""
    depth = np.clip((build.apex - z) / (build.apex - build.base), 0.0, 1.0)
    cap = np.sqrt(np.maximum(1.0 - (1.0 - np.minimum(depth / 0.55, 1.0)) ** 2, 1e-4))
    inside = (1.0 - _radius(y, x, wall[0] * cap, wall[1] * (0.35 + 0.65 * cap))) * wall[1]
    across, side = np.abs(x), np.sign(x)
    top = build.base - build.liver_rise * np.minimum(side, 0.0)
    dome = top + build.dome * (1.0 - ((across - 0.5 * wall[0]) / (0.5 * wall[0])) ** 2 - (y / wall[1]) ** 2)
    middle = 16.0 + 14.0 * bump(z - 20.0, 45.0) + 6.0 * bump(y + 30.0, 50.0)
    heart = _heart_distance(z, y, x, build)
    distance = np.minimum(np.minimum(inside, z - dome), np.minimum(across - middle, heart))
    distance = np.minimum(distance, np.hypot(across, y - wall[1] + 8.0) - 32.0)  # the spine and what lies along it
    return soft_step(distance, edge) * (z < build.apex + edge)


def _heart_distance(z: Map, y: Map, x: Map, build: Build) -> Map:
    """About the distance in mm to the heart's surface, positive outside: an ellipsoid before the middle, to the patient's left."""
    size = 56.0 * build.heart_size
    radius = np.sqrt(
        ((x - build.heart_shift) / size) ** 2 + ((y + 30.0) / (0.80 * size)) ** 2 + ((z + 62.0) / (0.95 * size)) ** 2
    )
    return (radius - 1.0) * size


def _bones(z: Map, y: Map, x: Map, build: Build, wall: tuple[float, float], edge: float) -> Map:
    """Spine with its canal, ribs that fall from back to front along the chest wall, and the breastbone."""
    behind = np.hypot(x, y - wall[1] + 8.0)
    discs = 0.75 + 0.25 * np.cos(2.0 * math.pi * z / 30.0)
    spine = soft_step(18.0 - behind, edge) * discs + 0.7 * (soft_step(10.0 - np.hypot(x, y - wall[1] - 20.0), edge))
    number = (z - build.apex + 12.0 - build.rib_slope * (y - wall[1])) / build.rib_spacing
    nearest = np.clip(np.rint(number), -_RIBS, 0.0)
    along = np.abs(number - nearest) * build.rib_spacing
    narrow = np.clip(1.0 - np.clip((z - build.apex + 70.0) / 110.0, 0.0, 1.0) ** 2, 0.05, 1.0)
    shell = np.abs((1.0 - _radius(y, x, (wall[0] + 6.0) * np.sqrt(narrow), (wall[1] + 5.0) * (0.5 + 0.5 * narrow))) * wall[1])
    ribs = soft_step(4.5 - shell, edge) * soft_step(6.0 - along, edge) * (np.abs(x) > 18.0)
    breastbone = (
        soft_step(18.0 - np.abs(x), edge)
        * soft_step(6.0 - np.abs(y + wall[1] + 4.0), edge)
        * soft_step(80.0 - np.abs(z - 10.0), edge)
    )
    return spine + ribs + 0.8 * breastbone


def _windpipe(z: Map, y: Map, x: Map, edge: float) -> Map:
    """The trachea above its fork at z = 25, and both main bronchi below."""
    across = np.where(z > 25.0, np.float32(0.0), (25.0 - z) * np.float32(0.9))
    return soft_step(8.5 - np.hypot(np.abs(x) - across, y - 12.0), edge) * soft_step(z + 2.0, edge)


def _vessels(z: Map, y: Map, x: Map, lung: Map, edge: float, rng: np.random.Generator) -> Map:
    """Tubes that run from each hilum through its lung and become thinner; the share of each voxel that they fill."""
    directions = rng.standard_normal((2, _VESSELS_PER_LUNG, 3)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=2, keepdims=True)
    filled = np.zeros(lung.shape, np.float32)
    for side, rays in zip((-1.0, 1.0), directions, strict=True):
        place = np.nonzero((lung > 0.02) & (side * x > 0))
        offset = np.stack([z.ravel()[place[0]] - 5.0, y.ravel()[place[1]] - 8.0, x.ravel()[place[2]] - side * 28.0], axis=1)
        length = np.linalg.norm(offset, axis=1) + np.float32(1e-3)
        cosine = np.clip((offset @ rays.T).max(axis=1) / length, -1.0, 1.0)
        radius = np.maximum(4.5 * (1.0 - length / 170.0), 0.9)
        apart = length * np.sqrt(1.0 - cosine**2) / (radius + 0.7 * edge)
        filled[place] = np.exp(-(apart**2)) * (radius / (radius + 0.7 * edge)) ** 2 * (cosine > 0)
    return filled


def _opacity(
    label: str, z: Map, y: Map, x: Map, build: Build, wall: tuple[float, float], grid: VoxelGrid, rng: np.random.Generator
) -> tuple[Map, float]:
    """(share of the lung that is pneumonia, its density)."""
    severity = float(rng.uniform(LEAST_SEVERITY, 1.0))
    height = build.apex - build.base
    if label == "normal":
        return np.zeros(grid.shape, np.float32), 0.0
    if label == "bacterial":
        side, reach = float(rng.choice((-1.0, 1.0))), 22.0 + 34.0 * severity
        centre = (
            build.base + height * rng.uniform(0.25, 0.70),
            wall[1] * rng.uniform(-0.4, 0.5),
            side * wall[0] * rng.uniform(0.40, 0.70),
        )
        lobe = soft_step(reach - 8.0 * _noise(grid, 8, rng) - _apart(z, y, x, centre), 6.0) * (side * x > 0)
        return (0.6 + 0.4 * severity) * lobe, float(rng.uniform(0.0, 40.0))
    patches = np.zeros(grid.shape, np.float32)
    for number in range(int(rng.integers(5, 9))):
        side = -1.0 if number % 2 else 1.0
        centre = (
            build.base + height * rng.uniform(0.15, 0.75),
            wall[1] * rng.uniform(-0.5, 0.75),
            side * wall[0] * rng.uniform(0.50, 0.85),
        )
        np.maximum(patches, bump(_apart(z, y, x, centre), rng.uniform(20.0, 38.0)), out=patches)
    ragged = np.clip(patches * (1.0 + 0.35 * _noise(grid, 12, rng)), 0.0, 1.0)
    return (0.4 + 0.6 * severity) * ragged, float(rng.uniform(-600.0, -300.0))


def _apart(z: Map, y: Map, x: Map, centre: tuple[float, float, float]) -> Map:
    return np.sqrt((z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2)


def _noise(grid: VoxelGrid, cells: int, rng: np.random.Generator) -> Map:
    """Gaussian noise of unit variance with features of 1 / `cells` of the box; the same on every grid (`anatomy.smooth_noise` in 3-D)."""
    along, down, across = (bumps(count, cells) for count in grid.shape)
    white = rng.standard_normal((cells + 1,) * 3, dtype=np.float32)
    planes = np.einsum("si,ijk->sjk", along, white)
    return np.einsum("srk,ck->src", np.einsum("sjk,rj->srk", planes, down), across)
