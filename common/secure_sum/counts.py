"""The statistics of an evaluation as a vector of a secure sum: all in its tail, exact."""

from __future__ import annotations

import numpy as np

from common.errors import MessageError, SecureSumError
from common.evaluation.statistics import MAX_IMAGES, Statistics, flat_length
from common.secure_sum.masks import SumShape, SumVector


def statistics_shape(classes: int) -> SumShape:
    return SumShape(0, flat_length(classes), 32)


def encode_statistics(statistics: Statistics) -> SumVector:
    """The vector of one site."""
    vector = statistics_shape(statistics.classes).zeros()
    vector.tail[:] = statistics.flat().view(np.uint64)
    return vector


def decode_statistics(total: SumVector, classes: int) -> Statistics:
    """The statistics of all sites' images, exact.

    Raises:
        SecureSumError: no set of images can have these counts.
    """
    try:
        return Statistics.from_flat(total.tail.view(np.int64).copy(), classes, MAX_IMAGES)
    except MessageError as error:
        raise SecureSumError(f"the summed statistics contradict each other: {error}") from error
