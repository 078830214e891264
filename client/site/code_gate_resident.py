"""The gate, resident: a process that has imported what a message needs and forks one process a message, in which the gate runs.

Flower starts a process for each message, and to import PyTorch and the rest takes seconds. `start_resident` starts one process beside the
SuperNode that imports them once and listens on a socket in the gate's folder, which only the site's own user may enter. What Flower starts
in place of `flwr-clientapp` is then this file as a program of the standard library alone: it hands its arguments over and ends; a fork
of the resident process runs `code_gate.main` with them. So each message still has a process of its own, which judges the bundle by its
hash before anything of it is imported, keeps nothing for the next one, and may be killed as before. Where nobody listens (the first
seconds, or after a crash), the gate is started as without all this.

    python -P -m pneumofed.client.site.code_gate_resident serve FOLDER     the resident process; it ends with the one that started it
    python -I -S code_gate_resident.py ask FOLDER ARGUMENTS...             hands the gate's ARGUMENTS over, or becomes the gate
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

SOCKET = "socket"
MOST_BYTES = 1 << 16
PATIENCE_SEC = 5.0
"""How long the resident process waits for the few bytes of who asks."""
SILENCE_SEC = 60.0
"""How long who asks waits for a byte."""
TAKEN = b"+"
NEEDED = ("flwr.supernode.runtime.run_clientapp", "pneumofed.client.app", "pneumofed.client.privacy.dp_sgd")
"""What a message imports, with all that these import; Opacus comes with the last one."""
PLAIN_GATE = ("-P", "-m", "pneumofed.client.site.code_gate")
"""Python's arguments for the gate itself, as `client.site.code_gate` has them."""


def start_resident(folder: Path) -> subprocess.Popen[bytes]:
    """Starts the resident process as a child; nothing waits until it listens.

    Args:
        folder: of the gate's commands.
    """
    command = [sys.executable, "-P", "-m", "pneumofed.client.site.code_gate_resident", "serve", str(folder)]
    from pneumofed.common.ops.lifeline import children_end_with_me

    with children_end_with_me():
        return subprocess.Popen(command, stdin=subprocess.DEVNULL)


def asking_command(folder: Path) -> list[str]:
    """Builds the command that hands its further arguments, those of the gate, over to the resident process.

    Args:
        folder: of the gate's commands.
    """
    return [sys.executable, "-I", "-S", __file__, "ask", str(folder)]


def serve_forks(folder: Path, run: Callable[[Sequence[str]], None]) -> None:
    """Forks a process for each request, which calls `run` with its arguments; returns when the parent of this process has ended.

    Args:
        folder: where the socket is made.
        run: what a message needs; its imports are done.
    """
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.collect()
    gc.freeze()  # what is shared with the forks stays untouched, and so shared
    with _listening(folder) as listener:
        while os.getppid() == parent:
            ready, _, _ = select.select([listener], [], [], 1.0)
            if ready:
                connection, _ = listener.accept()
                with connection:
                    _take(connection, run, listener)
            _reap()


def hand_over(folder: Path, arguments: Sequence[str]) -> bool:
    """Hands arguments over to the resident process.

    Args:
        folder: of its socket.
        arguments: of the gate.

    Returns:
        False where nobody has taken them. Where nobody says so either, they count as taken: a task is rather lost, which the coordinator
        is told of, than run twice.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            with _inside(folder):
                connection.connect(SOCKET)
            connection.sendall(json.dumps(list(arguments)).encode() + b"\n")
            connection.settimeout(SILENCE_SEC)
            return connection.recv(1) == TAKEN
        except TimeoutError:
            return True
        except OSError:
            return False


def _take(connection: socket.socket, run: Callable[[Sequence[str]], None], listener: socket.socket) -> None:
    """Answers one request; whatever is wrong with it, the next one is answered too."""
    connection.settimeout(PATIENCE_SEC)
    with suppress(OSError, ValueError, RecursionError):
        if _user(connection) != os.getuid():
            return
        arguments = _read(connection)
        if os.fork() == 0:
            listener.close()
            _become(run, arguments, connection)


def _become(run: Callable[[Sequence[str]], None], arguments: Sequence[str], connection: socket.socket) -> NoReturn:
    """The rest of a forked process's life: nothing that it meets leads back to where it was forked."""
    code: object = 1
    try:
        connection.sendall(TAKEN)
        connection.close()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if "numpy" in sys.modules:  # Python's own generator is seeded anew by the fork
            sys.modules["numpy"].random.seed()
        run(arguments)
        code = 0
    except SystemExit as ended:
        code = 0 if ended.code is None else ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _read(connection: socket.socket) -> list[str]:
    content = b""
    while not content.endswith(b"\n") and len(content) < MOST_BYTES:
        part = connection.recv(MOST_BYTES)
        if not part:
            break
        content += part
    arguments = json.loads(content)
    if not isinstance(arguments, list) or not all(isinstance(one, str) for one in arguments):
        raise ValueError("expected a list of words")
    return arguments


def _user(connection: socket.socket) -> int:
    """Who is on the other side: the number of the user (SO_PEERCRED, unix(7))."""
    size = struct.calcsize("3i")
    return int(struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[1])


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


@contextmanager
def _listening(folder: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener, suppress(FileNotFoundError):
        with _inside(folder):
            Path(SOCKET).unlink(missing_ok=True)
            listener.bind(SOCKET)
        listener.listen(16)
        yield listener
        (folder / SOCKET).unlink()


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """In `folder`: the path of a socket has at most 107 bytes."""
    before = os.open(".", os.O_RDONLY)
    os.chdir(folder)
    try:
        yield
    finally:
        os.fchdir(before)
        os.close(before)


def main(arguments: Sequence[str]) -> None:
    """Runs the file as a program; see above.

    Raises:
        OSError: the gate cannot be started.
    """
    folder, own = Path(arguments[1]), arguments[2:]
    if arguments[0] == "serve":
        from pneumofed.client.site import code_gate

        code_gate.load_ahead(_import_what_messages_need)
        serve_forks(folder, code_gate.main)
    elif not hand_over(folder, own):
        os.execv(sys.executable, [sys.executable, *PLAIN_GATE, *own])


def _import_what_messages_need() -> None:
    """The libraries stay imported in the forks; the modules of this project are those of the installed version, used for it only."""
    for name in NEEDED:
        importlib.import_module(name)


if __name__ == "__main__":
    main(sys.argv[1:])
