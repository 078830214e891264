"""Pictures that no model of chest radiographs may judge: spoilt radiographs, drawn patterns, pictures of other things."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import PIL.Image

from common.images import fit_square

Spoil = Callable[[np.ndarray], np.ndarray]


def _zoom(square: np.ndarray, share: float) -> np.ndarray:
    """The upper left part of `square`, a `share` of its side, at full size."""
    side = max(2, int(len(square) * share))
    return fit_square(square[:side, :side], len(square), "pad")


def _blur(square: np.ndarray) -> np.ndarray:
    small = PIL.Image.fromarray(square).resize((8, 8), PIL.Image.Resampling.BOX)
    return np.asarray(small.resize(square.shape[::-1], PIL.Image.Resampling.BICUBIC)).clip(0, 1)


SPOILT: dict[str, Spoil] = {
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
"""What goes wrong with a radiograph: float32 [S, S] in [0, 1] -> the same, spoilt."""


def spoil(square: np.ndarray, how: str) -> np.ndarray:
    """`square` float32 [S, S] spoilt as `how`, a key of `SPOILT`, says; C-contiguous float32."""
    return np.ascontiguousarray(SPOILT[how](square), np.float32)


def draw_pattern(kind: str, side_px: int, generator: np.random.Generator) -> np.ndarray:
    """A picture of `kind`, a key of `PATTERNS`, float32 [side_px, side_px] in [0, 1]; pure in the generator's state."""
    drawn = PATTERNS[kind](side_px, generator)
    drawn = drawn - drawn.min()
    return (drawn / max(drawn.max(), 1e-6)).astype(np.float32)


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
"""Things that are drawn from nothing."""
