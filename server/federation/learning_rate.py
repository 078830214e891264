"""The sites' learning rate from round to round, where the coordinator has a part in it: the schedule `plateau`."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.models.recipe import gradient_weight, plateau_factor, rate_of_round
from pneumofed.server.runs.records import RoundRecord

logger = logging.getLogger(__name__)


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
        return plateau_factor(self._experiment.training, self._values[: round_number - 1])

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
        if self._values[-1] is None:
            logger.warning(
                "round %d: no validation %s, by which the schedule plateau decides; the rate stays", record.round, monitor
            )
        return record.updated(rate_factor=had)

    def _monitored(self, record: RoundRecord) -> float | None:
        if record.validation is None:
            return None
        return record.validation.log_loss if self._experiment.training.plateau.monitor == "loss" else record.validation.auroc
