"""Mergeable statistics: the sum of all sites' statistics gives the metrics of their pooled images.

A mean of the sites' metrics would not: the AUROC of pooled images is no average of AUROCs. Every number here is an integer
(sums of real numbers are kept in fixed point), so merging is exact and its result does not depend on order or grouping, bit for
bit. `Statistics` of one grid and class count form a commutative monoid under `+` with `Statistics.zero` as its zero.

`ScoreGrid` holds the bins of the score histograms; those of several sites merge because all sites use `FEDERATED_GRID`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pneumofed.common.errors import DataError, MessageError
from pneumofed.common.evaluation.predictions import Predictions

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
        """Makes equal bins of the logit over [-limit, limit] and one more bin beyond each end.

        Images whose logits differ by more than 2 * limit / bins (0.02 by default) are never in one bin, unless both lie beyond
        the same end. With an even number of bins 0.5 is exactly an edge.

        Args:
            bins: number of bins between the limits.
            limit: largest absolute logit that is resolved, above 0.
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


Counts = npt.NDArray[np.int64]

CALIBRATION_BINS = 15  # Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4
FIXED_POINT = 2**32  # units in 1.0: the mean of rounded numbers is within 1.2e-10 of the true mean
MAX_IMAGES = 2**25  # with more, a sum of log losses could pass 2**63
MAX_SITE_IMAGES = 2**20  # in one message, so that no single site's claim can make the sum of all too large
PROBABILITY_FLOOR = float(np.finfo(np.float64).eps)  # the log loss moves 0 and 1 so far inside, as scikit-learn
MAX_LOG_LOSS = -float(np.log(PROBABILITY_FLOOR))

CALIBRATION_COUNT, CALIBRATION_POSITIVE, CALIBRATION_SCORE_SUM = range(3)  # columns of `calibration`
SQUARED_ERROR, LOG_LOSS = range(2)  # entries of `losses`
COUNT_ARRAYS = ("confusion", "histograms", "calibration", "losses")


