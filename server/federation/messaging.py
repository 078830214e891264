"""Messages to sites and their replies: an end to the waiting, a failure by name for everyone who did not answer, and a check of each reply.

messenger.exchange(messages, task, ...)     one message a site out; replies are handed on one by one as they arrive
messenger.send, pull, read_failure_in       its parts, of which asynchronous rounds are made
messenger.collect_late()                    replies to earlier rounds: dropped, counted, and the site is free again
checks.take(site, message)                  before any arithmetic: form, sizes, finite values, counts, and a plausible length of the update
judging.take(site, message)                 statistics of an evaluation; take_attached those that came with an update

`TrainingOutcome` and `EvaluationOutcome` are what the replies of one round gave, whichever way they came: one by one, or as a secure
sum (`server.secure_aggregation.rounds`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from pneumofed.common.audit.log import hash_arrays
from pneumofed.common.config.classes import classes_of
from pneumofed.common.config.experiment import ExperimentConfig, StrategyConfig
from pneumofed.common.errors import HeldModelError, MessageError
from pneumofed.common.evaluation.statistics import FEDERATED_GRID, Statistics
from pneumofed.common.wire.instructions import with_average, with_held
from pneumofed.common.wire.messages import (
    ARRAYS,
    SITE,
    Evaluation,
    Failure,
    ModelArrays,
    Presence,
    Update,
    all_held_in,
    content_bytes,
    pack_arrays,
    read_failure,
    unpack_arrays,
    unpack_attached,
    unpack_evaluation,
    unpack_update,
)
from pneumofed.common.wire.parameter_layout import ArraysLayout, TensorKind
from pneumofed.server.federation.strategies import squared_length
from pneumofed.server.federation.update_spool import UpdateSpool
from pneumofed.server.runs.events import Activity, Kind, kind_of_failure
from pneumofed.server.runs.records import SecureSumRecord, SiteTraining

logger = logging.getLogger(__name__)

BLOCK = 1 << 18
"""Values that are subtracted at once where two models are compared; they stay in the processor's cache."""
LEAST_PAUSE_SEC, LONGEST_PAUSE_SEC, LATE_BY = 0.05, 1.0, 0.05
"""Who waited for a reply is late by a twentieth of that time at most: each question costs the SuperLink's processor 15 ms."""
ASKED_AT_ONCE = 4
"""For so many replies in one question; as many as `server.federation.update_spool` keeps in memory."""
FORGET_AFTER_DEADLINES = 3
"""A site that is silent for so many deadlines is asked again: its message is lost, for it would have been answered by now."""

Task = Literal["survey", "roll call", "clinical sums", "train", "evaluate", "keys", "shares", "confirmation", "unmasking"]
"""The last four are steps of a secure sum (`common.secure_aggregation.protocol`)."""
Take = Callable[[str, Message], bool]
"""Is given a site's name and reply; says whether the reply counts."""


@dataclass(frozen=True)
class OpenMessage:
    """A message that was not answered in its round."""

    site: str
    round: int
    task: Task
    until: float
    """Time (monotonic) after which nothing more is expected."""


@dataclass(frozen=True)
class AverageStep:
    """From one moving average to the next: a site that keeps the former makes the result of the round's weights, and has these too."""

    former: str
    """SHA-256 of the average before the round."""
    result: str
    """SHA-256 of the average after it."""
    weights: ArrayRecord
    """Of the round."""

    @classmethod
    def of(cls, former: ModelArrays, result: ModelArrays, weights: ModelArrays) -> AverageStep:
        """Hashes both averages.

        Args:
            former: the average before the round.
            result: that after it.
            weights: of the round, which sites train on from.
        """
        return cls(hash_arrays(former), hash_arrays(result), pack_arrays(weights))


