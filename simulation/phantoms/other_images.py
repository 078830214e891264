"""Pictures that are no chest radiographs: random processes to pretrain a network on, and images that no model may judge.

Random processes (`draw_process_picture`) are what a network may learn from before it sees a patient, at no cost in privacy. They are
dead leaves with textured leaves: discs or squares with sizes of a power law fall on each other until nothing of the ground is left
(Lee, Mumford & Huang 2001, section 3; as training images Baradad et al. 2021, section 3.2), each leaf filled with noise whose
spectrum falls with a power of the frequency, as that of natural images does (Field 1987). A class is a process: a draw of its
parameters. To distinguish processes needs edges, blobs and textures of all sizes, which is what the first layers of a network are
for (DP-RandP, Tang et al. 2023, learns them from a random StyleGAN's pictures by a contrastive loss).

Unsuitable images test the suitability check: corrupted radiographs (`corrupt`) and drawn pictures of other things (`draw_pattern`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import PIL.Image

from pneumofed.common.imaging.images import fit_square
from pneumofed.common.seeds import numpy_generator
from pneumofed.simulation.phantoms.anatomy import Map

PROCESSES = 32

LEAVES_PER_PICTURE = 60
"""Leaves of a picture; with the sizes below they cover nearly all of it, and the ground is a texture of its own."""

Corruption = Callable[[np.ndarray], np.ndarray]


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
    """Draws the parameters of one class of pictures; pure in the arguments.

    Args:
        number: of the class, from 0.
        seed: of all classes.
    """
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
    """Draws one picture of a process.

    Args:
        process: the class.
        size_px: side of the square, S.
        rng: draws the leaves and their textures.

    Returns:
        float32 [S, S] in [0, 1].
    """
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


def corrupt(square: np.ndarray, how: str) -> np.ndarray:
    """Corrupts a radiograph.

    Args:
        square: float32 [S, S] in [0, 1], left as it is.
        how: a key of `CORRUPTIONS`.

    Returns:
        float32 [S, S], C-contiguous.
    """
    return np.ascontiguousarray(CORRUPTIONS[how](square), np.float32)


def draw_pattern(kind: str, side_px: int, generator: np.random.Generator) -> np.ndarray:
    """Draws a picture of something that is no radiograph; pure in the generator's state.

    Args:
        kind: a key of `PATTERNS`.
        side_px: side of the square, S.
        generator: draws what differs between pictures of one kind.

    Returns:
        float32 [S, S] in [0, 1], scaled to the full range.
    """
    drawn = PATTERNS[kind](side_px, generator)
    drawn = drawn - drawn.min()
    return (drawn / max(drawn.max(), 1e-6)).astype(np.float32)


def _half_widths(process: Process, rng: np.random.Generator) -> np.ndarray:
    """`LEAVES_PER_PICTURE` draws from the density r^-exponent by inversion, the largest falling first.

    In the order of a true dead leaves process nearly all small leaves would lie below large ones, and a finite picture shows none.
    """
    share, power = rng.uniform(size=LEAVES_PER_PICTURE), 1.0 - process.exponent
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


def _zoom(square: np.ndarray, share: float) -> np.ndarray:
    """The upper left part of `square`, a `share` of its side, at full size."""
    side = max(2, int(len(square) * share))
    return fit_square(square[:side, :side], len(square), "pad")


def _blur(square: np.ndarray) -> np.ndarray:
    small = PIL.Image.fromarray(square).resize((8, 8), PIL.Image.Resampling.BOX)
    return np.asarray(small.resize(square.shape[::-1], PIL.Image.Resampling.BICUBIC)).clip(0, 1)


CORRUPTIONS: dict[str, Corruption] = {
    "inverted grey": lambda square: 1 - square,
    "quarter turn": lambda square: np.rot90(square),
    "three quarter turn": lambda square: np.rot90(square, 3),
    "upside down": lambda square: np.rot90(square, 2),
    "corner, half the side": lambda square: _zoom(square, 0.5),
    "corner, a quarter of the side": lambda square: _zoom(square, 0.25),
    "two greys": lambda square: (square > np.median(square)).astype(np.float32),
    "contrast of a tenth": lambda square: 0.45 + square / 10,
    "over-exposed": lambda square: np.clip(square * 4, 0, 1),
    "under-exposed": lambda square: np.clip(square * 2 - 1, 0, 1),
    "blurred to 8 x 8": _blur,
    "noise over all": lambda square: np.clip(square + np.random.default_rng(0).normal(0, 0.35, square.shape), 0, 1),
}
"""What goes wrong with a radiograph: float32 [S, S] in [0, 1] -> the same, corrupted."""


def _grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.mgrid[0:side, 0:side] / side - 0.5
    return rows, columns


def _gradient(side: int, generator: np.random.Generator) -> np.ndarray:
    rows, columns = _grid(side)
    angle = generator.uniform(0, 2 * np.pi)
    return np.cos(angle) * rows + np.sin(angle) * columns


def _landscape(side: int, generator: np.random.Generator) -> np.ndarray:
    """Noise whose amplitude falls with frequency as that of photographs does (Field 1987: 1 / f)."""
    frequencies = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequencies[0, 0] = 1
    spectrum = np.fft.fft2(generator.normal(size=(side, side))) / frequencies ** generator.uniform(0.8, 1.4)
    return np.fft.ifft2(spectrum).real


def _scene(side: int, generator: np.random.Generator) -> np.ndarray:
    """Overlapping discs and boxes of uneven grey: dead leaves (Lee, Mumford & Huang 2001), a model of photographs with edges."""
    scene = np.zeros((side, side))
    rows, columns = _grid(side)
    for _ in range(80):
        row, column = generator.uniform(-0.5, 0.5, 2)
        radius = min(0.5, 0.03 / generator.uniform(0.05, 1))
        round_ = np.hypot(rows - row, columns - column) < radius
        square = (abs(rows - row) < radius) & (abs(columns - column) < radius)
        scene[round_ if generator.random() < 0.5 else square] = generator.random()
    return scene + generator.normal(0, 0.02, scene.shape)


def _slice(side: int, generator: np.random.Generator) -> np.ndarray:
    """A CT slice of the chest in outline: a bright ellipse in the black with two dark ones and a spine."""
    rows, columns = _grid(side)
    body = (rows / 0.33) ** 2 + (columns / generator.uniform(0.4, 0.46)) ** 2 < 1
    lungs = ((rows / 0.2) ** 2 + ((abs(columns) - 0.2) / generator.uniform(0.11, 0.14)) ** 2) < 1
    spine = np.hypot(rows - 0.22, columns) < 0.06
    return np.where(spine, 1.0, np.where(lungs, 0.1, np.where(body, 0.6, 0.0))) + generator.normal(0, 0.02, (side, side))


def _hand(side: int, generator: np.random.Generator) -> np.ndarray:
    """A radiograph of a hand in outline: five bright fingers from a palm, on black."""
    rows, columns = _grid(side)
    picture = np.exp(-((rows - 0.22) ** 2 / 0.03 + columns**2 / 0.03))
    for finger, length in zip(range(-2, 3), (0.2, 0.42, 0.48, 0.42, 0.3), strict=True):
        across = columns - finger * 0.13 - rows * finger * generator.uniform(-0.2, 0.1)
        picture += 0.8 * np.exp(-(across**2) / 0.0012) * ((rows > 0.2 - length) & (rows < 0.2))
    return np.clip(picture, 0, 1) + generator.normal(0, 0.02, picture.shape)


def _text(side: int, generator: np.random.Generator) -> np.ndarray:
    """A scanned page: dark runs in lines on white."""
    page = np.ones((side, side))
    height = max(4, side // 24)
    for top in range(height, side - height, 2 * height):
        runs = generator.random(side // 2).repeat(2)[:side] < 0.55
        page[top : top + height // 2 + 1, side // 12 : -side // 12] = 1 - runs[side // 12 : -side // 12]
    return page


PATTERNS: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "gradient": _gradient,
    "uniform noise": lambda side, generator: generator.random((side, side)),
    "landscape of 1/f noise": _landscape,
    "scene of dead leaves": _scene,
    "outline of a CT slice": _slice,
    "outline of a hand": _hand,
    "page of text": _text,
    "stripes": lambda side, generator: np.sin(_gradient(side, generator) * generator.uniform(20, 120)),
}
"""Pictures of other things than a chest, drawn by formulas."""
