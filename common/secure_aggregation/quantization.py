"""Updates and statistics as integers whose sum over all sites cannot overflow, and the mean that the sum says.

`UpdateCodec` encodes an update and decodes the mean update; `encode_statistics` and `decode_statistics` do so for the statistics of an
evaluation, which are all in the vector's tail, exact.

For N sites of n_i images, differences d_i from the global weights with ||d_i|| <= C (`clip_norm`, longer ones are scaled down) and weights
w_i = n_i / M (`max_examples`), each body word is round(w_i d_i / s) with

    s = C / (floor((2^(bits-1) - 1) / N) - 1)         so that |sum| <= N (C / s + 1/2) < 2^(bits-1)

and the mean of the parameters is s M sum / (sum of n_i). Rounding moves each w_i d_i by at most s/2, so that, against the plain mean

    |error| <= (s / 2) N M / (sum of n_i)             of each parameter.

Statistics of the model (running means and variances) are in the tail, as round(2^16 n_i x_i) with |x_i| <= 2^16, where x_i is again the
difference: their error is at most 2^-17 N / (sum of n_i). Counts are exact; the loss is a sum in units of 2^-20.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pneumofed.common.config.experiment import SecureAggregationConfig
from pneumofed.common.errors import ConfigError, MessageError, SecureSumError
from pneumofed.common.evaluation.statistics import MAX_IMAGES, Statistics, flat_length
from pneumofed.common.secure_aggregation.masking import SumShape, SumVector, Words
from pneumofed.common.wire.messages import ModelArrays

STATISTIC_UNITS = 2**16
STATISTIC_LIMIT = 2.0**16
LOSS_UNITS = 2**20
MAX_LOSS_SUM = 2.0**30
"""Of one site; larger ones, and those that are no numbers, count as this."""
SUMMED_COUNTS = ("images", "seen", "correct", "clipped", "loss")
"""Images of the sites; images seen in training, with repetitions; of them classified rightly; updates that were scaled down; loss."""
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


@dataclass(frozen=True)
class UpdateCodec:
    """From an update to a vector of integers, and from the sum of such vectors to the mean update."""

    cfg: SecureAggregationConfig
    parameters: int
    statistics: int
    classes: int
    sites: int
    """N: how many vectors may be summed."""

    def __post_init__(self) -> None:
        if self.sites * self.cfg.max_examples * STATISTIC_UNITS * int(STATISTIC_LIMIT) >= 2**62:
            raise ConfigError(
                f"secure_aggregation.max_examples is {self.cfg.max_examples}, too many for {self.sites} sites; take a smaller number"
            )

    @property
    def shape(self) -> SumShape:
        return SumShape(self.parameters, self.statistics + len(SUMMED_COUNTS) + self.classes, self.cfg.bits)

    @property
    def unit(self) -> float:
        """s."""
        return self.cfg.clip_norm / ((2 ** (self.cfg.bits - 1) - 1) // self.sites - 1)

    def error_bound(self, images: int) -> float:
        """Largest distance of a parameter's mean from the plain weighted mean over `images` images in all."""
        return self.unit / 2 * self.sites * self.cfg.max_examples / images

    def encode(self, difference: ModelArrays, sums: TrainingSums) -> SumVector:
        """Encodes the update of one site as a vector of integers.

        Args:
            difference: local minus global weights and statistics, float32; longer ones than `clip_norm` are scaled down.
            sums: of the site's training, of 1 to `max_examples` images.

        Raises:
            ConfigError: more images than `max_examples`.
            SecureSumError: the update holds values that are not finite.
        """
        if not 0 < sums.images <= self.cfg.max_examples:
            raise ConfigError(f"{sums.images} images, secure_aggregation.max_examples is {self.cfg.max_examples}")
        length = float(np.linalg.norm(difference.parameters.astype(np.float64)))
        if not np.isfinite(length) or not np.isfinite(difference.statistics).all():
            raise SecureSumError("the update holds values that are not finite")
        vector = self.shape.zeros()
        shrink = min(1.0, self.cfg.clip_norm / length) if length else 1.0
        self._encode_body(vector.body, difference.parameters, shrink * sums.images / self.cfg.max_examples / self.unit)
        loss = min(sums.loss, MAX_LOSS_SUM) if np.isfinite(sums.loss) else MAX_LOSS_SUM
        counts = [sums.images, sums.seen, sums.correct, shrink < 1.0, round(loss * LOSS_UNITS), *sums.classes]
        limited = np.clip(difference.statistics.astype(np.float64), -STATISTIC_LIMIT, STATISTIC_LIMIT)
        tail = np.rint(limited * (sums.images * STATISTIC_UNITS)).astype(np.int64)
        vector.tail[:] = np.concatenate([tail, np.array(counts, np.int64)]).view(np.uint64)
        return vector

    def decode(self, total: SumVector) -> MeanUpdate:
        """The mean that the sum of at most `sites` vectors says.

        Raises:
            SecureSumError: no vectors of the agreed bounds can have this sum: a mask is left in it, or a site broke the agreement.
        """
        tail = total.tail.view(np.int64)
        images, seen, correct, clipped, loss = (int(count) for count in tail[self.statistics :][: len(SUMMED_COUNTS)])
        classes = [int(count) for count in tail[self.statistics + len(SUMMED_COUNTS) :]]
        self._check(images, seen, correct, clipped, classes)
        parameters = self._decode_body(total.body, self.unit * self.cfg.max_examples / images)
        longest = self.cfg.clip_norm * (1 + FLOAT32_SLACK) + self.error_bound(images) * len(parameters) ** 0.5
        if float(np.linalg.norm(parameters.astype(np.float64))) > longest:
            raise SecureSumError("the sum of the updates is longer than the clipping norm allows")
        statistics = (tail[: self.statistics] / (float(images) * STATISTIC_UNITS)).astype(np.float32)
        if np.abs(statistics).max(initial=0.0) > STATISTIC_LIMIT + 1:
            raise SecureSumError("the sum of the statistics is beyond their bound")
        sums = TrainingSums(images, seen, correct, loss / LOSS_UNITS, classes)
        return MeanUpdate(ModelArrays(parameters, statistics), sums, clipped)

    def _check(self, images: int, seen: int, correct: int, clipped: int, classes: Sequence[int]) -> None:
        plausible = 0 < images <= self.sites * self.cfg.max_examples and 0 <= correct <= seen and 0 <= clipped <= self.sites
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