@dataclass
class Messenger:
    """The coordinator's side of the exchange. A model that a site says it keeps is not sent to it again, only its hash.

    Attributes:
        outstanding: messages that sites still work on, by message id.
        at_work: sites whose training may outlast the round (`server.federation.asynchronous`).
        held: by site, the SHA-256 of each of the weights that it keeps.
        average: of the last round, where a moving average is judged.
        bytes_down: of all arrays that were sent.
    """

    grid: Grid
    activity: Activity
    outstanding: dict[str, OpenMessage] = field(default_factory=dict)
    at_work: set[str] = field(default_factory=set)
    held: dict[str, frozenset[str]] = field(default_factory=dict)
    average: AverageStep | None = None
    bytes_down: int = 0

    def exchange(
        self,
        messages: Mapping[str, Message],
        task: Task,
        number: int,
        deadline_sec: float,
        take: Take,
        enough: int | None = None,
        grace_sec: float = 0.0,
    ) -> dict[str, Failure]:
        """Sends one message a site and hands each reply to `take`; returns why each other site did not answer.

        Waits until all have answered, `enough` replies count and `grace_sec` has passed since, or `deadline_sec` has passed. A site
        is known by the message that it answers: an error reply that Flower writes for a lost node does not name the node.

        Args:
            messages: by site.
            task: what is asked for; stands in the event lines.
            number: the round; 0 before the first one.
            deadline_sec: how long to wait, from the sending.
            take: is given a site's name and reply as it arrives; says whether the reply counts towards `enough`.
            enough: how many replies that count end the waiting early; None waits for all.
            grace_sec: how long to wait still once `enough` replies count.

        Returns:
            By site, sorted, the failure of each that sent no reply. Those that were late stay in `outstanding`.
        """
        started = time.monotonic()
        waiting, failures = self.send(messages, task, number, deadline_sec)
        counted, last = 0, started
        deadline = started + deadline_sec
        while waiting and time.monotonic() < deadline:
            arrived, before, asked = False, counted, time.monotonic()
            for message in self.pull(waiting, ASKED_AT_ONCE):
                site = waiting.pop(message.metadata.reply_to_message_id)
                arrived, last = True, time.monotonic()
                failure = self.read_failure_in(message, site, task, number, time.monotonic() - started)
                if failure is None:
                    counted += take(site, message)
                elif failure.error == HeldModelError.__name__ and self.held.pop(site, None) is not None:
                    again, failures_again = self.send({site: messages[site]}, task, number, deadline_sec)
                    waiting |= again
                    failures |= failures_again
                else:
                    failures[site] = failure
                    self.note_failure(failure, site, task, number)
            if enough is not None and before < enough <= counted:
                deadline = min(deadline, time.monotonic() + grace_sec)
                continue
            if waiting and not arrived:
                pause(last, asked, deadline)
        failures.update(self._give_up(waiting, task, number, deadline_sec, time.monotonic() - started))
        return dict(sorted(failures.items()))

    @property
    def busy(self) -> set[str]:
        """Sites that still work on an earlier message; another one would only queue behind it."""
        return self.at_work | {asked.site for asked in self.outstanding.values()}

    def collect_late(self) -> list[OpenMessage]:
        """Drops what arrived too late. Its sites are free again, as are those that nothing more is expected of.

        Returns:
            The messages whose replies were dropped.
        """
        arrived = self.pull(self.outstanding, ASKED_AT_ONCE)
        late = [self.outstanding.pop(message.metadata.reply_to_message_id) for message in arrived]
        for asked in late:
            self.activity.note(Kind.LATE, round=asked.round, site=asked.site, task=asked.task, arrived=True)
        now = time.monotonic()
        self.outstanding = {identifier: asked for identifier, asked in self.outstanding.items() if asked.until > now}
        return late

    def _refer(self, messages: Mapping[str, Message]) -> dict[str, Message]:
        """The messages, with a reference in place of weights that their site keeps."""
        hashes: dict[int, str] = {}  # messages of a round share their arrays, so that they are hashed once
        referring = {}
        for site, message in messages.items():
            record = message.content.array_records.get(ARRAYS) if site in self.held else None
            if record is not None and id(record) not in hashes:
                hashes[id(record)] = hash_arrays(unpack_arrays(record))
            referring[site] = message if record is None else self._referring(message, hashes[id(record)], self.held[site])
        return referring

    def _referring(self, message: Message, digest: str, held: frozenset[str]) -> Message:
        if digest in held:
            return with_held(message, digest)
        step = self.average
        if step is not None and step.result == digest and step.former in held:
            return with_average(message, step.weights, step.former, step.result)
        return message

    def _remember_held(self, site: str, message: Message) -> None:
        if SITE in message.content.config_records and (held := all_held_in(message.content.config_records[SITE])):
            self.held[site] = held

    def send(
        self, messages: Mapping[str, Message], task: Task, number: int, deadline_sec: float
    ) -> tuple[dict[str, str], dict[str, Failure]]:
        """Sends one message a site, with a reference in place of weights that the site keeps.

        Args:
            messages: by site.
            task: what is asked for.
            number: the round.
            deadline_sec: what the event line says; nothing waits here.

        Returns:
            The site by the id of each message that was handed over, and the failures of the other sites.
        """
        messages = self._refer(messages)
        ids = list(self.grid.push_messages(messages.values()))
        waiting = {identifier: site for identifier, site in zip(ids, messages, strict=True) if identifier}
        failures = {}
        for identifier, (site, message) in zip(ids, messages.items(), strict=True):
            if identifier:
                size = content_bytes(message.content)
                self.activity.note(Kind.ASKED, round=number, site=site, task=task, bytes=size, deadline_sec=deadline_sec)
                self.bytes_down += size
            else:
                failures[site] = Failure(site, "Unreachable", "the message could not be handed over")
                self.note_failure(failures[site], site, task, number)
        return waiting, failures

    def pull(self, identifiers: Iterable[str], at_once: int = 1) -> Iterator[Message]:
        """Gives the replies that are there, asked for a few at a time so that only these are in memory besides what is kept of the others.

        Flower's grid repeats a request that fails.

        Args:
            identifiers: of the messages that were sent.
            at_once: how many replies one question is for. Who may stop in between has to ask for each by itself: a reply that was
                handed over and not taken is lost.
        """
        wanted = list(identifiers)
        for first in range(0, len(wanted), at_once):
            left = wanted[first : first + at_once]
            while left and (found := list(self.grid.pull_messages(left))):
                answered = {reply.metadata.reply_to_message_id for reply in found}
                left = [identifier for identifier in left if identifier not in answered]
                while found:
                    yield found.pop(0)

    def read_failure_in(
        self, message: Message, site: str, task: Task, number: int, seconds: float, **facts: int
    ) -> Failure | None:
        """Reads why a reply is none; notes a good one, and the model that its site keeps.

        Args:
            message: the reply.
            site: who was asked.
            task: what for.
            number: the round.
            seconds: since it was asked.
            facts: further ones of the event line.
        """
        if message.has_error():
            return read_failure(message)
        self._remember_held(site, message)
        facts |= {"bytes": content_bytes(message.content)}
        self.activity.note(Kind.ANSWERED, round=number, site=site, task=task, seconds=seconds, **facts)
        return None

    def _give_up(
        self, waiting: Mapping[str, str], task: Task, number: int, deadline_sec: float, waited: float
    ) -> dict[str, Failure]:
        until = time.monotonic() + FORGET_AFTER_DEADLINES * deadline_sec
        failures = {}
        for identifier, site in waiting.items():
            self.outstanding[identifier] = OpenMessage(site, number, task, until)
            failures[site] = Failure(site, "Timeout", f"no reply within {waited:.3g} s")
            self.note_failure(failures[site], site, task, number)
        return failures

    def note_failure(self, failure: Failure, site: str, task: Task, number: int) -> None:
        """Writes the event line of a failure.

        Args:
            failure: why there is no answer.
            site: who was asked.
            task: what for.
            number: the round.
        """
        self.activity.note(kind_of_failure(failure.error), round=number, site=site, task=task, reason=failure.sentence)


