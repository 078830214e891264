"""Training and evaluation of a round by secure sums: the strategy gets the weighted mean as one update, the judge the pooled statistics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message, MessageType

from common.audit_events import hash_arrays, hash_experiment
from common.config import ExperimentConfig
from common.data.manifest import CLASSES
from common.errors import ConfigError, RoundError, SecureSumError
from common.evaluation.statistics import FEDERATED_GRID, Statistics
from common.layout import ArraysLayout
from common.messages import Failure, Instruction, ModelArrays, Presence, Update, pack_instruction
from common.secure_sum.counts import decode_statistics, statistics_shape
from common.secure_sum.masks import SumShape
from common.secure_sum.quantize import MeanUpdate, UpdateCodec
from common.secure_sum.roster import KeyRoster, parse_roster
from common.secure_sum.session import Purpose, Session
from common.secure_sum.steps import Step
from server.exchange import Post
from server.outcomes import Judged, Trained
from server.records import SiteTraining
from server.secure_sum.collector import Collector
from server.secure_sum.exchange import Outcome, SumExchange

logger = logging.getLogger(__name__)

Messages = Callable[[Mapping[str, str]], Mapping[str, Message]]
"""Steps by site, as text -> the messages with the model that ask for the vectors."""


@dataclass(frozen=True)
class Asked:
    """What a sum is for: vectors of `shape_for(sites)` about the weights of hash `model`."""

    purpose: Purpose
    round: int
    model: str
    shape_for: Callable[[int], SumShape]


@dataclass(frozen=True)
class SecureRounds:
    """Secure sums of one run. `nodes` maps each site to Flower's node."""

    post: Post
    experiment: ExperimentConfig
    run: str
    layout: ArraysLayout
    roster: KeyRoster
    nodes: Mapping[str, int]

    def train(self, drawn: Sequence[str], number: int, base: ModelArrays, messages: Messages) -> Trained:
        """The mean update on `base`, as the only one.

        Raises:
            RoundError: too few sites stayed, or their sum is none that their bounds allow.
        """
        asked = Asked("train", number, hash_arrays(base), lambda sites: self._codec(sites).shape)
        outcome = self._sum(asked, drawn, messages)
        sites = len(outcome.participants)
        try:
            mean = self._codec(sites).decode(outcome.total)
        except SecureSumError as error:
            raise RoundError(f"round {number}: {error}; one of {', '.join(outcome.summed)} broke the agreement") from error
        update = Update.of(Presence("mean", self.layout.digest), self._apply(mean, base), mean.sums.images, {})
        return Trained(
            updates=[update],
            sites={site: SiteTraining(summed=True) for site in outcome.summed},
            heads=outcome.heads,
            bytes_up=outcome.bytes_up,
            left_out={},
            failures=outcome.lost,
            secure_sum=outcome.record().updated(**_describe(mean, self._codec(sites))),
        )

    def evaluate(self, judges: Sequence[str], number: int, model: ModelArrays, messages: Messages) -> Judged:
        """The pooled statistics; those of nothing where too few judged, as where nobody answers."""
        classes = len(CLASSES[self.experiment.task])
        try:
            asked = Asked("evaluate", number, hash_arrays(model), lambda _: statistics_shape(classes))
            outcome = self._sum(asked, judges, messages)
            pooled = decode_statistics(outcome.total, classes)
        except (RoundError, SecureSumError) as error:
            logger.warning("round %d: no validation: %s", number, error)
            failure = Failure(None, type(error).__name__, str(error))
            return Judged(Statistics.zero(classes, FEDERATED_GRID), {}, {site: replace(failure, site=site) for site in judges})
        return Judged(pooled, {}, outcome.lost, outcome.record())

    def _sum(self, asked: Asked, sites: Sequence[str], messages: Messages) -> Outcome:
        cfg, number, training = self.experiment.strategy, asked.round, asked.purpose == "train"
        session = Session.begin(self.run, number, asked.purpose, hash_experiment(self.experiment))
        collector = Collector(session, self.experiment.secure_aggregation, self.roster, asked.shape_for, asked.model)
        exchange = SumExchange(
            post=self.post,
            collector=collector,
            compose=lambda site, step: self._message(site, step, number),
            compose_vector=lambda steps: messages({site: step.model_dump_json() for site, step in steps.items()}),
            deadline_sec=cfg.round_timeout_sec,
            least=cfg.replies_needed if training else 1,
            enough=cfg.enough_sites if training else None,
        )
        outcome = exchange.run(sites)
        for site, dropped in outcome.dropped.items():
            logger.warning(
                "round %d: %s dropped out of the %s sum (%s): %s", number, site, asked.purpose, dropped.stage, dropped.failure
            )
        return outcome

    def _message(self, site: str, step: Step, number: int) -> Message:
        instruction = Instruction(self.experiment, self.run, number, step=step.model_dump_json())
        return Message(pack_instruction(instruction), dst_node_id=self.nodes[site], message_type=MessageType.QUERY)

    def _codec(self, sites: int) -> UpdateCodec:
        sizes = self.layout.parameter_count, self.layout.statistic_count, len(CLASSES[self.experiment.task])
        return UpdateCodec(self.experiment.secure_aggregation, *sizes, sites)

    def _apply(self, mean: MeanUpdate, base: ModelArrays) -> ModelArrays:
        statistics = base.statistics + mean.arrays.statistics
        variances = self.layout.variances
        statistics[variances] = np.maximum(statistics[variances], 0.0)  # rounding may carry a variance of zero below it
        return ModelArrays(base.parameters + mean.arrays.parameters, statistics)


def read_key_roster(path: str | None) -> KeyRoster:
    """The roster that the coordinator hands on; the sites check who signed it.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    if path is None or not Path(path).is_file():
        raise ConfigError(
            "secure_aggregation needs the signed roster of the sites' node keys, and there is none: run `pneumofed provision` again and "
            "give the coordinator its new kit (keys/roster.json)"
        )
    try:
        return parse_roster(Path(path).read_text(encoding="utf-8"))
    except SecureSumError as error:
        raise ConfigError(f"{path}: {error}") from error


def _describe(mean: MeanUpdate, codec: UpdateCodec) -> dict[str, Any]:
    """What the sums tell of the training of all sites together; under differential privacy loss and accuracy stay at the sites."""
    sums, seen = asdict(mean.sums), mean.sums.seen
    means = {"train_loss": mean.sums.loss / seen, "train_accuracy": mean.sums.correct / seen} if seen else {}
    counts = {"images": sums["images"], "classes": sums["classes"], "clipped": mean.clipped}
    return {**counts, **means, "error_bound": codec.error_bound(mean.sums.images)}
