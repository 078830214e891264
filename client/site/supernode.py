"""Flower's SuperNode with what a hospital needs besides: retries, a longer heartbeat, and a certificate of its own.

    python -P -m pneumofed.client.site.supernode [--client-certificate client.crt --client-key client.key] ... what
    flower-supernode takes ...

Seven things of Flower 1.41 are fixed, four of them in its client of the fleet interface; everything else is Flower's own.

- It takes a TLS handshake that timed out or was cut off for a wrong certificate: it gives up, and deletes the reply that it was about
  to send, which may be an hour's training.
- It waits 30 s for a part of a reply to be sent and taken, and then sends it again: over a line of 2 Mbit/s none ever arrives.
- It promises a heartbeat every 30 s, so that the coordinator takes a site for lost, and its work with it, that was cut off for a minute.
- It asks for the next message every 3 s, and looks for its own app's answer every 0.5 s: in a secure round of ten messages that alone is
  half a minute. `Pace` asks soon after a message, and less and less often.
- Large messages travel in parts of 5 MB, each of which costs a request, and whoever waits for a part that is still on its way waits 1, 2,
  4, 8 s (`tune_parts`); its SuperExec is told at once, four times a second, that there is no task; `TaskBell` lets it wait for one.
- What it no longer needs of each message, 45 MB each way, stays until Python happens to look for garbage (`serve_long`).
- It cannot show a client certificate to a proxy that asks for mutual TLS, since it builds a TLS context only from the root certificates.
"""

from __future__ import annotations

import argparse
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState
from flwr.supernode.servicer.runtime import runtime_handlers

from pneumofed.client.site.code_gate_resident import start_resident
from pneumofed.common.errors import ConfigError
from pneumofed.common.ops.processes import serve_long
from pneumofed.common.wire.messages import tune_parts

HEARTBEAT_INTERVAL_SEC = 75.0
"""Within twice this time (Flower's HEARTBEAT_PATIENCE) the site sends a heartbeat, or counts as lost. It is sent every 24 s all the
same, and what could not be sent is tried again after 30 s and a pause: a network that is cut for 90 s costs nothing."""

LEAST_WAIT_SEC, LATE_BY = 0.1, 0.05
PART_PAUSES_SEC = 0.2, 1.0
"""First and longest pause before the coordinator is asked again for a part of a message that is not there yet: all sites ask at the time
when it puts the parts there, and each question takes some of its processor."""
PART_TIMEOUT_SEC = 170.0
"""How long a part of a reply may take. Two are sent at a time, and the SuperLink forgets a reply of which no part came for 180 s (Flower's
OBJECT_PUSH_SESSION_TTL_SECONDS): a line of 1.5 Mbit/s suffices."""
PUSH_PART = "/v1/fleet/push-object"
OWN_WAIT_SEC = 0.02
"""How often this process looks for its own app's answer, which lies in its memory."""
HOLD_SEC = 2.0
"""How long SuperExec's question for a task is held at most; shorter than the SuperNode may take to stop (Flower's
HTTP_SERVER_SHUTDOWN_TIMEOUT, 3 s)."""


