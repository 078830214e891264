"""Everything that a run needs, checked before one begins: the machine, keys, data and policy by `client.site.checks`, the connection here.

`check_connection` goes the way to the coordinator step by step: name, TCP, TLS with the federation's authority, an answer, its clock, our
key. `ask_for_admission` is the last step, which asks the coordinator whether it knows this site's key, as a SuperNode would, and leaves
again at once. `run_checks` makes all checks.
"""

from __future__ import annotations

import http.client
import logging
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import get_args

import httpx
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.supercore.error import FlowerError
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from rich.table import Table
from rich.text import Text

from pneumofed.client.site import checks
from pneumofed.client.site.checks import WARN_BEFORE_EXPIRY, Kind, Level, PreflightFinding
from pneumofed.client.site.folder import SiteFolder
from pneumofed.common.config.parties import ConnectionConfig
from pneumofed.common.errors import ConfigError
from pneumofed.common.wire.keys import read_private_key

TIMEOUT_SEC = 10.0
MAX_AHEAD_SEC, MAX_BEHIND_SEC = 5.0, 300.0
"""Flower 1.41 refuses a signed request that is dated so far ahead, or is so old (SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE)."""


@dataclass(frozen=True)
class GatewayAnswer:
    """What the coordinator's gateway answered."""

    status: int
    date: datetime | None
    certificate_ends: datetime | None


class ConnectionProblem(Exception):  # noqa: N818 - carries a finding and ends the steps
    """A step that the later ones need failed."""

    def __init__(self, name: str, sentence: str, remedy: str) -> None:
        super().__init__(sentence)
        self.finding = PreflightFinding("connection", name, "problem", sentence, remedy)


def check_connection(folder: SiteFolder) -> Iterator[PreflightFinding]:
    """Takes the steps up to the first that fails: the later ones would fail for the same reason."""
    connection = folder.connection
    host, _, port = connection.coordinator.rpartition(":")
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        yield PreflightFinding(
            "connection", "proxy", "ok", "HTTPS_PROXY is set; the way through it shows when the site is started"
        )
        yield from check_node(folder)
        return
    try:
        yield check_name(host)
        yield check_port(host, int(port))
        started = datetime.now(UTC)
        answer = probe_gateway(connection, host, int(port))
    except ConnectionProblem as problem:
        yield problem.finding
        return
    yield from check_gateway(answer)
    if answer.date:
        yield check_clock(answer.date, started)
    yield from check_node(folder)


def check_name(host: str) -> PreflightFinding:
    """Checks that the coordinator's name is known here.

    Raises:
        ConnectionProblem: it is not.
    """
    try:
        found = socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)
    except OSError:
        remedy = "check the name in connection.yaml and this machine's DNS; a hospital's DNS may need an entry"
        raise ConnectionProblem("name", f"the name {host} is not known here", remedy) from None
    return PreflightFinding("connection", "name", "ok", f"{host} is {found[0][4][0]}")


def check_port(host: str, port: int) -> PreflightFinding:
    """Checks that the coordinator's port takes TCP connections.

    Args:
        host: name or address.
        port: 1 to 65535.

    Raises:
        ConnectionProblem: it does not, or not in time.
    """
    try:
        with socket.create_connection((host, port), timeout=TIMEOUT_SEC):
            return PreflightFinding("connection", "TCP", "ok", f"port {port} is open")
    except TimeoutError:
        remedy = f"ask the firewall's keeper to allow outgoing TCP to {host}:{port}"
        raise ConnectionProblem("TCP", f"{host}:{port} does not answer", remedy) from None
    except OSError as error:
        remedy = "ask the coordinator whether the federation is up, and check the port in connection.yaml"
        raise ConnectionProblem("TCP", f"{host}:{port} refuses ({error.strerror})", remedy) from None


