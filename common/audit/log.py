"""An append-only log whose lines are chained by SHA-256, so that a line that was changed, removed or moved shows.

Each line is the canonical JSON of {actor, event, facts, hash, previous, sequence, time}; `hash` is the SHA-256 of the canonical JSON
of the rest, `previous` the hash of the line before. A cut at the end shows only against a head (the hash of the last line) that was
known before: so each side tells the other its head with every message, and the other's log keeps it (see `common.audit.log`).

The events of both sides' audit logs and their facts, so that a reader of either knows what a line means.

    site                                                     coordinator
    request            what the coordinator asked            run-started     configuration and app by their hashes
    answer             what left the site                    round           who took part, bytes, hash of its model
    refusal            by which rule                         run-ended       status, and why
    failure            class of the error
    app-approved / app-revoked / site-started / site-stopped release         which model, against which, and the decision
    models-compared    two models on the site's validation
    labels-taken       readers' labels in the manifest, in counts

No line names a patient, a file or a folder. The fact `heads` keeps the other side's head (see `common.audit.verify.anchors_in`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from pneumofed.common.audit.hash_chain import CHAIN_START, canonical, chain_hash
from pneumofed.common.errors import AuditError
from pneumofed.common.files import sync_folder

if TYPE_CHECKING:
    from pneumofed.common.config.experiment import ExperimentConfig
    from pneumofed.common.wire.messages import ModelArrays


RECOVERED = "log-recovered"
"""Event of the line that tells of one before it that a crash cut short."""
FIELDS = frozenset({"actor", "event", "facts", "hash", "previous", "sequence", "time"})
_BLOCK = 1 << 16


@dataclass(frozen=True)
class AuditEntry:
    """One line of the log."""

    sequence: int
    time: str
    actor: str
    event: str
    facts: Mapping[str, Any]
    previous: str
    hash: str

    def line(self) -> bytes:
        """The only bytes that stand for this entry in a log."""
        return canonical(asdict(self)) + b"\n"

    def is_sound(self) -> bool:
        """Whether `hash` is that of the rest."""
        return self.hash == chain_hash(canonical({key: value for key, value in asdict(self).items() if key != "hash"}))


class AuditLog:
    """The log at `path`, written by any number of processes under the name `actor`."""

    def __init__(self, path: Path, actor: str = "", now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.path, self.actor, self._now = Path(path), actor, now

    def record(self, event: str, **facts: Any) -> str:
        """Appends a line, makes sure that it is on the disk, and returns its hash, which is the log's new head.

        A last line that a crash cut short is taken out first, and a line of its own says so.

        Raises:
            AuditError: the last line is damaged; nothing is appended to a broken chain.
            OSError: the file cannot be written; it is as it was.
        """
        with _locked(self.path), _appending(self.path) as descriptor:
            last, cut = _mend(self.path, descriptor)
            if cut:
                last = self._append(descriptor, last, RECOVERED, {"bytes": len(cut), "sha256": hashlib.sha256(cut).hexdigest()})
            return self._append(descriptor, last, event, facts).hash

    def head(self) -> str | None:
        """The hash of the last line, None of a log without one.

        Raises:
            AuditError: the last line is damaged.
        """
        last, _ = _last_entry(self.path)
        return last.hash if last else None

    def _append(self, descriptor: int, last: AuditEntry | None, event: str, facts: Mapping[str, Any]) -> AuditEntry:
        body = {
            "sequence": last.sequence + 1 if last else 1,
            "time": self._now().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "actor": self.actor,
            "event": event,
            "facts": json.loads(json.dumps(facts, allow_nan=False)),  # what a reader will read: tuples are lists
            "previous": last.hash if last else CHAIN_START,
        }
        entry = AuditEntry(**body, hash=chain_hash(canonical(body)))
        _write(descriptor, entry.line())
        return entry


def read_entries(path: Path) -> list[AuditEntry]:
    """The sound lines of a log, in their order; what is broken is left out, since `audit_report.verify` tells of it.

    Raises:
        AuditError: the file cannot be read.
    """
    try:
        lines = Path(path).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise AuditError(f"{path} cannot be read: {error.strerror}; check its owner and permissions") from error
    return [entry for line in lines if (entry := parse_line(line)) is not None]


def parse_line(line: bytes) -> AuditEntry | None:
    """The entry that `line` stands for, or None if it is not the canonical form of a sound one."""
    try:
        values = json.loads(line)
        if not isinstance(values, dict) or set(values) != FIELDS:
            return None
        entry = AuditEntry(**values)
        return entry if entry.line() == line and entry.is_sound() and isinstance(entry.sequence, int) else None
    except (ValueError, TypeError, RecursionError):
        return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with FileLock(path.with_name(path.name + ".lock"), mode=0o600):
        yield


@contextmanager
def _appending(path: Path) -> Iterator[int]:
    new = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        if new:
            sync_folder(path.parent)
        yield descriptor
    finally:
        os.close(descriptor)


def _write(descriptor: int, line: bytes) -> None:
    """Appends the whole of `line` or nothing."""
    before = os.fstat(descriptor).st_size
    try:
        written = 0
        while written < len(line):
            written += os.write(descriptor, line[written:])
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, before)
        raise


def _mend(path: Path, descriptor: int) -> tuple[AuditEntry | None, bytes]:
    """The last whole entry and what stood after it; a line that lacks nothing but its end is completed."""
    last, tail = _last_entry(path)
    if not tail:
        return last, b""
    whole = parse_line(tail + b"\n")
    if whole and whole.previous == (last.hash if last else CHAIN_START):
        _write(descriptor, b"\n")
        return whole, b""
    os.ftruncate(descriptor, path.stat().st_size - len(tail))
    return last, tail


def _last_entry(path: Path) -> tuple[AuditEntry | None, bytes]:
    """The entry of the last line that ends, and the bytes after it."""
    end = _read_end(path)
    lines = end.splitlines(keepends=True)
    tail = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
    if not lines:
        return None, tail
    entry = parse_line(lines[-1])
    if entry is None:
        raise AuditError(
            f"{path}: the last line is damaged, so nothing can be appended. Look at it with `pneumofed audit verify`, then keep the "
            "file under another name; a new log begins by itself"
        )
    return entry, tail


def _read_end(path: Path) -> bytes:
    """The end of the file, with one whole line and what follows it at least, where it has one."""
    try:
        with path.open("rb") as file:
            size, length = file.seek(0, os.SEEK_END), _BLOCK
            while True:
                file.seek(max(size - length, 0))
                end = file.read()
                if length >= size or end.count(b"\n") > 1:
                    return end
                length *= 4
    except FileNotFoundError:
        return b""


REQUEST, ANSWER, REFUSAL, FAILURE = "request", "answer", "refusal", "failure"
APP_APPROVED, APP_REVOKED = "app-approved", "app-revoked"
SITE_STARTED, SITE_STOPPED = "site-started", "site-stopped"
COMPARED, LABELS_TAKEN, RELEASE = "models-compared", "labels-taken", "release"
RUN_STARTED, ROUND, RUN_ENDED = "run-started", "round", "run-ended"

COORDINATOR = "coordinator"
"""Actor of the coordinator's log."""


def record_run_started(log: AuditLog, run: str, experiment: ExperimentConfig, app: str, *, resumed: bool = False) -> str:
    """Notes that a run begins or goes on; `app` is the hash of the app bundle. Returns the head."""
    return log.record(RUN_STARTED, run=run, name=experiment.name, config=hash_experiment(experiment), app=app, resumed=resumed)


def record_run_ended(log: AuditLog, run: str, status: str, rounds: int) -> str:
    """Notes how a run ended (`succeeded`, `failed` or `stopped`) and after how many rounds. Returns the head."""
    return log.record(RUN_ENDED, run=run, status=status, rounds=rounds)


def hash_experiment(experiment: ExperimentConfig) -> str:
    """SHA-256 of an experiment, the same at both sides and independent of how its file was written."""
    return hashlib.sha256(canonical(experiment.model_dump(mode="json"))).hexdigest()


def hash_arrays(arrays: ModelArrays) -> str:
    """SHA-256 of a model's weights: parameters, then statistics, as little-endian float32."""
    digest = hashlib.sha256(arrays.parameters.astype("<f4").tobytes())
    digest.update(arrays.statistics.astype("<f4").tobytes())
    return digest.hexdigest()