def pause(since: float, asked: float, until: float = math.inf) -> None:
    """Waits before the next question for replies; not at all where the SuperLink has held the last one for as long (`MessageBell`).

    Args:
        since: time (monotonic) of the last reply, or of the messages.
        asked: time of the last question.
        until: time after which nobody waits any more.
    """
    next_one = asked + max(LEAST_PAUSE_SEC, min(LONGEST_PAUSE_SEC, LATE_BY * (asked - since)))
    time.sleep(max(0.0, min(next_one, until) - time.monotonic()))


Evaluations = dict[str, tuple[Evaluation, Statistics]]
"""By site: what it said of itself, and its statistics."""


def read_personal(evaluation: Evaluation, shared: Statistics) -> Statistics | None:
    """Reads the statistics of a site's own model; None where it sent none.

    Args:
        evaluation: the site's answer.
        shared: those of the global model.

    Raises:
        MessageError: they are none, or of other images than the global model's.
    """
    if evaluation.personal is None:
        return None
    own = Statistics.from_numbers(evaluation.personal, shared.classes)
    if not np.array_equal(own.confusion.sum(axis=1), shared.confusion.sum(axis=1)):
        raise MessageError("the statistics of the site's own model are of other images than those of the global one")
    return own


@dataclass
class TrainingOutcome:
    """What the strategy aggregates, and what the history records of it."""

    updates: list[Update]
    """Those of the sites; only one, the mean over all sites, where they come as a secure sum."""
    sites: dict[str, SiteTraining]
    """By site: what is known of its own training."""
    heads: dict[str, str]
    bytes_up: int
    left_out: Mapping[str, Failure]
    failures: Mapping[str, Failure]
    secure_sum: SecureSumRecord | None = None
    central_epsilon: float | None = None
    staleness: Mapping[str, int] | None = None
    """By site, of the update, in asynchronous rounds only."""
    simulated_time: float | None = None
    judged: EvaluationOutcome | None = None
    """What came with the updates of the model that the sites trained on from (`evaluation.with_training`)."""


