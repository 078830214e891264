"""The gateway: nginx in front of the SuperLink, through which hospitals reach the fleet interface and nothing else.

Flower 1.41 serves its fleet, control and runtime interfaces on one port, the latter two without any authentication. So the SuperLink
listens on loopback only, and the gateway passes on exactly the calls that a registered SuperNode makes.
"""

from __future__ import annotations

import shutil
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path

from pneumofed.common.ops.render import render
from pneumofed.server.operations.settings import CoordinatorFolder, CoordinatorSettings

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


def render_gateway(settings: CoordinatorSettings, sites: Sequence[str]) -> str:
    """Renders nginx's configuration.

    Args:
        settings: of the coordinator: ports, hosts, mutual TLS.
        sites: names of the sites that may come in; used only with mutual TLS.
    """
    return render(__package__, "nginx.conf", s=settings, sites=sites, fleet_calls=FLEET_CALLS)


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
