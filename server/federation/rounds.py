"""The rounds: who is there, train, check, aggregate, judge, remember.

coordinator.roll_call.assemble()             until enough sites are there
for each round:
    line = coordinator.run_round(round)      the ten visible steps of a round, and its record
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from torch import nn

from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.data.manifest import CLASSES
from pneumofed.common.errors import MessageError, RoundError
from pneumofed.common.evaluation.metrics import ChosenThreshold, choose_threshold, metrics
from pneumofed.common.evaluation.statistics import FEDERATED_GRID, Statistics
from pneumofed.common.secure_aggregation.key_agreement import KeyDirectory
from pneumofed.common.wire.messages import (
    ARRAYS,
    CONFIG,
    Failure,
    Instruction,
    ModelArrays,
    Update,
    pack_instruction,
    unpack_evaluation,
    with_step,
)
from pneumofed.common.wire.parameter_layout import ArraysLayout
from pneumofed.server.federation.central_evaluation import CentralEvaluator
from pneumofed.server.federation.central_privacy import CentralPrivacy
from pneumofed.server.federation.enrolment import Enrolment, SiteDirectory, tell_reasons
from pneumofed.server.federation.messaging import EvaluationOutcome, Evaluations, Messenger, TrainingOutcome
from pneumofed.server.federation.strategies import SiteStrategy, aggregate, draw_sites, moving_average
from pneumofed.server.federation.update_checks import UpdateChecks
from pneumofed.server.runs.events import Kind, RunLog
from pneumofed.server.runs.records import (
    LateReply,
    Metrics,
    RoundBytes,
    RoundRecord,
    RoundSeconds,
    SiteRound,
    SiteTraining,
    SiteValidation,
    StoredThreshold,
)
from pneumofed.server.secure_aggregation.rounds import SecureRounds

logger = logging.getLogger(__name__)


@dataclass
class Coordinator:
    """One run in progress. `arrays` are the global weights that sites train on from; `network` is a scratch model."""

    grid: Grid
    experiment: ExperimentConfig
    chronicle: RunLog
    strategy: SiteStrategy
    arrays: ModelArrays
    network: nn.Module
    judge: CentralEvaluator
    kept: ModelArrays
    """What is judged and kept: after a round `arrays`, or their moving average over the rounds (`strategy.ema_decay`)."""
    roster: SiteDirectory = field(init=False)
    layout: ArraysLayout = field(init=False)
    post: Messenger = field(init=False)
    roll_call: Enrolment = field(init=False)
    secure: SecureRounds | None = field(init=False, default=None)
    """Set where the experiment asks for secure aggregation."""
    central_privacy: CentralPrivacy | None = None
    validation: Statistics | None = field(init=False, default=None)
    """The hospitals' pooled validation statistics of the last round."""
    key_roster: InitVar[KeyDirectory | None] = None

    def __post_init__(self, key_roster: KeyDirectory | None) -> None:
        self.layout = ArraysLayout.of(self.network)
        self.roster = SiteDirectory(self.layout.digest)
        self.post = Messenger(self.grid, self.chronicle.activity)
        self.roll_call = Enrolment(self.grid, self.experiment, self.chronicle, self.post, self.roster)
        if key_roster is not None:
            self.secure = SecureRounds(self.post, self.experiment, self.chronicle.run, self.layout, key_roster, self.roster.nodes)

    def run_round(self, number: int) -> RoundRecord:
        """Runs one round, moves `arrays` and `kept` on, and returns its record.

        Raises:
            RoundError: fewer than `min_sites` good updates; the weights stay as they were.
        """
        clock = Clock()
        late = self.post.collect_late()
        sites = self.roll_call.free_sites()
        drawn = draw_sites(sites, self.experiment.strategy.fraction_train, self.experiment.seed, number)
        deadline = self.experiment.strategy.round_timeout_sec
        self.chronicle.activity.note(Kind.ROUND_STARTED, round=number, sites=drawn, deadline_sec=deadline)
        trained = self._train(drawn, number)
        seconds = {"train": clock.lap()}
        self.arrays = self._aggregate(number, trained, len(drawn))
        self.kept = moving_average(self.kept if number > 1 else None, self.arrays, self.experiment.strategy.ema_decay)
        seconds["aggregate"] = clock.lap()
        judges = draw_sites(sites, self.experiment.evaluation.fraction_sites, self.experiment.seed, number)
        judged = self._evaluate(judges, number)
        self.validation = judged.pooled
        cfg = self.experiment.evaluation
        threshold = choose_threshold(judged.pooled, cfg.threshold_policy, cfg.target)
        seconds["evaluate"] = clock.lap()
        central = self._central(number, threshold)
        seconds["central"] = clock.lap()
        seconds["total"] = clock.total()
        line = RoundRecord(
            round=number,
            drawn=tuple(drawn),
            failures={site: str(failure) for site, failure in {**trained.failures, **judged.failures}.items()},
            left_out={site: failure.sentence for site, failure in trained.left_out.items()},
            late=tuple(LateReply(site=asked.site, round=asked.round, task=asked.task) for asked in late),
            threshold=StoredThreshold.model_validate(vars(threshold)),
            validation=Metrics.model_validate(metrics(judged.pooled, threshold.value)),
            sites=_site_rounds(trained.sites, judged.evaluations, threshold.value),
            absent=self.roster.absences(),
            seconds=RoundSeconds(**seconds),
            bytes=RoundBytes(down=self.arrays.nbytes * (len(drawn) + len(judges)), up=trained.bytes_up),
            **central,
            **_present(
                secure_sum=trained.secure_sum,
                central_epsilon=trained.central_epsilon,
                secure_validation=judged.secure_validation,
            ),
        )
        self.chronicle.finishes(line, self.kept, trained.heads)
        return line

    def _aggregate(self, number: int, trained: TrainingOutcome, asked: int) -> ModelArrays:
        """The new global weights; `trained` gives up its updates, 45 MB a site, and tells what was spent."""
        updates = list(trained.updates)
        trained.updates.clear()
        if self.central_privacy is not None:
            updates = [self.central_privacy.combine(self.arrays, updates, asked, number)]
            trained.central_epsilon = self.central_privacy.epsilon(number)
        return aggregate(self.strategy, number, updates)

    def _train(self, drawn: Sequence[str], number: int) -> TrainingOutcome:
        """What the sites' training gave.

        Raises:
            RoundError: fewer good updates than the experiment needs.
        """
        if self.secure is not None:
            return self.secure.train(
                drawn, number, self.arrays, lambda steps: self._training_messages(number, list(steps), steps)
            )
        cfg = self.experiment.strategy
        intake = UpdateChecks(self.arrays, self.layout, self.roster.presences, cfg, compares=self.central_privacy is None)
        messages = self._training_messages(number, drawn)
        failures = self.post.exchange(messages, "train", number, cfg.round_timeout_sec, intake.take, cfg.enough_sites)
        updates, left_out = intake.close()
        for site, failure in {**failures, **left_out}.items():
            logger.warning("round %d: %s is left out: %s", number, site, failure)
        for site, failure in left_out.items():
            self.chronicle.activity.note(Kind.LEFT_OUT, round=number, site=site, reason=failure.sentence)
        if len(updates) < cfg.replies_needed:
            reasons = {site: str(failure) for site, failure in {**failures, **left_out}.items()}
            raise RoundError(
                f"round {number}: {len(updates)} good updates, {cfg.replies_needed} are needed (strategy.min_sites). "
                + tell_reasons({**reasons, **self.roster.absences()}, nobody="No site was connected.")
            )
        heads = {site: head for site, update in updates.items() if (head := update.presence.audit_head)}
        bytes_up = sum(update.nbytes for update in updates.values())
        return TrainingOutcome(list(updates.values()), _site_trainings(updates), heads, bytes_up, left_out, failures)

    def _training_messages(self, number: int, sites: Sequence[str], steps: Mapping[str, str] | None = None) -> dict[str, Message]:
        """One a site, as the strategy configures them; `steps` are those of a secure sum."""
        content = self._instruct(number, self.arrays)
        self.strategy.drawn_nodes = [self.roster.nodes[site] for site in sites]
        messages = self.strategy.configure_train(number, content.array_records[ARRAYS], content.config_records[CONFIG], self.grid)
        by_site = dict(zip(sites, messages, strict=True))
        return {site: with_step(message, steps[site]) if steps else message for site, message in by_site.items()}

    def _evaluate(self, judges: Sequence[str], number: int) -> EvaluationOutcome:
        content = self._instruct(number, self.kept)
        messages = {site: _message(content, self.roster.nodes[site], MessageType.EVALUATE) for site in judges}
        if self.secure is not None:
            return self.secure.evaluate(
                judges, number, self.kept, lambda steps: {site: with_step(messages[site], step) for site, step in steps.items()}
            )
        good: Evaluations = {}
        bad: dict[str, Failure] = {}

        def take(site: str, message: Message) -> bool:
            try:
                evaluation = unpack_evaluation(message.content)
                good[site] = evaluation, Statistics.from_numbers(evaluation.statistics, len(CLASSES[self.experiment.task]))
            except MessageError as error:
                bad[site] = Failure(site, "MessageError", str(error))
            return site in good

        bad |= self.post.exchange(messages, "evaluate", number, self.experiment.strategy.round_timeout_sec, take)
        for site, failure in bad.items():
            logger.warning("round %d: %s did not judge: %s", number, site, failure)
        zero = Statistics.zero(len(CLASSES[self.experiment.task]), FEDERATED_GRID)
        return EvaluationOutcome(sum((statistics for _, statistics in good.values()), zero), dict(sorted(good.items())), bad)

    def _central(self, number: int, threshold: ChosenThreshold) -> dict[str, Any]:
        """Metrics of the central sets that are judged in this round, by field of the round's record."""
        cfg = self.experiment
        if number % cfg.evaluation.every_rounds and number != cfg.rounds:
            return {}
        return dict(self.judge.results(self.judge.predict(self.load_network()), threshold.value))

    def load_network(self) -> nn.Module:
        """The scratch network with the weights that are judged and kept."""
        self.layout.load(self.network, self.kept.parameters, self.kept.statistics)
        return self.network

    def _instruct(self, number: int, arrays: ModelArrays) -> RecordDict:
        head = self.chronicle.audit.head() if self.chronicle.audit else None
        return pack_instruction(Instruction(self.experiment, self.chronicle.run, number, arrays, head))


class Clock:
    """Seconds since the last lap and since the start."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds

    def total(self) -> float:
        return time.perf_counter() - self._start


def _message(content: RecordDict, node: int, kind: str) -> Message:
    return Message(content, dst_node_id=node, message_type=kind)


def _present(**parts: Any) -> dict[str, Any]:
    """Those of `parts` that the round has; the others stay absent in its history line."""
    return {name: part for name, part in parts.items() if part is not None}


def _site_trainings(updates: Mapping[str, Update]) -> dict[str, SiteTraining]:
    """Each site's own numbers of its training."""
    return {site: SiteTraining.of(update.num_examples, update.metrics) for site, update in updates.items()}


def _site_rounds(trained: Mapping[str, SiteTraining], evaluations: Evaluations, threshold: float) -> dict[str, SiteRound]:
    """Each site's own numbers of the round."""
    judged = {
        site: SiteValidation.of(metrics(statistics, threshold), evaluation.metrics)
        for site, (evaluation, statistics) in evaluations.items()
    }
    return {
        site: SiteRound(**_present(train=trained.get(site), validation=judged.get(site)))
        for site in sorted({*trained, *evaluations})
    }
