"""Backup and restore of the coordinator folder: settings, keys, sites, registry, SuperLink's database, audit log, runs.

The audit log's chain and the registry are checked before anything is put back. What the federation did after the backup is known only
outside of it, so a restore says what to do about it: the newest kit goes over the folder before the start, since sites that were
revoked meanwhile are not revoked in the backup; and a run with noise at the coordinator that had not ended is not gone on with
(`RunFolder.no_resume`), since the rounds that it released meanwhile are not in its account. Sites count repeated rounds in their own
ledgers.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from pneumofed.common.audit.log import COORDINATOR_ACTOR, RESTORED_EVENT, AuditLog
from pneumofed.common.audit.verify import verify_log
from pneumofed.common.errors import ConfigError, PneumofedError
from pneumofed.common.files import write_file
from pneumofed.common.ops.backup import BackupLabel, BackupWritten, files_to_back_up, unpack_backup, write_backup
from pneumofed.common.privacy.randomness import NOISE_KEY_FILE
from pneumofed.server.operations.settings import CoordinatorFolder
from pneumofed.server.runs.folder import RunFolder

KEYS = ("keys/server.key", "keys/superexec.secret", "keys/page-token.sha256", "keys/release")
"""What `--without-keys` leaves out: who has them acts as the coordinator, or signs models. The next kit brings the first two again."""
MADE_ANEW = (
    *("state/cache", "state/flwr", "state/parts", "state/nginx", "nginx.conf", "runs/*/heartbeat", f"runs/*/{NOISE_KEY_FILE}"),
    *("runs/*/report.html", "runs/*/figures", "software"),
)  # fmt: skip


@dataclass(frozen=True)
class CoordinatorRestored:
    """What a restore did."""

    label: BackupLabel
    unfinished: tuple[str, ...]
    """Runs that had not ended; `pneumofed server resume` goes on with them after their last completed round of the backup."""
    closed: tuple[str, ...]
    """Of these, the ones that must not go on, since they add noise at the coordinator."""
    missing: tuple[str, ...]
    """Keys that the backup does not hold."""


def backup_coordinator(place: CoordinatorFolder, out: Path, passphrase: str | None) -> BackupWritten:
    """Writes a backup of the coordinator folder; its processes and runs may go on meanwhile.

    Args:
        place: the folder.
        out: the archive, outside the folder.
        passphrase: encrypts it; None leaves the keys out.

    Raises:
        ConfigError: `out` is in the wrong place, or something cannot be read or written.
    """
    settings = place.settings()
    if out.resolve().is_relative_to(place.path.resolve()):
        raise ConfigError(f"{out} lies in the coordinator folder; keep a backup on another disk")
    found = () if passphrase else tuple(key for key in KEYS if (place.path / key).exists())
    label = BackupLabel("coordinator", settings.federation, str(place.path.resolve()), version("pneumofed"), without=found)
    return write_backup(out, label, place.path, files_to_back_up(place.path, (*MADE_ANEW, *found)), passphrase)


def restore_coordinator(archive: Path, path: Path, passphrase: str | None) -> CoordinatorRestored:
    """Puts a backup back as the coordinator folder `path`.

    Args:
        archive: the backup.
        path: the new folder; empty, or not there.
        passphrase: of an encrypted backup.

    Raises:
        ConfigError: the backup is not taken (`unpack_backup`), or its audit log or registry does not hold.
    """
    with unpack_backup(archive, "coordinator", path, passphrase, "coordinator.yaml") as (staging, label):
        place = CoordinatorFolder(staging)
        if label.name != place.settings().federation:
            raise ConfigError(
                f"the backup says that it is of {label.name}, and holds the federation {place.settings().federation}"
            )
        log = place.state / "audit.jsonl"
        if log.exists() and not (report := verify_log(log)).intact:
            raise ConfigError(
                f"the audit log of the backup does not hold: line {report.line} was {report.damage}; take another backup"
            )
        _move_runs(place.state / "registry.db", label.folder, str(path.resolve()))
        unfinished = [run for run in sorted(place.runs.glob("*")) if run.is_dir() and not _has_ended(run)]
        closed = [run for run in unfinished if _adds_noise(run)]
        for run in closed:
            write_file(RunFolder(run).no_resume, label.created.encode())
        missing = tuple(key for key in label.without if not (staging / key).exists())
        AuditLog(log, COORDINATOR_ACTOR).record(RESTORED_EVENT, made=label.created)
    names = tuple(run.name for run in unfinished), tuple(run.name for run in closed)
    return CoordinatorRestored(label, *names, missing)


def _has_ended(run: Path) -> bool:
    try:
        return RunFolder(run).has_succeeded
    except PneumofedError:
        return False


def _adds_noise(run: Path) -> bool:
    try:
        return RunFolder(run).read_config().central_privacy.enabled
    except PneumofedError:
        return True  # what cannot be read cannot be gone on with either


def _move_runs(registry: Path, before: str, now: str) -> None:
    """Checks the registry, and lets its runs lie in the new folder; there is none where it is in PostgreSQL."""
    if not registry.exists():
        return
    try:
        with closing(sqlite3.connect(registry)) as connection, connection:
            if connection.execute("PRAGMA quick_check").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("damaged")
            rows = connection.execute("SELECT id, folder FROM run").fetchall()
            moved = [(now + folder.removeprefix(before), number) for number, folder in rows if folder.startswith(f"{before}/")]
            connection.executemany("UPDATE run SET folder = ? WHERE id = ?", moved)
    except sqlite3.Error as error:
        raise ConfigError(f"the registry of the backup does not hold ({error}); take another backup") from error
