"""The audit log of a site or of the coordinator: append-only, its lines chained by SHA-256, so that a changed line shows.

Each line is the canonical JSON of {actor, event, facts, hash, previous, sequence, time}; `hash` is the SHA-256 of the canonical JSON
of the rest, `previous` the hash of the line before. `chain_hash` and `first_broken` serve other chained records too, such as the privacy
ledger's and releases'. A cut at the end shows only against a head (the hash of the last line) that was known before. So each side sends
its head with every message, and the other's log keeps it in the fact `heads`; `common.audit.verify` compares the two.

The events of both logs:

    site                                                     coordinator
    request            what the coordinator asked, and       run-started     configuration and app by their hashes
                       the main terms of its run
    answer             what left the site, and by which      round           who took part, bytes, hash of its model
                       policy
    refusal            by which rule                         run-ended       status, and why
    failure            class of the error                    release         which model, against which, and the decision
    malformed          a message that could not be read
    app-approved, app-revoked, site-started, site-stopped
    models-compared, point-chosen    of bundles, on the site's own patients
    labels-taken       readers' labels in the manifest, in counts
    restored           from which backup, and what was       restored        from which backup
                       counted as spent since

No line names a patient, a file or a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from pneumofed.common.errors import AuditError
from pneumofed.common.files import append_whole, sync_folder

if TYPE_CHECKING:
    from pneumofed.common.config.experiment import ExperimentConfig
    from pneumofed.common.wire.messages import ModelArrays

CHAIN_START = "0" * 64
"""What stands for the hash before the first record."""


def canonical(values: Any) -> bytes:
    """Writes `values` as JSON in one form only: sorted keys, no spaces, ASCII; NaN and infinity are refused."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def chain_hash(body: bytes, before: str = "") -> str:
    """Computes the SHA-256, in hexadecimal, of a record that follows the one of hash `before`.

    Args:
        body: the record's only bytes.
        before: the hash of the record before, where `body` does not name it itself.
    """
    return hashlib.sha256(before.encode() + body).hexdigest()


def first_broken(links: Iterable[tuple[bytes, str]]) -> int | None:
    """Finds the first of `links` (body, hash) whose hash is not that of its body after the hash before.

    Returns:
        Its position, from 0; None if all hashes are right.
    """
    before = CHAIN_START
    for position, (body, found) in enumerate(links):
        if found != chain_hash(body, before):
            return position
        before = found
    return None


ENTRY_FIELDS = frozenset({"actor", "event", "facts", "hash", "previous", "sequence", "time"})
_TAIL_BYTES = 1 << 16
"""How much of the end of a log is read at first to find its last line."""

REQUEST_EVENT, ANSWER_EVENT, REFUSAL_EVENT, FAILURE_EVENT = "request", "answer", "refusal", "failure"
MALFORMED_EVENT = "malformed"
"""A message that could not be read; nothing of it stands in the line."""
APP_APPROVED, APP_REVOKED = "app-approved", "app-revoked"
SITE_STARTED, SITE_STOPPED = "site-started", "site-stopped"
MODELS_COMPARED, POINT_CHOSEN, LABELS_TAKEN, RELEASE_EVENT = "models-compared", "point-chosen", "labels-taken", "release"
RUN_STARTED, ROUND_EVENT, RUN_ENDED, SURVEY_EVENT = "run-started", "round", "run-ended", "survey"
RESTORED_EVENT = "restored"
"""Event of the first line after a backup was put back."""
LOG_RECOVERED = "log-recovered"
"""Event of the line that stands for one that a crash cut short, with its length and SHA-256."""

COORDINATOR_ACTOR = "coordinator"
"""Who writes the coordinator's log; a site writes under its own name."""


@dataclass(frozen=True)
class AuditEntry:
    """One line of the log.

    Attributes:
        sequence: position in the log, from 1.
        time: UTC, ISO 8601 with microseconds.
        actor: who wrote it: a site's name, or `COORDINATOR_ACTOR`.
        event: what happened; one of the names above.
        facts: what else is known, as JSON values.
        previous: hash of the line before; `CHAIN_START` on the first line.
        hash: SHA-256 of the canonical JSON of all other fields.
    """

    sequence: int
    time: str
    actor: str
    event: str
    facts: Mapping[str, Any]
    previous: str
    hash: str

    def line(self) -> bytes:
        """Writes the entry as its line of the log; no other bytes stand for it."""
        return canonical(asdict(self)) + b"\n"

    def is_sound(self) -> bool:
        """Checks that `hash` is that of the other fields."""
        return self.hash == chain_hash(canonical({key: value for key, value in asdict(self).items() if key != "hash"}))


