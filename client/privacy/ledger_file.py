"""The ledger's file: SQLite, each entry chained to the one before by its hash, and a mark beside it of how far it had come.

    ledger.sqlite       entries, data sets, keyed hashes of images and patients; mode 0600; write-ahead log, synchronous
    ledger.mark         number and hash of the last entry: shows that the ledger was lost, or that an old copy took its place

Whatever is wrong closes the ledger: nothing is spent before someone has looked. To begin anew is to forget what was spent, so nothing
here does it; who decides to removes both files.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pneumofed.client.privacy.entries import LINEAGE_SCHEMA, LedgerEntry
from pneumofed.common.audit.log import CHAIN_START, canonical, chain_hash, first_broken
from pneumofed.common.config.choices import PrivacyUnit
from pneumofed.common.errors import ConfigError, PolicyError
from pneumofed.common.files import StateFile, exclusive
from pneumofed.common.privacy.accounting import Mechanism

_WAIT_SEC = 60.0
_SCHEMA = (
    "CREATE TABLE ledger (secret BLOB NOT NULL)",
    "CREATE TABLE entry (number INTEGER PRIMARY KEY, body TEXT NOT NULL, hash TEXT NOT NULL)",
    *LINEAGE_SCHEMA,
)


@dataclass(frozen=True)
class Recorded:
    """An entry as it stands in the ledger, with the epsilon that its lineage had come to with it."""

    number: int
    time: str
    dataset: str
    entry: LedgerEntry
    epsilon: float | None
    """None is infinity."""
    delta: float
    """At which `epsilon` was judged."""
    level: PrivacyUnit
    """Whose `epsilon` is."""
    hash: str = ""

    def body(self) -> bytes:
        """Returns the bytes that stand for it, without its hash; canonical, so that there are no others."""
        return canonical({key: value for key, value in asdict(self).items() if key != "hash"})

    @classmethod
    def parse(cls, body: str, hash_: str) -> Recorded:
        """Reads an entry back from its row.

        Args:
            body: the text of `body`.
            hash_: the entry's in the chain.

        Raises:
            ValueError, TypeError, KeyError, ConfigError: it is of another version.
        """
        values: dict[str, Any] = json.loads(body)
        entry = values.pop("entry")
        return cls(**values, entry=LedgerEntry(**{**entry, "mechanism": Mechanism(**entry["mechanism"])}), hash=hash_)


@contextmanager
def ledger_errors(path: Path) -> Iterator[None]:
    """Turns whatever the database or the disk says into a refusal.

    Raises:
        PolicyError: rule `ledger`.
    """
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise _closed(path, f"cannot be read or written ({type(error).__name__}: {error})") from error


def connect(path: Path) -> sqlite3.Connection:
    """Opens the ledger, made with a key of its own if there is none and none was known.

    Raises:
        PolicyError: it was known and is gone.
        sqlite3.Error, OSError: it cannot be opened.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with exclusive(path.parent):
        if not path.exists():
            check_mark(path, [])
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))  # SQLite gives its other files the same mode
        connection = sqlite3.connect(path, timeout=_WAIT_SEC, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            if not connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
                _make(connection)
        except BaseException:
            connection.close()
            raise
    return connection


def _make(connection: sqlite3.Connection) -> None:
    with transaction(connection):
        for statement in _SCHEMA:
            connection.execute(statement)
        connection.execute("INSERT INTO ledger VALUES (?)", (secrets.token_bytes(32),))


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """The only writer while the block runs; committed to the disk when it ends well, undone when it does not."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def read_all(connection: sqlite3.Connection) -> tuple[list[Recorded], bytes]:
    """Reads all entries in their order, and the ledger's key.

    Raises:
        PolicyError: an entry was changed, removed or inserted, or the database is damaged.
    """
    path = Path(connection.execute("PRAGMA database_list").fetchone()[2])
    if connection.execute("PRAGMA quick_check").fetchone()[0] != "ok":
        raise _closed(path, "is damaged")
    rows = connection.execute("SELECT number, body, hash FROM entry ORDER BY number").fetchall()
    secret = connection.execute("SELECT secret FROM ledger").fetchall()
    misplaced = next((index for index, (number, _, _) in enumerate(rows) if number != index + 1), None)
    broken = [
        index for index in (first_broken((body.encode(), found) for _, body, found in rows), misplaced) if index is not None
    ]
    if broken:
        number = rows[min(broken)][0]
        raise _closed(path, f"is not as it was written: entry {number} was changed, or entries before it are missing")
    if len(secret) != 1:
        raise _closed(path, "has lost its key")
    try:
        return [Recorded.parse(body, found) for _, body, found in rows], secret[0][0]
    except (ValueError, TypeError, KeyError, ConfigError) as error:
        raise _closed(path, f"holds an entry of another version ({error})") from error


def append_entry(connection: sqlite3.Connection, new: Recorded, known: Sequence[Recorded]) -> None:
    """Adds `new` after `known`, chained to the last of them.

    Args:
        connection: an open ledger, in a transaction of the caller.
        new: its number is that of the last entry plus one.
        known: all entries that the ledger holds.
    """
    body = new.body()
    connection.execute("INSERT INTO entry VALUES (?, ?, ?)", (new.number, body.decode(), chain_hash(body, _head(known))))


def write_mark(path: Path, known: Sequence[Recorded]) -> None:
    """Writes beside the ledger how far it has come, on the disk.

    Args:
        path: the ledger's.
        known: all its entries.
    """
    _mark_file(path).write((len(known), _head(known)))


def check_mark(path: Path, known: Sequence[Recorded]) -> None:
    """Compares the entries with the mark, which may be behind and not ahead.

    Args:
        path: the ledger's; nothing is compared where there is no mark.
        known: all its entries; none where the ledger is missing.

    Raises:
        PolicyError: the ledger is missing or older than the mark, or the mark cannot be read.
    """
    mark = _mark_file(path).read()
    if mark is None:
        return
    entries, head = mark
    if not path.exists():
        raise _closed(path, f"is missing; it had {entries} entries")
    if len(known) < entries or _head(known[:entries]) != head:
        raise _closed(path, f"has {len(known)} entries, and once had {entries} or others: an old copy or another ledger")


def _mark_file(path: Path) -> StateFile[tuple[int, str] | None]:
    file = path.with_suffix(".mark")

    def parse(content: bytes) -> tuple[int, str]:
        mark = json.loads(content)
        return int(mark["entries"]), str(mark["hash"])

    return StateFile(
        file,
        kind="the mark of how far the ledger had come",
        parse=parse,
        missing=None,
        remedy="the ledger cannot be compared with it",
        refuse=lambda problem: _closed(path, f"cannot be compared with {file.name}, which is damaged ({problem})"),
        dump=lambda mark: canonical({"entries": mark[0], "hash": mark[1]}) if mark else b"",
    )


def _head(known: Sequence[Recorded]) -> str:
    return known[-1].hash if known else CHAIN_START


def _closed(path: Path, why: str) -> PolicyError:
    advice = "no private round may run; put the newest backup back, or ask who answers for the data before removing it"
    return PolicyError("ledger", f"the privacy ledger {path} {why}; {advice}")
