"""Waiting for sites: it ends, everyone is named, and late replies are dropped, counted, and free their site."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from pneumofed.server.federation import messaging
from pneumofed.server.federation.messaging import Messenger
from pneumofed.server.runs.events import Activity, read_activity
from tests.server.federation.updates import take_identity

NEVER = float("inf")


class SlowGrid(Grid):
    """Replies to node N after `delays[N]` seconds; a delay below zero means that the message cannot be handed over."""

    def __init__(self, delays: Mapping[int, float], error: bool = False) -> None:
        self.delays, self.error = delays, error
        self.sent: dict[str, tuple[float, Message]] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[Any]:
        ids: list[Any] = []
        for message in messages:
            delay = self.delays[message.metadata.dst_node_id]
            identifier = f"m{len(self.sent)}" if delay >= 0 else None
            if identifier:
                message.metadata.__dict__["_message_id"] = identifier
                self.sent[identifier] = (time.monotonic() + delay, message)
            ids.append(identifier)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        ready = [identifier for identifier in message_ids if self.sent[identifier][0] <= time.monotonic()]
        return [self.reply(self.sent[identifier][1]) for identifier in ready]

    def reply(self, message: Message) -> Message:
        return Message(Error(code=3), reply_to=message) if self.error else Message(RecordDict(), reply_to=message)

    def set_run(self, run: Run) -> None: ...
    @property
    def run(self) -> Run:
        return Run.create_empty(1)

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(self.delays)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def _identity() -> None:
    take_identity()


def build_messenger(tmp_path: Path, delays: Mapping[int, float], error: bool = False) -> Messenger:
    return Messenger(SlowGrid(delays, error), Activity(tmp_path / "events.jsonl"))


def messages(*nodes: int) -> dict[str, Message]:
    return {f"site-{node}": Message(RecordDict(), dst_node_id=node, message_type="train") for node in nodes}


def ask(
    messenger: Messenger, *nodes: int, deadline: float = 0.5, enough: int | None = None, good: bool = True
) -> tuple[list[str], Any]:
    taken: list[str] = []

    def take(site: str, _: Message) -> bool:
        taken.append(site)
        return good

    failures = messenger.exchange(messages(*nodes), "train", 1, deadline, take, enough)
    return sorted(taken), {site: failure.error for site, failure in failures.items()}


def test_everyone_who_answers_in_time_is_taken_and_the_others_are_named(tmp_path: Path) -> None:
    messenger = build_messenger(tmp_path, {1: 0.0, 2: 0.2, 3: NEVER, 4: -1})
    assert ask(messenger, 1, 2, 3, 4) == (["site-1", "site-2"], {"site-3": "Timeout", "site-4": "Unreachable"})
    assert messenger.busy == {"site-3"}


def test_a_round_closes_when_enough_have_answered(tmp_path: Path) -> None:
    started = time.monotonic()
    messenger = build_messenger(tmp_path, {1: 0.0, 2: 0.0, 3: 20.0})
    assert ask(messenger, 1, 2, 3, deadline=20.0, enough=2) == (["site-1", "site-2"], {"site-3": "Timeout"})
    assert time.monotonic() - started < 10


def test_a_reply_that_does_not_count_is_none_of_the_enough(tmp_path: Path) -> None:
    messenger = build_messenger(tmp_path, {1: 0.0, 2: 0.1})
    assert ask(messenger, 1, 2, enough=1, good=False)[0] == ["site-1", "site-2"]


def test_a_late_reply_is_counted_once_and_frees_its_site(tmp_path: Path) -> None:
    messenger = build_messenger(tmp_path, {1: 0.4})
    assert ask(messenger, 1, deadline=0.2)[1] == {"site-1": "Timeout"}
    assert messenger.collect_late() == [] and messenger.busy == {"site-1"}
    time.sleep(0.3)
    assert [(late.site, late.round, late.task) for late in messenger.collect_late()] == [("site-1", 1, "train")]
    assert messenger.busy == set() and messenger.collect_late() == []


def test_a_site_that_stays_silent_is_asked_again_after_some_deadlines(tmp_path: Path) -> None:
    messenger = build_messenger(tmp_path, {1: NEVER})
    ask(messenger, 1, deadline=0.1)
    time.sleep(0.4)
    messenger.collect_late()
    assert messenger.busy == set()


def test_what_happens_is_noted_while_it_happens(tmp_path: Path) -> None:
    ask(build_messenger(tmp_path, {1: 0.0, 2: NEVER, 3: -1}), 1, 2, 3, deadline=0.2)
    kinds = {(event["kind"], event["site"]) for event in read_activity(tmp_path / "events.jsonl")}
    assert kinds >= {("asked", "site-1"), ("answered", "site-1"), ("late", "site-2"), ("lost", "site-3")}


def test_an_error_of_flower_is_a_lost_site(tmp_path: Path) -> None:
    messenger = build_messenger(tmp_path, {1: 0.0}, error=True)
    assert ask(messenger, 1) == ([], {"site-1": "Flower error 3"})


class CountingGrid(SlowGrid):
    """Remembers for how many replies each question was."""

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        wanted = list(message_ids)
        self.questions = [*getattr(self, "questions", []), len(wanted)]
        return super().pull_messages(wanted)


def test_one_question_is_for_a_few_replies_and_each_is_handed_on_once(tmp_path: Path) -> None:
    grid = CountingGrid(dict.fromkeys(range(1, 10), 0.0))
    messenger = Messenger(grid, Activity(tmp_path / "events.jsonl"))
    waiting, _ = messenger.send(messages(*range(1, 10)), "train", 1, 1.0)
    came = [reply.metadata.reply_to_message_id for reply in messenger.pull(waiting, 4)]
    assert came == list(waiting) and grid.questions == [4, 4, 1]
    grid.questions = []
    assert next(iter(messenger.pull(waiting))).metadata.reply_to_message_id == came[0]
    assert grid.questions == [1]  # who stops after one has not been handed another


def test_the_coordinator_is_late_by_a_twentieth_of_what_it_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, slept = [100.0], list[float]()
    monkeypatch.setattr(messaging.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(messaging.time, "sleep", slept.append)
    for waited, until in ((0.0, 1e9), (2.0, 1e9), (3600.0, 1e9), (3600.0, 100.3), (3600.0, 99.0)):
        messaging.pause(100.0 - waited, 100.0, until)
    assert slept == pytest.approx([0.05, 0.1, 1.0, 0.3, 0.0])


def test_a_question_that_was_held_is_followed_by_the_next_one_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    slept = list[float]()
    monkeypatch.setattr(messaging.time, "monotonic", lambda: 100.0)
    monkeypatch.setattr(messaging.time, "sleep", slept.append)
    messaging.pause(90.0, 99.7)
    messaging.pause(90.0, 99.0)
    assert slept == pytest.approx([0.185, 0.0])