class Pace:
    """The module `time` to Flower's main loop, which uses nothing of it but `sleep`.

    Who waited for the coordinator since a message was answered is late by a twentieth of that time at most, and asks every 0.1 to 3 s. A
    question that was held so long (`server.operations.superlink.MessageBell`) is followed by the next one at once.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep) -> None:
        self._now, self._sleep = now, sleep
        self._answered = self._asked = now()

    def asking(self, ask: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps Flower's question for the next message, whose time counts as waiting."""

        def pull_and_store_message(**named: Any) -> Any:
            self._asked = self._now()
            return ask(**named)

        return pull_and_store_message

    def answering(self, answer: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps Flower's sending of the answer, after which the waiting begins."""

        def push_messages(**named: Any) -> Any:
            try:
                return answer(**named)
            finally:
                self._answered = self._now()

        return push_messages

    def sleep(self, seconds: float) -> None:
        """Waits in place of Flower's `time.sleep`.

        Args:
            seconds: what Flower would wait; below a second it waits for its own app, else for the coordinator.
        """
        if seconds < 1.0:
            self._sleep(OWN_WAIT_SEC)
            return
        now = self._now()
        interval = min(seconds, max(LEAST_WAIT_SEC, LATE_BY * (now - self._answered)))
        self._sleep(max(0.0, self._asked + interval - now))


class TaskBell:
    """Lets SuperExec's question for a task wait until there is one, for `HOLD_SEC` at most."""

    def __init__(self, hold_sec: float = HOLD_SEC) -> None:
        self._hold_sec = hold_sec
        self._rung = threading.Event()

    def install(self) -> None:
        """Puts the bell between Flower's memory of tasks and its answer to SuperExec."""
        state: Any = InMemoryNodeState
        handlers: Any = runtime_handlers
        state.create_task = self.ringing(state.create_task)
        handlers.acquire_task = self.waiting(handlers.acquire_task)

    def ringing(self, create: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps Flower's `create_task`, after which there is a task."""

        def create_task(*arguments: Any, **named: Any) -> Any:
            created = create(*arguments, **named)
            self._rung.set()
            return created

        return create_task

    def waiting(self, acquire: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """Wraps Flower's `acquire_task`, whose answer has a token where there is a task."""

        def acquire_task(request: Any, state: Any) -> Any:
            self._rung.clear()  # before the look: a task that comes after it rings
            answer = acquire(request, state)
            if not answer.token and self._rung.wait(self._hold_sec):
                answer = acquire(request, state)
            return answer

        return acquire_task


class RetryingClient(FleetHttpClient):
    """Flower's client of the fleet interface, whose callers try again after a handshake that failed for a transient reason, which has
    patience with a slow line, and which promises a heartbeat every `HEARTBEAT_INTERVAL_SEC`."""

    def ActivateNode(self, request: ActivateNodeRequest) -> ActivateNodeResponse:  # noqa: N802
        request.heartbeat_interval = HEARTBEAT_INTERVAL_SEC
        return super().ActivateNode(request)

    def SendNodeHeartbeat(self, request: SendNodeHeartbeatRequest) -> SendNodeHeartbeatResponse:  # noqa: N802
        request.heartbeat_interval = HEARTBEAT_INTERVAL_SEC
        return super().SendNodeHeartbeat(request)

    def _unary_unary(self, **call: Any) -> Any:
        if call["path"] == PUSH_PART:  # whoever does not answer at all is found out as soon as ever
            others = self._client.timeout.as_dict()
            call["timeout"] = httpx.Timeout(**{**others, "read": PART_TIMEOUT_SEC, "write": PART_TIMEOUT_SEC})
        try:
            return super()._unary_unary(**call)
        except httpx.TransportError as error:
            if is_transient(error):
                # Flower tries again unless the text holds "ssl", "tls" or "certificate" (supercore/retry/http_retry.py)
                raise httpx.ConnectTimeout("the coordinator did not answer in time") from error
            raise


def is_transient(error: BaseException) -> bool:
    """Reports whether the connection timed out or was cut off, also in its handshake. A certificate that does not hold is not transient."""
    causes = list(_chain(error))
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
        return False
    cut = (TimeoutError, ConnectionError, httpx.TimeoutException, ssl.SSLEOFError, ssl.SSLZeroReturnError)
    return any(isinstance(cause, cut) for cause in causes)


def client_with_certificate(certificate: str, key: str) -> type[FleetHttpClient]:
    """Makes the client class that shows `certificate` when it is asked for one, and retries as `RetryingClient`.

    Args:
        certificate: path of the site's certificate (PEM).
        key: path of its private key (PEM).

    Raises:
        ConfigError: the certificate or its key cannot be read, or they do not belong together.
    """
    _load(ssl.create_default_context(), certificate, key)  # now, and not in the middle of a connection

    class Client(RetryingClient):
        def __init__(self, base_url: str, *, verify: ssl.SSLContext | bool | str = True, **options: Any) -> None:
            if not isinstance(verify, ssl.SSLContext):
                raise ConfigError("a client certificate needs --root-certificates, and no --insecure")
            _load(verify, certificate, key)
            super().__init__(base_url, verify=verify, **options)

    return Client


def main(arguments: Sequence[str] | None = None, start: Callable[[], None] = flower_supernode) -> None:
    """Starts Flower's SuperNode, whose own options are all that is left after ours.

    Args:
        arguments: of the command line; the process's own where it is None.
        start: Flower's entry, called with the rest of the arguments in `sys.argv`.
    """
    parser = argparse.ArgumentParser(prog="python -m pneumofed.client.site.supernode", add_help=False, allow_abbrev=False)
    parser.add_argument("--client-certificate")
    parser.add_argument("--client-key")
    parser.add_argument("--gate", type=Path)
    ours, theirs = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    client = client_with_certificate(ours.client_certificate, ours.client_key) if ours.client_certificate else RetryingClient
    fleet_http_connection.FleetHttpClient = client  # type: ignore[misc]
    _set_pace(start_client_internal, Pace())
    tune_parts(*PART_PAUSES_SEC)
    TaskBell().install()
    serve_long()
    if ours.gate:
        start_resident(ours.gate)
    sys.argv = ["flower-supernode", *theirs]
    start()


def _set_pace(loop: Any, pace: Pace) -> None:
    loop.time = pace
    loop._pull_and_store_message = pace.asking(loop._pull_and_store_message)
    loop._push_messages = pace.answering(loop._push_messages)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _load(context: ssl.SSLContext, certificate: str, key: str) -> None:
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"the client certificate {certificate} and its key {key} cannot be used: {error}; take both from the kit"
        ) from error


if __name__ == "__main__":
    main()
