"""Children that end with their parent, whatever ended it: SIGKILL, a crash, or an end of the test run around it.

A process starts others inside `children_end_with_me`, or as a `Daemon` of `common/ops/processes.py`. Both put a mark into their
environment, which whatever they start inherits, and leave a guard behind: a small process in a session of its own that waits for the end
of the marked family's head, through a pidfd (Linux 5.3, pidfd_open(2)), and then kills who is left of the family. PR_SET_PDEATHSIG would
not do: it fires at the end of the *thread* that started a child, and grandchildren do not inherit it.

The file is also a program, of the standard library only, since a guard should be small and be there at once:

    python -I -S lifeline.py guard MARK PATIENCE_SEC [MARK ...]     waits for the end of the first or of another, then kills the family
    python -I -S lifeline.py lead COMMAND ...                       becomes COMMAND, as the head of a family with a guard
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

VARIABLE = "PNEUMOFED_FAMILY"
"""Variable with the marks of the families that a process belongs to, the outermost first: PID@START, where START is the head's start in
clock ticks since boot (field 22 of /proc/PID/stat, proc(5)). A `+` behind it: daemons belong to the family too."""
PATIENCE_SEC = 3.0
"""How long the children of a daemon that ended have to end by themselves."""
SWEEP_SEC = 6.0
"""How long a guard looks for what is left of its family."""

_lock = threading.Lock()
_guarded: set[str] = set()
_outside: list[str | None] = []
"""The variable's value outside of the open blocks, once for each of them."""


@contextmanager
def children_end_with_me(daemons: bool = False) -> Iterator[None]:
    """Lets all processes that are started in the block, and theirs, end with this one, whatever ends it. No effect where there is no /proc.

    Args:
        daemons: also those `Daemon`s that otherwise outlive the command that started them.
    """
    own = family_mark(os.getpid())
    if own is None:
        yield
        return
    with _lock:
        if own not in _guarded:
            start_guard(own, 0.0, [])
            _guarded.add(own)
        known = os.environ.get(VARIABLE)
        _outside.append(_outside[0] if _outside else known)
        others = [mark for mark in (known or "").split() if mark.rstrip("+") != own]
        daemons = daemons or f"{own}+" in (known or "").split()
        os.environ[VARIABLE] = " ".join([*others, own + ("+" if daemons else "")])
    try:
        yield
    finally:
        with _lock:
            before = _outside.pop()
            if not _outside and before is None:
                del os.environ[VARIABLE]
            elif not _outside and before is not None:
                os.environ[VARIABLE] = before


def lead_command(command: Sequence[str]) -> list[str]:
    """Builds the command that becomes `command`, under the same number, as the head of a family of its own."""
    return [sys.executable, "-I", "-S", __file__, "lead", *command]


def daemon_marks(marks: str) -> str:
    """Keeps those of the marks in `VARIABLE` whose families a daemon belongs to."""
    return " ".join(mark for mark in marks.split() if mark.endswith("+"))


def family_mark(pid: int) -> str | None:
    """Returns the mark of the process, which no later one with its number has; None if it does not live."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else f"{pid}@{fields[19]}"


def start_guard(head: str, patience_sec: float, also: Sequence[str]) -> None:
    """Starts the guard of a family, in a session of its own and without a mark, so that no other guard kills it.

    Args:
        head: mark of the family's head.
        patience_sec: how long the family has to end by itself.
        also: marks of other processes whose end is the family's, its head's included.
    """
    command = [sys.executable, "-I", "-S", __file__, "guard", head, str(patience_sec), *also]
    quiet = subprocess.DEVNULL
    subprocess.run(command, env={}, cwd="/", stdin=quiet, stdout=quiet, stderr=quiet, check=True)


def _lead(command: Sequence[str]) -> None:
    own = family_mark(os.getpid())
    if own is not None:
        marks = os.environ.get(VARIABLE, "").split()
        start_guard(own, PATIENCE_SEC, [mark for mark in marks if mark.endswith("+")])
        os.environ[VARIABLE] = " ".join([*marks, own])
    os.execvpe(command[0], list(command), os.environ)


def _guard(head: str, patience_sec: float, also: Sequence[str]) -> None:
    if os.fork():
        os._exit(0)  # who started the guard does not wait for it, and it is nobody's child
    os.setsid()
    pid = int(head.partition("@")[0])
    with suppress(OSError):
        leads = os.getsid(pid) == pid
        _wait_for_an_end([head, *(mark.rstrip("+") for mark in also)])
        _sweep(head, leads, patience_sec if family_mark(pid) != head else 0.0)


def _wait_for_an_end(marks: Sequence[str]) -> None:
    """Returns when one of the processes has ended."""
    numbers = [int(mark.partition("@")[0]) for mark in marks]
    ends, every_msec = select.poll(), -1
    try:
        for number in numbers:
            ends.register(os.pidfd_open(number), select.POLLIN)
    except ProcessLookupError:
        return
    except (OSError, AttributeError):  # an older kernel or another system
        ends, every_msec = select.poll(), 500
    while [family_mark(number) for number in numbers] == list(marks):
        ends.poll(every_msec)


def _sweep(head: str, leads: bool, patience_sec: float) -> None:
    """Kills who is left of the family until nobody is, its head included where it was another's end."""
    deadline = time.monotonic() + patience_sec
    while time.monotonic() < deadline and _family(head, leads):
        time.sleep(0.1)
    deadline, empty = time.monotonic() + SWEEP_SEC, 0
    while time.monotonic() < deadline and empty < 3:  # who was being started at the first look is seen at the next
        family = _family(head, leads)
        empty = 0 if family else empty + 1
        for pid in family:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _family(head: str, leads: bool) -> set[int]:
    """The living processes of the family: its head, who carries its mark, who is in the session that the head leads, and all below them.

    A program that writes its title over its environment (nginx, Ray's workers) shows no mark any more, so session and descent count too.
    """
    first, parents, found = int(head.partition("@")[0]), {}, set()
    for path in Path("/proc").glob("[0-9]*"):
        pid, fields = int(path.name), _stat(int(path.name))
        if fields is None or fields[0] in "ZX" or pid == os.getpid():
            continue
        parents[pid] = int(fields[1])
        if (pid == first and family_mark(pid) == head) or (leads and int(fields[3]) == first) or _carries(path, head):
            found.add(pid)
    more = set(found)
    while more:
        more = {pid for pid, parent in parents.items() if parent in more} - found
        found |= more
    return found


def _carries(process: Path, mark: str) -> bool:
    try:
        variables = (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return False
    prefix = f"{VARIABLE}=".encode()
    return any(mark.encode() in [m.rstrip(b"+") for m in v[len(prefix) :].split()] for v in variables if v.startswith(prefix))


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third on: state, parent, group, session, ..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def main(arguments: Sequence[str]) -> None:
    """Runs the file as a program.

    Raises:
        OSError: the command of `lead` cannot be started.
    """
    if arguments[0] == "lead":
        _lead(arguments[1:])
    elif arguments[0] == "guard":
        _guard(arguments[1], float(arguments[2]), arguments[3:])


if __name__ == "__main__":
    main(sys.argv[1:])
