"""What the SuperLink holds back: a site's question until there is a message, and a lost site until whoever waits for it knows."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.superlink.config_loader import get_federation_manager, get_objectstore_linkstate_factories
from flwr.superlink.routers.fleet import router as fleet_router
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers

from pneumofed.client.site.supernode import LATE_BY, LEAST_WAIT_SEC
from pneumofed.server.federation.messaging import LONGEST_PAUSE_SEC
from pneumofed.server.operations.superlink import HOLD_SEC, NOTICE_SEC, FlowerRefusal, MessageBell, after_notice


def ask(bell: MessageBell, there: list[str]) -> tuple[list[str], float]:
    """What a site is told, and after how many seconds."""
    started = time.monotonic()
    answer = bell.waiting(lambda **_: SimpleNamespace(messages_list=list(there)))(request=None, state=None, store=None)
    return answer.messages_list, time.monotonic() - started


def hand_over(bell: MessageBell, parts: list[str], session: str = "s") -> None:
    bell.announcing(lambda *_: SimpleNamespace(session_id=session, objects_to_push=parts))(None, None, None)


def store(bell: MessageBell, part: str, session: str = "s") -> None:
    bell.completing(lambda *_: None)(SimpleNamespace(session_id=session, object_id=part), None, None)


def later(seconds: float, *deeds: Callable[[], None]) -> None:
    def act() -> None:
        for deed in deeds:
            deed()

    threading.Timer(seconds, act).start()


def test_a_message_that_is_there_is_handed_over_at_once() -> None:
    assert ask(MessageBell(), ["m"])[0] == ["m"] and ask(MessageBell(), ["m"])[1] < 1.0


def test_a_site_is_told_when_the_last_part_is_there_and_asks_again_itself() -> None:
    bell = MessageBell(hold_sec=20.0)
    hand_over(bell, ["a", "b"])
    later(0.2, lambda: store(bell, "a"))
    later(0.6, lambda: store(bell, "b"))
    found, seconds = ask(bell, [])
    assert found == []  # a message is not given to a question that may have lost its connection meanwhile
    assert 0.5 < seconds < 10.0


def test_a_message_without_parts_that_are_missing_rings_too() -> None:
    bell = MessageBell(hold_sec=20.0)
    later(0.2, lambda: hand_over(bell, []))
    assert 0.15 < ask(bell, [])[1] < 10.0


def test_parts_that_never_come_and_parts_of_nobody_hold_no_question_longer() -> None:
    bell = MessageBell(hold_sec=0.3)
    hand_over(bell, ["a"])
    later(0.1, lambda: store(bell, "x", session="unknown"))
    assert 0.25 < ask(bell, [])[1] < 5.0


def test_a_message_that_comes_between_the_look_and_the_waiting_is_not_missed() -> None:
    bell = MessageBell(hold_sec=20.0)

    def look(**_: Any) -> Any:
        hand_over(bell, [])
        return SimpleNamespace(messages_list=[])

    started = time.monotonic()
    bell.waiting(look)(request=None, state=None, store=None)
    assert time.monotonic() - started < 5.0


def test_only_so_many_questions_are_held_that_threads_are_left_for_all_else() -> None:
    bell = MessageBell(hold_sec=3.0, most=1)
    held = threading.Thread(target=lambda: ask(bell, []))
    held.start()
    time.sleep(0.3)
    assert ask(bell, [])[1] < 1.0  # is told at once, as by Flower
    held.join()
    assert ask(MessageBell(hold_sec=0.2, most=1), [])[1] > 0.15


def test_flower_asks_these_functions_by_these_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (
        (fleet_handlers, "pull_messages"),
        (runtime_handlers, "push_messages"),
        (runtime_handlers, "push_object"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back afterwards
    before = fleet_handlers.pull_messages
    assert list(inspect.signature(before).parameters) == ["request", "state", "store"]
    for name in ("push_messages", "push_object"):
        assert list(inspect.signature(getattr(runtime_handlers, name)).parameters) == ["request", "state", "task"]
    for name in ("pull_messages", "activate_node"):
        assert f"fleet_handlers.{name}(" in inspect.getsource(fleet_router)
    MessageBell().install()
    assert fleet_handlers.pull_messages is not before


def test_a_site_that_was_held_asks_again_without_a_pause() -> None:
    assert HOLD_SEC >= 3.0 > LEAST_WAIT_SEC > LATE_BY  # 3 s: Flower's own pause, the longest one of `Pace`


class Clock:
    """Seconds since 1970, as many after now as a test says."""

    ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


def test_a_site_that_was_lost_comes_back_when_whoever_waits_for_it_knows(tmp_path: Path) -> None:
    _, states = get_objectstore_linkstate_factories(str(tmp_path / "superlink.db"), get_federation_manager())
    state, clock = states.state(), Clock()
    site = state.create_node("owner", "", b"its key", 30.0)
    activate = after_notice(fleet_handlers.activate_node, clock)
    asked = ActivateNodeRequest(public_key=b"its key", heartbeat_interval=30.0)
    assert activate(request=asked, state=state).node_id == site  # never seen before: at once
    with pytest.raises(FlowerRefusal, match="activat"):
        activate(request=asked, state=state)  # counts as there
    assert state.deactivate_node(site)
    for clock.ahead in (0.0, 0.9 * NOTICE_SEC):
        with pytest.raises(FlowerRefusal):
            activate(request=asked, state=state)
    clock.ahead = 1.1 * NOTICE_SEC
    assert activate(request=asked, state=state).node_id == site
    assert NOTICE_SEC > 2 * LONGEST_PAUSE_SEC


def test_an_unknown_site_is_told_so_by_flower(tmp_path: Path) -> None:
    _, states = get_objectstore_linkstate_factories(str(tmp_path / "superlink.db"), get_federation_manager())
    with pytest.raises(FlowerRefusal, match="No SuperNode found"):
        after_notice(fleet_handlers.activate_node)(request=ActivateNodeRequest(public_key=b"another"), state=states.state())