class AuditLog:
    """The log at `path`, written by any number of processes under the name `actor`."""

    def __init__(self, path: Path, actor: str = "", now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.path, self.actor, self._now = Path(path), actor, now

    def record(self, event: str, **facts: Any) -> str:
        """Appends a line and makes sure that it is on the disk.

        A last line that a crash cut short is taken out first, and a line of its own (`LOG_RECOVERED`) says so.

        Args:
            event: what happened; one of the names in this module.
            **facts: JSON values; nothing of a patient, no path.

        Returns:
            The line's hash, which is the log's new head.

        Raises:
            AuditError: the last line is damaged; nothing is appended to a broken chain.
            OSError: the file cannot be written; it is as it was.
        """
        with _locked(self.path), _appending(self.path) as descriptor:
            last, cut = _repair(self.path, descriptor)
            if cut:
                last = self._append(
                    descriptor, last, LOG_RECOVERED, {"bytes": len(cut), "sha256": hashlib.sha256(cut).hexdigest()}
                )
            return self._append(descriptor, last, event, facts).hash

    def head(self) -> str | None:
        """Reads the hash of the last line; None of a log without one.

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
        append_whole(descriptor, entry.line())
        return entry


def read_entries(path: Path) -> list[AuditEntry]:
    """Reads the sound lines of a log, in their order; broken ones are left out, since `verify_log` reports them.

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
    """Parses one line of a log; None if it is not the canonical form of a sound entry."""
    try:
        values = json.loads(line)
        if not isinstance(values, dict) or set(values) != ENTRY_FIELDS:
            return None
        entry = AuditEntry(**values)
        return entry if entry.line() == line and entry.is_sound() and isinstance(entry.sequence, int) else None
    except (ValueError, TypeError, RecursionError):
        return None


def record_run_started(log: AuditLog, run: str, experiment: ExperimentConfig, app: str, *, resumed: bool = False) -> str:
    """Logs that a run begins or goes on.

    Args:
        log: the coordinator's.
        run: the run's token.
        experiment: its name and its hash go into the line.
        app: SHA-256 of the app bundle, in hexadecimal.
        resumed: whether the run goes on from a checkpoint.

    Returns:
        The log's new head.

    Raises:
        AuditError, OSError: as `AuditLog.record`.
    """
    return log.record(RUN_STARTED, run=run, name=experiment.name, config=hash_experiment(experiment), app=app, resumed=resumed)


def record_run_ended(log: AuditLog, run: str, status: str, rounds: int) -> str:
    """Logs the end of a run.

    Args:
        log: the coordinator's.
        run: the run's token.
        status: `succeeded`, `failed` or `stopped`.
        rounds: how many rounds were done.

    Returns:
        The log's new head.

    Raises:
        AuditError, OSError: as `AuditLog.record`.
    """
    return log.record(RUN_ENDED, run=run, status=status, rounds=rounds)


def hash_experiment(experiment: ExperimentConfig) -> str:
    """Computes the SHA-256 of an experiment, the same on both sides and independent of how its file was written."""
    return hashlib.sha256(canonical(experiment.model_dump(mode="json"))).hexdigest()


def hash_arrays(arrays: ModelArrays) -> str:
    """Computes the SHA-256 of a model's weights: parameters, then statistics, as little-endian float32."""
    digest = hashlib.sha256()
    for values in (arrays.parameters, arrays.statistics):
        digest.update(values.astype("<f4", order="C", copy=False).data)  # its own memory: 45 MB are not copied
    return digest.hexdigest()


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


def _repair(path: Path, descriptor: int) -> tuple[AuditEntry | None, bytes]:
    """The last whole entry and what stood after it; a line that lacks nothing but its end is completed."""
    last, tail = _last_entry(path)
    if not tail:
        return last, b""
    whole = parse_line(tail + b"\n")
    if whole and whole.previous == (last.hash if last else CHAIN_START):
        append_whole(descriptor, b"\n")
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
            size, length = file.seek(0, os.SEEK_END), _TAIL_BYTES
            while True:
                file.seek(max(size - length, 0))
                end = file.read()
                if length >= size or end.count(b"\n") > 1:
                    return end
                length *= 4
    except FileNotFoundError:
        return b""
