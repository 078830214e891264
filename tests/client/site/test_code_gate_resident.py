"""The resident gate: one process a message, nothing carried over, and the plain gate where nobody listens."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pneumofed.client.site.code_gate_resident import NEEDED, SOCKET, asking_command, hand_over
from pneumofed.client.site.supernode import Pace
from pneumofed.common.ops.processes import descendants

SERVING = """
import json, os, sys, time
from pathlib import Path
from pneumofed.client.site.code_gate_resident import serve_forks

met = []
def run(arguments):
    met.append(arguments)
    if arguments[0] == "fail":
        raise ValueError("on purpose")
    Path(arguments[0]).write_text(json.dumps([os.getpid(), os.getppid(), len(met), arguments]))
    if arguments[1:] == ["stay"]:
        time.sleep(60)

serve_forks(Path(sys.argv[1]), run)
"""


def until(path: Path) -> list[object]:
    """What a fork wrote."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if path.exists() and (text := path.read_text()):
            return list(json.loads(text))
        time.sleep(0.02)
    raise AssertionError(f"{path.name} was not written")


def begin(folder: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", SERVING, str(folder)])
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with suppress(OSError), connected(folder):
            return process
        time.sleep(0.02)
    raise AssertionError("nobody listens")


@contextmanager
def connected(folder: Path) -> Iterator[socket.socket]:
    descriptor = os.open(folder, os.O_PATH)  # the path of a socket may be too long
    try:
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(f"/proc/self/fd/{descriptor}/{SOCKET}")
            yield stranger
    finally:
        os.close(descriptor)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    deep = tmp_path / ("a long name of a hospital's folder " * 3) / ("and another one " * 4)
    deep.mkdir(parents=True)
    return deep


@pytest.fixture
def resident(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = begin(folder)
    yield process
    process.kill()
    process.wait()


def test_each_message_has_a_process_of_its_own_that_knows_of_no_other(
    folder: Path, resident: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    seen = []
    for name in ("first", "second"):
        assert hand_over(folder, [str(tmp_path / name), "an argument"])
        seen.append(until(tmp_path / name))
    (first, second) = seen
    assert first[0] != second[0] and resident.pid not in (first[0], second[0])
    assert [parent for _, parent, *_ in seen] == [resident.pid] * 2
    assert [count for _, _, count, _ in seen] == [1, 1]
    assert second[3] == [str(tmp_path / "second"), "an argument"]


def test_a_message_that_fails_or_is_killed_costs_only_itself(
    folder: Path, resident: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    assert hand_over(folder, ["fail"])
    assert hand_over(folder, [str(tmp_path / "killed"), "stay"])
    os.kill(int(str(until(tmp_path / "killed")[0])), signal.SIGKILL)
    assert hand_over(folder, [str(tmp_path / "next")])
    assert until(tmp_path / "next")[1] == resident.pid


@pytest.mark.parametrize("content", [b"", b"\n", b"{", b"{}\n", b"[1]\n", b"\xff\xfe\n", b"[" * 70000])
def test_what_is_no_request_is_dropped_and_the_next_one_is_taken(
    folder: Path, resident: subprocess.Popen[bytes], tmp_path: Path, content: bytes
) -> None:
    with connected(folder) as stranger:
        stranger.settimeout(20)
        try:
            stranger.sendall(content)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b""
        except ConnectionError:
            pass
    assert hand_over(folder, [str(tmp_path / "next")])
    assert until(tmp_path / "next")[1] == resident.pid


def test_a_fork_whose_asker_is_gone_ends_and_serves_nobody(
    folder: Path, resident: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    os.kill(resident.pid, signal.SIGSTOP)  # so that the asker is gone when its request is read
    with connected(folder) as stranger:
        stranger.sendall(json.dumps([str(tmp_path / "lost")]).encode() + b"\n")
    os.kill(resident.pid, signal.SIGCONT)
    assert hand_over(folder, [str(tmp_path / "next")])
    assert until(tmp_path / "next")[1] == resident.pid
    deadline = time.monotonic() + 20
    while descendants(resident.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not descendants(resident.pid) and not (tmp_path / "lost").exists()


def test_all_that_messages_need_can_be_imported() -> None:
    assert [name for name in NEEDED if importlib.util.find_spec(name) is None] == []


def test_where_nobody_listens_nothing_is_taken(folder: Path) -> None:
    assert not hand_over(folder, ["x"])
    process = begin(folder)
    process.kill()
    process.wait()
    assert (folder / SOCKET).exists() and not hand_over(folder, ["x"])


def test_the_command_becomes_the_gate_where_nobody_listens(folder: Path) -> None:
    done = subprocess.run([*asking_command(folder), "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "--runtime-api-address" in done.stdout


def test_the_command_ends_when_its_arguments_are_taken(folder: Path, resident: subprocess.Popen[bytes], tmp_path: Path) -> None:
    subprocess.run([*asking_command(folder), str(tmp_path / "taken"), "stay"], timeout=20, check=True)
    assert until(tmp_path / "taken")[1] == resident.pid


def test_it_ends_with_the_process_that_started_it(folder: Path, tmp_path: Path) -> None:
    starting = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', *sys.argv[1:]]); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", starting, SERVING, str(folder)])
    deadline = time.monotonic() + 20
    while not (folder / SOCKET).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    while (folder / SOCKET).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not (folder / SOCKET).exists()  # it is removed at the end


def test_a_site_is_late_by_a_twentieth_of_what_it_waited_for() -> None:
    clock, slept = [0.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += seconds

    pace = Pace(lambda: clock[0], sleep)
    ask, answer = pace.asking(lambda took: clock.__setitem__(0, clock[0] + took)), pace.answering(lambda: pace.sleep(0.5))
    answer()
    assert slept == [0.02]
    answered = clock[0]
    while clock[0] < 200:
        before = clock[0] - answered
        ask(took=0.0)
        pace.sleep(3)
        assert 0.1 - 1e-9 <= slept[-1] <= max(0.1, min(3, 0.05 * before)) + 1e-9
    assert slept[-1] == pytest.approx(3)
    ask(took=3.5)  # held by the coordinator
    pace.sleep(3)
    assert slept[-1] == 0
    ask(took=1.0)  # told after a second that there is a message
    pace.sleep(3)
    assert slept[-1] == pytest.approx(2)
    answer()
    ask(took=0.04)
    pace.sleep(3)
    assert slept[-1] == pytest.approx(0.06)
