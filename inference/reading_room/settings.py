"""The room's folder: its settings (`room.yaml`), where each file in it lies, and the files of cases.

ROOM/                    mode 0700, since all of it is about patients
  room.yaml              the settings below
  keys/pseudonym.key     of the patients' pseudonyms in exported labels, unless `site` names a site folder
  state/room.db          users, tokens, cases, findings
  state/audit.jsonl      who did what, chained (see `common.audit.log`)
  store/ab/ab12.../      one folder a case: the file as it came, or the files of a CT series, its pixels, the heat map
  monitor/               for `pneumofed monitor`, unless `monitor` names another folder: numbers of each judged case
  quarantine/            files that are still arriving or being judged

`CaseFiles` keeps the files of cases: arriving in quarantine, moved into the store as a whole, gone as a whole. All their names are random.
"""

from __future__ import annotations

import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pneumofed.common.config.experiment import Count, Section
from pneumofed.common.config.reader import build_config, read_yaml
from pneumofed.common.errors import ConfigError
from pneumofed.common.ops.processes import LOOPBACK_HOSTS

Port = Annotated[int, Field(ge=1, le=65535)]
Host = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?$", max_length=253)]
MIB, GIB = 2**20, 2**30

CASE_ID = re.compile(r"[0-9a-f]{32}")
ABANDONED_SEC = 3600.0
FREE_BYTES = 2**30
"""The room takes no more files when the disk has less than this left."""


class UploadLimits(Section):
    """What is refused before it fills the disk."""

    file_mb: Count = 128
    """A digital radiograph of 18 million pixels has 36 MB without compression."""
    files: Count = 100
    """In one request."""
    slices: Count = 2048
    """Files of one CT series in one request, or in one archive; only where the model judges CT."""
    request_mb: Count = 1024
    at_once: Count = 8
    """Requests whose files arrive or are judged at the same time; others wait."""
    waiting: Count = 200
    """Requests that wait; more are refused and may come again."""
    seconds: Count = 600
    """For a request to arrive."""

    def for_series(self) -> UploadLimits:
        """Returns the limits where one request is one CT series, in as many files as it has slices, or in one file."""
        return self.model_copy(update={"files": self.slices, "file_mb": self.request_mb})


class RoomSettings(Section):
    """`room.yaml`. Paths are relative to the room's folder."""

    hospital: Annotated[str, Field(min_length=1, max_length=100)]
    bundle: str
    """The model bundle: a folder or an archive that `pneumofed export` wrote."""
    trusted: list[str] | None = None
    """Public keys of who may sign bundles; without any the signature is checked only against the key in the bundle."""
    operating_point: str | None = None
    """The hospital's own threshold for this bundle, a file of `pneumofed site operating-point`; null: the bundle's."""
    site: str | None = None
    """The hospital's site folder, whose pseudonyms the exported labels then have."""
    require_release: list[str] | None = None
    """Public keys of coordinators; the room then starts only with a bundle that one of them released."""
    monitor: str | None = "monitor"
    """Folder of the monitor of drift that each case is recorded in; null records none."""
    host: Host = "127.0.0.1"
    port: Port = 8443
    names: list[Host] = Field(default_factory=list)
    """Names and addresses that browsers call the room by, besides those of loopback."""
    certificate: str | None = None
    """TLS certificate (PEM, with its chain); without one the room is only for this machine."""
    key: str | None = None
    workers: Annotated[int, Field(ge=1, le=64)] = 2
    """Processes that decode and judge."""
    worker_memory_mb: Annotated[int, Field(ge=256)] = 3072
    """What decoding one image may take; the largest that is read (100 million pixels) needs about 2 GB."""
    worker_seconds: Count = 60
    """After so long a file counts as damaged."""
    precision: Literal["float32", "int8"] = "float32"
    upload: UploadLimits = UploadLimits()
    retention_days: Count = 90
    store_gb: Count = 100
    idle_min: Count = 30
    """A session ends after so long without a request."""

    @model_validator(mode="after")
    def _tls_outside_loopback(self) -> RoomSettings:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together")
        if self.host not in LOOPBACK_HOSTS and self.certificate is None:
            raise ValueError(f"host {self.host} is reached from other machines, so it needs certificate and key")
        return self


@dataclass(frozen=True)
class RoomFolder:
    """Paths in the room's folder."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> RoomFolder:
        """Opens the room at `path`.

        Raises:
            ConfigError: it is none.
        """
        if not (path / "room.yaml").is_file():
            raise ConfigError(
                f"{path} is no reading room: it holds no room.yaml; make one with `pneumofed reading-room init {path}`"
            )
        return cls(path.resolve())

    @cached_property
    def settings(self) -> RoomSettings:
        return build_config(RoomSettings, read_yaml(self.settings_file), "room.yaml")

    @property
    def settings_file(self) -> Path:
        return self.path / "room.yaml"

    @property
    def database(self) -> Path:
        return self.path / "state" / "room.db"

    @property
    def audit(self) -> Path:
        return self.path / "state" / "audit.jsonl"

    @property
    def keys(self) -> Path:
        return self.path / "keys"

    @property
    def store(self) -> Path:
        return self.path / "store"

    @property
    def quarantine(self) -> Path:
        return self.path / "quarantine"

    def inside(self, name: str) -> Path:
        """Resolves a path of the settings, which is relative to the room's folder."""
        return (self.path / name).resolve()

    def make(self) -> None:
        """Makes the folders, for this user only."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path.chmod(0o700)
        for folder in (self.keys, self.store, self.quarantine, self.database.parent):
            folder.mkdir(mode=0o700, exist_ok=True)


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
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
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
        left = []
        for path in (*orphans, *self._quarantine.iterdir()):
            with suppress(FileNotFoundError):  # of a request that has just ended
                left += [path] if path.stat().st_mtime < before else []
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        return len(left)

    def has_room(self, least: int = FREE_BYTES) -> bool:
        """Checks whether the disk has `least` bytes left."""
        return shutil.disk_usage(self._store).free >= least
