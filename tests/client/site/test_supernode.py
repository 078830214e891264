"""A site's SuperNode and a bad network: what is tried again, and what never is."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from flwr.common.constant import HEARTBEAT_PATIENCE
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, AcquireTaskResponse
from flwr.supercore.constant import (
    FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES,
    HTTP_SERVER_SHUTDOWN_TIMEOUT,
    OBJECT_PUSH_SESSION_TTL_SECONDS,
    TaskType,
)
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState
from flwr.supernode.servicer.runtime import runtime_handlers

from pneumofed.client.site.service import LEASE_SEC, RETRY_SEC
from pneumofed.client.site.supernode import HEARTBEAT_INTERVAL_SEC, HOLD_SEC, PART_TIMEOUT_SEC, RetryingClient, TaskBell
from pneumofed.common.wire.messages import PART_BYTES
from tests.client.superlink import issue


@contextmanager
def listening(answer: str, context: ssl.SSLContext | None = None) -> Iterator[tuple[str, list[float]]]:
    """A port that takes connections and keeps silent, closes them, or begins TLS; and one number a connection."""
    server, taken, open_ones = socket.create_server(("127.0.0.1", 0)), list[float](), list[socket.socket]()

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            taken.append(1.0)
            open_ones.append(connection)
            if answer == "close":
                connection.recv(64)
                connection.close()
            elif context is not None:
                try:
                    context.wrap_socket(connection, server_side=True)
                except OSError:
                    connection.close()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"https://127.0.0.1:{server.getsockname()[1]}", taken
    finally:
        server.close()
        for connection in open_ones:
            connection.close()


def pull(address: str, verify: ssl.SSLContext, tries: int) -> None:
    """Asks as Flower's SuperNode does, so many times at most, without waiting in between."""
    retry = make_simple_http_retry_invoker()
    retry.max_tries, retry.wait_function = tries, lambda _: None
    client = RetryingClient(address, verify=verify, timeout=0.3)
    retry.invoke(client.PullMessages, PullMessagesRequest())


@pytest.mark.parametrize("answer", ["silence", "close"])
def test_a_handshake_that_was_cut_or_timed_out_is_tried_again(answer: str) -> None:
    with listening(answer) as (address, taken), pytest.raises(httpx.ConnectTimeout, match="did not answer in time"):
        pull(address, ssl.create_default_context(), tries=3)
    assert len(taken) == 3


def test_a_certificate_of_another_authority_is_not_tried_again(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        issue(tmp_path / name)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "one" / "server.crt", tmp_path / "one" / "server.key")
    trusted = ssl.create_default_context(cafile=str(tmp_path / "two" / "ca.crt"))
    with listening("tls", context) as (address, taken), pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        pull(address, trusted, tries=3)
    assert len(taken) == 1


def test_signs_of_life_are_promised_with_room_for_a_cut_network(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(RetryingClient, "_unary_unary", lambda self, **call: sent.append(call["request"]))
    client = RetryingClient("https://127.0.0.1:1")
    client.ActivateNode(ActivateNodeRequest(heartbeat_interval=30))
    client.SendNodeHeartbeat(SendNodeHeartbeatRequest(heartbeat_interval=30))
    assert [request.heartbeat_interval for request in sent] == [HEARTBEAT_INTERVAL_SEC, HEARTBEAT_INTERVAL_SEC]
    assert HEARTBEAT_PATIENCE * HEARTBEAT_INTERVAL_SEC + RETRY_SEC < LEASE_SEC


@contextmanager
def slow_to_answer(seconds: float) -> Iterator[str]:
    """A server that takes a request whole, and answers it so late, as through a slow line."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            time.sleep(seconds)
            self.send_response(200)
            self.send_header("content-length", "0")
            with suppress(OSError):  # whoever asked has gone
                self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_part_of_a_reply_may_take_its_time_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with slow_to_answer(1.0) as address:
        client = RetryingClient(address, timeout=0.3)
        assert not client.PushObject(PushObjectRequest(object_content=b"weights")).stored  # what an empty answer says
        with pytest.raises(httpx.TimeoutException):
            client.PullMessages(PullMessagesRequest())


def test_a_line_of_one_and_a_half_megabits_a_second_is_fast_enough() -> None:
    at_a_time = FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES * PART_BYTES * 8
    assert at_a_time / PART_TIMEOUT_SEC < 1.5e6
    assert PART_TIMEOUT_SEC < OBJECT_PUSH_SESSION_TTL_SECONDS  # after which the SuperLink has forgotten the reply


@pytest.fixture
def bell() -> Iterator[TaskBell]:
    """Installed in Flower, which is put back as it was."""
    state, handlers = cast("Any", InMemoryNodeState), cast("Any", runtime_handlers)
    before = state.create_task, handlers.acquire_task
    found = TaskBell(hold_sec=5.0)
    found.install()
    yield found
    state.create_task, handlers.acquire_task = before


def test_who_asks_for_a_task_has_it_as_soon_as_there_is_one(bell: TaskBell) -> None:
    state = NodeStateFactory(objectstore_factory=ObjectStoreFactory()).state()
    request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
    late = threading.Timer(0.3, lambda: state.create_task(task_type=TaskType.CLIENT_APP, run_id=1, fab_hash="a" * 64))
    started = time.monotonic()
    late.start()
    answer = runtime_handlers.acquire_task(request, state)
    assert answer.token and 0.2 < time.monotonic() - started < 3.0
    assert state.create_task(task_type=TaskType.CLIENT_APP, run_id=1, fab_hash="a" * 64) is not None
    assert (
        runtime_handlers.acquire_task(request, state).task.task_id != answer.task.task_id
    )  # one that was there before is not waited for
    assert time.monotonic() - started < 4.0


def test_nobody_is_held_for_longer_than_a_supernode_may_take_to_stop() -> None:
    started = time.monotonic()
    assert not TaskBell(hold_sec=0.2).waiting(lambda *_: AcquireTaskResponse())(None, None).token
    assert 0.15 < time.monotonic() - started < 2.0
    assert HOLD_SEC < HTTP_SERVER_SHUTDOWN_TIMEOUT
