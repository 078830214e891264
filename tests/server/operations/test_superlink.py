"""What the SuperLink holds back: a site's question until there is a message, and a lost site until whoever waits for it knows."""

from __future__ import annotations

import errno
import functools
import inspect
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.corestate import sql_corestate
from flwr.supercore.corestate.sql_corestate import SqlCoreState
from flwr.supercore.inflatable.inflatable_object import (
    UnexpectedObjectContentError,
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
)
from flwr.supercore.object_store import NoObjectInStoreError, object_store_factory
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.routers.runtime.router import pull_messages as runtime_pull
from flwr.supercore.state.schema.objectstore_models import StoredObject
from flwr.superlink import main as superlink
from flwr.superlink.config_loader import get_federation_manager, get_objectstore_linkstate_factories
from flwr.superlink.routers.fleet import router as fleet_router
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from pneumofed.client.site.supernode import LATE_BY, LEAST_WAIT_SEC
from pneumofed.server.federation.messaging import LONGEST_PAUSE_SEC
from pneumofed.server.operations.superlink import (
    HOLD_REPLIES_SEC,
    HOLD_SEC,
    IN_FILE,
    LEAST_IN_FILE,
    LOOK_SEC,
    NOTICE_SEC,
    FlowerRefusal,
    MessageBell,
    OneLayer,
    PartsInFiles,
    after_notice,
    change_flower,
    is_for_all,
    seldom,
    when_complete,
)
from tests.tiny import there


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


def test_what_dead_sites_left_is_forgotten_and_the_latest_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pneumofed.server.operations.superlink.MOST_OPEN", 3)
    bell = MessageBell(hold_sec=20.0)
    for number in range(100):
        hand_over(bell, ["a"], session=f"dead {number}")
    hand_over(bell, ["a"])
    assert len(bell._missing) == 3
    later(0.2, lambda: store(bell, "a"))
    assert 0.15 < ask(bell, [])[1] < 10.0


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
    names = ("pull_messages", "push_messages", "push_object")
    changed: list[tuple[Any, str]] = [(module, name) for module in (fleet_handlers, runtime_handlers) for name in names]
    changed += [(fleet_handlers, "activate_node"), (SqlCoreState, "_cleanup_expired_task_tokens"), (superlink, "_get_middleware")]
    changed += [(object_store_factory, "SqlObjectStore")]
    before = [getattr(module, name) for module, name in changed]
    for (module, name), former in zip(changed, before, strict=True):
        monkeypatch.setattr(module, name, former)  # put back afterwards
    assert list(inspect.signature(fleet_handlers.pull_messages).parameters) == ["request", "state", "store"]
    for name in names:
        assert list(inspect.signature(getattr(runtime_handlers, name)).parameters) == ["request", "state", "task"]
        assert f"handlers.{name}(request, state, task)" in inspect.getsource(there(inspect.getmodule(runtime_pull)))
    for name in (*names, "activate_node"):
        assert f"fleet_handlers.{name}(" in inspect.getsource(fleet_router)
    change_flower()
    assert all(getattr(module, name) is not former for (module, name), former in zip(changed, before, strict=True))
    assert "_get_middleware()" in inspect.getsource(superlink.create_app)
    assert "self._cleanup_expired_task_tokens()" in inspect.getsource(SqlLinkState.get_run_status)


