"""Which sites train in a round, and the end of each strategy's chain of `super()` calls, which sends to these sites only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower

from pneumofed.common.seeds import numpy_generator
from pneumofed.common.wire.messages import ARRAYS, CONFIG, ModelArrays, unpack_arrays


def draw_sites(sites: Sequence[str], fraction: float, seed: int, round_number: int) -> list[str]:
    """Draws sites of a round without replacement: at least one, `fraction` of them rounded up.

    Pure in (set of sites, fraction, seed, round): a resumed run draws as an unbroken one.

    Args:
        sites: names to draw from, in any order; none gives none.
        fraction: share that is drawn, in (0, 1].
        seed: of the experiment.
        round_number: from 1.

    Returns:
        The names that were drawn, sorted.
    """
    ordered = sorted(sites)
    count = int(np.ceil(round(fraction * len(ordered), 9)))
    drawn = numpy_generator(seed, round_number, "sites").permutation(len(ordered))[:count]
    return [ordered[index] for index in sorted(drawn)]


class SiteSampling(flower.FedAvg):
    """FedAvg whose nodes are given by the round loop, which knows sites by name."""

    extra_bytes = 0
    """What each training message of the last `configure_train` holds beside the weights."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.drawn_nodes: list[int] = []

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Builds one training message a drawn node, in the order of `drawn_nodes`.

        Args:
            server_round: from 1.
            arrays: the global weights.
            config: what goes with them, the same for every site.
            grid: not used: the round loop knows which nodes are there.
        """
        content = RecordDict({ARRAYS: arrays, CONFIG: config})
        return self._construct_messages(content, self.drawn_nodes, MessageType.TRAIN)


class StartingWeights(SiteSampling):
    """Put in the place of `SiteSampling` where a strategy needs the weights that the round's updates are taken from.

    Attributes:
        current: the global weights that the last `configure_train` sent.
    """

    current: ModelArrays

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Builds the messages, and remembers the weights that they carry.

        Args:
            server_round: from 1.
            arrays: the global weights.
            config: what goes with them.
            grid: Flower's way to the nodes.
        """
        self.current = unpack_arrays(arrays)
        return super().configure_train(server_round, arrays, config, grid)
