"""One round of a run, top to bottom: enrol, draw sites, train, check, aggregate, evaluate, evaluate centrally, record.

coordinator.enrolment.assemble()             before the first round: waits until enough sites are there
for each round:
    record = coordinator.run_round(number)   the steps above in order; `RoundRecord` is what the history keeps of it

`Coordinator.run_round` is the round; the private methods below it are its steps, in the order in which they run. Where the experiment
asks for secure aggregation, `server.secure_aggregation.rounds` takes the place of the training and evaluation steps; where it asks for a
buffer, `server.federation.asynchronous` that of the exchange of training messages.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from torch import nn

from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.errors import RoundError
from pneumofed.common.evaluation.metrics import ChosenThreshold, choose_threshold, metrics
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.models.build import freeze_in_round, trained_names
from pneumofed.common.models.fusion import ClinicalNetwork
from pneumofed.common.models.kept_model import moving_average
from pneumofed.common.secure_aggregation.key_agreement import KeyDirectory
from pneumofed.common.wire.instructions import Instruction, pack_instruction, with_counted, with_step
from pneumofed.common.wire.messages import ARRAYS, CONFIG, Failure, ModelArrays, Update
from pneumofed.common.wire.parameter_layout import ArraysLayout
from pneumofed.server.federation.asynchronous import BufferedRounds, VirtualClock
from pneumofed.server.federation.central_evaluation import CentralEvaluator
from pneumofed.server.federation.central_privacy import CentralPrivacy
from pneumofed.server.federation.drift import SummedCorrections
from pneumofed.server.federation.enrolment import Enrolment, SiteDirectory, list_reasons, refuse_missing_classes
from pneumofed.server.federation.messaging import AverageStep, Messenger, OpenMessage
from pneumofed.server.federation.replies import EvaluationChecks, EvaluationOutcome, TrainingOutcome, UpdateChecks
from pneumofed.server.federation.round_choices import LearningRate, draw_sites
from pneumofed.server.federation.strategies import SiteStrategy, aggregate
from pneumofed.server.federation.update_spool import UpdateSpool
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
    by_field,
)
from pneumofed.server.secure_aggregation.rounds import SecureRounds

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelJudgement:
    """What is known of the model of one round: the sites' statistics of it, the threshold that these choose, and the central sets.

    Attributes:
        round: from 1.
        arrays: the model.
        central: metrics by field of the round's record.
    """

    round: int
    arrays: ModelArrays
    outcome: EvaluationOutcome
    threshold: ChosenThreshold
    central: Mapping[str, Any]

    def complete(self, record: RoundRecord) -> RoundRecord:
        """Adds all of it to the record of the round, which has the training only.

        Args:
            record: of the same round.
        """
        found, outcome = self.threshold.value, self.outcome
        return record.without("judged_later").updated(
            failures={**record.failures, **_sentences(outcome.failures)},
            threshold=StoredThreshold.model_validate(vars(self.threshold)),
            validation=Metrics.model_validate(metrics(outcome.pooled, found)),
            sites=self._site_rounds({name: site.train for name, site in record.sites.items() if site.train}),
            **_present(secure_validation=outcome.secure_validation),
            **self.central,
        )

    def _site_rounds(self, trained: Mapping[str, SiteTraining]) -> dict[str, SiteRound]:
        """Each site's own numbers of the round."""
        outcome, threshold = self.outcome, self.threshold.value
        evaluated = {
            site: SiteValidation.of(metrics(statistics, threshold), evaluation.metrics)
            for site, (evaluation, statistics) in outcome.evaluations.items()
        }
        personal = {site: Metrics.model_validate(metrics(statistics, threshold)) for site, statistics in outcome.personal.items()}
        return {
            site: SiteRound(**_present(train=trained.get(site), validation=evaluated.get(site), personal=personal.get(site)))
            for site in sorted({*trained, *outcome.evaluations})
        }


