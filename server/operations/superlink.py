"""Flower's SuperLink with what a round needs besides, and its control interface, asked over loopback: sites and runs.

    python -P -m pneumofed.server.operations.superlink ... what flower-superlink takes ...

Of Flower 1.41 five things are changed. It tells a site at once that there is no message, and the coordinator that there is no reply, so
that who is to have one soon has to ask many times a second, at 15 ms of the SuperLink's processor each, in which nothing else is answered
(`MessageBell`). It gives the coordinator a reply that is still on its way, which then waits for its parts and for nothing else, for three
minutes where the site has died meanwhile (`when_complete`). It takes a site that was lost in again at any time, so that whoever waits for
the answer that went with it may never hear of the loss (`after_notice`). It looks for tasks whose process has died at each request
(`seldom`), and hands each 64 KiB of a request's body through nine layers (`WholeBodies`).

The control interface is asked in this process and not with the `flwr` command, which costs two seconds a call and shows neither a node's
name nor its key.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import httpx
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    StreamLogsRequest,
    UnregisterNodeRequest,
)
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.error import FlowerError as FlowerRefusal
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from pneumofed.common.errors import FlowerError
from pneumofed.common.ops.processes import without_proxy_on_loopback
from pneumofed.server.operations.settings import CoordinatorFolder

T = TypeVar("T")
HOLD_SEC = 3.0
"""How long a site's question is held at most: a site whose key was revoked is refused at the next one."""
HOLD_REPLIES_SEC = 1.0
"""How long the coordinator's question is held at most: a site that was lost is noticed at the next one (`NOTICE_SEC`)."""
MOST_HELD = 16
"""How many questions are held at a time; each takes one of the 40 threads with which the SuperLink answers (anyio's default)."""
LOOK_SEC = 1.0
"""How often the SuperLink looks for tasks whose process has not been heard of; Flower gives one 30 s and more."""
NOTICE_SEC = 3.0
"""How long a site stays lost: a round asks for its answer once a second at least (`server.federation.messaging.LONGEST_PAUSE_SEC`)."""


@dataclass(frozen=True)
class Node:
    """A registered SuperNode. `status` is `registered`, `online`, `offline` or `unregistered`; times are ISO 8601 or empty."""

    id: int
    name: str
    public_key: bytes
    status: str
    last_deactivated_at: str
    online_until: float


class Control:
    """Calls of the control interface. Errors are `FlowerError` with the SuperLink's own sentence."""

    def __init__(self, client: ControlHttpClient) -> None:
        self._client = client

    def nodes(self) -> list[Node]:
        """Lists all nodes that were ever registered."""
        answer = _call(lambda: self._client.ListNodes(ListNodesRequest()))
        return [Node(n.node_id, n.name, n.public_key, n.status, n.last_deactivated_at, n.online_until) for n in answer.nodes_info]

    def register(self, name: str, public_key: bytes) -> int:
        """Registers a site's key and returns the node's number.

        Args:
            name: of the site.
            public_key: P-384, PEM.
        """
        return int(_call(lambda: self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name))).node_id)

    def unregister(self, node_id: int) -> None:
        """Refuses the node from now on. Flower never takes the same key again."""
        _call(lambda: self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id)))

    def submit(self, bundle: bytes, run_config: Mapping[str, str]) -> int:
        """Submits a run of the app in `bundle` and returns its number.

        Args:
            bundle: the app bundle (FAB), a ZIP archive.
            run_config: what the apps read from their run config.

        Raises:
            FlowerError: the SuperLink took no run.
        """
        fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
        request = StartRunRequest(fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(run_config)))
        answer = _call(lambda: self._client.StartRun(request))
        if not answer.HasField("run_id"):
            raise FlowerError("the SuperLink took no run and gave no reason; see state/superlink.log")
        return int(answer.run_id)

    def run_status(self, run_id: int) -> str:
        """Asks for the run's status: `pending`, `starting`, `running` or `finished:` and `completed`, `failed` or `stopped`."""
        status = _call(lambda: self._client.ListRuns(ListRunsRequest(run_id=run_id))).run_dict[run_id].status
        return f"{status.status}:{status.sub_status}" if status.sub_status else str(status.status)

    def run_log(self, run_id: int) -> str:
        """Reads what the ServerApp has logged so far; empty for a run that has not begun."""
        if self.run_status(run_id) in ("pending", "starting"):
            return ""  # the stream would wait for the first line
        return _call(lambda: next((part.log_output for part in self._client.StreamLogs(StreamLogsRequest(run_id=run_id))), ""))

    def stop_run(self, run_id: int) -> None:
        """Stops the run, unless it has ended already."""
        if not self.run_status(run_id).startswith("finished"):
            _call(lambda: self._client.StopRun(StopRunRequest(run_id=run_id)))


@contextmanager
def open_control(folder: CoordinatorFolder) -> Iterator[Control]:
    """Opens the control interface of the SuperLink that runs in `folder`.

    Raises:
        ConfigError: the folder is no coordinator folder.
    """
    address = f"127.0.0.1:{folder.settings().loopback.superlink}"
    os.environ.update(without_proxy_on_loopback(os.environ))
    interceptors = [RuntimeVersionHttpInterceptor(component_name="flwr CLI")]
    with ControlHttpClient.from_server_address(address, False, folder.ca.read_bytes(), interceptors) as client:
        yield Control(client)


