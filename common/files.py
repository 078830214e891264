"""Files that stay whole when a process dies, small state files, and folders with one writer at a time.

`atomic_write` and `write_file` replace a file as a whole, with mode 0600, since all that a site writes may name patients; `append_whole`
adds a line as a whole. `StateFile` builds on them: a file of one value that several processes read and change, with a checksum.
`exclusive` is the lock of a folder, and `drawn_once` uses it for keys that only the first process may draw.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

from filelock import FileLock, Timeout

from pneumofed.common.errors import DataError, PneumofedError

log = logging.getLogger(__name__)

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors of a disk, a quota or a file size limit that is used up."""
_DAMAGE = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError, PneumofedError)
"""What reading a file of another content raises: JSON, pydantic, a lookup, a cast, or a check of ours."""

_LOOKS = 3
"""How often a value and its checksums are read that do not agree: a writer may be between the two."""

T = TypeVar("T")

OnProgress = Callable[[str, int, int], None]
"""Takes a step over many files: its name, for people, and how many are done of how many. `Progress.show` is one."""


def tell_nobody(step: str, done: int, total: int) -> None:
    """Of a step that nobody watches."""


def count_off(items: Iterable[T], step: str, total: int, on_progress: OnProgress) -> Iterator[T]:
    """Iterates over `items`, `total` of them, and tells after each how many are done."""
    for done, item in enumerate(items, start=1):
        yield item
        on_progress(step, done, total)


def to_json(value: Any) -> bytes:
    """Writes `value` as JSON in UTF-8."""
    return json.dumps(value).encode()


@dataclass(frozen=True)
class StateFile(Generic[T]):
    """A small file that holds one value, which one process writes and later ones read or change.

    Readers see the old value or the new one. Who makes the new value from the old one holds `locked` meanwhile, so that no other
    process's change is lost. `read` and `write` take no lock, since several files may change under the lock of their folder.

    Attributes:
        path: the file. Its folder's lock guards it.
        kind: what errors and the log call the file; never anything of a patient.
        parse: the value of the file's bytes; raises one of `_DAMAGE` where they hold none.
        missing: the value before the first write. It is handed out as it is, so a mutable one belongs to a file object used once.
        remedy: the end of the sentence about a damaged file: what a person should do, or what happens instead.
        refuse: makes the error that a damaged or unreadable file raises. Without it such a file counts as missing, with a warning.
        dump: the bytes of a value.
        falls_back: whether the value before the last write, which is then kept beside it, takes the place of a damaged one. Never of a
            file that counts what was spent or used: an earlier value forgets.

    Beside the file, `.NAME.sum` holds the SHA-256 of its bytes and of those before the last write. It is written first, so that after a
    kill at any time one of the two agrees. Without it, as in folders of earlier versions, the value counts as it is.
    """

    path: Path
    kind: str
    parse: Callable[[bytes], T]
    missing: T
    remedy: str
    refuse: Callable[[str], PneumofedError] | None = None
    dump: Callable[[T], bytes] = to_json
    falls_back: bool = False

    def read(self) -> T:
        """Reads the value; `missing` where there is no file yet.

        Raises:
            PneumofedError: of `refuse`; the file is damaged or cannot be read.
        """
        try:
            return self.parse(self._read_checked())
        except FileNotFoundError:
            return self.missing
        except OSError as error:
            problem = f"{self.path}, {self.kind}, cannot be read: {error.strerror}; check its owner and permissions"
        except _DAMAGE as error:  # its text may quote the content, so only its class is named
            damage = f"{self.path}, {self.kind}, is damaged ({type(error).__name__})"
            if (earlier := self._read_earlier()) is not None:
                log.warning("%s; the value before its last change is used", damage)
                return self.parse(earlier)
            restored = f"; if it is a backup that was put back, remove {self._sums.name} beside it" * isinstance(
                error, ChecksumError
            )
            problem = f"{damage}; {self.remedy}{restored}"
        if self.refuse is not None:
            raise self.refuse(problem)
        log.warning("%s", problem)
        return self.missing

    def remove(self) -> None:
        """Removes the value, what is kept beside it, and nothing else; does nothing where there is none."""
        for path in (self.path, previous_of(self.path), self._sums):
            path.unlink(missing_ok=True)

    def write(self, value: T, forget: bool = False) -> None:
        """Writes `value`, which is on the disk when this returns.

        Args:
            value: takes the place of the one before.
            forget: whether the value before is not kept, as where a patient withdrew.

        Raises:
            OSError: the folder is missing or cannot be written, or the disk is full; the file is as it was.
        """
        content = self.dump(value)
        before: bytes | None
        try:
            before, sound = self._read_checked(), True
        except (OSError, ChecksumError):
            before, sound = self._read_earlier(), False
        write_file(self._sums, _format_sums([content] if before is None else [content, before]))
        if self.falls_back and sound and not forget:
            keep_previous(self.path)
        write_file(self.path, content)
        if self.falls_back and forget:
            previous_of(self.path).unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[T]:
        """Yields the value while no other process changes it; for a `write` in the block. Makes the folder.

        Raises:
            PneumofedError: as `read`.
            OSError: the folder cannot be made or written.
        """
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with exclusive(self.path.parent):
            yield self.read()

    @property
    def _sums(self) -> Path:
        return self.path.with_name(f".{self.path.name}.sum")

    def _read_checked(self) -> bytes:
        for _ in range(_LOOKS):
            known = _read_sums(self._sums)
            content = self.path.read_bytes()
            if not known or _hash(content) in known:
                return content
        raise ChecksumError

    def _read_earlier(self) -> bytes | None:
        """The bytes before the last write, where they are kept and are what they were."""
        try:
            content = previous_of(self.path).read_bytes() if self.falls_back else b""
        except OSError:
            return None
        return content if _hash(content) in _read_sums(self._sums) else None


