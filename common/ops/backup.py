"""Backups of a party's folder: one archive, checked as a whole before anything of it is put back.

    plain       a tar archive: LABEL, the files, COMPLETE (every file's size and SHA-256)
    encrypted   that archive under a passphrase (`common.ops.encryption`), which shows any change and any cut

A plain archive has checksums, which show damage and a cut; who can write it can also make it anew, so nothing proves who wrote it.

An archive may come from anywhere: only regular files with plain relative names are taken, into a new folder that nobody else writes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sqlite3
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal, cast

from pneumofed.common.errors import ConfigError
from pneumofed.common.files import atomic_write, sync_folder
from pneumofed.common.ops.encryption import CHUNK, FORMAT, MAGIC, Unsealed, sealed

Party = Literal["site", "coordinator"]
LABEL, COMPLETE = "backup.json", "complete.json"
_MAX_LABEL = 1 << 26
"""Bytes of a label or a list of files, at most."""
_STAGING = ".restoring"
_SQLITE = b"SQLite format 3\x00"


@dataclass(frozen=True)
class BackupLabel:
    """What a backup is of. It names no patient and holds no secret."""

    party: Party
    name: str
    """Of the site, or of the federation."""
    folder: str
    """Where it lay, absolute."""
    version: str
    """Of pneumofed, that made the backup."""
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    without: tuple[str, ...] = ()
    """Files that were left out by choice, such as keys."""
    format: int = FORMAT


@dataclass(frozen=True)
class BackupWritten:
    """A backup as it lies on the disk."""

    path: Path
    files: int
    size: int
    encrypted: bool


def write_backup(out: Path, label: BackupLabel, folder: Path, names: Iterable[str], passphrase: str | None) -> BackupWritten:
    """Writes the files `names` of `folder` as one archive of mode 0600, which takes its name only once it is whole.

    What runs may go on: a SQLite database is copied by its own online backup, of a log (`.jsonl`) only whole lines are taken, and small
    state files are replaced as a whole by who writes them. Files are read in the order of `names`.

    Args:
        out: the archive; must not be there.
        label: what it is of.
        folder: of the party.
        names: paths below `folder`; one that has vanished meanwhile is left out.
        passphrase: encrypts all of it; None writes a plain archive.

    Raises:
        ConfigError: `out` is there, or a file cannot be read or written.
    """
    if out.exists():
        raise ConfigError(f"{out} exists; a backup never takes the place of another, give another name")
    held: dict[str, dict[str, object]] = {}
    try:
        with (
            atomic_write(out, synced=True) as file,
            sealed(file, passphrase) as payload,
            tarfile.open(fileobj=payload, mode="w|", format=tarfile.PAX_FORMAT) as tar,
        ):
            _add(tar, LABEL, json.dumps(asdict(label)).encode(), 0o600)
            for name in names:
                with _opened(folder / name, out.parent) as source:
                    if source is not None:
                        held[name] = _copy_in(tar, name, source, _is_program(folder / name))
            _add(tar, COMPLETE, json.dumps(held).encode(), 0o600)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"the backup {out} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    return BackupWritten(out, len(held), out.stat().st_size, passphrase is not None)


def files_to_back_up(folder: Path, leave: Iterable[str] = (), last: Iterable[str] = ()) -> list[str]:
    """Lists the files below `folder`, as a backup reads them: logs first, databases and `last` at the end.

    So what a database counts before it is done, a log that was read earlier does not know of yet: never the other way. Links, locks,
    checksums beside state files, write-ahead logs, pid files, sockets and half-written files are left out; each can be made anew.

    Args:
        folder: of the party.
        leave: patterns (as in `fnmatch`) of paths below `folder` that are left out, with all below them.
        last: patterns of files that are read after all others.
    """
    patterns, late = (*leave, *_PASSING), tuple(last)
    found = []
    for root, folders, files in os.walk(folder):
        here = PurePosixPath(Path(root).relative_to(folder).as_posix())
        folders[:] = sorted(
            name for name in folders if not (Path(root) / name).is_symlink() and not _matches(here / name, patterns)
        )
        found += [here / name for name in files if not _matches(here / name, patterns) and _is_plain_file(Path(root) / name)]

    def order(path: PurePosixPath) -> tuple[int, str]:
        return (2 if _matches(path, (*late, "*.sqlite", "*.db")) else 0 if path.suffix == ".jsonl" else 1), str(path)

    return [str(path) for path in sorted(found, key=order)]


_PASSING = (
    *("lock", ".*.lock", "*.lock", ".*.sum", "*-wal", "*-shm", "*-journal", "*.pid", "*.log", "*.log.1", ".*.kept", ".*.????????"),
    *("lost+found", f"{_STAGING}*"),
)  # fmt: skip
"""Files that mean something only to the processes that run now."""


def _matches(path: PurePosixPath, patterns: Iterable[str]) -> bool:
    """Whether a pattern fits: one with a folder in it is a whole path, any other a name anywhere."""
    return any(fnmatchcase(str(path) if "/" in pattern else path.name, pattern) for pattern in patterns)


def _is_plain_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _is_program(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & 0o100)
    except FileNotFoundError:  # it was replaced, or removed, while it was read
        return False


@contextmanager
def _opened(path: Path, beside: Path) -> Iterator[BinaryIO | None]:
    """The file's content at one moment; None where it is gone."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        yield None
        return
    with file:
        if file.read(len(_SQLITE)) == _SQLITE:
            with tempfile.TemporaryDirectory(dir=beside, prefix=".backup.") as place:
                copy = Path(place) / "database"
                os.close(os.open(copy, os.O_CREAT | os.O_EXCL, 0o600))
                snapshot_database(path, copy)
                with copy.open("rb") as database:
                    yield database
            return
        file.seek(0)
        if path.suffix == ".jsonl":
            whole = file.read()
            yield io.BytesIO(whole[: whole.rfind(b"\n") + 1])
        else:
            yield file