def probe_gateway(connection: ConnectionConfig, host: str, port: int) -> GatewayAnswer:
    """Sends the gateway a request that no site may make, to see what answers.

    Args:
        connection: the site's: the federation's authority, and the site's certificate where there is one.
        host: name or address.
        port: 1 to 65535.

    Returns:
        The answer's status and date, and when the coordinator's certificate expires.

    Raises:
        ConnectionProblem: no TLS connection could be made, or no HTTP answer came.
    """
    try:
        context = ssl.create_default_context(cafile=connection.ca)
        if connection.client_certificate and connection.client_key:
            context.load_cert_chain(connection.client_certificate, connection.client_key)
    except (OSError, ssl.SSLError):
        raise ConnectionProblem(
            "TLS", "the authority or the site's certificate cannot be used", "see the lines on keys"
        ) from None
    channel = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_SEC, context=context)
    try:
        channel.connect()
        certificate = channel.sock.getpeercert() or {}
        channel.request("GET", "/")
        answer = channel.getresponse()
        date = _date(answer.getheader("Date"))
        ends = certificate.get("notAfter")
        return GatewayAnswer(
            answer.status, date, datetime.fromtimestamp(ssl.cert_time_to_seconds(str(ends)), UTC) if ends else None
        )
    except ssl.SSLCertVerificationError as error:
        raise ConnectionProblem("TLS", *_explain(error, host)) from None
    except (ssl.SSLError, http.client.HTTPException, OSError) as error:
        sentence = f"what answers at {host}:{port} does not speak our TLS ({type(error).__name__})"
        raise ConnectionProblem("TLS", sentence, "check the port; a proxy that opens TLS must leave this address alone") from None
    finally:
        channel.close()


def check_gateway(answer: GatewayAnswer) -> Iterator[PreflightFinding]:
    """Checks the certificate and the status of the gateway's answer."""
    remedy = "report it to the coordinator"
    if answer.certificate_ends and answer.certificate_ends - datetime.now(UTC) < WARN_BEFORE_EXPIRY:
        yield PreflightFinding(
            "connection", "TLS", "warning", f"the coordinator's certificate expires on {answer.certificate_ends:%Y-%m-%d}", remedy
        )
    else:
        yield PreflightFinding("connection", "TLS", "ok", "the federation's authority vouches for the coordinator")
    if answer.status >= 500:
        yield PreflightFinding(
            "connection", "answer", "problem", f"the gateway answers {answer.status}", "ask the coordinator whether it is up"
        )
    elif answer.status == 400:  # nginx without the certificate that it asks for
        sentence, remedy = (
            "the gateway refuses the request (400)",
            "the gateway may ask for a site certificate: see client_certificate",
        )
        yield PreflightFinding("connection", "answer", "warning", sentence, remedy)
    else:
        yield PreflightFinding("connection", "answer", "ok", f"HTTP {answer.status}")


def check_clock(theirs: datetime, ours: datetime) -> PreflightFinding:
    """Compares the clocks, up to the second that the Date header leaves open.

    Args:
        theirs: the Date header of the coordinator's answer, to the second.
        ours: when the request began.
    """
    difference = max(abs((ours - theirs).total_seconds()) - 1.0, 0.0)
    limit = MAX_AHEAD_SEC if ours > theirs else MAX_BEHIND_SEC
    if difference < MAX_AHEAD_SEC / 2:
        return PreflightFinding("environment", "clock", "ok", "as the coordinator's")
    level: Level = "problem" if difference >= limit * 0.8 else "warning"
    sentence = (
        f"{difference:.0f} s {'ahead of' if ours > theirs else 'behind'} the coordinator's, who refuses beyond {limit:.0f} s"
    )
    return PreflightFinding("environment", "clock", level, sentence, "switch time synchronisation on: timedatectl set-ntp true")


def check_node(folder: SiteFolder) -> Iterator[PreflightFinding]:
    """Whether the coordinator knows our key. A running SuperNode shows it by running, and must not be disturbed."""
    from pneumofed.client.site.service import running_process

    if running_process(folder) is not None:
        yield PreflightFinding("connection", "node", "ok", "the SuperNode is running")
        return
    started = time.monotonic()
    try:
        refusal = ask_for_admission(folder.connection, TIMEOUT_SEC)
    except ConfigError as error:
        yield PreflightFinding("connection", "node", "problem", str(error), "see the lines on keys")
        return
    if refusal is None:
        yield PreflightFinding("connection", "node", "ok", f"the coordinator knows this key ({time.monotonic() - started:.1f} s)")
    else:
        remedy = (
            "send keys/node.pub to the coordinator and compare the fingerprint; a revoked key needs a new pair. After a SuperNode was "
            "killed, wait two minutes"
        )
        yield PreflightFinding("connection", "node", "problem", f"the coordinator does not accept this key: {refusal}", remedy)


