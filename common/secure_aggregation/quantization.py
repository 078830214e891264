"""Updates and statistics as integers whose sum over all sites cannot overflow, and the mean that the sum says.

`UpdateCodec` encodes an update and decodes the mean update; `encode_statistics` and `decode_statistics` do so for the statistics of an
evaluation, `encode_scores` and `decode_scores` for the counts of suitability scores; both are all in the vector's tail, exact.

For N sites that count as n_i images, differences d_i from the global weights with ||d_i|| <= C (`clip_norm`, longer ones are scaled down)
and weights w_i = n_i / M (`max_examples`), each body word is round(w_i d_i / s) with

    s = C / (floor((2^(bits-1) - 1) / N) - 1)         so that |sum| <= N (C / s + 1/2) < 2^(bits-1)

and the mean of the parameters is s M sum / (sum of n_i). Rounding moves each w_i d_i by at most s/2, so that, against the plain mean

    |error| <= (s / 2) N M / (sum of n_i)             of each parameter.

A site counts as its number of images, limited to [m, M]: with t sites that must stay (`threshold`) and the largest share f of one
(`largest_weight`), m = ceil(M (1 - f) / (f (t - 1))), so that M <= f (M + (t - 1) m) whoever drops out. The steps in which the least of
them sees its own difference are therefore never coarser than s M / m, whatever it has.

Statistics of the model (running means and variances) are in the tail, as round(2^16 n_i x_i) with |x_i| <= 2^16, where x_i is again the
difference: their error is at most 2^-17 N / (sum of n_i). Counts are exact; the loss is a sum in units of 2^-20.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pneumofed.common.config.experiment import SecureAggregationConfig
from pneumofed.common.errors import ConfigError, MessageError, SecureSumError
from pneumofed.common.evaluation.statistics import MAX_IMAGES, Statistics, flat_length
from pneumofed.common.model_bundle.pooled_scores import MOST_PATIENTS, SCORE_BINS, Counts
from pneumofed.common.model_bundle.suitability import SUITABILITY_TESTS
from pneumofed.common.secure_aggregation.masking import SumShape, SumVector, Words, threshold
from pneumofed.common.wire.messages import ModelArrays

STATISTIC_UNITS = 2**16
STATISTIC_LIMIT = 2.0**16
LOSS_UNITS = 2**20
MAX_LOSS_SUM = 2.0**30
"""Of one site; larger ones, and those that are no numbers, count as this."""
SUMMED_COUNTS = ("weight", "images", "seen", "correct", "clipped", "loss")
"""Images as which the sites count; images that they have; images seen in training, with repetitions; of them classified rightly; updates
that were scaled down; loss."""
FLOAT32_SLACK = 1e-6
"""Relative error of the length of a vector whose entries were rounded to float32."""
NUMBERS_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class TrainingSums:
    """What else of a site's training is summed: counts over its images, and its classes."""

    images: int
    seen: int
    correct: int
    loss: float
    classes: Sequence[int]


@dataclass(frozen=True)
class MeanUpdate:
    """What the sum of all sites' vectors says. `arrays` is the weighted mean of the differences."""

    arrays: ModelArrays
    sums: TrainingSums
    clipped: int
    weight: int
    """Images as which all sites together count."""


def least_weight(cfg: SecureAggregationConfig, sites: int) -> int:
    """Computes as how many images a site counts at least: m, 1 to `max_examples`.

    Args:
        cfg: `max_examples`, `largest_weight` and `threshold`.
        sites: how many vectors may be in the sum.
    """
    others = threshold(sites, cfg.threshold) - 1
    return min(cfg.max_examples, max(1, math.ceil(cfg.max_examples * (1 - cfg.largest_weight) / (cfg.largest_weight * others))))


def largest_share(cfg: SecureAggregationConfig, sites: int) -> float:
    """Computes the largest share of one site in the weighted mean, in (0, 1], with as few sites as may stay.

    Args:
        cfg: the run's terms.
        sites: how many vectors may be in the sum.
    """
    others = threshold(sites, cfg.threshold) - 1
    return cfg.max_examples / (cfg.max_examples + others * least_weight(cfg, sites))


def coarsest_step(cfg: SecureAggregationConfig, sites: int) -> float:
    """Computes the step s M / m in which a parameter's difference enters the sum from the site that counts least.

    Args:
        cfg: the run's terms.
        sites: how many vectors may be in the sum.

    Returns:
        In units of the parameters; infinite where so many sites leave no room in `bits`.
    """
    room = (2 ** (cfg.bits - 1) - 1) // sites - 1
    return cfg.clip_norm / room * cfg.max_examples / least_weight(cfg, sites) if room > 0 else math.inf


