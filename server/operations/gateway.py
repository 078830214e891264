"""The gateway: nginx in front of the SuperLink, through which hospitals reach the fleet interface and nothing else.

Flower 1.41 serves its fleet, control and runtime interfaces on one port, the latter two without any authentication. So the SuperLink
listens on loopback only, and the gateway passes on exactly the calls that a registered SuperNode makes.
"""

from __future__ import annotations

import base64
import shutil
import socket
import ssl
from collections.abc import Mapping
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


BODY_LIMITS = {"stranger": "16k", "small": "1m", "large": "16m"}
"""Of a request, in nginx's words, by who sends it and what, since the SuperLink reads a request whole before it verifies the signature.
`stranger`: who shows no key of a site; `large`: a piece of a message (`push-object`), 5 MB in Flower 1.41; `small`: all else."""


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