@dataclass(frozen=True, eq=False)
class Statistics:
    """What metrics need to know of a set of images, all int64; C classes, K two-class views (see `Predictions.views`), B bins.

    Attributes:
        grid: the grid of the histograms.
        confusion: [C, C], images by true class (row) and class of highest probability (column).
        histograms: [K, 2, B], images by view, truth (negative, positive) and bin of the score.
        calibration: [15, 3], by equal-width bin of P(pneumonia): images, pneumonias, sum of scores in units of 2**-32.
        losses: [2], sums over images of squared error and log loss of P(pneumonia), in units of 2**-32.
    """

    grid: ScoreGrid
    confusion: Counts
    histograms: Counts
    calibration: Counts
    losses: Counts

    @classmethod
    def zero(cls, classes: int, grid: ScoreGrid = FEDERATED_GRID) -> Statistics:
        """Makes the statistics of no image.

        Args:
            classes: C, at least 2.
            grid: of the histograms; only statistics on one grid can be added.
        """
        return cls(grid, **{name: np.zeros(shape, np.int64) for name, shape in _shapes(classes, len(grid)).items()})

    @classmethod
    def of(cls, predictions: Predictions, grid: ScoreGrid | None = None) -> Statistics:
        """Computes the statistics of `predictions`.

        On the exact grid metrics are those of the images themselves. On `FEDERATED_GRID` scores in one bin count as ties, so that
        |AUROC(grid) - AUROC| <= sum over bins of negatives * positives / (2 * all negatives * all positives), and a threshold
        should cut no occupied bin (see `ScoreGrid.first_positive`). All else does not depend on the grid.

        Args:
            predictions: of N images, C classes.
            grid: of the histograms; None for the exact grid of the predictions' own scores.

        Raises:
            DataError: a score lies in no bin of `grid`.
        """
        scores, positive = predictions.views
        grid = ScoreGrid.exact(scores) if grid is None else grid
        confusion, calibration, losses = image_terms(predictions)
        return cls(grid, confusion.sum(0), _histograms(scores, positive, grid), calibration.sum(0), losses.sum(0))

    @property
    def classes(self) -> int:
        """Number of classes C."""
        return len(self.confusion)

    @property
    def n(self) -> int:
        """Number of images."""
        return int(self.confusion.sum())

    @property
    def n_positive(self) -> int:
        """Number of images of pneumonia."""
        return int(self.confusion[1:].sum())

    def __add__(self, other: Statistics) -> Statistics:
        """Statistics of both sets of images together.

        Raises:
            DataError: grids or class counts differ, or the sum would be beyond `MAX_IMAGES`.
        """
        if self.classes != other.classes or self.grid != other.grid:
            raise DataError(
                f"statistics: expected others of {self.classes} classes on the same {len(self.grid)} bins, got {other.classes} "
                f"classes on {len(other.grid)} bins; make all of one task and on one grid, e.g. FEDERATED_GRID"
            )
        if self.n + other.n > MAX_IMAGES:
            raise DataError(f"statistics: expected at most {MAX_IMAGES} images in all, got {self.n + other.n}")
        return Statistics(self.grid, **{name: getattr(self, name) + getattr(other, name) for name in COUNT_ARRAYS})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Statistics):
            return NotImplemented
        return self.grid == other.grid and all(np.array_equal(getattr(self, name), getattr(other, name)) for name in COUNT_ARRAYS)

    __hash__ = None  # type: ignore[assignment]

    def to_numbers(self) -> dict[str, int | list[int]]:
        """Plain numbers for the wire: `classes`, `bins`, and `index` and `value` of every count that is not zero.

        They are linked to no image or patient, but where few images share a bin, single scores and labels can be read from them.

        Raises:
            DataError: the grid is not `FEDERATED_GRID`, the only one that the other side knows and that merges.
        """
        if self.grid != FEDERATED_GRID:
            raise DataError("statistics: only those on FEDERATED_GRID may be sent")
        flat = self.flat()
        index = np.flatnonzero(flat)
        return {"classes": self.classes, "bins": len(self.grid), "index": index.tolist(), "value": flat[index].tolist()}

    def flat(self) -> Counts:
        """Every count in one vector, int64; the vector of a sum is the sum of the vectors."""
        return np.concatenate([getattr(self, name).ravel() for name in COUNT_ARRAYS])

    @classmethod
    def from_flat(cls, flat: Counts, classes: int, most_images: int) -> Statistics:
        """Reads the statistics on `FEDERATED_GRID` that `flat` wrote, and checks that images can have them.

        Args:
            flat: int64 [`flat_length(classes)`].
            classes: C of the task.
            most_images: how many images there may be in all.

        Raises:
            MessageError: no set of at most `most_images` images can have these counts.
        """
        shapes = _shapes(classes, len(FEDERATED_GRID))
        parts = np.split(flat, np.cumsum([np.prod(shape) for shape in shapes.values()])[:-1])
        fields = {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        statistics = cls(FEDERATED_GRID, **fields)
        _check_totals(statistics, most_images)
        return statistics

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, object], classes: int, most_images: int = MAX_SITE_IMAGES) -> Statistics:
        """Reads the statistics that `to_numbers` wrote.

        Args:
            numbers: as they came over the wire, not trusted.
            classes: C of the task, which the numbers must agree with.
            most_images: how many images one sender may claim.

        Raises:
            MessageError: a number is missing, of a wrong type or range, or the counts contradict each other.
        """
        if set(numbers) != {"classes", "bins", "index", "value"}:
            raise _wrong("the keys bins, classes, index, value", f"{len(numbers)} keys")
        if numbers["classes"] != classes or numbers["bins"] != len(FEDERATED_GRID):
            raise _wrong(f"{classes} classes on {len(FEDERATED_GRID)} bins", "others")
        flat = _unpack(numbers, flat_length(classes))
        return cls.from_flat(flat, classes, most_images)


def flat_length(classes: int) -> int:
    """Length of `Statistics.flat` for `classes` classes on `FEDERATED_GRID`."""
    return sum(int(np.prod(shape)) for shape in _shapes(classes, len(FEDERATED_GRID)).values())


