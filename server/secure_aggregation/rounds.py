"""Training and evaluation of a round as secure sums: the coordinator learns only sums over the sites.

`SecureRounds` takes the place of the plain steps of `server.federation.rounds`: the strategy gets the weighted mean as one update, the
evaluation the pooled statistics. `SumExchange` runs one secure sum over the network: five exchanges, each with its own deadline, and a
record of who dropped out where; what each exchange asks and checks is `server.secure_aggregation.collector`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message, MessageType, RecordDict

from pneumofed.common.audit.log import hash_experiment
from pneumofed.common.config.classes import classes_of
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.errors import ConfigError, MessageError, RoundError, SecureSumError
from pneumofed.common.evaluation.statistics import FEDERATED_GRID, Statistics
from pneumofed.common.model_bundle.pooled_scores import Counts
from pneumofed.common.model_bundle.suitability import Suitability
from pneumofed.common.secure_aggregation.key_agreement import KeyDirectory, parse_roster
from pneumofed.common.secure_aggregation.masking import SumShape, SumVector, threshold
from pneumofed.common.secure_aggregation.protocol import Purpose, Stage, Step, SumSession, hash_subject
from pneumofed.common.secure_aggregation.quantization import (
    SCORES_SHAPE,
    MeanUpdate,
    UpdateCodec,
    decode_scores,
    decode_statistics,
    statistics_shape,
)
from pneumofed.common.wire.instructions import Instruction, pack_instruction
from pneumofed.common.wire.messages import Failure, ModelArrays, Presence, Update, content_bytes, unpack_presence
from pneumofed.common.wire.parameter_layout import ArraysLayout
from pneumofed.server.federation.messaging import Messenger, Task
from pneumofed.server.federation.replies import EvaluationOutcome, TrainingOutcome
from pneumofed.server.runs.events import Kind
from pneumofed.server.runs.records import SecureSumRecord, SiteTraining
from pneumofed.server.secure_aggregation.collector import Collector

logger = logging.getLogger(__name__)

Messages = Callable[[Mapping[str, str]], Mapping[str, Message]]
"""Steps by site, as text -> the messages with the model that ask for the vectors."""
Compose = Callable[[str, Step], Message]
"""(site, step) -> the message that asks it."""
TASK_OF_PURPOSE: Mapping[Purpose, Task] = {"train": "train", "evaluate": "evaluate", "score": "evaluate"}
TASK_OF_STAGE: Mapping[Stage, Task] = {"advertise": "keys", "share": "shares", "confirm": "confirmation", "unmask": "unmasking"}


@dataclass(frozen=True)
class SecureRounds:
    """Secure sums of one run. `nodes` maps each site to Flower's node."""

    messenger: Messenger
    experiment: ExperimentConfig
    run: str
    layout: ArraysLayout
    key_roster: KeyDirectory
    nodes: Mapping[str, int]

    def train(
        self, drawn: Sequence[str], number: int, base: ModelArrays, messages: Messages, rate_factor: float = 1.0
    ) -> TrainingOutcome:
        """Runs the round's training as a secure sum and returns the mean update on `base`, as the only one.

        Args:
            drawn: sites that are asked.
            number: the round, from 1.
            base: the global weights that sites train on from.
            messages: gives the training messages for the steps that ask for the vectors.
            rate_factor: on the learning rate, as these messages have it.

        Raises:
            RoundError: too few sites stayed, or their sum is none that their bounds allow.
        """
        subject = hash_subject(base, rate_factor=rate_factor)
        asked = SumRequest("train", number, subject, lambda sites, judged: self._codec(sites, judged).shape)
        outcome = self._sum(asked, drawn, messages)
        codec = self._codec(len(outcome.participants), outcome.judged)
        try:
            mean = codec.decode(outcome.total)
        except SecureSumError as error:
            raise RoundError(f"round {number}: {error}; one of {', '.join(outcome.summed)} broke the agreement") from error
        update = Update.of(Presence("mean", self.layout.digest), self._apply(mean, base), mean.sums.images, {})
        return TrainingOutcome(
            updates=[update],
            sites={site: SiteTraining(summed=True) for site in outcome.summed},
            heads=outcome.heads,
            bytes_up=outcome.bytes_up,
            left_out={},
            failures=outcome.lost,
            secure_sum=outcome.record().updated(**_describe(mean, codec)),
            judged=self._judged(outcome, codec, number) if outcome.judged else None,
        )

    def _judged(self, outcome: SumOutcome, codec: UpdateCodec, number: int) -> EvaluationOutcome:
        """What the sum says of the model that the sites trained on from, which is that of the round before."""
        try:
            return EvaluationOutcome(codec.decode_judged(outcome.total), {}, {}, outcome.record())
        except SecureSumError as error:
            return self._nothing(number - 1, outcome.summed, error)

    def _nothing(self, number: int, sites: Sequence[str], error: Exception) -> EvaluationOutcome:
        """Statistics of nothing, and why."""
        logger.warning("round %d: no validation: %s", number, error)
        failures = {site: Failure(site, type(error).__name__, str(error)) for site in sites}
        return EvaluationOutcome(Statistics.zero(len(classes_of(self.experiment.task)), FEDERATED_GRID), {}, failures)

    def evaluate(self, evaluating: Sequence[str], number: int, model: ModelArrays, messages: Messages) -> EvaluationOutcome:
        """Sums the sites' validation statistics; gives those of nothing where too few evaluated, as where nobody answers.

        Args:
            evaluating: sites that are asked.
            number: the round, from 1.
            model: the weights that are evaluated.
            messages: gives the evaluation messages for the steps that ask for the vectors.
        """
        classes = len(classes_of(self.experiment.task))
        try:
            asked = SumRequest("evaluate", number, hash_subject(model), lambda *_: statistics_shape(classes))
            outcome = self._sum(asked, evaluating, messages)
            pooled = decode_statistics(outcome.total, classes)
        except (RoundError, SecureSumError) as error:
            return self._nothing(number, evaluating, error)
        return EvaluationOutcome(pooled, {}, outcome.lost, outcome.record())

    def score(
        self, sites: Sequence[str], number: int, model: ModelArrays, suitability: Suitability, messages: Messages
    ) -> tuple[Counts, list[str]]:
        """Sums how the sites' validation patients score in the suitability tests.

        Args:
            sites: that are asked.
            number: the round whose weights `model` are, from 1.
            model: the weights whose features count.
            suitability: the tests.
            messages: gives the messages for the steps that ask for the vectors.

        Returns:
            Patients by test and bin, int64 [T, SCORE_BINS], and the sites that are in the sum.

        Raises:
            RoundError: too few sites stayed.
            SecureSumError: the sum is none of such counts.
        """
        outcome = self._sum(
            SumRequest("score", number, hash_subject(model, suitability), lambda *_: SCORES_SHAPE), sites, messages
        )
        return decode_scores(outcome.total, len(outcome.summed)), outcome.summed

    def _sum(self, asked: SumRequest, sites: Sequence[str], messages: Messages) -> SumOutcome:
        cfg, number, training = self.experiment.strategy, asked.round, asked.purpose == "train"
        session = SumSession.begin(self.run, number, asked.purpose, hash_experiment(self.experiment))
        collector = Collector(session, self.experiment.secure_aggregation, self.key_roster, asked.shape_for, asked.subject)
        exchange = SumExchange(
            messenger=self.messenger,
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

    def _codec(self, sites: int, judged: bool) -> UpdateCodec:
        sizes = self.layout.parameter_count, self.layout.statistic_count, len(classes_of(self.experiment.task))
        return UpdateCodec(self.experiment.secure_aggregation, *sizes, sites, judged)

    def _apply(self, mean: MeanUpdate, base: ModelArrays) -> ModelArrays:
        statistics = base.statistics + mean.arrays.statistics
        variances = self.layout.variances
        statistics[variances] = np.maximum(statistics[variances], 0.0)  # rounding may carry a variance of zero below it
        return ModelArrays(base.parameters + mean.arrays.parameters, statistics)


@dataclass(frozen=True)
class SumRequest:
    """What a sum is for: vectors of `shape_for(sites, judged)` about what has the hash `subject`."""

    purpose: Purpose
    round: int
    subject: str
    shape_for: Callable[[int, bool], SumShape]


def read_key_roster(path: str | None) -> KeyDirectory:
    """Reads the key roster that the coordinator hands on; the sites check who signed it.

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
    """What the sums show of the training of all sites together; under differential privacy loss and accuracy stay at the sites."""
    sums, seen = asdict(mean.sums), mean.sums.seen
    means = {"train_loss": mean.sums.loss / seen, "train_accuracy": mean.sums.correct / seen} if seen else {}
    counts = {"images": sums["images"], "classes": sums["classes"], "clipped": mean.clipped}
    return {**counts, **means, "error_bound": codec.error_bound(mean.weight)}


@dataclass(frozen=True)
class Dropped:
    """A site that gave no good answer to a step, and why."""

    stage: Stage
    failure: Failure


@dataclass
class SumOutcome:
    """A sum that came about. Sites that dropped out after they sent their vector are in `summed` all the same."""

    total: SumVector
    participants: list[str]
    """Those whose keys were agreed on, which sets the quantisation."""
    summed: list[str]
    dropped: dict[str, Dropped]
    heads: dict[str, str]
    bytes_up: int
    judged: bool = False
    """Whether the vectors hold statistics of the model that was trained on from."""

    @property
    def lost(self) -> dict[str, Failure]:
        """Those that are not in the sum, with the reason."""
        return {site: dropped.failure for site, dropped in self.dropped.items() if site not in self.summed}

    def record(self) -> SecureSumRecord:
        """Builds the record for the history: names and stages only."""
        dropped = {site: dropped.stage for site, dropped in sorted(self.dropped.items())}
        return SecureSumRecord(summed=tuple(self.summed), dropped=dropped)


@dataclass
class SumExchange:
    """Runs `collector` over `messenger`. `compose_vector` asks for the vector, `compose` for all else."""

    messenger: Messenger
    collector: Collector
    compose: Compose
    compose_vector: Callable[[Mapping[str, Step]], Mapping[str, Message]]
    deadline_sec: float
    """Of the vectors."""
    least: int
    """Fewer vectors than this fail the round even where the threshold would allow them."""
    enough: int | None = None
    dropped: dict[str, Dropped] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    bytes_up: int = 0

    def run(self, sites: Sequence[str]) -> SumOutcome:
        """Runs the five exchanges and returns the sum over those of `sites` that stay until they sent their vectors.

        Raises:
            RoundError: fewer than the threshold stayed; says who fell out, where and why.
        """
        collector = self.collector
        try:
            self._ask("advertise", collector.advertise(sites), collector.take_keys)
            self._ask("share", collector.share(), collector.take_parcels)
            self._ask_vectors(collector.mask())
            self._ask("confirm", collector.confirm(self.least), collector.take_confirmation, patient=False)
            self._ask("unmask", collector.unmask(), collector.take_shares, patient=False)
            total = collector.finish()
        except SecureSumError as error:
            raise RoundError(f"round {collector.session.round}: the secure sum failed: {error}. {self._reasons()}") from error
        return SumOutcome(
            total, sorted(collector.keys), collector.summed, self.dropped, self.heads, self.bytes_up, collector.judged
        )

    def _ask(
        self, stage: Stage, steps: Mapping[str, Step], take: Callable[[str, RecordDict], None], *, patient: bool = True
    ) -> None:
        """With `patient` all are waited for until the deadline; else, once the threshold is reached, only a little longer."""
        cfg, collector = self.collector.cfg, self.collector
        messages = {site: self.compose(site, step) for site, step in steps.items()}
        full = all(len(holders) == len(collector.keys) for holders in collector.holders.values())
        enough = None if patient or not full else threshold(len(collector.keys), cfg.threshold)
        failures = self.messenger.exchange(
            messages,
            TASK_OF_STAGE[stage],
            collector.session.round,
            cfg.stage_timeout_sec,
            self._taker(stage, take),
            enough,
            cfg.grace_sec,
        )
        self.dropped |= {site: Dropped(stage, failure) for site, failure in failures.items()}

    def _ask_vectors(self, steps: Mapping[str, Step]) -> None:
        collector = self.collector
        enough = max(self.enough, threshold(len(collector.keys), collector.cfg.threshold)) if self.enough else None
        session, take = collector.session, self._taker("mask", collector.take_vector)
        failures = self.messenger.exchange(
            self.compose_vector(steps), TASK_OF_PURPOSE[session.purpose], session.round, self.deadline_sec, take, enough
        )
        self.dropped |= {site: Dropped("mask", failure) for site, failure in failures.items()}

    def _taker(self, stage: Stage, take: Callable[[str, RecordDict], None]) -> Callable[[str, Message], bool]:
        def taker(site: str, message: Message) -> bool:
            try:
                presence = unpack_presence(message.content)
                take(site, message.content)
            except (MessageError, SecureSumError) as error:
                failure = Failure(site, type(error).__name__, str(error))
                self.dropped[site] = Dropped(stage, failure)
                self.messenger.activity.note(
                    Kind.LEFT_OUT, round=self.collector.session.round, site=site, reason=failure.sentence
                )
                return False
            if presence.audit_head:
                self.heads[site] = presence.audit_head
            self.bytes_up += content_bytes(message.content)
            return True

        return taker

    def _reasons(self) -> str:
        reasons = (f"{site} ({dropped.stage}): {dropped.failure}" for site, dropped in sorted(self.dropped.items()))
        return "; ".join(reasons) or "No site said why."
