"""How sites come to the SuperLink: each is registered by its public key and refused once revoked, and all pass the gateway.

The gateway is nginx in front of the SuperLink, through which hospitals reach the fleet interface and nothing else. Flower 1.41 serves its
fleet, control and runtime interfaces on one port, the latter two without any authentication. So the SuperLink listens on loopback only,
and the gateway passes on exactly the calls that a registered SuperNode makes.
"""

from __future__ import annotations

import base64
import shutil
import socket
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pneumofed.common.errors import FlowerError
from pneumofed.common.ops.render import render
from pneumofed.common.wire.keys import public_pem, read_public_key
from pneumofed.server.operations.settings import CoordinatorFolder, CoordinatorSettings

if TYPE_CHECKING:
    from pneumofed.server.operations.control import Node

FLEET_CALLS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
"""All but `register-node` and `unregister-node`, which are the coordinator's: `flwr.superlink.routers.fleet.router`."""
BODY_LIMITS = {"stranger": "16k", "small": "1m", "large": "16m"}
"""Of a request, in nginx's words, by who sends it and what, since the SuperLink reads a request whole before it verifies the signature.
`stranger`: who shows no key of a site; `large`: a part of a message (`push-object`), at most `PART_BYTES`; `small`: all else."""


@dataclass(frozen=True)
class SiteStatus:
    """One site as the coordinator sees it now."""

    name: str
    node_id: int | None
    """Flower's number for it; None where it is not registered."""
    connected: bool
    detail: str
    """`connected`, `registered, not connected yet`, `disconnected since ...`, `revoked`, `not registered`, `unknown: ...`."""


def register_sites(place: CoordinatorFolder) -> None:
    """Makes the SuperLink know exactly the keys of `place.site_keys()`.

    Raises:
        ConfigError: a file holds no public key.
        FlowerError: the SuperLink does not answer, or a key was revoked before, which Flower never takes again.
    """
    from pneumofed.server.operations.control import open_control

    wanted = {name: public_pem(read_public_key(path)) for name, path in place.site_keys().items()}
    with open_control(place) as control:
        nodes = control.nodes()
        known = {(node.name, node.public_key) for node in _live(nodes)}
        for node in _live(nodes):
            if wanted.get(node.name) != node.public_key:
                control.unregister(node.id)
        for name, key in wanted.items():
            if (name, key) not in known:
                _check_never_revoked(name, key, nodes)
                control.register(name, key)


def list_sites(place: CoordinatorFolder, superlink_serves: bool) -> tuple[SiteStatus, ...]:
    """Lists all sites that have a key file or are revoked, sorted by name.

    Args:
        place: the coordinator folder.
        superlink_serves: whether the SuperLink can be asked; without it each site's connection is unknown.
    """
    names, revoked = set(place.site_keys()), set(place.settings().revoked)
    nodes, unknown = _nodes_by_name(place) if superlink_serves else ({}, "unknown: the SuperLink does not answer")
    return tuple(
        _state(name, nodes.get(name), unknown or ("revoked" if name in revoked else "")) for name in sorted(names | revoked)
    )


def _nodes_by_name(place: CoordinatorFolder) -> tuple[dict[str, Node], str]:
    """The registered nodes, or why nothing is known of them: a question must not fail because the SuperLink is busy."""
    from pneumofed.server.operations.control import open_control

    try:
        with open_control(place) as control:
            return {node.name: node for node in _live(control.nodes())}, ""
    except FlowerError as error:
        return {}, f"unknown: {error}"


def _state(name: str, node: Node | None, other: str) -> SiteStatus:
    if other:
        return SiteStatus(name, node.id if node else None, False, other)
    if node is None:
        return SiteStatus(name, None, False, "not registered")
    if node.status == "online":
        return SiteStatus(name, node.id, True, "connected")
    since = node.last_deactivated_at
    return SiteStatus(name, node.id, False, f"disconnected since {since}" if since else "registered, not connected yet")


def _live(nodes: Iterable[Node]) -> list[Node]:
    return [node for node in nodes if node.status != "unregistered"]


def _check_never_revoked(name: str, key: bytes, nodes: Iterable[Node]) -> None:
    if any(node.public_key == key for node in nodes):
        raise FlowerError(
            f"site {name}: this key was revoked, renamed or is another site's, and Flower takes no key twice; "
            f"the site makes a new pair and sends its node.pub"
        )


def render_gateway(settings: CoordinatorSettings, sites: Mapping[str, bytes]) -> str:
    """Renders nginx's configuration.

    Args:
        settings: of the coordinator: ports, hosts, mutual TLS.
        sites: public key (PEM) of each site that may come in, by its name.
    """
    keys = {base64.b64encode(key).decode("ascii"): name for name, key in sites.items()}  # as Flower's header has it
    return render(
        __package__, "nginx.conf", s=settings, sites=sorted(sites), keys=keys, limits=BODY_LIMITS, fleet_calls=FLEET_CALLS
    )


def gateway_command(place: CoordinatorFolder) -> list[str]:
    """Builds the command that runs nginx in `place` until it is stopped, with all its files in there."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin") or "nginx"
    early_log = str(place.state / "door-error.log")  # the former name of the gateway, which files in `state/` keep
    return [program, "-p", f"{place.path}/", "-c", str(place.gateway_config), "-e", early_log, "-g", "daemon off;"]


def gateway_answers(ca: Path, port: int) -> bool:
    """Says whether the gateway on this machine speaks TLS with a valid certificate of the federation. Sends no request.

    Args:
        ca: certificate of the federation's authority, PEM.
        port: where it listens.
    """
    context = ssl.create_default_context(cafile=str(ca))
    try:
        plain = socket.create_connection(("127.0.0.1", port), timeout=2.0)
        with plain, context.wrap_socket(plain, server_hostname="localhost"):
            return True
    except OSError:  # also ssl.SSLError
        return False