def image_terms(predictions: Predictions) -> tuple[Counts, Counts, Counts]:
    """What each image adds to `confusion` [N, C, C], `calibration` [N, 15, 3] and `losses` [N, 2]."""
    n, rows, scores, positive = len(predictions), np.arange(len(predictions)), predictions.scores, predictions.labels != 0
    confusion = np.zeros((n, predictions.classes, predictions.classes), np.int64)
    confusion[rows, predictions.labels, predictions.probabilities.argmax(axis=1)] = 1
    calibration = np.zeros((n, CALIBRATION_BINS, 3), np.int64)
    bins = np.minimum((scores * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    calibration[rows, bins] = np.stack([np.ones(n, np.int64), positive, _fixed_point(scores)], axis=1)
    inside = np.clip(scores, PROBABILITY_FLOOR, 1.0 - PROBABILITY_FLOOR)
    log_loss = -np.where(positive, np.log(inside), np.log1p(-inside))
    return confusion, calibration, np.stack([_fixed_point((scores - positive) ** 2), _fixed_point(log_loss)], axis=1)


def _fixed_point(numbers: npt.NDArray[np.float64]) -> Counts:
    return np.rint(numbers * FIXED_POINT).astype(np.int64)


def _histograms(scores: npt.NDArray[np.float64], positive: npt.NDArray[np.bool_], grid: ScoreGrid) -> Counts:
    views, bins = len(scores), len(grid)
    cell = (np.arange(views)[:, None] * 2 + positive) * bins + grid.bin_of(scores)
    return np.bincount(cell.ravel(), minlength=views * 2 * bins).reshape(views, 2, bins)


def _shapes(classes: int, bins: int) -> dict[str, tuple[int, ...]]:
    views = classes if classes > 2 else 1
    return {
        "confusion": (classes, classes),
        "histograms": (views, 2, bins),
        "calibration": (CALIBRATION_BINS, 3),
        "losses": (2,),
    }


def _wrong(expected: str, came: object) -> MessageError:
    return MessageError(f"statistics: expected {expected}, got {came}; all parties must run the same version and task")


def _whole_numbers(numbers: Mapping[str, object], key: str, high: int) -> Counts:
    values = numbers[key]
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < high for value in values):
        raise _wrong(f"a list '{key}' of whole numbers in [0, {high})", type(values).__name__)
    return np.array(values, dtype=np.int64)


def _unpack(numbers: Mapping[str, object], length: int) -> Counts:
    index, value = _whole_numbers(numbers, "index", length), _whole_numbers(numbers, "value", 2**63)
    if len(index) != len(value) or np.any(np.diff(index) <= 0) or np.any(value == 0):
        raise _wrong("one value above zero for each index, indices increasing", f"{len(index)} indices and {len(value)} values")
    flat = np.zeros(length, np.int64)
    flat[index] = value
    return flat


def _check_totals(statistics: Statistics, most_images: int) -> None:
    """Refuses counts that no set of images can have; each count is bounded first, so that their sums cannot overflow."""
    counts = [statistics.confusion, statistics.histograms, statistics.calibration[:, :CALIBRATION_SCORE_SUM]]
    if any(np.any((count > most_images) | (count < 0)) for count in counts) or statistics.n > most_images:
        raise _wrong(f"counts of at most {most_images} images", "others")
    n, by_class = statistics.n, statistics.confusion.sum(axis=1)
    positives = np.array([statistics.n_positive, *by_class[1:]])[: len(statistics.histograms)]
    if not np.array_equal(statistics.histograms.sum(axis=2), np.stack([n - positives, positives], axis=1)):
        raise _wrong("histograms that hold the images of the confusion matrix", "other totals")
    _check_sums(statistics)


def _check_sums(statistics: Statistics) -> None:
    count, positive, total = statistics.calibration.T
    if count.sum() != statistics.n or positive.sum() != statistics.n_positive or np.any(positive > count):
        raise _wrong("calibration bins that hold the images of the confusion matrix", "other totals")
    edges = np.arange(CALIBRATION_BINS + 1) / CALIBRATION_BINS * FIXED_POINT
    if np.any(total < count * (edges[:-1] - 1)) or np.any(total > count * (edges[1:] + 1)):
        raise _wrong("sums of scores that their calibration bins allow", "others")
    if np.any(statistics.losses > statistics.n * np.array([1.0, MAX_LOG_LOSS]) * FIXED_POINT + statistics.n):
        raise _wrong("sums of losses that so many images allow", "larger ones")
