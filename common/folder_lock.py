"""Folders that one process owns while it works in them: a run's, a site's while it starts, a reading room's, a monitor's.

`owned` holds such a folder. Who comes second is refused at once and told who has it, in contrast to `common.files.exclusive`, where a
second process waits its turn. The system's own lock (flock(2)) decides, so that it is free as soon as its owner is dead, by whatever
death, and a process number that was given away anew means nothing: the text in the file only says who the owner is. Over NFS Linux
turns it into a lock at the server, which holds on all machines; where a file system has no locks, the log says that nobody guards the
folder. Children of the owner do not have the lock: Python closes it in programs that they start, and `_forget` in forks.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from pneumofed.common.errors import ConfigError

log = logging.getLogger(__name__)

_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
"""Errors of a file system that cannot lock."""
_MAX_OWNER = 300
"""Bytes of an owner's description that are read: a file of another program may be of any length."""
_held: set[int] = set()


@contextmanager
def owned(folder: Path, name: str, work: str, way_on: str, mode: int = 0o777) -> Iterator[None]:
    """Owns `folder` while the block runs, against every other process and every other block of this one.

    Args:
        folder: made if it is missing.
        name: of the lock: its file is `.NAME.lock` in the folder, and stays there.
        work: what works in the folder, for who is refused, e.g. `pneumofed simulate`.
        way_on: what who is refused should do; the end of the sentence.
        mode: of a folder that is made, less the umask.

    Raises:
        ConfigError: somebody else works there, or the folder cannot be written.
    """
    try:
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
        descriptor = os.open(_file(folder, name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}; check its owner and permissions") from error
    _held.add(descriptor)
    try:
        _lock(descriptor, folder, way_on)
        _describe(descriptor, f"`{work}` (process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M})")
        yield
        _describe(descriptor, "")
    finally:
        _held.discard(descriptor)
        os.close(descriptor)  # and with it the lock


def check_free(folder: Path, name: str, way_on: str) -> None:
    """Checks that nobody owns `folder` now; for who starts the process that will.

    Args:
        folder: need not exist.
        name: of the lock.
        way_on: as in `owned`.

    Raises:
        ConfigError: somebody works there.
    """
    try:
        descriptor = os.open(_file(folder, name), os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # nobody was there yet
        return
    try:
        _lock(descriptor, folder, way_on)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, way_on: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"{folder} is in use by {_owner(descriptor)}; {way_on}") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise ConfigError(f"{folder} cannot be locked: {error.strerror}; check its file system") from error
        log.warning("the file system of %s has no locks: see to it that no second process works there", folder)


def _describe(descriptor: int, owner: str) -> None:
    """Writes who owns the folder; a full disk costs the name and not the lock."""
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, owner.encode(), 0)
    except OSError as error:
        log.debug("the owner of a folder is not written: %s", error)


def _owner(descriptor: int) -> str:
    """The owner as he wrote himself down; without control characters, since anybody may have written into the file."""
    text = os.pread(descriptor, _MAX_OWNER, 0).decode(errors="replace")
    return "".join(letter if letter.isprintable() else "?" for letter in text) or "another process"


def _file(folder: Path, name: str) -> Path:
    return folder / f".{name}.lock"


def _forget() -> None:
    """In a fork: a copy of the descriptor would hold the lock for as long as the child lives."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
