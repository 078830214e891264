"""Processes that read and judge uploaded files and make them ready for the viewer.

A decoder is the part of the room that a hostile file can break. So it runs in a process of its own, whose memory is limited, and the
worst that a file can do is to cost that process. `Workers` deals jobs to free processes; `Worker` is one of them, replaced when a file
kills it or keeps it too long; `file_judge.FileJudge` is what it does in there. A job is a folder; its files are those of `viewing`.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import os
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Lock
from typing import Any

from pneumofed.common.errors import BundleError, ImageError, SkipReason
from pneumofed.common.files import is_disk_full
from pneumofed.common.ops.lifeline import children_end_with_me
from pneumofed.inference.reading_room.file_judge import FileJudge, ImageJob, load_file_judge
from pneumofed.inference.reading_room.viewing import JudgedFile, original_of

logger = logging.getLogger(__name__)

WORKER_START_SEC = 180.0
"""For a new process to import its libraries and load the model."""
MIB = 2**20


JobOutcome = JudgedFile | ImageError | OSError
"""`OSError` where the disk is full, which is no fault of the file."""
Read = Callable[[ImageJob], JobOutcome]


@dataclass(frozen=True)
class Question:
    """A job on its way to the process. `number` counts the questions of one worker; `sha256` is of the file that it is about."""

    number: int
    sha256: str
    job: ImageJob


@dataclass(frozen=True)
class Reply:
    """What came of a question. `sha256` is of the file that the process read, not a copy of the question's."""

    number: int
    sha256: str
    outcome: JobOutcome


READY = "ready"
"""What the process says once, before its first reply."""


def load_same_model(digest: str, *of: Any) -> FileJudge:
    """Loads the model for a worker, which may be replaced long after the room was opened: it judges with the same bundle, or not at all.

    Args:
        digest: of the bundle that the room was opened with.
        *of: of `load_file_judge`.

    Raises:
        BundleError: the folder holds another bundle by now, which nobody has checked for this room.
        ConfigError: a key cannot be read.
    """
    judge = load_file_judge(*of)
    if judge.predictor.bundle.digest != digest:
        raise BundleError(f"{judge.predictor.bundle.folder} holds another bundle than this room was opened with; start it anew")
    return judge


class Worker:
    """One process that reads one file at a time.

    Guarantees:
        A caller gets what was said of its own file or an error: one thread at a time speaks with the process, start included, and a
        reply that does not carry the number and the hash of its question ends the process.

    Args:
        load: makes the reading function in the process; has to be picklable.
        memory_mb: what a job may take beyond what the loaded process has.
        limit_sec: of a job.
    """

    def __init__(self, load: Callable[[], Read], memory_mb: int, limit_sec: float) -> None:
        self._load, self._memory_mb, self._limit_sec = load, memory_mb, limit_sec
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self._turn = Lock()
        self._asked = 0
        self._closed = False

    def start(self) -> bool:
        """Starts the process if none lives, and waits until it can judge. False if it cannot."""
        with self._turn:
            return self._start()

    def _start(self) -> bool:
        if self._process is not None and self._process.is_alive():
            return True
        self._end()
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, "1")  # of the new process, which is one of several: threads that wait for each other spin
        context = get_context("spawn")  # a fork of a server with threads may hold their locks for ever
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._load, self._memory_mb), daemon=True)
        try:
            with children_end_with_me(), _no_ctrl_c():
                self._process.start()
        except (OSError, RuntimeError) as error:  # no process to be had, or the server is at its end
            logger.warning("a worker could not be started: %s", type(error).__name__)
            theirs.close()
            self._end()
            return False
        if self._closed:  # `close` came before there was a process to kill
            self._process.kill()
        theirs.close()
        try:
            ready = self._connection.poll(WORKER_START_SEC) and self._connection.recv() == READY
        except (EOFError, OSError):
            ready = False
        if not ready:
            self._end()
        return ready

    def __call__(self, job: ImageJob) -> JobOutcome:
        """What came of the job; CORRUPT if it killed the process or took too long, UNREADABLE if the reply was not to this question."""
        with self._turn:
            return self._ask(job)

    def _ask(self, job: ImageJob) -> JobOutcome:
        if not self._start() or self._connection is None:
            return ImageError(SkipReason.UNREADABLE, "no worker could be started")
        self._asked += 1
        problem = ImageError(SkipReason.CORRUPT, "took too long")
        try:
            question = Question(self._asked, _hash_of(job), job)
            self._connection.send(question)
            if self._connection.poll(self._limit_sec):
                reply = self._connection.recv()
                if isinstance(reply, Reply) and (reply.number, reply.sha256) == (question.number, question.sha256):
                    return reply.outcome
                problem = ImageError(SkipReason.UNREADABLE, "got the reply to another question")
        except (EOFError, OSError):
            problem = ImageError(SkipReason.CORRUPT, "ended its process")
        logger.warning("a file %s; the worker is replaced", problem.detail)
        self._end()
        return problem

    def close(self) -> None:
        """Ends the process, for good; who waits for it gets an error."""
        self._closed, process = True, self._process
        if process is not None and process.pid is not None:  # else it is about to be started, and ended by who starts it
            process.kill()
        with self._turn:
            self._end()

    def _end(self) -> None:
        if self._process is not None and self._process.pid is not None:  # one whose start failed never was a process
            self._process.kill()
            self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None