def _call(send: Callable[[], T]) -> T:
    try:
        return send()
    except httpx.HTTPStatusError as error:
        refusal = FlowerRefusal.from_json(error.response.text)
        reason = refusal.message if refusal else f"HTTP {error.response.status_code}"
        raise FlowerError(f"the SuperLink refuses: {reason}") from error
    except httpx.HTTPError as error:
        raise FlowerError(f"the SuperLink does not answer ({type(error).__name__}); is it started?") from error


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

    def waiting(self, pull: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps the answer to a site's question for its next message."""

        def pull_messages(**asked: Any) -> Any:
            rung = self.rung
            answer = pull(**asked)
            if not answer.messages_list:
                self.wait(rung)
            return answer

        return pull_messages

    def waiting_for_all(self, pull: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps the answer to the coordinator's question for replies. Held is only the one for all that is open in the run.

        Of several questions in turn each would keep the next from finding what has come meanwhile.
        """

        def pull_messages(request: Any, state: Any, task: Any) -> Any:
            rung = self.rung
            answer = pull(request, state, task)
            if not answer.messages_list and _open(state, task.run_id) <= set(request.message_ids):
                self.wait(rung)
            return answer

        return pull_messages

    @property
    def rung(self) -> int:
        """How often the bell has rung. Read before one looks, so that a message that comes after the look is not missed."""
        return self._times

    def wait(self, rung: int) -> None:
        """Waits until the bell has rung more than `rung` times, unless too many wait already."""
        if not self._free.acquire(blocking=False):
            return
        try:
            with self._rung:
                self._rung.wait_for(lambda: self._times != rung, self._hold_sec)
        finally:
            self._free.release()

    def announcing(self, push: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps the answer to messages that are handed over, which names the parts that are still to come."""

        def push_messages(*asked: Any, **named: Any) -> Any:
            answer = push(*asked, **named)
            with self._rung:
                self._missing[answer.session_id] = set(answer.objects_to_push)
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
    from flwr.supercore.date import now
    from flwr.supercore.state.schema.corestate_models import ObjectPushSession, ObjectPushSessionRoot
    from flwr.supercore.state.schema.linkstate_models import MessageRes, Node
    from sqlalchemy import select

    question = (
        select(MessageRes.reply_to_message_id)
        .join(ObjectPushSessionRoot, ObjectPushSessionRoot.root_object_id == MessageRes.message_id)
        .join(ObjectPushSession, ObjectPushSession.session_id == ObjectPushSessionRoot.session_id)
        .join(Node, Node.node_id == MessageRes.src_node_id)
        .where(MessageRes.reply_to_message_id.in_(list(asked)))
        .where(ObjectPushSession.pending_count > 0, ObjectPushSession.expires_at > now())
        .where(Node.online_until >= now().timestamp())
    )
    with state.session() as session:
        return set(session.scalars(question))


def _open(state: Any, run_id: int) -> set[str]:
    """Messages of the run whose reply was not handed to the coordinator."""
    from flwr.supercore.state.schema.linkstate_models import MessageIns
    from flwr.supercore.utils import uint64_to_int64
    from sqlalchemy import select

    with state.session() as session:
        return set(session.scalars(select(MessageIns.message_id).where(MessageIns.run_id == uint64_to_int64(run_id))))


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


class WholeBodies:
    """Hands a request's body on in one piece, as the first of whoever of Flower's would pass on each of its pieces (ASGI).

    Whole it is held in memory anyhow, before anything of it is looked at; nginx says how large it may be.

    Args:
        app: what comes next.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        given = scope["type"] != "http"

        async def receive_whole() -> Any:
            nonlocal given
            if given:
                return await receive()
            pieces = []
            while not given:
                message = await receive()
                if message["type"] != "http.request":
                    return message  # whoever asked is gone
                pieces.append(message.get("body", b""))
                given = not message.get("more_body", False)
            return {"type": "http.request", "body": b"".join(pieces), "more_body": False}

        await self._app(scope, receive_whole, send)


def change_flower() -> None:
    """Puts all of this into Flower's SuperLink."""
    from flwr.supercore.corestate.sql_corestate import SqlCoreState
    from flwr.superlink import main as superlink
    from flwr.superlink.servicer.fleet import fleet_handlers
    from flwr.superlink.servicer.runtime import runtime_handlers
    from starlette.middleware import Middleware

    fleet, runtime, state, inside = (cast(Any, of) for of in (fleet_handlers, runtime_handlers, SqlCoreState, superlink))
    fleet.activate_node = after_notice(fleet.activate_node)
    state._cleanup_expired_task_tokens = seldom(state._cleanup_expired_task_tokens)
    layers = inside._get_middleware
    inside._get_middleware = lambda: [Middleware(WholeBodies), *layers()]
    messages, replies = MessageBell(), MessageBell(HOLD_REPLIES_SEC)
    fleet.pull_messages = messages.waiting(fleet.pull_messages)
    runtime.pull_messages = replies.waiting_for_all(when_complete(runtime.pull_messages))
    for bell, handed in ((messages, runtime), (replies, fleet)):
        handed.push_messages = bell.announcing(handed.push_messages)
        handed.push_object = bell.completing(handed.push_object)


def main() -> None:
    """Starts Flower's SuperLink with the options of its own."""
    from flwr.superlink.cli import flower_superlink

    change_flower()
    sys.argv[0] = "flower-superlink"
    flower_superlink()


if __name__ == "__main__":
    main()
