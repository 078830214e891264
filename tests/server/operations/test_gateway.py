"""The gateway as a hospital finds it: the real nginx on the generated configuration."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from flwr.proto.fleet_pb2 import ActivateNodeRequest

from pneumofed.client.site.supernode import client_with_certificate
from pneumofed.common.errors import ConfigError
from pneumofed.server.operations.gateway import FLEET_CALLS
from pneumofed.server.operations.settings import CoordinatorFolder
from pneumofed.server.provisioning.authority import open_authority
from tests.server.federations import (
    FakeSuperLink,
    fake_superlink,
    federation,
    key_of,
    make_kits,
    needs_nginx,
    open_gateway,
    send,
    status_of,
)

pytestmark = needs_nginx


@dataclass
class OpenGateway:
    """An open gateway, and what got through it."""

    kits: Path
    place: CoordinatorFolder
    superlink: FakeSuperLink
    process_id: int

    @property
    def port(self) -> int:
        return self.place.settings().port

    def ask(self, method: str, path: str, headers: str = "", body: bytes = b"x", context: ssl.SSLContext | None = None) -> int:
        head = f"{method} {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
        return status_of(send(self.port, head.encode() + body, context or trusting(self.place)))


def trusting(place: CoordinatorFolder, certificate: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(place.ca))
    if certificate:
        context.load_cert_chain(*certificate)
    return context


def opened(kits: Path, **changes: object) -> Iterator[OpenGateway]:
    place = make_kits(federation(**changes), kits)
    with fake_superlink(place, place.settings().loopback.superlink) as superlink, open_gateway(place) as process:
        yield OpenGateway(kits, place, superlink, process.pid)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenGateway]:
    yield from opened(tmp_path_factory.mktemp("kits"))


@pytest.fixture(scope="module")
def mutual_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenGateway]:
    kits = tmp_path_factory.mktemp("mutual")
    make_kits(federation(mutual_tls=True), kits)  # beta has a good certificate, and is revoked after that
    yield from opened(kits, mutual_tls=True, sites=[{"name": "alpha"}, {"name": "beta", "revoked": True}])


@pytest.mark.parametrize("call", FLEET_CALLS)
def test_fleet_call_passes(gateway: OpenGateway, call: str) -> None:
    before = len(gateway.superlink.calls)
    assert gateway.ask("POST", f"/v1/fleet/{call}") == 200
    assert [(c.method, c.path) for c in gateway.superlink.calls[before:]] == [("POST", f"/v1/fleet/{call}")]


def test_an_update_of_a_large_model_passes_whole_and_leaves_nothing_on_the_disk(gateway: OpenGateway) -> None:
    piece = bytes(range(256)) * 40_960  # 10 MB, twice what Flower sends at once
    for number in range(10):
        body = bytes([number]) + piece
        assert gateway.ask("POST", "/v1/fleet/push-object", key_of(gateway.kits, "alpha"), body=body) == 200
        assert gateway.superlink.calls[-1].body_sha256 == hashlib.sha256(body).hexdigest()
    assert not [path for path in (gateway.place.state / "nginx").rglob("*") if path.is_file()]


REFUSED = [
    # Flower's own, without authentication
    *[f"/v1/control/{call}" for call in ("start-run", "register-node", "unregister-node", "list-nodes", "stop-run", "list-runs")],
    *[f"/v1/runtime/{call}" for call in ("acquire-task", "push-messages", "pull-messages", "push-logs", "get-nodes")],
    "/v1/fleet/register-node", "/v1/fleet/unregister-node", "/v1/responses", "/health", "/docs", "/openapi.json", "/",
    # ways around a filter on the path
    "//v1/control/start-run", "/v1//fleet/activate-node", "/v1/fleet//activate-node", "//v1/fleet/activate-node",
    "/v1/fleet/../control/start-run", "/v1/fleet/activate-node/../../control/start-run", "/v1/fleet/..;/control/start-run",
    "/v1/fleet/%2e%2e/control/start-run", "/v1/fleet/%2E%2E%2Fcontrol/start-run", "/v1/fleet/..%2fcontrol%2fstart-run",
    "/v1/fleet/.%2e/control/start-run", "/v1/fleet/%252e%252e/control/start-run", "/v1/fleet\\..\\control\\start-run",
    "/V1/FLEET/ACTIVATE-NODE", "/v1/fleet/Activate-Node", "/v1/fleet/activate-nodE", "/v1/fleet/activate%2dnode",
    "/v1/fleet/activate-node/", "/v1/fleet/activate-node?x=/v1/control/start-run", "/v1/fleet/activate-node#x",
    "/v1/fleet/activate-node;x", "/v1/fleet/activate-node%00", "/v1/fleet/activate-node%20", "/v1/fleet/activate-node%0d%0aX:1",
    "/./v1/control/start-run", "/v1/fleet/./activate-node", "http://localhost/v1/control/start-run",
    "http://127.0.0.1:9091/v1/control/list-nodes", "/v1/control/start-run/v1/fleet/activate-node",
]  # fmt: skip


@pytest.mark.parametrize("path", REFUSED)
def test_everything_else_is_refused_at_the_gateway(gateway: OpenGateway, path: str) -> None:
    before = len(gateway.superlink.calls)
    assert gateway.ask("POST", path) in (400, 404)
    assert len(gateway.superlink.calls) == before


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "post", "PROPFIND"])
def test_other_methods_are_refused(gateway: OpenGateway, method: str) -> None:
    before = len(gateway.superlink.calls)
    assert gateway.ask(method, "/v1/fleet/activate-node") in (400, 405)
    assert len(gateway.superlink.calls) == before


def test_a_second_request_hidden_in_the_first_does_not_get_through(gateway: OpenGateway) -> None:
    before = len(gateway.superlink.calls)
    hidden = b"POST /v1/control/start-run HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n"
    chunked = "Transfer-Encoding: chunked"
    for lengths in (f"Content-Length: 0\r\n{chunked}", "Transfer-Encoding: xchunked", "Content-Length: 4\r\nContent-Length: 5"):
        head = f"POST /v1/fleet/get-run HTTP/1.1\r\nHost: h\r\nConnection: close\r\n{lengths}\r\n\r\n".encode()
        send(gateway.port, head + b"0\r\n\r\n" + hidden, trusting(gateway.place))
    assert {call.path for call in gateway.superlink.calls[before:]} <= {"/v1/fleet/get-run"}


def test_forwarding_headers_of_a_hospital_do_not_reach_the_superlink(gateway: OpenGateway) -> None:
    names = (
        "X-Forwarded-For",
        "X-Forwarded-Host",
        "X-Forwarded-Proto",
        "X-Real-IP",
        "Forwarded",
        "X-Original-URL",
        "X-Rewrite-URL",
    )
    before = len(gateway.superlink.calls)
    assert gateway.ask("POST", "/v1/fleet/get-run", "".join(f"{name}: /v1/control/start-run\r\n" for name in names)) == 200
    (call,) = gateway.superlink.calls[before:]
    assert call.path == "/v1/fleet/get-run"
    assert call.headers["X-Forwarded-For"] == "127.0.0.1"
    assert call.headers["Host"] == "localhost"
    assert not {"X-Forwarded-Host", "X-Real-IP", "Forwarded"} & set(call.headers)


def test_signed_headers_survive_the_gateway(gateway: OpenGateway) -> None:
    headers = "flwr-public-key: abc\r\nflwr-timestamp: 2026-01-01T00:00:00+00:00\r\nflwr-signature: def==\r\n"
    gateway.ask("POST", "/v1/fleet/get-run", headers)
    seen = gateway.superlink.calls[-1].headers
    assert (seen["flwr-public-key"], seen["flwr-signature"]) == ("abc", "def==")


def test_plain_http_is_refused(gateway: OpenGateway) -> None:
    before = len(gateway.superlink.calls)
    answer = send(
        gateway.port, b"POST /v1/fleet/get-run HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", None
    )
    assert status_of(answer) == 400
    assert len(gateway.superlink.calls) == before


def test_a_site_refuses_the_certificate_of_another_authority(gateway: OpenGateway, tmp_path: Path) -> None:
    other = make_kits(federation(), tmp_path)
    with pytest.raises(ssl.SSLCertVerificationError):
        send(gateway.port, b"", trusting(other))


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_old_tls_is_refused(gateway: OpenGateway) -> None:
    context = trusting(gateway.place)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        send(gateway.port, b"", context)


def log_with(gateway: OpenGateway, text: str) -> str:
    """The access log once `text` is in it: nginx writes a line after the answer has left."""
    deadline = time.monotonic() + 5
    while text not in (log := (gateway.place.state / "door-access.log").read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return log


def test_the_log_holds_no_header_and_no_body(gateway: OpenGateway) -> None:
    gateway.ask("POST", "/v1/fleet/confirm-message-received", "flwr-signature: s3cr3t-header\r\n", b"s3cr3t-body")
    log = log_with(gateway, "/v1/fleet/confirm-message-received 200")
    assert "/v1/fleet/confirm-message-received 200" in log
    assert "s3cr3t" not in log


def test_polls_that_went_well_fill_no_log(gateway: OpenGateway) -> None:
    before = (gateway.place.state / "door-access.log").read_text()
    for call in ("pull-messages", "send-node-heartbeat", "get-fab"):
        gateway.ask("POST", f"/v1/fleet/{call}")
    gateway.ask("POST", "/the-last")
    log = log_with(gateway, "/the-last").removeprefix(before)
    assert "get-fab" in log
    assert not re.search("pull-messages 200|heartbeat 200", log)


def test_expired_certificate_is_refused_by_the_site(tmp_path: Path) -> None:
    for gateway in opened(tmp_path):
        authority = open_authority(tmp_path / "ca", "test", datetime.now(UTC))
        key = serialization.load_pem_private_key(gateway.place.key.read_bytes(), None)
        expired = datetime.now(UTC) - timedelta(minutes=1)
        gateway.place.certificate.write_bytes(authority.issue_server(key.public_key(), ["127.0.0.1"], expired))  # type: ignore[arg-type]
        os.kill(gateway.process_id, signal.SIGHUP)
        deadline = time.monotonic() + 5
        with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
            while time.monotonic() < deadline:
                gateway.ask("POST", "/v1/fleet/get-run")
                time.sleep(0.1)


def test_mutual_tls_lets_a_site_with_its_certificate_in(mutual_gateway: OpenGateway) -> None:
    keys = mutual_gateway.kits / "alpha" / "keys"
    context = trusting(mutual_gateway.place, (keys / "client.crt", keys / "client.key"))
    assert mutual_gateway.ask("POST", "/v1/fleet/get-run", context=context) == 200


def test_mutual_tls_keeps_everybody_else_out(mutual_gateway: OpenGateway, tmp_path: Path) -> None:
    make_kits(federation(mutual_tls=True), tmp_path)
    before = len(mutual_gateway.superlink.calls)
    other, revoked = tmp_path / "alpha" / "keys", mutual_gateway.kits / "beta" / "keys"
    server = mutual_gateway.place.path / "keys"
    for pair in (
        None,
        (other / "client.crt", other / "client.key"),
        (revoked / "client.crt", revoked / "client.key"),
        (server / "server.crt", server / "server.key"),
    ):
        assert mutual_gateway.ask("POST", "/v1/fleet/get-run", context=trusting(mutual_gateway.place, pair)) in (400, 404)
    assert len(mutual_gateway.superlink.calls) == before


def test_flowers_own_client_shows_the_sites_certificate(mutual_gateway: OpenGateway) -> None:
    keys = mutual_gateway.kits / "alpha" / "keys"
    build = client_with_certificate(str(keys / "client.crt"), str(keys / "client.key"))
    address = f"127.0.0.1:{mutual_gateway.port}"
    with build.from_server_address(address, False, mutual_gateway.place.ca.read_bytes(), []) as client:
        client.ActivateNode(ActivateNodeRequest(public_key=b"k"))
    assert mutual_gateway.superlink.calls[-1].path == "/v1/fleet/activate-node"


def test_a_certificate_without_its_key_is_told_before_any_connection(mutual_gateway: OpenGateway) -> None:
    keys = mutual_gateway.kits / "alpha" / "keys"
    with pytest.raises(ConfigError, match="cannot be used"):
        client_with_certificate(str(keys / "client.crt"), str(mutual_gateway.kits / "beta" / "keys" / "client.key"))


def test_auditors_read_and_do_nothing_else(gateway: OpenGateway) -> None:
    settings = gateway.place.settings()
    assert settings.page_port
    with fake_superlink(gateway.place, settings.loopback.page, tls=False) as page:
        for method, wanted in (("GET", 200), ("POST", 405), ("PUT", 405), ("DELETE", 405)):
            request = f"{method} /api/runs HTTP/1.1\r\nHost: h\r\nConnection: close\r\nAuthorization: Bearer t\r\n\r\n".encode()
            assert status_of(send(settings.page_port, request, trusting(gateway.place))) == wanted
        assert [(call.method, call.headers["Authorization"]) for call in page.calls] == [("GET", "Bearer t")]
