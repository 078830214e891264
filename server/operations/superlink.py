"""Flower's SuperLink with what a round needs besides.

    python -P -m pneumofed.server.operations.superlink ... what flower-superlink takes ...

Of Flower 1.41 six things are changed:

- It tells a site at once that there is no message, and the coordinator that there is no reply, so that who is to have one soon has to ask
  many times a second, at 15 ms of the SuperLink's processor each, in which nothing else is answered (`MessageBell`).
- It gives the coordinator a reply that is still on its way, which then waits for its parts and for nothing else, for three minutes where
  the site has died meanwhile (`when_complete`).
- It takes a site that was lost in again at any time, so that whoever waits for the answer that went with it may never hear of the loss
  (`after_notice`).
- It keeps the parts of messages in rows of its database, which are written anew with each count of who refers to them (`PartsInFiles`).
- It looks for tasks whose process has died at each request (`seldom`).
- It hands each request, and each 64 KiB of its body, through nine layers with a task each (`OneLayer`).
"""

from __future__ import annotations

import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.date import now as flower_now
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.error import FlowerError as FlowerRefusal
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.state.schema.corestate_models import ObjectPushSession, ObjectPushSessionRoot
from flwr.supercore.state.schema.linkstate_models import MessageIns, MessageRes, Node
from flwr.supercore.state.schema.objectstore_models import StoredObject
from flwr.supercore.utils import uint64_to_int64
from sqlalchemy import event, func, select
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from pneumofed.common.ops.processes import serve_long

HOLD_SEC = 3.0
"""How long a site's question is held at most: a site whose key was revoked is refused at the next one."""
HOLD_REPLIES_SEC = 1.0
"""How long the coordinator's question is held at most: a site that was lost is noticed at the next one (`NOTICE_SEC`)."""
MOST_HELD = 16  # questions at a time; each takes one of the 40 threads with which the SuperLink answers (anyio's default)
MOST_OPEN = 4096  # messages on their way that ring when they are whole: one a site, and some whose sender died
LOOK_SEC = 1.0  # between two looks for tasks whose process has not been heard of; Flower gives one 30 s and more
NOTICE_SEC = 3.0
"""How long a site stays lost: a round asks for its answer once a second at least (`server.federation.messaging.LONGEST_PAUSE_SEC`)."""
LEAST_IN_FILE = 1 << 16
"""Bytes of a part that is kept in a file; smaller ones cost the database less than a file does."""
IN_FILE = b"in the file "  # stands in the place of such a part in the database, before the file's name; no part begins so
LENGTH_OF_NAME = len(IN_FILE) + 32


