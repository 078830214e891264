"""Long-lived processes: pid files that cannot lie, and children that do not outlive a stop."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pneumofed.common.errors import ConfigError
from pneumofed.common.ops import processes
from pneumofed.common.ops.processes import (
    ALLOCATOR_SETTINGS,
    MAX_LOG_BYTES,
    SERVING_ALLOCATOR,
    Daemon,
    check_port_free,
    flower_environment,
    free_ports,
    started_at,
    without_proxy_on_loopback,
)

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def start(state: Path, command: list[str]) -> Daemon:
    """A daemon that has said its first word."""
    daemon = Daemon("thing", state)
    daemon.start(command, os.environ, state)
    deadline = time.monotonic() + 20
    while not daemon.log.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    return daemon


def test_a_running_process_is_known_by_its_pid_file(tmp_path: Path) -> None:
    daemon = start(tmp_path, SLEEP)
    try:
        assert started_at(daemon.pid() or 0)
        assert daemon.last_words() == "up"
    finally:
        daemon.stop()
    assert daemon.pid() is None
    assert not daemon.was_started()


def test_a_killed_process_is_dead_and_not_forgotten(tmp_path: Path) -> None:
    daemon = start(tmp_path, SLEEP)
    daemon.send(signal.SIGKILL)
    deadline = time.monotonic() + 5
    while daemon.pid() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert daemon.pid() is None
    assert daemon.was_started()
    daemon.stop()


def test_another_program_with_the_same_number_is_not_taken_for_ours_nor_stopped(tmp_path: Path) -> None:
    other = subprocess.Popen(SLEEP, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        (tmp_path / "thing.pid").write_text(json.dumps({"pid": other.pid, "started": "an earlier time"}))
        daemon = Daemon("thing", tmp_path)
        assert daemon.pid() is None
        daemon.stop()
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("content", ["", "12", "{}", '{"pid": "x", "started": "y"}', "\x00"])
def test_a_damaged_pid_file_means_nothing_runs(tmp_path: Path, content: str) -> None:
    (tmp_path / "thing.pid").write_text(content)
    daemon = Daemon("thing", tmp_path)
    assert daemon.pid() is None
    daemon.stop()


def test_a_process_that_will_not_stop_is_made_to(tmp_path: Path) -> None:
    daemon = start(tmp_path, [sys.executable, "-c", STUBBORN])
    pid = daemon.pid()
    daemon.stop(patience_sec=0.2)
    assert pid
    assert started_at(pid) is None


@pytest.mark.parametrize("killed_before", [False, True])
def test_children_end_with_their_parent(tmp_path: Path, killed_before: bool) -> None:
    daemon = start(tmp_path, [sys.executable, "-c", PARENT])
    child = int(daemon.last_words())
    if killed_before:
        daemon.send(signal.SIGKILL)
    daemon.stop()
    assert started_at(child) is None


def test_files_are_their_owners_alone(tmp_path: Path) -> None:
    daemon = start(tmp_path, SLEEP)
    daemon.stop()
    assert daemon.log.stat().st_mode & 0o777 == 0o600


def test_a_large_log_makes_room(tmp_path: Path) -> None:
    (tmp_path / "thing.log").write_bytes(b"x" * (MAX_LOG_BYTES + 1))
    daemon = Daemon("thing", tmp_path)
    daemon.start(SLEEP, os.environ, tmp_path)
    daemon.stop()
    assert daemon.log.stat().st_size < 100
    assert (tmp_path / "thing.log.1").stat().st_size == MAX_LOG_BYTES + 1


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} .the thing. is taken"):
            check_port_free("127.0.0.1", port, "the thing")
    check_port_free("127.0.0.1", port, "the thing")


def test_free_ports_are_found_once_and_outside_what_the_system_gives_away() -> None:
    first, second = free_ports(200), free_ports(200)
    assert len({*first, *second}) == 400
    with socket.socket() as connecting:
        connecting.bind(("127.0.0.1", 0))
        assert max(*first, *second) < connecting.getsockname()[1]


def test_a_port_that_is_listened_on_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    with socket.create_server(("127.0.0.1", port)):
        monkeypatch.setattr(processes, "_found_ports", set(range(15_000, 65_536)) - {port})
        with pytest.raises(ConfigError, match="no 1 free ports"):
            free_ports(1)
    assert free_ports(1) == [port]


def test_loopback_is_never_asked_of_a_proxy() -> None:
    assert without_proxy_on_loopback({"NO_PROXY": "pacs.local"})["NO_PROXY"] == "pacs.local,127.0.0.1,localhost"
    assert without_proxy_on_loopback({})["no_proxy"] == "127.0.0.1,localhost"


def test_last_words_are_plain_text(tmp_path: Path) -> None:
    daemon = Daemon("talker", tmp_path)
    daemon.log.write_text("first\n\x1b[92mINFO \x1b[0m: ready\n")
    assert daemon.last_words(1) == "INFO : ready"


SERVES = """
import json, os, time, weakref
from pneumofed.common.ops.processes import serve_long

class Part:
    def __init__(self):
        self.content, self.itself = bytearray(15 << 20), self

serve_long(0.05)
time.sleep(0.3)
parts = [weakref.ref(Part()) for _ in range(5)]
deadline = time.monotonic() + 20
while any(part() for part in parts) and time.monotonic() < deadline:
    time.sleep(0.05)
print(json.dumps([sum(part() is not None for part in parts), dict(os.environ)]))
"""


@pytest.mark.parametrize("own", [{}, {"MALLOC_TRIM_THRESHOLD_": "1"}])
def test_a_process_that_serves_keeps_no_garbage_and_what_it_starts_may_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: dict[str, str]
) -> None:
    for name in {*ALLOCATOR_SETTINGS, *SERVING_ALLOCATOR}:
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    environment = flower_environment(tmp_path, serving=True)
    assert {name: environment.get(name) for name in SERVING_ALLOCATOR} == SERVING_ALLOCATOR | own
    answer = subprocess.run([sys.executable, "-c", SERVES], env=environment, capture_output=True, check=True, timeout=60).stdout
    left, inherited = json.loads(answer)
    assert left == 0
    assert {name: inherited.get(name) for name in ALLOCATOR_SETTINGS} == ALLOCATOR_SETTINGS | own
    assert "MALLOC_ARENA_MAX" not in inherited