def snapshot_database(path: Path, copy: Path) -> None:
    """Copies a SQLite database as it stands between two transactions, while others write it (sqlite.org/backup.html).

    Args:
        path: the database.
        copy: an empty file, which becomes a database without a write-ahead log.

    Raises:
        sqlite3.Error: it is damaged or stays locked.
    """
    with closing(sqlite3.connect(path, timeout=60.0)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
        target.execute("PRAGMA journal_mode = DELETE")


def _copy_in(tar: tarfile.TarFile, name: str, source: BinaryIO, executable: bool) -> dict[str, object]:
    size = source.seek(0, os.SEEK_END)
    source.seek(0)
    reader = _Hashing(source)
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o700 if executable else 0o600
    tar.addfile(entry, cast(BinaryIO, reader))
    return {"size": size, "sha256": reader.digest.hexdigest()}


class _Hashing:
    """A file that hashes what is read of it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(size)
        self.digest.update(content)
        return content


def _add(tar: tarfile.TarFile, name: str, content: bytes, mode: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    tar.addfile(entry, io.BytesIO(content))


def is_encrypted(archive: Path) -> bool:
    """Reports whether the backup asks for a passphrase.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with archive.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise ConfigError(f"the backup {archive} cannot be read: {error.strerror}") from error


@contextmanager
def unpack_backup(
    archive: Path, party: Party, folder: Path, passphrase: str | None, first_file: str
) -> Iterator[tuple[Path, BackupLabel]]:
    """Yields a new folder inside `folder` with all files of the backup; when the block ends well they move into `folder`.

    Nothing is yielded before the whole archive was read and every checksum agreed; when the block fails, `folder` is as it was.

    Args:
        archive: the backup.
        party: whose it must be.
        folder: made if missing; it must be empty.
        passphrase: of an encrypted backup.
        first_file: the file by which the folder is known; it moves last, so that half a folder is none.

    Raises:
        ConfigError: `folder` holds files, the backup is of another party, was altered or cut, the passphrase is wrong, or it holds
            what no backup holds: a link, a device, a path that leads outside.
    """
    made = not folder.exists()
    if not made and (not folder.is_dir() or any(path.name != "lost+found" for path in folder.iterdir())):
        raise ConfigError(f"{folder} is not empty; a backup is restored into a new folder, so move this one away and keep it")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=folder, prefix=_STAGING))
    try:
        label = _unpack(archive, party, staging, passphrase)
        if not (staging / first_file).is_file():
            raise ConfigError(f"the backup {archive} holds no {first_file}")
        yield staging, label
        for path in sorted(staging.iterdir(), key=lambda path: path.name == first_file):
            path.rename(folder / path.name)
        sync_folder(folder)
    except (OSError, tarfile.TarError) as error:
        raise ConfigError(f"the backup {archive} cannot be restored ({type(error).__name__}: {error})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if made and not any(folder.iterdir()):
            folder.rmdir()


def _unpack(archive: Path, party: Party, staging: Path, passphrase: str | None) -> BackupLabel:
    found: dict[str, dict[str, object]] = {}
    complete: dict[str, dict[str, object]] | None = None
    with _members(archive, passphrase) as (tar, damaged):
        label = _label(archive, tar, tar.next())
        if label.party != party:
            raise ConfigError(f"{archive} is the backup of a {label.party}, not of a {party}")
        while (member := tar.next()) is not None:
            if complete is not None:
                raise damaged
            if member.name == COMPLETE:
                complete = json.loads(_content(tar, member, damaged))
            else:
                found[member.name] = _put(tar, member, staging, damaged)
    if complete != found:
        raise damaged
    return label


def _put(tar: tarfile.TarFile, member: tarfile.TarInfo, staging: Path, damaged: ConfigError) -> dict[str, object]:
    path = PurePosixPath(member.name)
    plain = member.isreg() and path.parts and not path.is_absolute() and ".." not in path.parts and str(path) == member.name
    if not plain or path.parts[0] in (LABEL, COMPLETE):
        raise ConfigError(
            f"the backup holds {member.name!r}, which no backup holds (a link, a device, a path outside); nothing is restored"
        )
    target = staging / path
    for parent in [*reversed(target.relative_to(staging).parents)][1:]:
        (staging / parent).mkdir(mode=0o700, exist_ok=True)
    source = tar.extractfile(member)
    if source is None or target.exists():
        raise damaged
    reader = _Hashing(cast(BinaryIO, source))
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o700 if member.mode & 0o100 else 0o600)
    with os.fdopen(descriptor, "wb") as file:
        shutil.copyfileobj(reader, file, CHUNK)
        file.flush()
        os.fsync(file.fileno())
    return {"size": target.stat().st_size, "sha256": reader.digest.hexdigest()}


