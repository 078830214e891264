"""The promise: who shows no key of a site costs the coordinator no memory; an update of 45 MB passes all the same."""

from __future__ import annotations

import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pneumofed.server.operations import processes
from pneumofed.server.operations.gateway import FLEET_CALLS
from pneumofed.server.operations.settings import CoordinatorFolder
from tests.server.federations import fake_superlink, federation, key_of, make_kits, needs_nginx, open_gateway, send, status_of
from tests.server.operations.test_processes import running

pytestmark = needs_nginx
MEGABYTE = 1 << 20
OTHER_KEY = "flwr-public-key: QUJD\r\n"


@pytest.fixture(scope="module", params=[False, True], ids=["keys", "certificates"])
def door(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    kits = tmp_path_factory.mktemp("kits")
    place = make_kits(federation(mutual_tls=request.param), kits)
    with fake_superlink(place, place.settings().loopback.superlink) as superlink, open_gateway(place):
        yield Door(kits, place, request.param, lambda: len(superlink.calls))


class Door:
    """An open gateway; `calls` counts what got through it."""

    def __init__(self, kits: Path, place: CoordinatorFolder, mutual_tls: bool, calls: object) -> None:
        self.kits, self.place, self.mutual_tls, self.calls = kits, place, mutual_tls, calls

    def context(self, site: str | None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.place.ca))
        if site and self.mutual_tls:
            context.load_cert_chain(self.kits / site / "keys" / "client.crt", self.kits / site / "keys" / "client.key")
        return context

    def upload(self, call: str, size: int, headers: str = "", site: str | None = None, chunked: bool = False) -> int:
        """The status of a body of `size` bytes; 0 where the connection was closed on it."""
        length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
        head = f"POST /v1/fleet/{call} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n{length}\r\n{headers}\r\n".encode()
        body = b"%x\r\n" % size + bytes(size) + b"\r\n0\r\n\r\n" if chunked else bytes(size)
        try:
            return status_of(send(self.place.settings().port, head + body, self.context(site)))
        except (OSError, IndexError):
            return 0


REFUSED = (0, 400, 413)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("headers", ["", OTHER_KEY])
def test_who_shows_no_key_of_a_site_sends_a_few_bytes_only(door: Door, headers: str, chunked: bool) -> None:
    for call in ("push-object", "push-messages", "activate-node"):
        assert door.upload(call, 2 * MEGABYTE, headers, chunked=chunked) in REFUSED
    if not door.mutual_tls:
        assert door.upload("activate-node", 1000, headers) == 200  # the SuperLink says in its own words what is wrong


@pytest.mark.parametrize("chunked", [False, True])
def test_a_sites_pieces_pass_and_nothing_else_is_large(door: Door, chunked: bool) -> None:
    key = key_of(door.kits, "alpha")
    assert door.upload("push-object", 10 * MEGABYTE, key, "alpha", chunked) == 200
    assert door.upload("push-object", 20 * MEGABYTE, key, "alpha", chunked) in REFUSED
    for call in set(FLEET_CALLS) - {"push-object"}:
        assert door.upload(call, 2 * MEGABYTE, key, "alpha", chunked) in REFUSED


def test_a_certificate_without_a_key_is_not_enough_and_the_rooms_of_the_gateway_have_no_door(door: Door) -> None:
    assert door.upload("push-object", MEGABYTE, OTHER_KEY, "alpha") in REFUSED
    for room in ("stranger", "small", "large"):
        head = f"POST /{room} HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx".encode()
        assert status_of(send(door.place.settings().port, head, door.context("alpha"))) == 404


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutual_tls", [False, True])
def test_six_anonymous_bodies_of_200_mb_cost_the_superlink_nothing(tmp_path: Path, mutual_tls: bool) -> None:
    with running(federation(mutual_tls=mutual_tls), tmp_path) as coordinator:
        pid = processes.process_status(coordinator.folder).processes[0].pid
        assert pid
        context, port = ssl.create_default_context(cafile=str(coordinator.place.ca)), coordinator.place.settings().port
        before, most = resident_mb(pid), 0.0
        threads = [threading.Thread(target=pour, args=(port, context, 200 * MEGABYTE)) for _ in range(6)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            most = max(most, resident_mb(pid))
            time.sleep(0.05)
        most = max(most, resident_mb(pid))
        sys.stdout.write(f"SuperLink: {before:.0f} MB before, {most:.0f} MB at most\n")
        assert most - before < 50


def pour(port: int, context: ssl.SSLContext, size: int) -> None:
    """Sends a body of `size` bytes, as far as it is taken."""
    head = (
        f"POST /v1/fleet/push-object HTTP/1.1\r\nHost: h\r\nContent-Type: application/protobuf\r\nContent-Length: {size}\r\n\r\n"
    )
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=60) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as tls,
        ):
            tls.sendall(head.encode())
            for _ in range(size // MEGABYTE):
                tls.sendall(bytes(MEGABYTE))
            tls.recv(1)
    except OSError:
        return


def resident_mb(pid: int) -> float:
    """VmRSS of /proc/PID/status (proc(5)) in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))