def ask_for_admission(connection: ConnectionConfig, patience_sec: float) -> str | None:
    """Asks the coordinator whether it takes the site's key.

    For a moment the site counts as connected. Not to be called while its SuperNode runs, whose place it would take.

    Args:
        connection: the site's.
        patience_sec: how long to wait for each answer.

    Returns:
        None where the coordinator takes the key, else what it said.

    Raises:
        ConfigError: a key or certificate of the site cannot be used.
    """
    private = read_private_key(Path(connection.key))
    public = public_key_to_bytes(private.public_key())
    interceptors: list[ProtobufClientInterceptor] = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        NodeAuthHttpInterceptor(private, private.public_key()),
    ]
    try:
        with _client(connection).from_server_address(connection.coordinator, False, connection.ca, interceptors) as client:
            client._client.timeout = httpx.Timeout(patience_sec)
            answer = client.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL))
            client.DeactivateNode(DeactivateNodeRequest(node_id=answer.node_id))
    except httpx.HTTPStatusError as error:
        refusal = FlowerError.from_json(error.response.text)
        return refusal.message if refusal else f"HTTP {error.response.status_code}"
    except httpx.HTTPError as error:
        return type(error).__name__
    return None


def _client(connection: ConnectionConfig) -> type[FleetHttpClient]:
    if connection.client_certificate is None:
        return FleetHttpClient
    from pneumofed.client.site.supernode import client_with_certificate

    return client_with_certificate(connection.client_certificate, str(connection.client_key))


def _explain(error: ssl.SSLCertVerificationError, host: str) -> tuple[str, str]:
    """Codes of OpenSSL's verification (openssl-verification-options): 9 and 10 validity, 62 and 64 name or address."""
    if error.verify_code == 10:
        return "the coordinator's certificate has expired", "report it to the coordinator; nothing can be done here"
    if error.verify_code == 9:
        return "the coordinator's certificate is not valid yet", "set this machine's clock right"
    if error.verify_code in (62, 64):
        return f"the coordinator's certificate is not for {host}", "use the name in connection.yaml that the coordinator gave you"
    return (
        "the coordinator's certificate is not from the federation's authority",
        "check that keys/ca.crt is the coordinator's; a proxy that opens TLS must leave this address alone",
    )


def _date(text: str | None) -> datetime | None:
    try:
        return parsedate_to_datetime(text).astimezone(UTC) if text else None
    except ValueError:
        return None


logger = logging.getLogger(__name__)

EXIT_CODES: dict[Kind, int] = {"environment": 10, "keys": 11, "connection": 12, "data": 13, "policy": 14}
LEVEL_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}
CHECKS: dict[Kind, Callable[[SiteFolder], Iterable[PreflightFinding]]] = {
    "environment": checks.check_environment,
    "keys": checks.check_site_keys,
    "connection": check_connection,
    "data": checks.check_data,
    "policy": checks.check_policy_file,
}


def run_checks(folder: SiteFolder) -> list[PreflightFinding]:
    """Runs all checks; findings come by kind. A check that fails itself is a problem of its kind, and the others are still made."""
    findings = [finding for kind in CHECKS for finding in _run(kind, folder)]
    return sorted(findings, key=lambda finding: get_args(Kind).index(finding.kind))


def exit_code(findings: Sequence[PreflightFinding]) -> int:
    """0 without a problem, else the code of the first kind that has one: a later kind may suffer from an earlier one."""
    return min((EXIT_CODES[finding.kind] for finding in findings if finding.level == "problem"), default=0)


def findings_table(findings: Sequence[PreflightFinding]) -> Table:
    """The findings for people."""
    shown = Table(box=None, pad_edge=False)
    for heading in ("kind", "check", "", "found, and what to do"):
        shown.add_column(heading, overflow="fold")
    for finding in findings:
        colour = LEVEL_COLOURS[finding.level]
        found = f"{finding.sentence}: {finding.remedy}" if finding.remedy else finding.sentence
        shown.add_row(finding.kind, finding.name, Text(finding.level, colour), found)
    return shown


def _run(kind: Kind, folder: SiteFolder) -> list[PreflightFinding]:
    found: list[PreflightFinding] = []
    try:
        found.extend(CHECKS[kind](folder))
    except ConfigError as error:
        found.append(PreflightFinding(kind, "settings", "problem", str(error), "fix that file"))
    except Exception as error:
        logger.exception("the check of %s failed", kind)
        found.append(
            PreflightFinding(
                kind, "check", "problem", f"could not be made ({type(error).__name__}): {error}", "report it to the developers"
            )
        )
    return found