class Link:
    """Flower's own state with a run that goes on, a site that is there, and what is asked of both."""

    def __init__(self, folder: Path, hold_sec: float = 20.0) -> None:
        _, states = get_objectstore_linkstate_factories(str(folder / "superlink.db"), get_federation_manager())
        self.state = states.state()
        self.site = self.state.create_node("owner", "", b"its key", 30.0)
        self.state.activate_node(self.site, 30.0)
        self.run = self.state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, "owner", TaskType.SERVER_APP)
        task = there(self.state.get_run_info(run_ids=[self.run])[0].primary_task_id)
        assert self.state.claim_task(task) and self.state.activate_task(task)
        self.task: Any = SimpleNamespace(run_id=self.run)
        self.bell = MessageBell(hold_sec)
        self._ask = self.bell.waiting(when_complete(runtime_handlers.pull_messages), is_for_all)

    def message(self, said: int, to: int, reply_to: str = "") -> Message:
        source = self.site if reply_to else SUPERLINK_NODE_ID
        facts = Metadata(self.run, "", source, to, reply_to, "", time.time(), 100.0 if reply_to else 200.0, "train")
        message = make_message(facts, RecordDict({"said": ConfigRecord({"number": said})}))
        message.metadata.__dict__["_message_id"] = message.object_id
        return message

    def send(self, said: int) -> str:
        """The coordinator's message with all its parts, taken by the site; its id."""
        message = self.message(said, to=self.site)
        asked = PushAppMessagesRequest(**announced(message))
        answer = runtime_handlers.push_messages(asked, self.state, self.task)
        here = Node(node_id=SUPERLINK_NODE_ID)
        for part in parts_of(message):
            stored = PushObjectRequest(node=here, run_id=self.run, session_id=answer.session_id, **part)
            runtime_handlers.push_object(stored, self.state, self.task)
        node = Node(node_id=self.site)
        pulled = fleet_handlers.pull_messages(PullMessagesRequest(node=node), self.state, self.state.object_store)
        assert len(pulled.messages_list) == 1
        return str(answer.message_ids[0])

    def announce(self, asked: str) -> list[Callable[[], None]]:
        """The site's reply without its parts, and what hands each of these over."""
        message, node = self.message(7, to=SUPERLINK_NODE_ID, reply_to=asked), Node(node_id=self.site)
        announcing = self.bell.announcing(fleet_handlers.push_messages)
        answer = announcing(request=PushMessagesRequest(node=node, **announced(message)), state=self.state)
        push = self.bell.completing(fleet_handlers.push_object)

        def hand_over(part: dict[str, Any]) -> None:
            push(request=PushObjectRequest(node=node, run_id=self.run, session_id=answer.session_id, **part), state=self.state)

        return [functools.partial(hand_over, part) for part in parts_of(message)]

    def ask(self, *asked: str) -> tuple[list[Any], float]:
        """What the coordinator is told, and after how many seconds."""
        started = time.monotonic()
        return list(
            self._ask(PullAppMessagesRequest(message_ids=asked), self.state, self.task).messages_list
        ), time.monotonic() - started


def announced(message: Message) -> dict[str, Any]:
    listed = [message_to_proto(remove_content_from_message(message))]
    return {"messages_list": listed, "message_object_trees": [get_object_tree(message)]}


def parts_of(message: Message) -> list[dict[str, Any]]:
    return [{"object_id": name, "object_content": part.deflate()} for name, part in get_all_nested_objects(message).items()]


def test_a_reply_that_is_on_its_way_is_not_there_and_keeps_no_other_from_the_coordinator(tmp_path: Path) -> None:
    link = Link(tmp_path, hold_sec=0.0)
    slow, quick = link.send(1), link.send(2)
    parts = link.announce(slow)
    for part in (*parts[:-1], *link.announce(quick)):
        part()
    found, _ = link.ask(slow, quick)
    assert [reply.metadata.reply_to_message_id for reply in found] == [quick]
    parts[-1]()
    found, _ = link.ask(slow)
    assert [reply.metadata.reply_to_message_id for reply in found] == [slow]


def test_a_site_that_dies_in_the_middle_of_its_reply_is_a_lost_one(tmp_path: Path) -> None:
    link = Link(tmp_path)
    asked = link.send(1)
    link.announce(asked)[0]()
    assert link.state.deactivate_node(link.site)
    found, seconds = link.ask(asked)
    assert found[0].HasField("error") and seconds < 10.0


def test_parts_that_stopped_coming_are_told_of_as_by_flower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = Link(tmp_path)
    asked = link.send(1)
    monkeypatch.setattr(sql_corestate, "OBJECT_PUSH_SESSION_TTL_SECONDS", -1)  # as if the time were over
    link.announce(asked)
    assert len(link.ask(asked)[0]) == 1  # its parts are asked for, and not there


def test_the_coordinator_is_held_until_a_reply_is_whole(tmp_path: Path) -> None:
    link = Link(tmp_path)
    asked = link.send(1)
    parts = link.announce(asked)
    later(0.5, *parts)
    found, seconds = link.ask(asked)
    assert found == [] and 0.4 < seconds < 10.0
    assert len(link.ask(asked)[0]) == 1


def test_a_question_for_some_of_what_is_open_is_not_held(tmp_path: Path) -> None:
    link = Link(tmp_path)
    first, second = link.send(1), link.send(2)
    assert link.ask(first) == ([], pytest.approx(0.0, abs=5.0))
    for part in link.announce(second):
        part()
    assert len(link.ask(first, second)[0]) == 1
    later(0.5, *link.announce(first))
    assert 0.4 < link.ask(first)[1] < 10.0  # the other was handed over, so that this is all that is open


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
    assert 2 * max(LONGEST_PAUSE_SEC, HOLD_REPLIES_SEC) < NOTICE_SEC