class ChecksumError(ValueError):
    """A file's bytes are not those that were written; its name is all that an error shows of it."""


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _format_sums(contents: list[bytes]) -> bytes:
    """The checksums in a line, and in a second one their own, so that damage to them is not taken for damage to the value."""
    line = " ".join(map(_hash, contents)).encode()
    return line + b"\n" + _hash(line).encode() + b"\n"


def _read_sums(path: Path) -> list[str]:
    """The checksums in `path`; none where there is no such file, or it is itself damaged."""
    try:
        line, own = path.read_bytes().split(b"\n")[:2]
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        line = own = b""
    if _hash(line).encode() != own:
        log.warning("%s is damaged; what it guards is read unchecked until it is written again", path)
        return []
    return line.decode().split()


def previous_of(path: Path) -> Path:
    """Names the file that keeps what `path` held before its last change, e.g. `last.previous.pt`."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def keep_previous(path: Path) -> None:
    """Keeps what `path` holds under the name of `previous_of`, for before it is replaced; nothing where there is no such file.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    keep_as(path, previous_of(path))


def keep_as(path: Path, kept: Path) -> None:
    """Keeps what `path` holds under the name `kept` too; nothing where there is no such file.

    Args:
        path: stays as it is, at every moment.
        kept: in the same folder; an older file is replaced.

    Raises:
        OSError: as `keep_previous`.
    """
    new = path.with_name(f".{path.name}.kept")
    new.unlink(missing_ok=True)
    try:
        os.link(path, new)  # takes no time and no space
    except FileNotFoundError:
        return
    except OSError:  # a file system without hard links
        shutil.copyfile(path, new)
        new.chmod(0o600)
    new.replace(kept)


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Writes `content` as the whole of the file, which is on the disk when this returns; mode 0600.

    Args:
        path: the file, in a folder that exists; an older file is replaced.
        content: all bytes of the new file.

    Raises:
        OSError: as `atomic_write`.
    """
    with atomic_write(path, synced=True) as file:
        file.write(content)


def append_whole(descriptor: int, line: bytes) -> None:
    """Appends the whole of `line`, which is on the disk when this returns, or nothing.

    Args:
        descriptor: of a file that was opened with `O_APPEND`, and that nobody else writes to meanwhile.
        line: all bytes of it.

    Raises:
        OSError: the disk is full, or the file cannot be written; it is as it was.
    """
    before = os.fstat(descriptor).st_size
    try:
        written = 0
        while written < len(line):
            written += os.write(descriptor, line[written:])
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, before)
        raise


def drawn_once(path: Path, draw: Callable[[], bytes]) -> bytes:
    """Reads the file `path`, e.g. a key, which the first of all processes draws. Makes the folder.

    Args:
        path: the file. The lock of its folder is held meanwhile, so that two processes cannot draw two keys.
        draw: makes the content; called only where the file is not there yet.

    Returns:
        The file's content, the same at each call.

    Raises:
        OSError: the file cannot be read or made.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with exclusive(path.parent):
        if not path.exists():
            write_file(path, draw())
        return path.read_bytes()


@contextmanager
def atomic_write(path: Path, synced: bool = False) -> Iterator[BinaryIO]:
    """Opens a binary file that takes the place of `path` when the block ends well, and vanishes when it does not.

    Readers see the old file or the new one, never a part; one that has the old file open or mapped keeps it. The file has
    mode 0600, since all that a site writes may name patients.

    Args:
        path: the file, in a folder that exists.
        synced: whether file and name are on the disk when the block has ended, for what cannot be had again after a power cut.

    Raises:
        OSError: the folder is missing or cannot be written, or the disk is full.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            if synced:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:  # KeyboardInterrupt too: nothing half-written stays behind
        temporary.unlink(missing_ok=True)
        raise
    if synced:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes sure that the names of new files in `folder` are on the disk, not only their content.

    Raises:
        OSError: the folder cannot be opened or synced.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def is_disk_full(error: BaseException) -> bool:
    """Reports whether a disk, a quota or a file size limit is used up; SQLite says it in its own way, and SQLAlchemy wraps that."""
    cause = getattr(error, "orig", None) or error
    return getattr(cause, "errno", None) in _DISK_FULL or getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL


def pass_if_disk_full(error: OSError, folder: Path) -> None:
    """Logs a full disk and returns, for writers of what can be computed again.

    Args:
        error: what a write raised.
        folder: where it wrote; the log and the error name it.

    Raises:
        DataError: `error` says that `folder` cannot be written for another reason.
    """
    if not is_disk_full(error):
        raise DataError(f"{folder} cannot be written: {error.strerror}; check its owner and permissions") from error
    log.warning("disk full while writing to %s; going on without", folder)
