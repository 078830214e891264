"""Pictures of random processes: what a network may learn from before it sees a patient, at no cost in privacy.

Dead leaves with textured leaves: discs or squares with sizes of a power law fall on each other until nothing of the ground is left
(Lee, Mumford & Huang 2001, section 3; as training images Baradad et al. 2021, section 3.2), each leaf filled with noise whose
spectrum falls with a power of the frequency, as that of natural images does (Field 1987). A class is a process: a draw of its
parameters. Telling processes apart needs edges, blobs and textures of all sizes, which is what the first layers of a network are
for (DP-RandP, Tang et al. 2023, learns them from a random StyleGAN's pictures by a contrastive loss).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.seeds import numpy_generator
from simulation.fields import Map

PROCESSES = 32

LEAVES = 60
"""Leaves of a picture; with the sizes below they cover nearly all of it, and the ground is a texture of its own."""


@dataclass(frozen=True)
class Process:
    """One random process. Lengths are shares of the picture's side.

    Attributes:
        squares: share of the leaves that are squares; the others are discs.
        smallest: half width of the smallest leaf.
        largest: half width of the largest leaf.
        exponent: of the density of half widths, r^-exponent.
        slope: amplitude of the texture falls as frequency^-slope.
        stretch: of the texture's frequencies along `angle_rad`; 1 is isotropic.
        angle_rad: direction of the texture.
        texture: standard deviation of the grey level within a leaf; between leaves it is uniform in [0, 1].
    """

    squares: float
    smallest: float
    largest: float
    exponent: float
    slope: float
    stretch: float
    angle_rad: float
    texture: float


def draw_process(number: int, seed: int) -> Process:
    """The process that is class `number`; pure in the arguments."""
    rng = numpy_generator("random process", seed, number)
    return Process(
        squares=float(rng.uniform()),
        smallest=float(rng.uniform(0.02, 0.06)),
        largest=float(rng.uniform(0.15, 0.45)),
        exponent=float(rng.uniform(1.0, 3.5)),
        slope=float(rng.uniform(0.5, 2.0)),
        stretch=float(rng.uniform(1.0, 4.0)),
        angle_rad=float(rng.uniform(0.0, np.pi)),
        texture=float(rng.uniform(0.05, 0.25)),
    )


def draw_process_picture(process: Process, size_px: int, rng: np.random.Generator) -> Map:
    """One picture of `process`: float32 [size_px, size_px] in [0, 1]."""
    pixels = 0.5 + process.texture * _texture(process, size_px, rng)
    texture = process.texture * _texture(process, size_px, rng)
    row, column = np.meshgrid(*2 * [(np.arange(size_px, dtype=np.float32) + 0.5) / size_px], indexing="ij")
    for half_width in _half_widths(process, rng):
        across, down = column - rng.uniform(), row - rng.uniform()
        turn = rng.uniform(0.0, np.pi)
        a, b = np.abs(np.cos(turn) * across + np.sin(turn) * down), np.abs(np.cos(turn) * down - np.sin(turn) * across)
        inside = np.maximum(a, b) < half_width if rng.uniform() < process.squares else a * a + b * b < half_width**2
        pixels[inside] = rng.uniform() + texture[inside]
    return np.clip(pixels, 0.0, 1.0).astype(np.float32)


def _half_widths(process: Process, rng: np.random.Generator) -> np.ndarray:
    """`LEAVES` draws from the density r^-exponent between the smallest and the largest, by inversion, the largest falling first.

    In the order of a true dead leaves process nearly all small leaves would lie below large ones, and a finite picture shows none.
    """
    share, power = rng.uniform(size=LEAVES), 1.0 - process.exponent
    if abs(power) < 1e-6:
        widths = process.smallest * (process.largest / process.smallest) ** share
    else:
        low, high = process.smallest**power, process.largest**power
        widths = (low + share * (high - low)) ** (1.0 / power)
    return np.sort(widths)[::-1]


def _texture(process: Process, size_px: int, rng: np.random.Generator) -> Map:
    """Gaussian noise float32 [size_px, size_px] of mean 0 and deviation 1 with the process's spectrum."""
    row, column = np.meshgrid(np.fft.fftfreq(size_px), np.fft.rfftfreq(size_px), indexing="ij")
    along = np.cos(process.angle_rad) * column + np.sin(process.angle_rad) * row
    across = np.cos(process.angle_rad) * row - np.sin(process.angle_rad) * column
    frequency = np.sqrt((process.stretch * along) ** 2 + across**2)
    frequency[0, 0] = np.inf
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((size_px, size_px))) * frequency**-process.slope, s=(size_px, size_px))
    return ((noise - noise.mean()) / noise.std()).astype(np.float32)
