"""Virtual scanners: each hospital's radiographs look like its own device's (feature shift).

A profile is drawn apart from its use, so one scanner treats every image alike and only the quantum noise differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.ndimage import affine_transform, gaussian_filter

from pneumofed.common.seeds import numpy_generator
from pneumofed.simulation.phantoms.anatomy import Map, distance

LONGEST_SIDE_PX = 512
_SHARPENING_RADIUS = 0.012
_PENUMBRA = 0.004
MONOCHROME1_SHARE = 1 / 3
"""Share of the scanners that store bone as low values."""


@dataclass(frozen=True)
class VirtualScanner:
    """How one device renders a chest. Lengths are shares of the picture's longer side, so that they hold at any resolution.

    Attributes:
        name: goes into the manifest's manufacturer column.
        zoom: magnification about the centre; above 1 crops the border, below 1 adds black around.
        blur: standard deviation of the detector's Gaussian blur.
        sharpening: strength of the edge enhancement (unsharp mask); 0 is none.
        gamma: exponent of the tone curve; above 1 is darker.
        contrast: bend of the film curve in [-2, 1]: above 0 steeper about middle grey, below 0 flatter.
        brightness: added to all grey values.
        vignetting: loss of light in the corners, in [0, 1].
        noise: standard deviation of the quantum noise at full brightness, where fewest quanta arrive.
        collimation: width of the black border of the collimator.
        bits: grey values are rounded to 2^bits steps.
        longest_side_px: resolution of the stored pictures.
        monochrome1: whether the files hold bone as low values and air as high ones; shown they look the same.
    """

    name: str
    zoom: float = 1.0
    blur: float = 0.0
    sharpening: float = 0.0
    gamma: float = 1.0
    contrast: float = 0.0
    brightness: float = 0.0
    vignetting: float = 0.0
    noise: float = 0.0
    collimation: float = 0.0
    bits: int = 8
    longest_side_px: int = LONGEST_SIDE_PX
    monochrome1: bool = False


_RANGES = {
    "zoom": (0.92, 1.12),
    "blur": (0.0, 0.012),
    "sharpening": (0.0, 1.2),
    "gamma": (0.65, 1.55),
    "contrast": (-0.8, 0.9),
    "brightness": (-0.08, 0.08),
    "vignetting": (0.0, 0.35),
    "noise": (0.003, 0.05),
    "collimation": (0.0, 0.05),
}


def draw_scanner(index: int, seed: int) -> VirtualScanner:
    """Draws the scanner of a hospital; pure in its arguments, every property uniform in a range that leaves a chest legible.

    Args:
        index: number of the hospital, from 0.
        seed: of all scanners.
    """
    rng = numpy_generator("scanner", seed, index)
    values = {name: float(rng.uniform(low, high)) for name, (low, high) in _RANGES.items()}
    bits, side = int(rng.choice((6, 7, 8))), int(rng.choice((256, 384, LONGEST_SIDE_PX)))
    inverted = bool(rng.random() < MONOCHROME1_SHARE)
    return VirtualScanner(f"virtual scanner {index}", **values, bits=bits, longest_side_px=side, monochrome1=inverted)


def apply(pixels: Map, scanner: VirtualScanner, rng: np.random.Generator) -> Map:
    """Renders a radiograph as a scanner shows it.

    Args:
        pixels: float32 [H, W] in [0, 1].
        scanner: the device.
        rng: draws only the noise.

    Returns:
        float32 [H, W] in [0, 1].
    """
    longer = max(pixels.shape)
    image = gaussian_filter(_magnify(pixels, scanner.zoom), scanner.blur * longer)
    image = image + scanner.sharpening * (image - gaussian_filter(image, _SHARPENING_RADIUS * longer))
    image = _tone(np.clip(image, 0.0, 1.0), scanner)
    radius, border = _geometry(*pixels.shape)
    image = image * (1.0 - scanner.vignetting * np.square(radius))
    quanta = rng.standard_normal(image.shape, dtype=np.float32)
    image = image + scanner.noise * np.sqrt(np.maximum(image, 0.02)) * quanta
    image = image * np.clip((border - scanner.collimation) / _PENUMBRA + 1.0, 0.0, 1.0)
    steps = np.float32(2**scanner.bits - 1)
    return (np.round(np.clip(image, 0.0, 1.0) * steps) / steps).astype(np.float32)


def _magnify(pixels: Map, zoom: float) -> Map:
    centre = (np.asarray(pixels.shape) - 1.0) / 2.0
    return affine_transform(pixels, np.full(2, 1.0 / zoom), offset=centre * (1.0 - 1.0 / zoom), order=1, mode="constant")


def _tone(image: Map, scanner: VirtualScanner) -> Map:
    """Gamma, then v + c v (1 - v) (2 v - 1), monotone for c in [-2, 1] with slope 1 + c / 2 in the middle, then brightness."""
    curved = image**scanner.gamma
    curved = curved + scanner.contrast * curved * (1.0 - curved) * (2.0 * curved - 1.0)
    return np.clip(curved + scanner.brightness, 0.0, 1.0)


@lru_cache(maxsize=16)
def _geometry(height: int, width: int) -> tuple[Map, Map]:
    """Distance from the centre (1 in the corners) and from the nearest border (as a share of the longer side), each [H, W]."""
    row, column = (np.arange(height, dtype=np.float32) + 0.5)[:, None], (np.arange(width, dtype=np.float32) + 0.5)[None, :]
    radius = distance(2.0 * row / height - 1.0, 2.0 * column / width - 1.0) / np.float32(np.sqrt(2.0))
    border = np.minimum(np.minimum(row, height - row), np.minimum(column, width - column)) / max(height, width)
    return radius, border