@dataclass
class EvaluationOutcome:
    """The sites' validation statistics, pooled and, where they are known, each site's own."""

    pooled: Statistics
    evaluations: Evaluations
    failures: Mapping[str, Failure]
    secure_validation: SecureSumRecord | None = None
    personal: Mapping[str, Statistics] = field(default_factory=dict)
    """By site: statistics of its own model, on the same images as the global one's."""


@dataclass
class EvaluationChecks:
    """Checks the sites' statistics of one model as they arrive."""

    classes: int
    personal_too: bool
    """Whether the sites' own models are judged beside it."""
    good: Evaluations = field(default_factory=dict)
    bad: dict[str, Failure] = field(default_factory=dict)
    personal: dict[str, Statistics] = field(default_factory=dict)

    @classmethod
    def of(cls, experiment: ExperimentConfig) -> EvaluationChecks:
        """Builds the checks of what `experiment` asks for."""
        return cls(len(classes_of(experiment.task)), experiment.personal.is_on)

    def take(self, site: str, message: Message, read: Callable[[RecordDict], Evaluation] = unpack_evaluation) -> bool:
        """Takes the statistics of one reply, and says whether they are good.

        Args:
            site: who was asked.
            message: its reply. A bad one is noted in `bad`; nothing is raised.
            read: finds the evaluation in it.
        """
        try:
            evaluation = read(message.content)
            statistics = Statistics.from_numbers(evaluation.statistics, self.classes)
            if self.personal_too and (own := read_personal(evaluation, statistics)) is not None:
                self.personal[site] = own
            self.good[site] = evaluation, statistics
        except MessageError as error:
            self.bad[site] = Failure(site, "MessageError", str(error))
        return site in self.good

    def take_attached(self, site: str, message: Message) -> None:
        """Takes what came with an update.

        Args:
            site: who was asked to train.
            message: its reply.
        """
        try:
            found = unpack_attached(message.content, site)
        except MessageError as error:
            found = Failure(site, "MessageError", str(error))
        if isinstance(found, Failure):
            self.bad[site] = found
        else:
            self.take(site, message, lambda _: found)

    def close(self, silent: Mapping[str, Failure], number: int) -> EvaluationOutcome:
        """Pools the good ones and logs why the others are missing.

        Args:
            silent: by site, why it sent nothing at all.
            number: the round whose model was judged.
        """
        failures = {**self.bad, **silent}
        for site, failure in failures.items():
            logger.warning("round %d: %s did not evaluate: %s", number, site, failure)
        pooled = sum((statistics for _, statistics in self.good.values()), Statistics.zero(self.classes, FEDERATED_GRID))
        return EvaluationOutcome(pooled, dict(sorted(self.good.items())), failures, personal=self.personal)


