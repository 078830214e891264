"""What the coordinator decides for each round: which sites train in it, and at which learning rate.

`SiteSampling` is the end of each strategy's chain of `super()` calls, which sends to the drawn sites only. `LearningRate` is the sites'
rate from round to round, where the coordinator has a part in it: the schedule `plateau`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower

from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.models.recipe import gradient_weight, plateau_factor, rate_of_round
from pneumofed.common.seeds import numpy_generator
from pneumofed.common.wire.messages import ARRAYS, CONFIG, ModelArrays, unpack_arrays
from pneumofed.server.runs.records import RoundRecord

logger = logging.getLogger(__name__)


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
    """FedAvg whose nodes are given by the round loop, which knows sites by name.

    Attributes:
        drawn_nodes: who trains in the next round.
        weight_by: `strategy.weight_by`.
    """

    weight_by: Literal["images", "hospitals"] = "images"

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.drawn_nodes: list[int] = []

    def weight_of(self, images: int) -> int:
        """Gives what a site of so many training images weighs in a mean over sites, at least 1."""
        return max(1, images) if self.weight_by == "images" else 1

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


class LearningRate:
    """Gives the learning rate of a round of one run, from the experiment and the rounds before it.

    All that it remembers are the rounds' records, which a resumed run reads from its history: it decides as an unbroken one.

    Args:
        experiment: of the run.
        history: the rounds completed so far, in order.
    """

    def __init__(self, experiment: ExperimentConfig, history: Iterable[RoundRecord] = ()) -> None:
        self._experiment = experiment
        self._values = [self._monitored(record) for record in history]

    def __call__(self, round_number: int) -> float:
        """Computes the mean rate of a round as a share of its peak, as strategies take it.

        Args:
            round_number: from 1, up to the one after the last completed.
        """
        return rate_of_round(self._experiment, round_number) * self.factor(round_number)

    def weight(self, round_number: int, images: int) -> float:
        """Computes what a site's local steps of a round add up to, see `gradient_weight`.

        Args:
            round_number: from 1, up to the one after the last completed.
            images: the site's training images.
        """
        return gradient_weight(self._experiment, round_number, images, self.factor(round_number))

    def factor(self, round_number: int) -> float:
        """Decides the factor that the sites get with the message of a round; 1 but under `plateau`.

        Args:
            round_number: from 1, up to the one after the last completed.
        """
        known = round_number - 2 if self._experiment.evaluation.with_training else round_number - 1
        return plateau_factor(self._experiment.training, self._values[: max(known, 0)])

    def remember(self, record: RoundRecord) -> RoundRecord:
        """Takes a completed round into account, and logs where the rate falls or cannot be decided.

        Args:
            record: of the round after the last one remembered.

        Returns:
            The record, under `plateau` with the factor that the round had.
        """
        self._values.append(self._monitored(record))
        if self._experiment.training.schedule != "plateau":
            return record
        had, comes = self.factor(record.round), self.factor(record.round + 1)
        monitor = self._experiment.training.plateau.monitor
        if comes < had:
            logger.info(
                "round %d: validation %s no longer improves; the rate falls to %.4g of its first", record.round, monitor, comes
            )
        if self._values[-1] is None and self._experiment.validates(record.round) and not record.judged_later:
            logger.warning(
                "round %d: no validation %s, by which the schedule plateau decides; the rate stays", record.round, monitor
            )
        return record.updated(rate_factor=had)

    def complete(self, record: RoundRecord) -> None:
        """Takes into account what was found of the last round's model after the round (`evaluation.with_training`).

        Args:
            record: of the last round or, where the next one was remembered meanwhile, of the one before it.
        """
        self._values[record.round - 1] = self._monitored(record)

    def _monitored(self, record: RoundRecord) -> float | None:
        if record.validation is None:
            return None
        return record.validation.log_loss if self._experiment.training.plateau.monitor == "loss" else record.validation.auroc
