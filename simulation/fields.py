"""Soft shapes and smooth noise on a grid: what the phantoms are drawn with. All maps are float32 [H, W]."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Map = NDArray[Any]
"""float32 [H, W]; not said to the type checker, to whom a float32 array times a Python float is float64."""


def soft_step(depth: Map, width: float) -> Map:
    """0 well below zero, 1 well above, one half at zero with the slope 0.4 / `width`: a hyperbolic tangent, the cheapest in numpy."""
    t = depth * np.float32(0.8 / width)
    np.tanh(t, out=t)
    t *= np.float32(0.5)
    t += np.float32(0.5)
    return t


def bump(offset: Map, width: float) -> Map:
    """exp(-(offset / width)^2)."""
    return np.exp(-np.square(offset * np.float32(1.0 / width)))


def distance(dx: Map, dy: Map) -> Map:
    """Euclidean length; `np.hypot` also guards against overflow, at several times the price."""
    return np.sqrt(dx * dx + dy * dy)


def smooth_noise(shape: tuple[int, int], cells: tuple[int, int], rng: np.random.Generator) -> Map:
    """Gaussian noise of unit variance whose features are about one of `cells` (rows, columns) large.

    White noise on a coarse grid, spread by Gaussian bumps along each axis in turn: two small matrix products, by einsum since
    BLAS would start its threads for them, which is slow on a busy machine and may round otherwise on another.
    """
    rows, columns = (_bumps(side, count) for side, count in zip(shape, cells, strict=True))
    white = rng.standard_normal((rows.shape[1], columns.shape[1]), dtype=np.float32)
    return np.einsum("hi,iw->hw", np.einsum("hi,ij->hj", rows, white), np.ascontiguousarray(columns.T))


@lru_cache(maxsize=256)
def _bumps(side: int, cells: int) -> Map:
    """Gaussian bumps [side, cells + 1], one at each border of a cell, scaled so that white noise on them keeps unit variance."""
    position = (np.arange(side, dtype=np.float32)[:, None] + 0.5) / side * cells
    bumps = np.exp(-np.square((position - np.arange(cells + 1, dtype=np.float32)) / 0.8))
    return bumps / np.sqrt(np.sum(bumps * bumps, axis=1, keepdims=True))
