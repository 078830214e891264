"""The files of cases: arriving in quarantine, moved into the store as a whole, gone as a whole. All names are random."""

from __future__ import annotations

import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CASE_ID = re.compile(r"[0-9a-f]{32}")
ABANDONED_SEC = 3600.0
FREE_BYTES = 2**30
"""The room takes no more files when the disk has less than this left."""


class CaseFiles:
    """The store and the quarantine of one room, on one disk."""

    def __init__(self, store: Path, quarantine: Path) -> None:
        self._store, self._quarantine = store, quarantine

    @contextmanager
    def arriving(self) -> Iterator[Path]:
        """Makes a folder of mode 0700 for one file, which is gone after the block unless it was moved into the store."""
        folder = self._quarantine / secrets.token_hex(16)
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def path(self, case: str) -> Path:
        """Returns the folder of a case.

        Raises:
            ValueError: `case` is no case's id and so no safe name.
        """
        if not CASE_ID.fullmatch(case):
            raise ValueError("no case id")
        return self._store / case[:2] / case

    def keep(self, folder: Path, case: str) -> int:
        """Moves an arrived folder to its place and returns its size in bytes.

        Args:
            folder: of `arriving`, on the same disk.
            case: id of the case, which has no folder yet.

        Raises:
            ValueError: `case` is no case's id.
        """
        size = sum(file.stat().st_size for file in folder.iterdir())
        target = self.path(case)
        target.parent.mkdir(mode=0o700, exist_ok=True)
        folder.rename(target)
        return size

    def remove(self, case: str) -> None:
        """Deletes the files of a case; nothing where there are none."""
        target = self.path(case)
        if target.exists():  # out of sight first, so that a crash leaves no half of a case
            gone = self._quarantine / secrets.token_hex(16)
            target.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    def sweep(self, known: set[str], now: float | None = None) -> int:
        """Deletes what crashes left behind an hour ago or longer: arrivals, and folders of no case in `known`; returns how many.

        Args:
            known: ids of all cases.
            now: seconds since the epoch; the clock without it.
        """
        before = (time.time() if now is None else now) - ABANDONED_SEC
        orphans = [path for path in self._store.glob("??/*") if path.name not in known]
        left = [path for path in (*orphans, *self._quarantine.iterdir()) if path.stat().st_mtime < before]
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        return len(left)

    def has_room(self, least: int = FREE_BYTES) -> bool:
        """Checks whether the disk has `least` bytes left."""
        return shutil.disk_usage(self._store).free >= least
