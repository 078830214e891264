"""Files that appear whole or not at all, readable by their owner alone, and folders with one writer at a time."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from common.errors import DataError

log = logging.getLogger(__name__)

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors of a disk, a quota or a file size limit that is used up."""


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends well, and vanishes when it does not.

    Readers see the old file or the new one, never a part; one that has the old file open or mapped keeps it. The file has
    mode 0600, since all that a site writes may name patients.

    Raises:
        OSError: the folder is missing or cannot be written, or the disk is full.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        temporary.replace(path)
    except BaseException:  # KeyboardInterrupt too: nothing half-written stays behind
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds `folder`'s lock, for which other processes wait; the system frees it when a process dies.

    Raises:
        OSError: the lock file cannot be made.
    """
    lock = FileLock(folder / "lock", mode=0o600)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("another process works in %s; waiting for it", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def pass_if_disk_full(error: OSError, folder: Path) -> None:
    """Logs a full disk and returns, for writers of what can be had again.

    Raises:
        DataError: `error` says that `folder` cannot be written for another reason.
    """
    if error.errno not in _DISK_FULL:
        raise DataError(f"{folder} cannot be written: {error.strerror}; check its owner and permissions") from error
    log.warning("disk full while writing to %s; going on without", folder)