@dataclass
class Coordinator:
    """One run in progress.

    Attributes:
        arrays: the global weights that sites train on from.
        network: a scratch model of the experiment, which takes whichever weights are needed.
        rate: the learning rate of each round, which under the schedule `plateau` depends on the rounds before.
        kept: what is evaluated and kept: after a round `arrays`, or their moving average over the rounds (`strategy.ema_decay`).
        directory: which connected node is which site.
        secure: set where the experiment asks for secure aggregation.
        buffered: set where it asks for asynchronous rounds.
        judgement: of the last round's model; None where nobody was asked for one, or with the next round's training.
        former: of the model of the round before it, where the last round's updates brought it (`evaluation.with_training`).
        predictions: of the central sets by the last round's model and by the best one's so far, by round.
        key_roster: the sites' signed node keys, where the experiment asks for secure aggregation.
        clock: of a simulation that goes by virtual time.
    """

    grid: Grid
    experiment: ExperimentConfig
    run_log: RunLog
    strategy: SiteStrategy
    arrays: ModelArrays
    network: nn.Module
    central_evaluator: CentralEvaluator
    kept: ModelArrays
    rate: LearningRate
    directory: SiteDirectory = field(init=False)
    layout: ArraysLayout = field(init=False)
    messenger: Messenger = field(init=False)
    enrolment: Enrolment = field(init=False)
    secure: SecureRounds | None = field(init=False, default=None)
    central_privacy: CentralPrivacy | None = None
    judgement: ModelJudgement | None = field(init=False, default=None)
    former: ModelJudgement | None = field(init=False, default=None)
    predictions: dict[int, dict[str, Predictions]] = field(init=False, default_factory=dict)
    key_roster: InitVar[KeyDirectory | None] = None
    clock: VirtualClock | None = None
    buffered: BufferedRounds | None = field(init=False, default=None)

    def __post_init__(self, key_roster: KeyDirectory | None) -> None:
        self.layout = ArraysLayout.of(self.network)
        self.directory = SiteDirectory(self.layout.digest)
        self.messenger = Messenger(self.grid, self.run_log.activity)
        self.enrolment = Enrolment(self.grid, self.experiment, self.run_log, self.messenger, self.directory)
        if key_roster is not None:
            self.secure = SecureRounds(
                self.messenger, self.experiment, self.run_log.run, self.layout, key_roster, self.directory.nodes
            )
        if self.experiment.strategy.buffer is not None:
            self.buffered = BufferedRounds(self.messenger, self.experiment.strategy, self.rate, self.clock)

    def standardize_clinical(self) -> None:
        """Puts what the sites' clinical numbers are standardised by into the first weights; asked once, before the first round."""
        stated = self.enrolment.standardize_clinical()
        if stated is None:
            return
        assert isinstance(self.network, ClinicalNetwork)
        self.layout.load(self.network, self.arrays.parameters, self.arrays.statistics)
        self.network.fusion.restate(stated)
        self.arrays = self.kept = ModelArrays(*self.layout.flatten(self.network))

    def run_round(self, number: int) -> RoundRecord:
        """Runs one round, moves `arrays` and `kept` on, and returns its record.

        Raises:
            RoundError: fewer than `min_sites` good updates; the weights stay as they were.
            ConfigError: the sums of the first round show that no site has an image of a class.
        """
        cfg, clock, down = self.experiment, RoundClock(), self.messenger.bytes_down

        # Who is there: replies to earlier rounds are dropped first, so that their sites are free for this one.
        late = _late(self.messenger.collect_late())
        sites = self.enrolment.free_sites()
        drawn = draw_sites(sites, cfg.strategy.fraction_train, cfg.seed, number)
        self._note_start(number, drawn)

        # Train on the drawn sites; every reply is checked before any arithmetic.
        trained = self._train(drawn, number)
        drawn, sites = (self.buffered.taking_part, self.buffered.free) if self.buffered else (drawn, sites)
        clock.lap("train")

        # What came with the updates is about the model that they began from: the round before's, still the kept one.
        self.former = self._judge(number - 1, self._of_former(number, trained), clock)

        # Aggregate. From here on the round counts: too few good updates have raised above.
        self._move_on(number, self._aggregate(number, trained, len(drawn)))
        clock.lap("aggregate")

        # Evaluate the new model on the sites' validation images, whose pooled statistics choose the threshold, and at that threshold on
        # the central sets, which no hospital has seen.
        at_once = cfg.validates(number) and not cfg.evaluation.with_training
        self.judgement = self._judge(number, self._evaluate(sites, number) if at_once else None, clock)

        # Record: history, audit line, live page and report are all written from this.
        record = RoundRecord(
            late=late,
            absent=self.directory.absences(),
            seconds=clock.seconds(),
            bytes=RoundBytes(down=self.messenger.bytes_down - down, up=trained.bytes_up),
            **_results_of(number, drawn, trained),
        )
        record = self.rate.remember(self._with_judgement(record))
        self.run_log.finishes(record, self.kept, trained.heads)
        return record

    def _with_judgement(self, record: RoundRecord) -> RoundRecord:
        if self.judgement is not None:
            return self.judgement.complete(record)
        return record.updated(judged_later=True) if self.experiment.judges_in_training(record.round + 1) else record

    def _note_start(self, number: int, drawn: Sequence[str]) -> None:
        """Notes who begins, and until when or, in asynchronous rounds, beside whom."""
        facts: dict[str, Any] = {"sites": drawn}
        if self.buffered is None:
            facts["deadline_sec"] = self.experiment.strategy.round_timeout_sec
        else:
            facts["at_work"] = sorted(self.messenger.at_work)
        self.run_log.activity.note(Kind.ROUND_STARTED, round=number, **facts)

    def _check_summed_classes(self, trained: TrainingOutcome) -> None:
        """As `Enrolment.check_classes`, where counts come under masks and so only as the sum of all sites."""
        summed = trained.secure_sum.classes if trained.secure_sum else None
        if summed and any(summed):
            refuse_missing_classes(self.experiment, summed, sorted(trained.sites))

    def _train(self, drawn: Sequence[str], number: int) -> TrainingOutcome:
        """Asks the drawn sites to train and gives what came back.

        Raises:
            RoundError: fewer good updates than the experiment needs.
        """
        if self.secure is not None:
            factor = self.rate.factor(number)
            trained = self.secure.train(
                drawn, number, self.arrays, lambda steps: self._training_messages(number, list(steps), steps), factor
            )
            if number == 1 and sorted(trained.sites) == self.directory.names:
                self._check_summed_classes(trained)
            return trained
        cfg = self.experiment.strategy
        spool = UpdateSpool(self.run_log.activity.path.parent)
        checks = UpdateChecks(
            self.arrays, self.layout, self.directory.presences, cfg, compares=self.central_privacy is None, spool=spool
        )
        judging = EvaluationChecks.of(self.experiment) if self.experiment.judges_in_training(number) else None
        failures = self._collect(drawn, number, checks, judging)
        updates, left_out = checks.close()  # only now: an update's length is compared with the others'
        for site, failure in {**failures, **left_out}.items():
            logger.warning("round %d: %s is left out: %s", number, site, failure)
        for site, failure in left_out.items():
            self.run_log.activity.note(Kind.LEFT_OUT, round=number, site=site, reason=failure.sentence)
        if len(updates) < cfg.replies_needed:
            reasons = {site: str(failure) for site, failure in {**failures, **left_out}.items()}
            raise RoundError(
                f"round {number}: {len(updates)} good updates, {cfg.replies_needed} are needed (strategy.min_sites). "
                + list_reasons({**reasons, **self.directory.absences()}, nobody="No site was connected.")
            )
        heads = {site: head for site, update in updates.items() if (head := update.presence.audit_head)}
        bytes_up = sum(update.nbytes for update in updates.values())
        sites, staleness = _site_trainings(updates), None
        if self.buffered is not None:
            fixed = self.experiment.training.fixes_statistics(number, self.experiment.rounds)
            updates, staleness = self.buffered.as_if_fresh(updates, self.arrays, number, fixed_statistics=fixed)
        outcome = TrainingOutcome(list(updates.values()), sites, heads, bytes_up, left_out, failures)
        outcome.staleness, outcome.simulated_time = staleness, self.clock.now if self.clock else None
        outcome.judged = judging.close({}, number - 1) if judging else None
        return outcome

    def _collect(
        self, drawn: Sequence[str], number: int, checks: UpdateChecks, judging: EvaluationChecks | None
    ) -> dict[str, Failure]:
        """Sends the training messages and hands the updates to `checks`, and what judging found to `judging`; returns why each other site
        sent none."""

        def take(site: str, message: Message) -> bool:
            if judging is not None:
                judging.take_attached(site, message)
            return checks.take(site, message)

        cfg, messages = self.experiment.strategy, self._training_messages(number, drawn)
        if self.buffered is not None:
            return self.buffered.fill(number, messages, self.arrays, checks)
        failures = self.messenger.exchange(messages, "train", number, cfg.round_timeout_sec, take, cfg.enough_sites)
        if self.clock is not None:
            self.clock.wait_for(drawn)
        return failures

    def _training_messages(self, number: int, sites: Sequence[str], steps: Mapping[str, str] | None = None) -> dict[str, Message]:
        """One a site, as the strategy configures them; `steps` are those of a secure sum."""
        content = self._instruct(number, self.arrays, self.rate.factor(number))
        if isinstance(self.strategy, SummedCorrections):
            announced = {site: presence.report.get("train", 1) for site, presence in self.directory.presences.items()}
            self.strategy.meet(announced)
        self.strategy.drawn_nodes = [self.directory.nodes[site] for site in sites]
        messages = self.strategy.configure_train(number, content.array_records[ARRAYS], content.config_records[CONFIG], self.grid)
        by_site = dict(zip(sites, messages, strict=True))
        if isinstance(self.strategy, SummedCorrections):
            by_site = {site: with_counted(message, self.strategy.counted.get(site, 0)) for site, message in by_site.items()}
        return {site: with_step(message, steps[site]) if steps else message for site, message in by_site.items()}

    def _aggregate(self, number: int, trained: TrainingOutcome, asked: int) -> ModelArrays:
        """The new global weights; notes in `trained` what central privacy spent. `asked` is how many sites were asked to train."""
        updates = list(trained.updates)
        trained.updates.clear()  # what lies in memory or on the disk goes with the last use of it
        if self.central_privacy is not None:  # the strategy then sees one update, the noised mean
            updates = [self.central_privacy.combine(self.arrays, updates, asked, number)]
            trained.central_epsilon = self.central_privacy.epsilon(number)
        return self._keep_untouched(number, aggregate(self.strategy, number, updates))

    def _move_on(self, number: int, arrays: ModelArrays) -> None:
        """Takes the round's weights and what is evaluated of them; sites may make their moving average of the one before."""
        former, self.arrays = self.kept, arrays
        self.kept = moving_average(former if number > 1 else None, arrays, self.experiment.strategy.ema_decay)
        self.messenger.average = None if self.kept is arrays else AverageStep.of(former, self.kept, arrays)

    def _keep_untouched(self, number: int, after: ModelArrays) -> ModelArrays:
        """What the round leaves as it is keeps its bits: a mean of equal numbers has others, by which kept features of a frozen network
        would be those of another one, and no site may move what nobody trains, or what all standardise by."""
        model, training = self.experiment.model, self.experiment.training
        trained = frozenset(trained_names(self.network, freeze_in_round(model, number)[0]))
        fix_norms = training.fixes_statistics(number, self.experiment.rounds)
        parameters, statistics = self.layout.untouched(trained, fix_norms=fix_norms)
        if not (parameters.any() or statistics.any()):
            return after
        before = self.arrays
        return ModelArrays(
            np.where(parameters, before.parameters, after.parameters), np.where(statistics, before.statistics, after.statistics)
        )

    def _of_former(self, number: int, trained: TrainingOutcome) -> EvaluationOutcome | None:
        """What the replies to training say of the round before's model, where they were asked. In a secure sum to which not all could add
        statistics none did: those who can are asked by themselves."""
        if trained.judged is not None or not self.experiment.judges_in_training(number):
            return trained.judged
        return self._evaluate(self.enrolment.free_sites(), number - 1)

    def judge_last(self, number: int) -> ModelJudgement:
        """Asks the sites to judge the last round's model, which no training message brings them any more.

        Args:
            number: of the round.
        """
        judgement = self._judge(number, self._evaluate(self.enrolment.free_sites(), number), RoundClock())
        assert judgement is not None  # there is an outcome, of no site at least
        return judgement

    def _evaluate(self, sites: Sequence[str], number: int) -> EvaluationOutcome:
        """The pooled validation statistics of `kept`. Sites that do not answer are left out of them; none has to answer."""
        evaluating = draw_sites(sites, self.experiment.evaluation.fraction_sites, self.experiment.seed, number)
        content = self._instruct(number, self.kept)
        messages = {site: _message(content, self.directory.nodes[site], MessageType.EVALUATE) for site in evaluating}
        if self.secure is not None:
            return self.secure.evaluate(
                evaluating,
                number,
                self.kept,
                lambda steps: {site: with_step(messages[site], step) for site, step in steps.items()},
            )
        checks = EvaluationChecks.of(self.experiment)
        deadline_sec = self.experiment.strategy.round_timeout_sec
        return checks.close(self.messenger.exchange(messages, "evaluate", number, deadline_sec, checks.take), number)

    def _judge(self, number: int, outcome: EvaluationOutcome | None, clock: RoundClock) -> ModelJudgement | None:
        """What `kept`, the model of a round, is worth: by the sites' patients, and at their threshold on the central sets. None where no
        site was asked."""
        clock.lap("evaluate")
        if outcome is None:
            return None
        cfg = self.experiment.evaluation
        threshold = choose_threshold(outcome.pooled, cfg.threshold_policy, cfg.target)
        judgement = ModelJudgement(number, self.kept, outcome, threshold, self._evaluate_centrally(number, threshold))
        clock.lap("central")
        return judgement

    def _evaluate_centrally(self, number: int, threshold: ChosenThreshold) -> dict[str, Any]:
        """Metrics of the central sets by field of the round's record; empty in a round that `evaluation.every_rounds` skips."""
        if not self.experiment.judges_centrally(number):
            return {}
        return by_field(self.central_evaluator.results(self.predict_centrally(number), threshold.value))

    def predict_centrally(self, number: int) -> dict[str, Predictions]:
        """Predicts the central sets with `kept`, the model of a round, once: the same weights give the same predictions.

        Args:
            number: the round.
        """
        if number not in self.predictions:
            self.predictions[number] = self.central_evaluator.predict(self.load_network())
        return self.predictions[number]

    def forget_predictions(self, rounds: Container[int]) -> None:
        """Keeps the predictions of `rounds` only."""
        self.predictions = {number: found for number, found in self.predictions.items() if number in rounds}

    def load_network(self) -> nn.Module:
        """Loads the weights that are evaluated and kept into the scratch network, and returns it."""
        self.layout.load(self.network, self.kept.parameters, self.kept.statistics)
        return self.network

    def _instruct(self, number: int, arrays: ModelArrays, rate_factor: float = 1.0) -> RecordDict:
        head = self.run_log.audit.head() if self.run_log.audit else None
        return pack_instruction(Instruction(self.experiment, self.run_log.run, number, arrays, head, rate_factor=rate_factor))


