"""Whether what a map points at matters to the network: deletion and insertion curves (Petsiuk et al. 2018, section 4.2).

What is deleted must be replaced by something. The paper takes a constant or a blurred image, of which a network trained on photographs
says "nothing". A network that tells pneumonia from normal has no such class, and calls an empty image one or the other; if it calls it
what the image is called anyway, deletion changes nothing and the curve means nothing. So the reference is an argument: the blurred
image where it serves, else a radiograph of the other class (as Goyal et al. 2019, "Counterfactual Visual Explanations", section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.explain.score import LogOdds
from common.seeds import numpy_generator

CELLS = 16
"""Cells to a side that are exchanged as a whole, by map and at random alike: single pixels in random order are noise, which disturbs a
network more than any region that it looks at, so that a random order of pixels would seem to beat every map."""
STEPS = 8
RANDOM_ORDERS = 2


@dataclass(frozen=True)
class Curves:
    """Probability of the target over the share of the image that was exchanged, 0 to 1 in `STEPS` steps; float64 [STEPS + 1] each.

    Attributes:
        deletion: from image to reference, the cells of the highest evidence first; a small area is good.
        insertion: from reference to image; a large area is good.
    """

    deletion: NDArray[np.float64]
    insertion: NDArray[np.float64]

    @property
    def deletion_area(self) -> float:
        return area(self.deletion)

    @property
    def insertion_area(self) -> float:
        return area(self.insertion)


def curves(score: LogOdds, image: Tensor, values: np.ndarray, reference: Tensor) -> Curves:
    """Of the map `values` [S, S] of `image` [1, 1, S, S], towards `reference` of the same shape; S at least `CELLS`."""
    return _exchange(score, image, reference, np.argsort(-by_cell(values), kind="stable"))


def random_curves(score: LogOdds, image: Tensor, reference: Tensor, seed: int = 0) -> Curves:
    """The mean of `RANDOM_ORDERS` random orders: what a map without any knowledge has."""
    rng = numpy_generator("deletion", seed)
    found = [_exchange(score, image, reference, rng.permutation(CELLS**2)) for _ in range(RANDOM_ORDERS)]
    return Curves(*(np.mean([getattr(one, name) for one in found], axis=0) for name in ("deletion", "insertion")))


def area(curve: np.ndarray) -> float:
    """Area under a curve of evenly spaced points over [0, 1], by trapezoids."""
    return float(np.trapezoid(curve, dx=1.0 / (len(curve) - 1)))


def by_cell(values: np.ndarray) -> NDArray[np.float64]:
    """Mean of the map in each of `CELLS` x `CELLS` cells, row by row."""
    cell = _cells(values.shape[0]).ravel()
    return np.bincount(cell, values.ravel()) / np.bincount(cell)


@torch.inference_mode()
def _exchange(score: LogOdds, image: Tensor, reference: Tensor, order: np.ndarray) -> Curves:
    turn = np.empty(CELLS**2)
    turn[order] = np.arange(CELLS**2)
    place = torch.from_numpy(turn[_cells(image.shape[-1])])
    taken = torch.stack([place < CELLS**2 * step // STEPS for step in range(STEPS + 1)])[:, None]
    both = torch.cat([torch.where(taken, reference, image), torch.where(taken, image, reference)])
    return Curves(*torch.sigmoid(score(both).double()).numpy().reshape(2, STEPS + 1))


def _cells(side: int) -> NDArray[np.int64]:
    """Number of the cell of each pixel, int64 [S, S]."""
    part = np.arange(side) * CELLS // side
    return (part[:, None] * CELLS + part).astype(np.int64)
