"""The control interface of Flower's SuperLink, asked over loopback: sites and runs.

It is asked in this process and not with the `flwr` command, which costs two seconds a call and shows neither a node's name nor its key.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

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
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError as FlowerRefusal
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from pneumofed.common.errors import FlowerError
from pneumofed.common.ops.processes import without_proxy_on_loopback
from pneumofed.server.operations.settings import CoordinatorFolder

T = TypeVar("T")


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