@dataclass(frozen=True)
class UpdateCodec:
    """From an update to a vector of integers, and from the sum of such vectors to the mean update."""

    cfg: SecureAggregationConfig
    parameters: int
    statistics: int
    classes: int
    sites: int
    """N: how many vectors may be summed."""
    judged: bool = False
    """Whether statistics of the model that the sites train on from stand at the end of the tail."""

    def __post_init__(self) -> None:
        if self.sites * self.cfg.max_examples * STATISTIC_UNITS * int(STATISTIC_LIMIT) >= 2**62:
            raise ConfigError(
                f"secure_aggregation.max_examples is {self.cfg.max_examples}, too many for {self.sites} sites; take a smaller number"
            )

    @property
    def shape(self) -> SumShape:
        return SumShape(self.parameters, self._counted + (flat_length(self.classes) if self.judged else 0), self.cfg.bits)

    @property
    def _counted(self) -> int:
        """Length of the tail without statistics of a judged model."""
        return self.statistics + len(SUMMED_COUNTS) + self.classes

    @property
    def unit(self) -> float:
        """s."""
        return self.cfg.clip_norm / ((2 ** (self.cfg.bits - 1) - 1) // self.sites - 1)

    def error_bound(self, weight: int) -> float:
        """Largest distance of a parameter's mean from the plain weighted mean over sites that count as `weight` images in all."""
        return self.unit / 2 * self.sites * self.cfg.max_examples / weight

    def weight(self, images: int) -> int:
        """As how many images a site that has `images` counts."""
        return min(max(images, least_weight(self.cfg, self.sites)), self.cfg.max_examples)

    def encode(self, difference: ModelArrays, sums: TrainingSums, judged: Statistics | None = None) -> SumVector:
        """Encodes the update of one site as a vector of integers.

        Args:
            difference: local minus global weights and statistics, float32; longer ones than `clip_norm` are scaled down.
            sums: of the site's training, of one image or more.
            judged: of the model that it trained on from, where the vector holds them.

        Raises:
            SecureSumError: there is no image, the update holds values that are not finite, or most of it is lost in rounding, so that
                the site would only seem to take part.
        """
        if sums.images < 1:
            raise SecureSumError("a site without training images takes no part in a sum of updates")
        length = float(np.linalg.norm(difference.parameters.astype(np.float64)))
        if not np.isfinite(length) or not np.isfinite(difference.statistics).all():
            raise SecureSumError("the update holds values that are not finite")
        vector, weight = self.shape.zeros(), self.weight(sums.images)
        shrink = min(1.0, self.cfg.clip_norm / length) if length else 1.0
        self._encode_body(vector.body, difference.parameters, shrink * weight / self.cfg.max_examples / self.unit)
        if 2 * np.count_nonzero(vector.body) <= np.count_nonzero(difference.parameters):
            raise SecureSumError(
                "rounding leaves half of the update or less; take a smaller secure_aggregation.clip_norm or bits: 64"
            )
        loss = min(sums.loss, MAX_LOSS_SUM) if np.isfinite(sums.loss) else MAX_LOSS_SUM
        counts = [weight, sums.images, sums.seen, sums.correct, shrink < 1.0, round(loss * LOSS_UNITS), *sums.classes]
        limited = np.clip(difference.statistics.astype(np.float64), -STATISTIC_LIMIT, STATISTIC_LIMIT)
        tail = np.rint(limited * (weight * STATISTIC_UNITS)).astype(np.int64)
        found = [] if judged is None else [judged.flat()]
        vector.tail[:] = np.concatenate([tail, np.array(counts, np.int64), *found]).view(np.uint64)
        return vector

    def decode(self, total: SumVector) -> MeanUpdate:
        """The mean that the sum of at most `sites` vectors says.

        Raises:
            SecureSumError: no vectors of the agreed bounds can have this sum: a mask is left in it, or a site broke the agreement.
        """
        tail = total.tail.view(np.int64)
        weight, images, seen, correct, clipped, loss = (int(count) for count in tail[self.statistics :][: len(SUMMED_COUNTS)])
        classes = [int(count) for count in tail[self.statistics + len(SUMMED_COUNTS) : self._counted]]
        if not 0 < weight <= self.sites * self.cfg.max_examples:
            raise SecureSumError("the summed weights are beyond their bound")
        self._check(images, seen, correct, clipped, classes)
        parameters = self._decode_body(total.body, self.unit * self.cfg.max_examples / weight)
        longest = self.cfg.clip_norm * (1 + FLOAT32_SLACK) + self.error_bound(weight) * len(parameters) ** 0.5
        if float(np.linalg.norm(parameters.astype(np.float64))) > longest:
            raise SecureSumError("the sum of the updates is longer than the clipping norm allows")
        statistics = (tail[: self.statistics] / (float(weight) * STATISTIC_UNITS)).astype(np.float32)
        if np.abs(statistics).max(initial=0.0) > STATISTIC_LIMIT + 1:
            raise SecureSumError("the sum of the statistics is beyond their bound")
        sums = TrainingSums(images, seen, correct, loss / LOSS_UNITS, classes)
        return MeanUpdate(ModelArrays(parameters, statistics), sums, clipped, weight)

    def decode_judged(self, total: SumVector) -> Statistics:
        """The statistics of all sites' images that the sum of their vectors holds; exact.

        Raises:
            SecureSumError: no set of images can have these counts.
        """
        return decode_statistics(SumVector(total.body[:0], total.tail[self._counted :]), self.classes)

    def _check(self, images: int, seen: int, correct: int, clipped: int, classes: Sequence[int]) -> None:
        plausible = 0 < images <= self.sites * MAX_IMAGES and 0 <= correct <= seen and 0 <= clipped <= self.sites
        if not plausible or min(classes, default=0) < 0 or sum(classes) != images:
            raise SecureSumError("the summed counts contradict each other")

    def _encode_body(self, body: Words, values: np.ndarray, factor: float) -> None:
        signed = body.view(f"<i{body.itemsize}")
        for part in _parts(len(body)):
            signed[part] = np.rint(values[part].astype(np.float64) * factor)

    def _decode_body(self, body: Words, factor: float) -> np.ndarray:
        signed, values = body.view(f"<i{body.itemsize}"), np.empty(len(body), np.float32)
        for part in _parts(len(body)):
            values[part] = signed[part].astype(np.float64) * factor
        return values


def _parts(length: int) -> Iterator[slice]:
    """Slices short enough that their float64 copies cost no memory to speak of."""
    return (slice(start, start + NUMBERS_AT_ONCE) for start in range(0, length, NUMBERS_AT_ONCE))


def statistics_shape(classes: int) -> SumShape:
    return SumShape(0, flat_length(classes), 32)


def encode_statistics(statistics: Statistics) -> SumVector:
    """The vector of one site."""
    vector = statistics_shape(statistics.classes).zeros()
    vector.tail[:] = statistics.flat().view(np.uint64)
    return vector


def decode_statistics(total: SumVector, classes: int) -> Statistics:
    """Decodes the statistics of all sites' images, exact.

    Args:
        total: the unmasked sum of the sites' vectors.
        classes: C of the task.

    Raises:
        SecureSumError: no set of images can have these counts.
    """
    try:
        return Statistics.from_flat(total.tail.view(np.int64).copy(), classes, MAX_IMAGES)
    except MessageError as error:
        raise SecureSumError(f"the summed statistics contradict each other: {error}") from error


SCORES_SHAPE = SumShape(0, len(SUITABILITY_TESTS) * SCORE_BINS, 32)
"""Of the vectors of suitability scores."""


def encode_scores(counts: Counts) -> SumVector:
    """The vector of one site.

    Args:
        counts: int64 [T, SCORE_BINS], patients by test and bin.
    """
    vector = SCORES_SHAPE.zeros()
    vector.tail[:] = counts.reshape(-1).view(np.uint64)
    return vector


def decode_scores(total: SumVector, sites: int) -> Counts:
    """Decodes how the patients of all sites score, int64 [T, SCORE_BINS], exact.

    Args:
        total: the unmasked sum of the sites' vectors.
        sites: how many vectors are in it.

    Raises:
        SecureSumError: no patients can have these counts.
    """
    counts = total.tail.view(np.int64).reshape(len(SUITABILITY_TESTS), SCORE_BINS).copy()
    plausible = counts.min() >= 0 and counts.max() <= sites * MOST_PATIENTS  # then no sum of a row can overflow
    patients = counts.sum(axis=1)
    if not plausible or len(set(patients.tolist())) != 1 or not 0 < patients[0] <= sites * MOST_PATIENTS:
        raise SecureSumError("the summed scores contradict each other")
    return counts