@dataclass
class UpdateChecks:
    """Checks the replies of one round as they arrive. Of each good one it keeps the weights, in `spool`, and the update's length.

    checks.take(site, message)      one reply
    checks.close()                  (good updates, the reason for each one left out), both by site
    """

    current: ModelArrays
    layout: ArraysLayout
    presences: Mapping[str, Presence]
    cfg: StrategyConfig
    compares: bool = True
    """Whether an update is left out for its length beside the others'. Under central privacy none is: no site may decide on another."""
    spool: UpdateSpool = field(default_factory=lambda: UpdateSpool(None))
    updates: dict[str, Update] = field(default_factory=dict)
    left_out: dict[str, Failure] = field(default_factory=dict)
    lengths: dict[str, float] = field(default_factory=dict)

    def take(self, site: str, message: Message, base: ModelArrays | None = None, scale: float = 1.0) -> bool:
        """Checks one reply and keeps its update; says whether it is good as far as one can say without the others.

        Args:
            site: who was asked.
            message: its reply. A bad one is noted in `left_out`; nothing is raised.
            base: the weights that it was asked to train from; None: `current`.
            scale: what the update's length is multiplied by before it is compared.
        """
        base = self.current if base is None else base
        try:
            update = unpack_update(message.content, base, self.cfg.update_precision)
            arrays = update.arrays
            _check_form(site, update, arrays, self.layout, self.presences[site])
        except MessageError as error:
            self.left_out[site] = Failure(site, "MessageError", str(error))
            return False
        self.updates[site] = self.spool.keep(update)
        self.lengths[site] = scale * distance_between(arrays.parameters, base.parameters)
        return True

    def close(self) -> tuple[dict[str, Update], dict[str, Failure]]:
        """Compares the lengths of all updates and returns the good ones and the reason for each one left out, both by site."""
        lengths = {site: (length, self.updates[site].num_examples) for site, length in self.lengths.items()}
        for site, reason in implausible(lengths, self.cfg.max_update_norm_factor).items() if self.compares else ():
            self.left_out[site] = Failure(site, "MessageError", reason)
        good = {site: update for site, update in sorted(self.updates.items()) if site not in self.left_out}
        return good, dict(sorted(self.left_out.items()))


def distance_between(first: np.ndarray, second: np.ndarray) -> float:
    """Euclidean distance of two float32 vectors of one length, a block at a time, so that the difference needs no memory of their size."""
    blocks = range(0, len(first), BLOCK)
    return math.sqrt(sum(squared_length(first[at : at + BLOCK] - second[at : at + BLOCK]) for at in blocks))


def implausible(updates: Mapping[str, tuple[float, int]], factor: float) -> dict[str, str]:
    """Finds the sites whose update is too long beside the others', each with the sentence that says so.

    The length is taken per square root of the number of images: a site with a hundred times the images takes a hundred times the
    steps, and its update grows with them. It is compared with the lower median of the round, which an attacker moves only where
    at least half of the sites are with him. Updates of length zero are plausible.

    Args:
        updates: by site, the length of its update and its number of images.
        factor: how many times the round's median a length may be.
    """
    lengths = {site: length / max(images, 1) ** 0.5 for site, (length, images) in updates.items()}
    if len(lengths) < 2:
        return {}
    median = sorted(lengths.values())[(len(lengths) - 1) // 2]
    limit = factor * median
    return {
        site: f"its update is {length / median:.3g} times as long as the round's median, the limit is {factor:g}"
        for site, length in lengths.items()
        if median > 0 and length > limit
    }


def _check_form(site: str, update: Update, arrays: ModelArrays, layout: ArraysLayout, presence: Presence) -> None:
    if update.presence.site != site:
        raise MessageError("the reply names another site")
    if update.presence.layout != layout.digest:
        raise MessageError("the reply's model has another layout")
    check_values(arrays, layout)
    announced = int(presence.report.get("train", 0))
    if not 0 < update.num_examples <= announced:
        raise MessageError(f"trained on {update.num_examples} images but announced {announced}")


def check_values(arrays: ModelArrays, layout: ArraysLayout) -> None:
    """Does nothing where weights that a site sent are a model of `layout` with which one can compute.

    Args:
        arrays: float32 vectors of any length.
        layout: of the run's network.

    Raises:
        MessageError: another number of values, values that are not finite, or a running variance below zero.
    """
    parameters, statistics = arrays.parameters, arrays.statistics
    if len(parameters) != layout.parameter_count or len(statistics) != layout.statistic_count:
        raise MessageError(
            f"expected {layout.parameter_count} parameters and {layout.statistic_count} statistics, "
            f"got {len(parameters)} and {len(statistics)}"
        )
    kinds: tuple[tuple[TensorKind, np.ndarray], ...] = (("parameter", parameters), ("statistic", statistics))
    for kind, values in kinds:
        finite = np.isfinite(values)
        if not finite.all():
            where = layout.name_at(kind, int(np.argmin(finite)))
            raise MessageError(f"{int((~finite).sum())} values are not finite, the first in {where}")
    if (statistics[layout.variances] < 0).any():
        raise MessageError("a running variance is negative")
