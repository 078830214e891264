"""Worker processes of the local engine: each answers one message at a time with the ClientApp, as many at once as there are workers.

    with HospitalWorkers(count) as workers:
        future = workers.answer(message, context)       the reply, once a worker is free and has made it

A first process imports the ClientApp and then forks a worker for each connection, so that PyTorch is imported once and its pages are
shared; they stay so, since no worker's garbage collector touches what was imported (`gc.freeze`). Messages and replies are pickled; their
arrays lie in files in memory (/dev/shm where there is one): the weights that all hospitals of a round get are one file, which each worker
maps. A worker that dies costs the reply that it was working on, as the loss of a site does; the next message gets a new one. The
processes end with the process that made them, whatever ended it.

The file is also the program of the first process: `python -m pneumofed.simulation.workers FOLDER WORKERS [NAME OF STUDY CODE ...]`.
"""

from __future__ import annotations

import gc
import io
import mmap
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from flwr.app import Array, Context, Error, Message
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from pneumofed.common.errors import FlowerError
from pneumofed.common.ops.lifeline import children_end_with_me
from pneumofed.common.ops.processes import ALLOCATOR_SETTINGS, stop_group
from pneumofed.common.ops.study_code import FOLDER, StudyCode, remember_folder, write_codes

MEMORY = Path("/dev/shm")
SOCKET = "workers"
START_TIMEOUT_SEC = 120.0
LENGTH = struct.Struct("<Q")
RUN_ID, SERVER_NODE_ID = 1, 1


def take_identity() -> None:
    """Gives this process the identity that Flower's apps ask for."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, SERVER_NODE_ID


@contextmanager
def no_collections() -> Iterator[None]:
    """Holds the garbage collector off, for imports and for figures: again and again it would look through a million objects of torch, a
    quarter of the time, and find little."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class StoredArray(NamedTuple):
    """An array whose bytes lie in a file."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    stype: str


class HospitalWorkers:
    """Processes that answer messages; `close`, or the end of a `with` block, ends them and removes their files."""

    def __init__(self, count: int, codes: Sequence[StudyCode] = ()) -> None:
        """Starts the first process, which takes a moment to import; nothing waits for it before the first message.

        Args:
            count: how many messages are answered at once, at least 1.
            codes: a study's own networks and losses, which the workers know.
        """
        self._open = ExitStack()
        memory = MEMORY if os.access(MEMORY, os.W_OK) else None
        self._folder = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="pneumofed-workers-", dir=memory)))
        write_codes(self._folder / FOLDER, codes)
        program = [sys.executable, "-m", "pneumofed.simulation.workers"]
        command = [*program, str(self._folder), str(count), *(code.name for code in codes)]
        with children_end_with_me():
            self._process = subprocess.Popen(
                command, env={**ALLOCATOR_SETTINGS, **os.environ}, stdin=subprocess.DEVNULL, start_new_session=True
            )
        self._open.callback(stop_group, self._process)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="worker")
        self._open.callback(self._threads.shutdown, wait=False, cancel_futures=True)
        self._own = threading.local()
        self._shared = SharedArrays(self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends all processes; what they were working on is lost."""
        self._open.close()

    def answer(self, message: Message, context: Context) -> Future[Message]:
        """Answers a message as soon as a worker is free, in the order of the calls.

        Args:
            message: to the ClientApp.
            context: of its node; what the app changes in it is lost.

        Returns:
            The reply; one with an error where the worker died.
        """
        arrays = [array for record in message.content.array_records.values() for array in record.values()]
        stored = [self._shared.store(array) for array in arrays]
        future = self._threads.submit(self._ask, message, context)
        future.add_done_callback(lambda _: self._shared.release(stored))
        return future

    def _ask(self, message: Message, context: Context) -> Message:
        try:
            if getattr(self._own, "connection", None) is None:
                self._own.connection = self._connect()
            _send(self._own.connection, _pack((message, context), self._shared.find))
            reply: Message = _unpack(_receive(self._own.connection), _take)
            return reply
        except (OSError, EOFError):
            self._own.connection = None
            return Message(Error(ErrorCode.CLIENT_APP_CRASHED, "the worker process died"), reply_to=message)

    def _connect(self) -> socket.socket:
        """A connection is a worker.

        Raises:
            FlowerError: the first process has ended, or is not ready in time.
        """
        deadline = time.monotonic() + START_TIMEOUT_SEC
        while self._process.poll() is None and time.monotonic() < deadline:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(self._folder / SOCKET))
            except OSError:
                connection.close()
                time.sleep(0.02)
                continue
            return connection
        raise FlowerError("the worker processes of the simulation could not be started; with --workers 1 there are none")


