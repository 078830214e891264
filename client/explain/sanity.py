"""Whether a map depends on what the network has learnt: parameter randomisation (Adebayo et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.stats import rankdata
from torch import Tensor, nn

from client.explain.explain import explain
from client.explain.intervals import mean_interval, show_interval
from client.explain.methods import Method, Target
from client.explain.randomise import randomised
from common.evaluation.bootstrap import Interval
from common.evaluation.ssim import ssim

Verdict = Literal["depends on the weights", "does not depend on the weights", "open"]

LARGEST_CORRELATION = 0.5
"""Rank correlation with the map of a random network below which a map counts as the network's own: a quarter of the variance of its
ranks, or less, comes without any learning. Ours; the paper shows curves and sets no number."""
LEAST_PAIRS = 6


@dataclass(frozen=True)
class Likeness:
    """How alike two maps of one image are; NaN where a map is constant, since that has no order.

    Attributes:
        rank: Spearman's correlation over pixels.
        absolute_rank: the same of the absolute values, which a change of sign leaves alone (their section 4, "ABS").
        structure: SSIM of the absolute values, each map scaled to 1 at most.
    """

    rank: float
    absolute_rank: float
    structure: float


@dataclass(frozen=True)
class Sanity:
    """The outcome for one method.

    Attributes:
        method: that was checked.
        verdict: by the interval of the larger of the two correlations: below `LARGEST_CORRELATION`, above, or neither.
        rank: mean over pairs of a trained and a random network's map.
        absolute_rank: likewise.
        structure: likewise.
        pairs: number of them.
        constant: pairs left out since a map was constant.
    """

    method: Method
    verdict: Verdict
    rank: Interval
    absolute_rank: Interval
    structure: Interval
    pairs: int
    constant: int

    def as_json(self) -> dict[str, Any]:
        """All of it, with the sentence."""
        return {**vars(self), "sentence": self.sentence()}

    def sentence(self) -> str:
        """The verdict with its number, for the radiologist."""
        worst = max(self.rank, self.absolute_rank, key=lambda found: found["value"])
        number = f"rank correlation {show_interval(worst)}, {self.pairs} pairs of maps"
        if self.verdict == "depends on the weights":
            return f"The map depends on what the network has learnt: with random weights it is another one ({number})."
        if self.verdict == "does not depend on the weights":
            return f"The map does not depend on the weights: do not use. Without any learning it is nearly the same ({number})."
        if not self.pairs:
            return "Whether the map depends on the weights could not be told: the maps to compare were empty."
        return f"Whether the map depends on the weights could not be told ({number})."


def sanity_check(
    network: nn.Module, images: Sequence[Tensor], method: Method, target: Target = "pneumonia", *, seed: int = 0
) -> Sanity:
    """The check with all weights drawn anew, on each of `images` [1, 1, S, S]; several random networks where there are few images."""
    networks = [randomised(network, 1.0, seed + number) for number in range(math.ceil(LEAST_PAIRS / max(1, len(images))))]
    found: list[Likeness] = []
    for image in images:
        own = explain(network, image, method, target, seed=seed).values
        found += [likeness(own, explain(other, image, method, target, seed=seed).values) for other in networks]
    return conclude(method, found)


def conclude(method: Method, found: Sequence[Likeness], patients: Sequence[str] | None = None) -> Sanity:
    """The outcome of `found`, one of each pair; `patients` as in `mean_interval`."""
    rank, absolute, structure = (
        mean_interval([getattr(one, name) for one in found], patients) for name in ("rank", "absolute_rank", "structure")
    )
    constant = sum(math.isnan(one.rank) for one in found)
    pairs = len(found) - constant
    return Sanity(
        method, _verdict(max(rank, absolute, key=lambda one: one["value"]), pairs), rank, absolute, structure, pairs, constant
    )


def likeness(first: np.ndarray, second: np.ndarray) -> Likeness:
    """Of two maps float32 [S, S], 11 pixels a side at least."""
    absolute = [_scaled(np.abs(values)) for values in (first, second)]
    rank = spearman(first, second)
    structure = math.nan if math.isnan(rank) else ssim(*absolute)
    return Likeness(rank, spearman(*absolute), structure)


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation, ties at their mean rank; NaN where one of the two is constant."""
    a, b = (rankdata(values.ravel()) for values in (first, second))
    a, b = a - a.mean(), b - b.mean()
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length > 0 else math.nan


def _scaled(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float64) / max(float(values.max()), 1e-30)


def _verdict(worst: Interval, pairs: int) -> Verdict:
    if pairs < LEAST_PAIRS:
        return "open"
    if worst["high"] < LARGEST_CORRELATION:
        return "depends on the weights"
    return "does not depend on the weights" if worst["low"] > LARGEST_CORRELATION else "open"
