"""Strategies that withstand hostile sites: the median and the trimmed mean by coordinate, Krum and Multi-Krum.

Each needs all updates of a round at once. The first two take every weight by itself, so that they read the updates some columns at a
time and memory does not grow with the sites; Krum compares whole updates and holds all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import cast

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from flwr.serverapp import strategy as flower

from pneumofed.common.wire.fields import PARAMETERS, pack_values
from pneumofed.common.wire.messages import ARRAYS, BUFFERS, METRICS, NUM_EXAMPLES
from pneumofed.server.federation.round_choices import SiteSampling, StartingWeights
from pneumofed.server.federation.update_spool import DerivedArray, columns


class ByColumns(SiteSampling):
    """A strategy whose every weight follows from that weight of all sites: so it reads them some columns at a time."""

    def combine(self, block: np.ndarray) -> np.ndarray:
        """Computes the new weights [C] from those of all sites, float32 [N, C]."""
        raise NotImplementedError

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Combines the parameters and the statistics of all sites, as many columns at a time as fit in `COLUMN_BYTES`.

        Args:
            server_round: not used.
            replies: checked ones.

        Returns:
            The arrays of the round, None without replies; no metrics.
        """
        records = [cast(ArrayRecord, reply.content[ARRAYS]) for reply in replies]
        if not records:
            return None, None
        blocks = {name: columns([record[name] for record in records]) for name in (PARAMETERS, BUFFERS)}
        return ArrayRecord(
            {name: pack_values(np.concatenate([self.combine(b) for b in each])) for name, each in blocks.items()}
        ), None


class FedMedian(ByColumns):
    """Yin et al. 2018, definition 1."""

    def combine(self, block: np.ndarray) -> np.ndarray:
        """Takes the median of the sites, float32 [C] of [N, C]."""
        return np.asarray(np.median(block, axis=0))


class FedTrimmedAvg(ByColumns):
    """Yin et al. 2018, definition 2. Cut is as many of n sites on each side as reach the share, so that it covers as many hostile ones of
    fewer replies too: at 0.2 two of six to ten. One or two values in the middle are always left, so that of few sites it is the median."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self._beta = beta

    def combine(self, block: np.ndarray) -> np.ndarray:
        """Takes the mean without the share `beta` of the largest and of the smallest, float32 [C] of [N, C]."""
        sites = len(block)
        cut = min(math.ceil(round(self._beta * sites, 9)), (sites - 1) // 2)
        return np.asarray(np.partition(block, (cut, sites - cut - 1), axis=0)[cut : sites - cut].mean(axis=0))


class MultiKrum(flower.MultiKrum, StartingWeights):
    """Multi-Krum, and Krum with `one`, on updates instead of weights (Blanchard et al. 2017).

    Multi-Krum takes the plain mean of the n - f - 2 updates with the best scores, as many as its score compares each with. Numbers of
    images count for nothing: a hostile site may send any.

    The choice does not change when all points move together, but Flower takes distances as |x|^2 + |y|^2 - 2xy in float32, which loses
    the small differences of long vectors.
    """

    def __init__(self, malicious_sites: int, *, one: bool) -> None:
        super().__init__(num_malicious_nodes=malicious_sites)
        self._one = one

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Chooses among the updates, each with weight 1, and adds the mean of those chosen to the weights before the round.

        Args:
            server_round: from 1.
            replies: checked ones; their arrays are replaced by the updates.

        Returns:
            Arrays and metrics of the round.
        """
        kept = list(replies)
        origin = {PARAMETERS: self.current.parameters, BUFFERS: self.current.statistics}
        self.num_nodes_to_select = 1 if self._one else max(1, len(kept) - self.num_malicious_nodes - 2)
        for reply in kept:
            cast(MetricRecord, reply.content[METRICS])[NUM_EXAMPLES] = 1
            record = cast(ArrayRecord, reply.content[ARRAYS])
            for name, start in origin.items():
                record[name] = DerivedArray(partial(_minus, record[name], start), record[name])
        arrays, metrics = super().aggregate_train(server_round, kept)
        if arrays is not None:
            arrays = ArrayRecord({name: pack_values(arrays[name].numpy() + start) for name, start in origin.items()})
        return arrays, metrics


def _minus(array: Array, start: np.ndarray) -> np.ndarray:
    return np.asarray(array.numpy() - start)