class SharedArrays:
    """Files with the arrays of the messages that wait for an answer; an array that several messages hold is one file."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock, self._number = folder, threading.Lock(), 0
        self._stored: dict[int, tuple[Array, StoredArray]] = {}  # the array itself is kept, so that no other gets its id
        self._users: dict[str, int] = {}

    def store(self, array: Array) -> str:
        """Writes the file, unless it is there, for one more user, and returns its path."""
        with self._lock:
            if id(array) not in self._stored:
                self._number += 1
                path = self._folder / f"array-{self._number}"
                self._stored[id(array)] = array, _write(array, path)
                self._users[str(path)] = 0
            path_of = self._stored[id(array)][1].path
            self._users[path_of] += 1
            return path_of

    def find(self, array: Array) -> StoredArray | None:
        """Returns where the array lies, None if it was not stored."""
        with self._lock:
            return found[1] if (found := self._stored.get(id(array))) else None

    def release(self, paths: Sequence[str]) -> None:
        """Removes each file that has no other user; who has mapped it keeps it."""
        with self._lock:
            for path in paths:
                self._users[path] -= 1
                if not self._users[path]:
                    del self._users[path]
                    self._stored = {key: kept for key, kept in self._stored.items() if kept[1].path != path}
                    Path(path).unlink(missing_ok=True)


def _write(array: Array, path: Path) -> StoredArray:
    path.write_bytes(array.data)
    return StoredArray(str(path), array.dtype, tuple(array.shape), array.stype)


def _map(stored: StoredArray) -> Array:
    """The array with its bytes mapped, not copied."""
    array = Array(stored.dtype, stored.shape, stored.stype, b"")
    with Path(stored.path).open("rb") as file:
        data: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    array.data = data  # the constructor takes nothing but bytes
    return array


def _take(stored: StoredArray) -> Array:
    """The array of a reply, mapped; its file goes, and its memory with the last use of it."""
    array = _map(stored)
    Path(stored.path).unlink()
    return array


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, place: Callable[[Array], StoredArray | None]) -> None:
        super().__init__(file, protocol=5)
        self._place = place

    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        found = self._place(value) if isinstance(value, Array) else None
        return None if found is None else tuple(found)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, read: Callable[[StoredArray], Array]) -> None:
        super().__init__(file)
        self._read = read

    def persistent_load(self, pid: Any) -> Array:
        return self._read(StoredArray(*pid))


def _pack(value: Any, place: Callable[[Array], StoredArray | None]) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, place).dump(value)
    return buffer.getvalue()


def _unpack(data: bytes, read: Callable[[StoredArray], Array]) -> Any:
    return _Unpickler(io.BytesIO(data), read).load()


def _send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(LENGTH.pack(len(data)) + data)


def _receive(connection: socket.socket) -> bytes:
    (length,) = LENGTH.unpack(_read(connection, LENGTH.size))
    return _read(connection, length)


def _read(connection: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        part = connection.recv(min(length - len(data), 1 << 20))
        if not part:
            raise EOFError("the other side has closed the connection")
        data += part
    return bytes(data)


def serve(folder: Path, workers: int, names: Sequence[str] = ()) -> None:
    """Is the first process: imports the ClientApp, and forks a worker for each connection to FOLDER/workers, until it is killed.

    Args:
        folder: for the socket and for the arrays of replies; holds the study's own code, if there is any.
        workers: how many there are, which share the memory of one card.
        names: of that code.
    """
    remember_folder(folder / FOLDER, names)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a user's Ctrl-C is for the process that made this one, which ends it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a worker ended
    with no_collections():
        from pneumofed.client.app import app
        from pneumofed.common.models.compute import share_card
    gc.freeze()

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / ".socket"))
    listener.listen(128)
    (folder / ".socket").rename(folder / SOCKET)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            with suppress(EOFError, OSError):
                share_card(1.0 / workers)
                _work(connection, app, folder)
            os._exit(0)
        connection.close()


def _work(connection: socket.socket, app: Callable[[Message, Context], Message], folder: Path) -> None:
    """Answers until the other side closes the connection."""
    take_identity()
    number = 0

    def place(array: Array) -> StoredArray:
        nonlocal number
        number += 1
        return _write(array, folder / f"reply-{os.getpid()}-{number}")

    while True:
        message, context = _unpack(_receive(connection), _map)
        _send(connection, _pack(app(message, context), place))


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
