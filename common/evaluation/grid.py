"""Grids of scores: what makes the score histograms of several sites mergeable."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.errors import DataError

Scores = npt.NDArray[np.float64]

LOGIT_BINS = 2048
LOGIT_LIMIT = 20.0


@dataclass(frozen=True, eq=False)
class ScoreGrid:
    """Increasing, disjoint bins of scores in [0, 1].

    Attributes:
        lower: float64 [B], the lowest score that a bin can hold.
        upper: float64 [B], no score of a bin is above it. Equal to `lower` where a bin is one single score.
    """

    lower: Scores
    upper: Scores

    @classmethod
    def uniform_in_logit(cls, bins: int = LOGIT_BINS, limit: float = LOGIT_LIMIT) -> ScoreGrid:
        """`bins` equal bins of the logit over [-limit, limit] and one more bin beyond each end.

        Images whose logits differ by more than 2 * limit / bins (0.02 by default) are never in one bin, unless both lie beyond
        the same end. With an even number of bins 0.5 is exactly an edge.
        """
        edges = 1.0 / (1.0 + np.exp(-np.linspace(-limit, limit, bins + 1)))
        return cls(np.concatenate([[0.0], edges]), np.concatenate([edges, [1.0]]))

    @classmethod
    def exact(cls, scores: npt.ArrayLike) -> ScoreGrid:
        """One bin for each distinct score of `scores` (any shape): histograms lose nothing."""
        values = np.unique(np.asarray(scores, dtype=np.float64))
        return cls(values, values)

    def __len__(self) -> int:
        return len(self.lower)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ScoreGrid):
            return NotImplemented
        return np.array_equal(self.lower, other.lower) and np.array_equal(self.upper, other.upper)

    __hash__ = None  # type: ignore[assignment]

    def bin_of(self, scores: Scores) -> npt.NDArray[np.int64]:
        """Index of the bin of each score; same shape as `scores`.

        Raises:
            DataError: a score lies in no bin of this grid.
        """
        index = np.searchsorted(self.lower, scores, side="right") - 1
        if scores.size and (len(self) == 0 or index.min() < 0 or np.any(scores > self.upper[index])):
            raise DataError(
                "score grid: a score lies in no bin; expected scores in [0, 1] or those that the exact grid was made of"
            )
        return index

    def first_positive(self, threshold: float) -> int:
        """First bin whose images all have a score >= `threshold`; `len(self)` if there is none.

        Exact where `threshold` does not cut a bin that holds images; images of a bin that is cut count as below.
        """
        return int(np.searchsorted(self.lower, threshold, side="left"))


FEDERATED_GRID = ScoreGrid.uniform_in_logit()
"""The grid of everything that crosses the wire; all parties make the same one."""
