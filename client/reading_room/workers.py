"""Processes that read and judge uploaded files, each replaced when a file kills it or keeps it too long.

A decoder is the part of the room that a hostile file can break. So it runs in a process of its own, whose memory is limited, and the
worst that a file can do is to cost that process.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from client.reading_room.reading import JudgedFile
from common.errors import ImageError, SkipReason

logger = logging.getLogger(__name__)

START_SEC = 180.0
"""For a new process to import its libraries and load the model."""
MIB = 2**20


@dataclass(frozen=True)
class ImageJob:
    """The file `original` in `folder`; with `keep`, what the viewer needs is written beside it, with `explain` it is found out where
    the map lies, which takes longer than the judgement."""

    folder: Path
    keep: bool = False
    explain: bool = False


JobOutcome = JudgedFile | ImageError
Read = Callable[[ImageJob], JobOutcome]


class Worker:
    """One process. A call gives it a job and waits; not for two threads at once.

    Args:
        load: makes the reading function in the process; has to be picklable.
        memory_mb: what a job may take beyond what the loaded process has.
        limit_sec: of a job.
    """

    def __init__(self, load: Callable[[], Read], memory_mb: int, limit_sec: float) -> None:
        self._load, self._memory_mb, self._limit_sec = load, memory_mb, limit_sec
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def start(self) -> bool:
        """Starts the process if none lives, and waits until it can judge. False if it cannot."""
        if self._process is not None and self._process.is_alive():
            return True
        self.close()
        context = get_context("spawn")  # a fork of a server with threads may hold their locks for ever
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._load, self._memory_mb), daemon=True)
        self._process.start()
        theirs.close()
        try:
            ready = self._connection.poll(START_SEC) and self._connection.recv() is True
        except (EOFError, OSError):
            ready = False
        if not ready:
            self.close()
        return ready

    def __call__(self, job: ImageJob) -> JobOutcome:
        """What came of the job; CORRUPT if it killed the process or took too long."""
        if not self.start() or self._connection is None:
            return ImageError(SkipReason.UNREADABLE, "no worker could be started")
        try:
            self._connection.send(job)
            if self._connection.poll(self._limit_sec):
                outcome: JobOutcome = self._connection.recv()
                return outcome
            detail = "took too long"
        except (EOFError, OSError):
            detail = "ended its process"
        logger.warning("a file %s; the worker is replaced", detail)
        self.close()
        return ImageError(SkipReason.CORRUPT, detail)

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
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
        """Starts the processes; `ready` tells whether all can judge."""
        processes = [worker for worker in self._workers if isinstance(worker, Worker)]
        self.ready = all(await asyncio.gather(*(asyncio.to_thread(worker.start) for worker in processes)))

    async def run(self, job: ImageJob) -> JudgedFile:
        """What came of the job.

        Raises:
            ImageError: the file cannot be used.
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
        if isinstance(outcome, ImageError):
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
    connection.send(True)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(_outcome(read, job))


def _outcome(read: Read, job: ImageJob) -> JobOutcome:
    try:
        return read(job)
    except MemoryError:
        return ImageError(SkipReason.TOO_LARGE)
    except Exception as error:  # its text may quote what is in the file
        logger.error("a file could not be judged: %s", type(error).__name__)
        return ImageError(SkipReason.UNREADABLE, type(error).__name__)


def _limit_memory(more_mb: int) -> None:
    """Lets this process have `more_mb` beyond the address space that it has now (proc(5), statm: its first number, in pages)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + more_mb * MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