class Workers:
    """Deals jobs to free workers. `waiting` is how many jobs have none yet."""

    def __init__(self, workers: Sequence[Read]) -> None:
        self._workers = workers
        self._free: asyncio.Queue[Read] = asyncio.Queue()
        for worker in workers:
            self._free.put_nowait(worker)
        self.waiting = 0
        self.ready = not any(isinstance(worker, Worker) for worker in workers)

    async def start(self) -> None:
        """Starts the processes; `ready` says whether all can judge."""
        processes = [worker for worker in self._workers if isinstance(worker, Worker)]
        self.ready = all(await asyncio.gather(*(asyncio.to_thread(worker.start) for worker in processes)))

    async def run(self, job: ImageJob) -> JudgedFile:
        """What came of the job.

        Raises:
            ImageError: the file cannot be used.
            OSError: the disk is full.
        """
        self.waiting += 1
        try:
            worker = await self._free.get()
        finally:
            self.waiting -= 1
        # Shielded: a caller who goes away must not set a worker free that still reads.
        return await asyncio.shield(asyncio.ensure_future(self._run(worker, job)))

    async def _run(self, worker: Read, job: ImageJob) -> JudgedFile:
        try:
            outcome = await asyncio.to_thread(worker, job)
        finally:
            self._free.put_nowait(worker)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def close(self) -> None:
        for worker in self._workers:
            if isinstance(worker, Worker):
                worker.close()


def _serve(connection: Connection, load: Callable[[], Read], memory_mb: int) -> None:
    """Answers jobs until the other side closes."""
    read = load()
    _limit_memory(memory_mb)
    try:
        connection.send(READY)
        while True:
            question: Question = connection.recv()
            connection.send(Reply(question.number, _hash_of(question.job), _outcome(read, question.job)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


@contextmanager
def _no_ctrl_c() -> Iterator[None]:
    """Blocks SIGINT in what the block starts, imports included: Ctrl-C goes to the whole group, and the server ends its workers."""
    resource_tracker.ensure_running()  # its start would lift the block again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _hash_of(job: ImageJob) -> str:
    """SHA-256 of the job's file, of a series of all its files in order; empty if one cannot be read, which the reading function says
    better."""
    path = original_of(job.folder)
    try:
        digests: list[bytes] = []
        for part in sorted(path.iterdir()) if path.is_dir() else [path]:
            with part.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").digest())
    except OSError:
        return ""
    return digests[0].hex() if len(digests) == 1 else hashlib.sha256(b"".join(digests)).hexdigest()


def _outcome(read: Read, job: ImageJob) -> JobOutcome:
    try:
        return read(job)
    except MemoryError:
        return ImageError(SkipReason.TOO_LARGE)
    except Exception as error:  # its text may quote what is in the file
        if is_disk_full(error):
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        logger.error("a file could not be judged: %s", type(error).__name__)
        return ImageError(SkipReason.UNREADABLE, type(error).__name__)


def _limit_memory(more_mb: int) -> None:
    """Lets this process have `more_mb` beyond the address space that it has now (proc(5), statm: its first number, in pages)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + more_mb * MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