def test_tasks_of_dead_processes_are_looked_for_once_a_second_and_not_at_each_request(tmp_path: Path) -> None:
    _, states = get_objectstore_linkstate_factories(str(tmp_path / "superlink.db"), get_federation_manager())
    state, looks, now = states.state(), list[object](), [100.0]
    assert callable(state._cleanup_expired_task_tokens)  # type: ignore[attr-defined]
    look = seldom(looks.append, lambda: now[0])
    for now[0] in (100.0, 100.1, 100.9, 101.0, 101.5, 140.0):
        look(state)
    assert looks == [state] * 3
    assert LOOK_SEC < HEARTBEAT_DEFAULT_INTERVAL / 10


class Telling(BaseHTTPMiddleware):
    """A layer that tells what passes it, and does one thing."""

    def __init__(self, app: Any, told: list[str], name: str, does: str) -> None:
        super().__init__(app)
        self.told, self.name, self.does = told, name, does

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        self.told.append(f"{self.name} in {getattr(request.state, 'mark', '-')}")
        match self.does:
            case "mark":
                request.state.mark = self.name
            case "read":
                self.told.append(f"{self.name} read {await request.body()!r}")
            case "answer":
                return PlainTextResponse(f"of {self.name}", 403)
            case "refuse":
                raise HTTPException(401, self.name)
            case "fail":
                raise ValueError(self.name)
        try:
            response = await call_next(request)
        except ValueError as error:
            self.told.append(f"{self.name} saw {error}")
            if self.does != "translate":
                raise
            response = PlainTextResponse(f"translated {error}", 500)
        if self.does == "replace":
            response = PlainTextResponse(f"{self.name} in the place of {response.status_code}")
        response.headers[f"x-{self.name}"] = self.does
        self.told.append(f"{self.name} out {response.status_code}")
        return response


async def echo(request: Request) -> Response:
    if request.url.path == "/bad":
        raise ValueError("the handler")
    body = await request.body()

    async def pieces() -> AsyncIterator[bytes]:
        for piece in (b"got ", body, b"!"):
            yield piece

    return StreamingResponse(pieces()) if request.url.path == "/stream" else Response(b"got " + body)


def asked(does: list[str], path: str, pieces: list[bytes], one: bool) -> tuple[Any, ...]:
    """What a client gets through these layers, and what each of them saw."""
    told = list[str]()
    layers = [Middleware(Telling, told=told, name=f"l{number}", does=one_does) for number, one_does in enumerate(does)]
    routes = [Route(place, echo, methods=["POST"]) for place in ("/good", "/stream", "/bad")]
    app = Starlette(routes=routes, middleware=OneLayer.of(layers) if one else layers)
    answer = TestClient(app, raise_server_exceptions=False).post(path, content=iter(pieces))
    return answer.status_code, answer.content, {name: value for name, value in answer.headers.items() if name[:2] == "x-"}, told


DOES = ["nothing", "mark", "read", "answer", "refuse", "fail", "translate", "replace"]


