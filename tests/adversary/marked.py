"""Processes that a test started, whatever became of their parents: known by a variable that they inherited."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "PNEUMOFED_TEST_MARK"
PATIENCE_SEC = 10.0


class Marked:
    """All processes of one start, and what was started by them."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex

    def start(self, command: Sequence[str], cwd: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Starts the command; its output goes to `out` in `cwd`."""
        variables = {**os.environ, **(environment or {}), VARIABLE: self.mark}
        with (cwd / "out").open("ab") as out:
            return subprocess.Popen(command, cwd=cwd, env=variables, stdout=out, stderr=out, start_new_session=True)

    def living(self) -> dict[int, str]:
        """Number and command of the living."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if f"{VARIABLE}={self.mark}".encode() in (path / "environ").read_bytes().split(b"\0"):
                    found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
        return found

    def wait_for(self, count: int, seconds: float = 20.0) -> dict[int, str]:
        """Waits until so many live."""
        deadline = time.monotonic() + seconds
        while len(found := self.living()) < count:
            assert time.monotonic() < deadline, found
            time.sleep(0.02)
        return found

    def all_gone(self) -> bool:
        """Whether none is left after `PATIENCE_SEC` at most."""
        deadline = time.monotonic() + PATIENCE_SEC
        while self.living() and time.monotonic() < deadline:
            time.sleep(0.05)
        return not self.living()


@contextmanager
def marked() -> Iterator[Marked]:
    """Leaves nothing behind, also where the test fails."""
    family = Marked()
    try:
        yield family
    finally:
        for pid in family.living():
            os.kill(pid, signal.SIGKILL)


def kill_at(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Sends SIGKILL after so many seconds. Says whether it still ran."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    return False


def moments(count: int, longest: float, seed: int) -> list[float]:
    """So many seconds, evenly drawn from 0 to `longest`."""
    draw = random.Random(seed)
    return [draw.uniform(0.0, longest) for _ in range(count)]


PYTHON = sys.executable
