"""Messages to sites and their replies: an end to the waiting, and a failure by name for everyone who did not answer.

messenger.exchange(messages, task, ...)     one message a site out; replies are handed on one by one as they arrive
messenger.send, pull, read_failure_in       its parts, of which asynchronous rounds are made
messenger.collect_late()                    replies to earlier rounds: dropped, counted, and the site is free again

What a reply holds is checked by whoever takes it (`server.federation.replies`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid

from pneumofed.common.audit.log import hash_arrays
from pneumofed.common.errors import HeldModelError
from pneumofed.common.wire.instructions import with_average, with_held
from pneumofed.common.wire.messages import (
    ARRAYS,
    SITE,
    Failure,
    ModelArrays,
    all_held_in,
    content_bytes,
    pack_arrays,
    read_failure,
    unpack_arrays,
)
from pneumofed.server.runs.events import Activity, Kind, kind_of_failure

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