@given(
    st.lists(st.sampled_from(DOES), min_size=1, max_size=5),
    st.sampled_from(["/good", "/stream", "/bad", "/unknown"]),
    st.lists(st.binary(max_size=20), max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_layers_as_one_do_what_they_did(does: list[str], path: str, pieces: list[bytes]) -> None:
    assert asked(does, path, pieces, one=True) == asked(does, path, pieces, one=False)


def test_layers_of_another_kind_stay_as_they_are() -> None:
    layers = [Middleware(Telling, told=[], name="a", does="nothing"), Middleware(GZipMiddleware)]
    assert OneLayer.of(layers) == layers


def test_flowers_own_layers_are_of_the_kind_that_is_made_one() -> None:
    layers = superlink._get_middleware()
    assert len(layers) == 9 and len(OneLayer.of(layers)) == 1
    steps = OneLayer(Starlette(), layers)._steps
    assert {tuple(inspect.signature(step).parameters) for step in steps} == {("request", "call_next")}


def test_an_unknown_site_is_told_so_by_flower(tmp_path: Path) -> None:
    _, states = get_objectstore_linkstate_factories(str(tmp_path / "superlink.db"), get_federation_manager())
    with pytest.raises(FlowerRefusal, match="No SuperNode found"):
        after_notice(fleet_handlers.activate_node)(request=ActivateNodeRequest(public_key=b"another"), state=states.state())


def parts_store(folder: Path) -> PartsInFiles:
    store = PartsInFiles(str(folder / "superlink.db"))
    store.initialize()
    return store


def tree_of(*numbers: int) -> RecordDict:
    """A record of an array each, large enough for a file."""
    arrays = {f"a{number}": ArrayRecord([np.full(LEAST_IN_FILE, number, np.uint8)]) for number in numbers}
    return RecordDict(dict(arrays))


def take(store: SqlObjectStore, record: RecordDict) -> None:
    store.preregister(1, get_object_tree(record))
    for name, part in get_all_nested_objects(record).items():
        store.put(name, part.deflate())


def files_in(folder: Path) -> list[Path]:
    return sorted((folder / "parts").iterdir())


def test_large_parts_are_kept_in_files_of_the_owner_and_given_back(tmp_path: Path) -> None:
    store, record = parts_store(tmp_path), tree_of(1, 2)
    take(store, record)
    assert len(files_in(tmp_path)) == 2 and {path.stat().st_mode & 0o777 for path in files_in(tmp_path)} == {0o600}
    assert (tmp_path / "parts").stat().st_mode & 0o777 == 0o700
    for name, part in get_all_nested_objects(record).items():
        assert store.get(name) == part.deflate()
    assert store.get("0" * 64) is None
    with store.session() as session:
        assert there(session.scalar(select(func.max(func.length(StoredObject.content))))) < LEAST_IN_FILE


def test_a_part_goes_with_the_last_message_that_has_it(tmp_path: Path) -> None:
    store, first, second = parts_store(tmp_path), tree_of(1, 2), tree_of(2, 3)
    take(store, first)
    take(store, second)
    assert len(files_in(tmp_path)) == 3  # the one of both is there once
    store.delete(first.object_id)
    assert len(files_in(tmp_path)) == 2
    assert all(store.get(name) == part.deflate() for name, part in get_all_nested_objects(second).items())
    store.delete_objects_in_run(1)
    assert files_in(tmp_path) == [] and len(store) == 0


def test_a_part_of_a_transaction_that_fails_leaves_no_file_and_one_that_was_to_go_stays(tmp_path: Path) -> None:
    store, kept, lost = parts_store(tmp_path), tree_of(1), tree_of(2)
    take(store, kept)

    def fail() -> None:
        with store.session():
            take(store, lost)
            store.delete(kept.object_id)
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert len(files_in(tmp_path)) == 1
    assert all(store.get(name) == part.deflate() for name, part in get_all_nested_objects(kept).items())


def test_a_part_that_the_disk_has_no_room_for_leaves_no_piece_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, write = parts_store(tmp_path), Path.write_bytes

    def write_half(self: Path, content: bytes) -> None:
        write(self, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OSError, match="No space"):
        take(store, tree_of(1))
    assert files_in(tmp_path) == []
    monkeypatch.undo()
    take(store, tree_of(1))
    assert len(files_in(tmp_path)) == 1


def test_what_a_killed_process_left_goes_at_the_next_start_and_no_more(tmp_path: Path) -> None:
    record = tree_of(1)
    take(parts_store(tmp_path), record)
    (tmp_path / "parts" / ("f" * 32)).write_bytes(b"of nobody")
    again = parts_store(tmp_path)
    assert len(files_in(tmp_path)) == 1
    assert all(again.get(name) == part.deflate() for name, part in get_all_nested_objects(record).items())
    files_in(tmp_path)[0].unlink()
    assert None in [again.get(name) for name in get_all_nested_objects(record)]  # and not something else


@pytest.mark.parametrize("name", ["f" * 32, "../superlink.db", "../../etc/passwd"])
def test_a_part_that_pretends_to_be_a_file_is_none(tmp_path: Path, name: str) -> None:
    store, content = parts_store(tmp_path), IN_FILE + name.encode("ascii")
    store.preregister(1, ObjectTree(object_id=get_object_id(content)))
    with pytest.raises(UnexpectedObjectContentError):
        store.put(get_object_id(content), content)
    body = IN_FILE + b" 0 0\x00" + name.encode("ascii")  # what Flower takes for a part
    assert store._file_of(body) is None


def test_a_part_that_is_not_what_was_announced_is_refused(tmp_path: Path) -> None:
    store, record = parts_store(tmp_path), tree_of(1)
    store.preregister(1, get_object_tree(record))
    names, parts = zip(*get_all_nested_objects(record).items(), strict=True)
    with pytest.raises(ValueError, match="does not match"):
        store.put(names[0], parts[-1].deflate())
    with pytest.raises(NoObjectInStoreError):
        store.put(get_object_id(other := next(iter(get_all_nested_objects(tree_of(9)).values())).deflate()), other)
    assert files_in(tmp_path) == []
