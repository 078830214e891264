"""What the SuperLink holds back: a site's question until there is a message, and a lost site until whoever waits for it knows."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.superlink import main as superlink
from flwr.superlink.config_loader import get_federation_manager, get_objectstore_linkstate_factories
from flwr.superlink.routers.fleet import router as fleet_router
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers
from hypothesis import given
from hypothesis import strategies as st

from pneumofed.client.site.supernode import LATE_BY, LEAST_WAIT_SEC
from pneumofed.server.federation.messaging import LONGEST_PAUSE_SEC
from pneumofed.server.operations.superlink import (
    HOLD_SEC,
    LOOK_SEC,
    NOTICE_SEC,
    FlowerRefusal,
    MessageBell,
    WholeBodies,
    after_notice,
    seldom,
)


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
    assert "_get_middleware()" in inspect.getsource(superlink.create_app)
    assert "self._cleanup_expired_task_tokens()" in inspect.getsource(SqlLinkState.get_run_status)


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


def test_tasks_of_dead_processes_are_looked_for_once_a_second_and_not_at_each_request(tmp_path: Path) -> None:
    _, states = get_objectstore_linkstate_factories(str(tmp_path / "superlink.db"), get_federation_manager())
    state, looks, now = states.state(), list[object](), [100.0]
    assert callable(state._cleanup_expired_task_tokens)  # type: ignore[attr-defined]
    look = seldom(looks.append, lambda: now[0])
    for now[0] in (100.0, 100.1, 100.9, 101.0, 101.5, 140.0):
        look(state)
    assert looks == [state] * 3
    assert LOOK_SEC < HEARTBEAT_DEFAULT_INTERVAL / 10


@given(st.lists(st.binary(max_size=50), min_size=1, max_size=8))
def test_a_body_comes_whole_however_it_was_sent(pieces: list[bytes]) -> None:
    sent = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    sent[-1]["more_body"] = False
    assert received("http", sent, 2) == [{"type": "http.request", "body": b"".join(pieces), "more_body": False}, GONE]


def test_who_goes_away_in_the_middle_is_gone_and_other_protocols_pass() -> None:
    begun = {"type": "http.request", "body": b"half", "more_body": True}
    assert received("http", [begun], 1) == [GONE]
    assert received("lifespan", [{"type": "lifespan.startup"}], 1) == [{"type": "lifespan.startup"}]


GONE = {"type": "http.disconnect"}


def received(kind: str, sent: list[dict[str, Any]], times: int) -> list[Any]:
    """What an app behind `WholeBodies` receives, asking so many times."""
    waiting, found = [*sent, GONE], list[Any]()

    async def receive() -> Any:
        return waiting.pop(0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(times):
            found.append(await receive())

    asyncio.run(WholeBodies(app)({"type": kind}, receive, None))
    return found


def test_an_unknown_site_is_told_so_by_flower(tmp_path: Path) -> None:
    _, states = get_objectstore_linkstate_factories(str(tmp_path / "superlink.db"), get_federation_manager())
    with pytest.raises(FlowerRefusal, match="No SuperNode found"):
        after_notice(fleet_handlers.activate_node)(request=ActivateNodeRequest(public_key=b"another"), state=states.state())