def _label(archive: Path, tar: tarfile.TarFile, member: tarfile.TarInfo | None) -> BackupLabel:
    wrong = ConfigError(f"{archive} is no backup of pneumofed, or of a later version")
    if member is None or member.name != LABEL:
        raise wrong
    try:
        values = json.loads(_content(tar, member, wrong))
        label = BackupLabel(**{**values, "without": tuple(values.get("without", ()))})
    except (ValueError, TypeError) as error:
        raise wrong from error
    if label.format != FORMAT:
        raise wrong
    return label


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, damaged: ConfigError) -> bytes:
    source = tar.extractfile(member) if member.isreg() and member.size <= _MAX_LABEL else None
    if source is None:
        raise damaged
    return source.read()


@contextmanager
def _members(archive: Path, passphrase: str | None) -> Iterator[tuple[tarfile.TarFile, ConfigError]]:
    """The archive's members in turn, and the error that says it is damaged."""
    damaged = ConfigError(f"the backup {archive} was altered, or cut in the middle; nothing is restored, take another one")
    try:
        with archive.open("rb") as file:
            encrypted = file.read(len(MAGIC)) == MAGIC
            if encrypted and passphrase is None:
                raise ConfigError(f"the backup {archive} is encrypted; give its passphrase (--passphrase-file)")
            if not encrypted:
                file.seek(0)
            payload = Unsealed(file, passphrase or "", damaged) if encrypted else file
            with tarfile.open(fileobj=cast(BinaryIO, payload), mode="r|") as tar:
                yield tar, damaged
            if encrypted:
                cast(Unsealed, payload).finish()
    except (tarfile.TarError, EOFError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise damaged from error
    except FileNotFoundError as error:
        if Path(error.filename or "") != archive:
            raise
        raise ConfigError(f"the backup {archive} is not there") from error
