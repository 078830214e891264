"""Promise: a signal ends the reading room in order. Attack: Ctrl-C and SIGTERM to the whole group, while it starts and while it serves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.context import SpawnProcess
from pathlib import Path
from threading import Event

import pytest

from pneumofed.common.ops.processes import free_port
from pneumofed.inference.reading_room.serve import init_room
from pneumofed.inference.reading_room.worker import Worker
from tests.inference.reading_room.stage import bundle


@pytest.fixture
def room(tmp_path: Path) -> Path:
    folder, _ = init_room(tmp_path / "room", bundle().folder, "North", None, None)
    port = free_port()
    with folder.settings_file.open("a") as file:
        file.write(f"port: {port}\nworkers: 2\n")
    command(["user", "add", "reader", "--password-stdin", "-C", str(folder.path)], b"a long pass phrase\n")
    return folder.path


def command(arguments: list[str], entry: bytes) -> None:
    call = "from pneumofed.cli.main import main; main()"
    subprocess.run([sys.executable, "-c", call, "reading-room", *arguments], input=entry, check=True, capture_output=True)


def members(group: int) -> list[int]:
    """Processes of the group, without those that ended and wait for their parent."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(pgrp) == group and state != "Z":
                found.append(int(entry.name))
    return found


def end_after(room: Path, sign: signal.Signals, seconds: float, whole_group: bool) -> str:
    """What the room said until it ended, with a signal `seconds` after it said where it is, or before it if that is negative."""
    call = "from pneumofed.cli.main import main; print('up', flush=True); main()"
    process = subprocess.Popen(
        [sys.executable, "-c", call, "reading-room", "start", "-C", str(room)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    said = process.stdout.readline()
    while seconds >= 0 and b"reading room at" not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    time.sleep(abs(seconds))
    (os.killpg if whole_group else os.kill)(process.pid, sign)
    said += process.communicate(timeout=60)[0]
    assert process.returncode in (0, 130), said
    deadline = time.monotonic() + 5
    while members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert members(process.pid) == []
    return said.decode()


@pytest.mark.parametrize(
    ("sign", "seconds"),
    [
        pytest.param(signal.SIGINT, -0.3, marks=pytest.mark.slow),
        (signal.SIGINT, 0.5),
        pytest.param(signal.SIGTERM, 0.2, marks=pytest.mark.slow),
    ],
)
def test_the_room_ends_without_a_traceback_and_without_a_process(room: Path, sign: signal.Signals, seconds: float) -> None:
    assert "Traceback" not in end_after(room, sign, seconds, whole_group=True)


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("whole_group", [True, False])
@pytest.mark.parametrize("seconds", [-0.01, -0.1, -0.5, -1.0, 0.0, 0.1, 0.3, 1.0, 2.0, 5.0])
def test_the_room_ends_at_any_moment(room: Path, sign: signal.Signals, seconds: float, whole_group: bool) -> None:
    assert "Traceback" not in end_after(room, sign, seconds, whole_group)


def test_a_worker_that_is_closed_while_it_begins_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process object is there before the process is."""
    worker = Worker(partial(time.sleep, 100), 1000, 1.0)  # type: ignore[arg-type]
    real, waiting, go_on = SpawnProcess.start, Event(), Event()

    def late(process: SpawnProcess) -> None:
        waiting.set()
        assert go_on.wait(20)
        real(process)

    monkeypatch.setattr(SpawnProcess, "start", late)
    with ThreadPoolExecutor(2) as threads:
        started = threads.submit(worker.start)
        assert waiting.wait(20)
        closed = threads.submit(worker.close)
        time.sleep(0.2)
        go_on.set()
        begun = time.monotonic()
        closed.result(30)
        assert not started.result(30) and time.monotonic() - begun < 20


def test_a_worker_whose_start_failed_is_closed_without_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(partial(time.sleep, 100), 1000, 1.0)  # type: ignore[arg-type]

    def fail(process: SpawnProcess) -> None:
        raise RuntimeError("can't start at the interpreter's end")

    monkeypatch.setattr(SpawnProcess, "start", fail)
    assert not worker.start()
    worker.close()
