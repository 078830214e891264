"""Which weights a training of several rounds keeps: each round's own or their moving average, and those of which round.

The coordinator keeps the global model by these rules, and a hospital that trains alone its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # who only reads a run folder must not wait for Flower
    from pneumofed.common.wire.messages import ModelArrays


@dataclass(frozen=True)
class JudgedRound:
    """A round's AUROC on validation images; `auroc` is None where a class is missing."""

    number: int
    auroc: float | None
    positives: int
    negatives: int

    @property
    def area(self) -> float:
        """AUROC; -inf where it is undefined, so that any defined one is better."""
        return -math.inf if self.auroc is None or math.isnan(self.auroc) else self.auroc

    @property
    def standard_error(self) -> float:
        """Of AUROC (Hanley and McNeil 1982, Radiology 143:29, eq. 1); 0 where that is undefined or the images were not counted."""
        area, positives, negatives = self.area, self.positives, self.negatives
        if not (math.isfinite(area) and positives and negatives):
            return 0.0
        both_above, both_below = area / (2.0 - area), 2.0 * area**2 / (1.0 + area)
        spread = (positives - 1) * (both_above - area**2) + (negatives - 1) * (both_below - area**2)
        return math.sqrt(max(0.0, area * (1.0 - area) + spread) / (positives * negatives))


def choose_round(rounds: Sequence[JudgedRound]) -> int:
    """Finds the latest round whose AUROC is within one standard error of the highest; 0 of none.

    The one-standard-error rule (Breiman et al. 1984, section 3.4.3): among rounds that validation cannot distinguish, the one that was
    trained longest, at the lowest learning rate. A round that was chosen once is given up only for a later one, so that only one model
    need be kept.
    """
    if not rounds:
        return 0
    highest = max(rounds, key=lambda judged: judged.area)
    limit = highest.area - highest.standard_error
    return max(judged.number for judged in rounds if judged.area >= limit)


def moving_average(average: ModelArrays | None, arrays: ModelArrays, decay: float) -> ModelArrays:
    """Computes decay * average + (1 - decay) * arrays, float32, which begins with the first round's `arrays`. With decay 0 it
    is `arrays` itself.

    Statistics are averaged as parameters are: rounds' running means and variances lie close to each other.

    Args:
        average: the average so far; None in the first round.
        arrays: the weights of this round.
        decay: the share that the former average keeps, in [0, 1).
    """
    if average is None or decay == 0.0:
        return arrays
    pairs = ((average.parameters, arrays.parameters), (average.statistics, arrays.statistics))
    # Of two equal numbers the sum may differ in the last bit, and what stands still would not.
    parameters, statistics = (
        np.where(old == new, new, (decay * old + (1.0 - decay) * new).astype(np.float32)) for old, new in pairs
    )
    return replace(arrays, parameters=parameters, statistics=statistics)
