"""SHA-256 of image files, remembered so that a later process need not read them again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.data.atomic import StateFile, pass_if_disk_full
from common.errors import ImageError, SkipReason

log = logging.getLogger(__name__)

Memo = dict[str, tuple[int, int, str]]
"""(bytes, time of last change in ns, hexadecimal SHA-256) by absolute path."""

_CHUNK = 64


def load_digests(paths: Sequence[Path], folder: Path, workers: int) -> list[str | SkipReason]:
    """The hexadecimal SHA-256 of each file, or why it has none.

    A file is read only if the memo in `folder` does not know its path with its present size and time of last change.

    Raises:
        DataError: `folder` cannot be made or written. A full disk is no error: the files are read again the next time.
    """
    memo_file = _memo_file(folder)
    memo = memo_file.read()
    with ThreadPoolExecutor(workers) as pool:
        chunks = pool.map(lambda chunk: [_digest(path, memo) for path in chunk], _chunks(paths))
        results = [result for chunk in chunks for result in chunk]
    new = {path: entry for path, entry in results if not isinstance(entry, SkipReason) and memo.get(path) != entry}
    if new:
        _extend_memo(new, memo_file)
    return [entry if isinstance(entry, SkipReason) else entry[2] for _, entry in results]


def _chunks(paths: Sequence[Path]) -> Iterator[list[str]]:
    """Absolute paths, some at a time: to hand a thread one path costs more than to look it up."""
    for start in range(0, len(paths), _CHUNK):
        yield [os.path.abspath(path) for path in paths[start : start + _CHUNK]]  # noqa: PTH100 - resolve() follows links


def _memo_file(folder: Path) -> StateFile[Memo]:
    def parse(content: bytes) -> Memo:
        known = json.loads(content)
        return {path: (int(size), int(mtime_ns), str(digest)) for path, (size, mtime_ns, digest) in known.items()}

    return StateFile(folder / "digests.json", "the memo of file digests", parse, {}, "all files are read again")


def _extend_memo(new: Memo, file: StateFile[Memo]) -> None:
    try:
        with file.locked() as memo:
            file.write(memo | new)
    except OSError as error:
        pass_if_disk_full(error, file.path.parent)


def _digest(path: str, memo: Memo) -> tuple[str, tuple[int, int, str] | SkipReason]:
    try:
        status = _status(path)
        known = memo.get(path)
        if known and known[:2] == (status.st_size, status.st_mtime_ns):
            return path, known
        with Path(path).open("rb") as file:
            return path, (status.st_size, status.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest())
    except ImageError as error:
        return path, error.reason
    except (FileNotFoundError, NotADirectoryError):
        return path, SkipReason.MISSING
    except (OSError, ValueError):  # ValueError: a null character in the path
        return path, SkipReason.UNREADABLE


def _status(path: str) -> os.stat_result:
    status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise ImageError(SkipReason.UNREADABLE)
    if status.st_size == 0:
        raise ImageError(SkipReason.EMPTY)
    return status
