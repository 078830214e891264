"""Federations on free ports of this machine, their kits, and a SuperLink that only listens."""

from __future__ import annotations

import base64
import hashlib
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pneumofed.common.config.reader import build_config
from pneumofed.common.ops.processes import free_ports
from pneumofed.common.wire.keys import public_pem, read_public_key
from pneumofed.server.operations.gateway import gateway_answers, gateway_command
from pneumofed.server.operations.settings import CoordinatorFolder
from pneumofed.server.provisioning.identities import FederationConfig
from pneumofed.server.provisioning.provision import provision

needs_nginx = pytest.mark.skipif(
    shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin") is None, reason="nginx is not installed (apt install nginx)"
)


def federation(**changes: Any) -> FederationConfig:
    """A federation at 127.0.0.1 with free ports; `changes` are keys of the federation file."""
    port, page_port, superlink, superlink_health, superexec_health, page = free_ports(6)
    loopback = {"superlink": superlink, "superlink_health": superlink_health, "superexec_health": superexec_health, "page": page}
    values = {
        "name": "test",
        "coordinator": {"hosts": ["127.0.0.1", "fl.example.org"], "port": port, "page_port": page_port, "loopback": loopback},
        "sites": [{"name": "alpha"}, {"name": "beta"}],
    }
    return build_config(FederationConfig, values | changes)


def changed(config: FederationConfig, **changes: Any) -> FederationConfig:
    return build_config(FederationConfig, config.model_dump() | changes)


@dataclass
class Call:
    """A request that reached the SuperLink."""

    method: str
    path: str
    headers: Mapping[str, str]
    body_sha256: str


@dataclass
class FakeSuperLink:
    """Answers 200 to all that reaches it, and remembers it."""

    calls: list[Call] = field(default_factory=list)


@contextmanager
def fake_superlink(place: CoordinatorFolder, port: int, tls: bool = True) -> Iterator[FakeSuperLink]:
    """A server on loopback at the place of the SuperLink (or, without TLS, of the live page)."""
    seen = FakeSuperLink()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            seen.calls.append(Call(self.command, self.path, dict(self.headers), hashlib.sha256(self._body()).hexdigest()))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_PUT = do_HEAD = do_POST  # noqa: N815

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(place.certificate, place.key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def open_gateway(place: CoordinatorFolder) -> Iterator[subprocess.Popen[bytes]]:
    """The real nginx on the configuration of the kit, without the processes behind it."""
    (place.state / "nginx").mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(gateway_command(place), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 10
        while not gateway_answers(place.ca, place.settings().port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError((place.state / "door-error.log").read_text())
            time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        process.wait(10)


def make_kits(config: FederationConfig, out: Path) -> CoordinatorFolder:
    """Kits with the sites' keys, which a test plays the sites with."""
    provision(config, out, with_keys=True)
    return CoordinatorFolder((out / "coordinator").resolve())


def key_of(kits: Path, site: str) -> str:
    """The header line by which Flower's SuperNode shows the site's key."""
    key = public_pem(read_public_key(kits / "coordinator" / "sites" / f"{site}.pub"))
    return f"flwr-public-key: {base64.b64encode(key).decode()}\r\n"


def send(port: int, request: bytes, context: ssl.SSLContext | None) -> bytes:
    """The raw answer to raw bytes, over TLS or, without a context, plain."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as plain:
        if context is None:
            return _exchange(plain, request)
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as secured:
            return _exchange(secured, request)


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def _exchange(connection: socket.socket, request: bytes) -> bytes:
    connection.sendall(request)
    answer = b""
    while piece := connection.recv(65536):
        answer += piece
    return answer