class MessageBell:
    """Lets a question for a message wait until one was handed over with all its parts.

    Whoever asked is then told that there is none, as without this, and asks again at once: a message is never given to a question whose
    connection may be dead since it was asked.

    Args:
        hold_sec: how long a question is held at most.
        most: how many questions are held at a time.
    """

    def __init__(self, hold_sec: float = HOLD_SEC, most: int = MOST_HELD) -> None:
        self._hold_sec = hold_sec
        self._free = threading.Semaphore(most)
        self._rung = threading.Condition()
        self._times = 0
        self._missing: dict[str, set[str]] = {}

    def waiting(self, pull: Callable[..., Any], may_wait: Callable[..., bool] = lambda **_: True) -> Callable[..., Any]:
        """Wraps the answer to the question for messages.

        Args:
            pull: Flower's answer.
            may_wait: whether this question may be held, where there is no message.
        """

        def pull_messages(*asked: Any, **named: Any) -> Any:
            before = self._times  # before the look: a message that comes after it rings
            answer = pull(*asked, **named)
            if answer.messages_list or not may_wait(*asked, **named) or not self._free.acquire(blocking=False):
                return answer
            try:
                with self._rung:
                    self._rung.wait_for(lambda: self._times != before, self._hold_sec)
            finally:
                self._free.release()
            return answer

        return pull_messages

    def announcing(self, push: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps the answer to messages that are handed over, which names the parts that are still to come."""

        def push_messages(*asked: Any, **named: Any) -> Any:
            answer = push(*asked, **named)
            with self._rung:
                self._missing[answer.session_id] = set(answer.objects_to_push)
                while len(self._missing) > MOST_OPEN:  # whoever waits for one of these is told at the next question
                    del self._missing[next(iter(self._missing))]
            self._ring_if_complete(answer.session_id)
            return answer

        return push_messages

    def completing(self, push: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps the answer to a part of a message."""

        def push_object(request: Any, *rest: Any, **named: Any) -> Any:
            answer = push(request, *rest, **named)
            with self._rung:
                self._missing.get(request.session_id, set()).discard(request.object_id)
            self._ring_if_complete(request.session_id)
            return answer

        return push_object

    def _ring_if_complete(self, session: str) -> None:
        with self._rung:
            if self._missing.get(session) == set():
                del self._missing[session]
                self._times += 1
                self._rung.notify_all()


def when_complete(pull: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps the answer to the coordinator's question for replies: one whose parts are on their way is not there yet.

    Of a site that is lost Flower says so, and of a reply whose parts stopped coming (for 180 s) that they are gone, both as without this.

    Args:
        pull: Flower's answer.
    """

    def pull_messages(request: Any, state: Any, task: Any) -> Any:
        coming = _coming(state, request.message_ids)
        complete = [asked for asked in request.message_ids if asked not in coming]
        return pull(PullAppMessagesRequest(message_ids=complete), state, task)

    return pull_messages


def _coming(state: Any, asked: Iterable[str]) -> set[str]:
    """Those of the messages whose reply was announced by a site that is there, and has parts that are still to come."""
    question = (
        select(MessageRes.reply_to_message_id)
        .join(ObjectPushSessionRoot, ObjectPushSessionRoot.root_object_id == MessageRes.message_id)
        .join(ObjectPushSession, ObjectPushSession.session_id == ObjectPushSessionRoot.session_id)
        .join(Node, Node.node_id == MessageRes.src_node_id)
        .where(MessageRes.reply_to_message_id.in_(list(asked)))
        .where(ObjectPushSession.pending_count > 0, ObjectPushSession.expires_at > flower_now())
        .where(Node.online_until >= flower_now().timestamp())
    )
    with state.session() as session:
        return set(session.scalars(question))


def is_for_all(request: Any, state: Any, task: Any) -> bool:
    """Whether the coordinator asks for all replies that are open in the run. Only then is it held: of several questions in turn each
    would keep the next from finding what has come meanwhile."""
    with state.session() as session:
        wanted = session.scalars(select(MessageIns.message_id).where(MessageIns.run_id == uint64_to_int64(task.run_id)))
        return set(wanted) <= set(request.message_ids)


class PartsInFiles(SqlObjectStore):
    """Keeps large parts of messages in files of their own beside the database, in `state/parts`.

    A file belongs to one row for good, and goes when that row is deleted for certain; what a process that was killed left behind goes at
    the next start. A row whose file is gone is a part that is gone.

    Args:
        database_path: of Flower's database, a file.
        verify: whether a part has to have the hash that it is asked for by.
    """

    def __init__(self, database_path: str, verify: bool = True) -> None:
        super().__init__(database_path, verify=False)
        self._checks = verify
        self._folder = Path(database_path).resolve().parent / "parts"

    def initialize(self, *args: Any, **named: Any) -> list[str]:
        """Opens the database, and removes files that no row has."""
        tables = super().initialize(*args, **named)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        with self.session() as session:
            rows = session.scalars(select(StoredObject.content).where(func.length(StoredObject.content) == LENGTH_OF_NAME))
            kept = {path for row in rows if (path := self._file_of(row))}
        for path in set(self._folder.iterdir()) - kept:
            path.unlink(missing_ok=True)
        return tables

    def put(self, object_id: str, object_content: bytes) -> None:
        """Keeps a part that was announced.

        Raises:
            ValueError: it is not what was announced.
            UnexpectedObjectContentError: it is no part.
            NoObjectInStoreError: nothing was.
        """
        if self._checks:
            if object_id != get_object_id(object_content):
                raise ValueError(f"Object ID {object_id} does not match content hash")
            validate_object_content(content=object_content)
        if len(object_content) < LEAST_IN_FILE:
            super().put(object_id, object_content)
            return
        path = self._folder / uuid.uuid4().hex
        with self.session() as session:
            event.listen(session, "after_rollback", lambda *_: path.unlink(missing_ok=True), once=True)
            path.touch(0o600, exist_ok=False)
            path.write_bytes(object_content)
            super().put(object_id, IN_FILE + path.name.encode("ascii"))
            if self._file_of(super().get(object_id)) != path:  # it was there already
                path.unlink()

    def get(self, object_id: str) -> bytes | None:
        """Gives a part: empty if it was announced only, None if it was not, or is gone."""
        content = super().get(object_id)
        path = self._file_of(content)
        try:
            return path.read_bytes() if path else content
        except FileNotFoundError:
            return None

    def delete(self, object_id: str) -> None:
        """Deletes a part that no other refers to, and those that only it refers to."""
        with self.session() as session:
            path = self._file_of(super().get(object_id))
            super().delete(object_id)
            if path and object_id not in self:
                event.listen(session, "after_commit", lambda _: path.unlink(missing_ok=True), once=True)

    def _file_of(self, content: bytes | None) -> Path | None:
        """The file that stands behind what is in the database; None where that is the part itself."""
        found = re.fullmatch(re.escape(IN_FILE) + rb"([0-9a-f]{32})", content or b"")
        return self._folder / found[1].decode("ascii") if found else None


def after_notice(activate: Callable[..., Any], now: Callable[[], float] = time.time) -> Callable[..., Any]:
    """Wraps the answer to a site that wants to be taken in: for `NOTICE_SEC` after it was lost it is refused, as while it counts as there.

    What it was asked before is lost with its process, and the SuperLink tells that only while the site is away.

    Args:
        activate: Flower's answer.
        now: seconds since 1970.
    """

    def activate_node(request: Any, state: Any) -> Any:
        node_id = state.get_node_id_by_public_key(request.public_key)
        known = state.get_node_info(node_ids=[node_id]) if node_id is not None else ()
        if any(node.HasField("online_until") and 0.0 <= now() - node.online_until < NOTICE_SEC for node in known):
            raise FlowerRefusal(ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED, f"node {node_id} was lost a moment ago")
        return activate(request=request, state=state)

    return activate_node


def seldom(look: Callable[[Any], None], now: Callable[[], float] = time.monotonic) -> Callable[[Any], None]:
    """Wraps what each request begins with, so that it is done every `LOOK_SEC` at most: it writes to the database, of which there is one.

    Args:
        look: Flower's search for tasks whose process has died.
        now: seconds.
    """
    last = -LOOK_SEC

    def look_sometimes(state: Any) -> None:
        nonlocal last
        if now() - last >= LOOK_SEC:
            last = now()
            look(state)

    return look_sometimes


class OneLayer(BaseHTTPMiddleware):
    """Flower's layers around each request as one: what each of them does, in their order, without a stream and a task for each.

    Args:
        app: what comes next.
        layers: the outermost first.
    """

    def __init__(self, app: ASGIApp, layers: Sequence[Middleware]) -> None:
        super().__init__(app)
        self._steps = [cast(Any, layer.cls)(app, *layer.args, **layer.kwargs).dispatch_func for layer in layers]

    @classmethod
    def of(cls, layers: Sequence[Middleware]) -> list[Middleware]:
        """The layers as one, or as they are where one of them is of another kind."""
        alike = (isinstance(layer.cls, type) and issubclass(layer.cls, BaseHTTPMiddleware) for layer in layers)
        return [Middleware(cls, layers=layers)] if all(alike) else list(layers)

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        """Answers a request."""
        for step in reversed(self._steps):
            call_next = partial(step, call_next=call_next)
        return await call_next(request)


def change_flower() -> None:
    """Puts all of this into Flower's SuperLink."""
    from flwr.supercore.corestate.sql_corestate import SqlCoreState
    from flwr.supercore.object_store import object_store_factory
    from flwr.superlink import main as superlink
    from flwr.superlink.servicer.fleet import fleet_handlers
    from flwr.superlink.servicer.runtime import runtime_handlers

    fleet, runtime, state, inside = (cast(Any, of) for of in (fleet_handlers, runtime_handlers, SqlCoreState, superlink))
    fleet.activate_node = after_notice(fleet.activate_node)
    state._cleanup_expired_task_tokens = seldom(state._cleanup_expired_task_tokens)
    cast(Any, object_store_factory).SqlObjectStore = PartsInFiles
    layers = inside._get_middleware
    inside._get_middleware = lambda: OneLayer.of(layers())
    messages, replies = MessageBell(), MessageBell(HOLD_REPLIES_SEC)
    fleet.pull_messages = messages.waiting(fleet.pull_messages)
    runtime.pull_messages = replies.waiting(when_complete(runtime.pull_messages), is_for_all)
    for bell, handed in ((messages, runtime), (replies, fleet)):
        handed.push_messages = bell.announcing(handed.push_messages)
        handed.push_object = bell.completing(handed.push_object)


def main() -> None:
    """Starts Flower's SuperLink with the options of its own."""
    from flwr.superlink.cli import flower_superlink

    change_flower()
    serve_long()
    sys.argv[0] = "flower-superlink"
    flower_superlink()


if __name__ == "__main__":
    main()