def _message(content: RecordDict, node: int, kind: str) -> Message:
    return Message(content, dst_node_id=node, message_type=kind)


def _late(replies: Sequence[OpenMessage]) -> tuple[LateReply, ...]:
    return tuple(LateReply(site=asked.site, round=asked.round, task=asked.task) for asked in replies)


def _results_of(number: int, drawn: Sequence[str], trained: TrainingOutcome) -> dict[str, Any]:
    """What the sites' replies to training gave, by field of the round's record."""
    return {
        "round": number,
        "drawn": tuple(drawn),
        "failures": _sentences(trained.failures),
        "left_out": {site: failure.sentence for site, failure in trained.left_out.items()},
        "sites": {site: SiteRound(train=training) for site, training in sorted(trained.sites.items())},
        **_present(
            secure_sum=trained.secure_sum,
            central_epsilon=trained.central_epsilon,
            staleness=trained.staleness,
            simulated_time=trained.simulated_time,
        ),
    }


def _sentences(failures: Mapping[str, Failure]) -> dict[str, str]:
    return {site: str(failure) for site, failure in failures.items()}


def _present(**parts: Any) -> dict[str, Any]:
    """Those of `parts` that the round has; the others stay absent in its history line."""
    return {name: part for name, part in parts.items() if part is not None}


def _site_trainings(updates: Mapping[str, Update]) -> dict[str, SiteTraining]:
    """Each site's own numbers of its training."""
    return {site: SiteTraining.of(update.num_examples, update.metrics) for site, update in updates.items()}


class RoundClock:
    """Wall time of a round and of its parts, in seconds."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._parts: dict[str, float] = {}

    def lap(self, part: str) -> None:
        """Counts the time since the last call, or since the start, to that of `part`, a field of `RoundSeconds`."""
        now = time.perf_counter()
        self._parts[part], self._last = self._parts.get(part, 0.0) + now - self._last, now

    def seconds(self) -> RoundSeconds:
        """Returns the parts so far and the total since the start."""
        return RoundSeconds(**self._parts, total=time.perf_counter() - self._start)
