"""What was judged at a site, day by day: an append-only SQLite file without a pixel and without a patient.

A patient is held as a keyed hash, which shows that two images are of one person and nothing more; its key lies beside the file and
never leaves the site. A row that was written is never changed: the database itself refuses.
"""

from __future__ import annotations

import hmac
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from datetime import date
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pneumofed.common.errors import DataError
from pneumofed.common.files import drawn_once
from pneumofed.common.folder_lock import owned
from pneumofed.common.imaging.patient_groups import KINDS, PatientGroups
from pneumofed.common.model_bundle.manifest import REFERENCE_GROUPS
from pneumofed.inference.monitor.e_processes import Baseline
from pneumofed.inference.monitor.reference import Observations, encode_words

Floats = npt.NDArray[np.float64]
Label = Literal["pneumonia", "normal"]

STORE_FILE, KEY_FILE = "judged.sqlite", "key"
BUSY_SEC = 30.0
REFUSED_VERDICT = "cannot judge"
_NO_PROBABILITY = -1.0
"""Probability in the row of an image that cannot be judged, since the column must not be null. Rows of earlier versions have the network's
own number there; neither is read."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS judged (
    id INTEGER PRIMARY KEY, bundle TEXT NOT NULL, day INTEGER NOT NULL, scanner TEXT NOT NULL, unit TEXT NOT NULL,
    verdict TEXT NOT NULL, probability REAL NOT NULL, statistics BLOB NOT NULL, embedding BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS readings (
    id INTEGER PRIMARY KEY, image INTEGER NOT NULL UNIQUE REFERENCES judged, day INTEGER NOT NULL, label TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS baselines (
    id INTEGER PRIMARY KEY, bundle TEXT NOT NULL, scanner TEXT NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS judged_by_day ON judged (bundle, day);
""" + "".join(
    f"CREATE TRIGGER IF NOT EXISTS {table}_{verb.lower()} BEFORE {verb} ON {table} BEGIN SELECT RAISE(ABORT, 'append-only'); END;\n"
    for table in ("judged", "readings", "baselines")
    for verb in ("UPDATE", "DELETE")
)


@dataclass(frozen=True)
class Observation:
    """One judged image. `day` and `scanner` as in `Observations`; `patient` is hashed before it is written, None if unknown; `probability`
    is None where the image cannot be judged. Of the patient's age no more than the group is written."""

    day: int
    scanner: str
    patient: str | None
    verdict: str
    probability: float | None
    statistics: npt.NDArray[np.float32]
    embedding: Floats
    groups: PatientGroups = field(default_factory=PatientGroups)


def own_monitor(folder: Path, work: str) -> AbstractContextManager[None]:
    """Owns a monitor for a batch of images, so that no two batches mix: their order is part of the evidence.

    Args:
        folder: of the monitor; made if it is missing.
        work: the command that adds them, as in `owned`.

    Raises:
        ConfigError: another batch is being added, or the folder cannot be made.
    """
    return owned(folder, "monitor", work, "wait for it or choose another folder", mode=0o700)


@dataclass(frozen=True)
class MonitorStore:
    """The store in `folder`, which is made with its first image."""

    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / STORE_FILE

    def append(self, bundle: str, observation: Observation) -> int:
        """Writes one judged image and returns its number, by which a reading names it.

        Args:
            bundle: digest of the bundle that judged it.
            observation: its patient is hashed with the key of the folder and not written.

        Raises:
            DataError: the folder cannot be written.
        """
        probability = _NO_PROBABILITY if observation.probability is None else observation.probability
        values = (
            bundle, observation.day, observation.scanner, self._unit(observation.patient), observation.verdict, probability,
            observation.statistics.astype("<f4").tobytes(), observation.embedding.astype("<f4").tobytes(),
            *(dict(observation.groups.known()).get(kind, "") for kind in KINDS),
        )  # fmt: skip
        columns = (
            f"bundle, day, scanner, unit, verdict, probability, statistics, embedding, {', '.join(REFERENCE_GROUPS.values())}"
        )
        return self._insert(f"INSERT INTO judged ({columns}) VALUES ({', '.join('?' * len(values))})", values)

    def append_reading(self, image: int, label: Label, day: int) -> None:
        """Writes what the reader found on `image`. The first reading of an image is kept, later ones are passed over.

        Args:
            image: number that `append` returned.
            label: of the reader.
            day: of the reading, a proleptic Gregorian ordinal.

        Raises:
            DataError: there is no such image, or the folder cannot be written.
        """
        self._insert("INSERT OR IGNORE INTO readings (image, day, label) VALUES (?, ?, ?)", (image, day, label))

    def append_baseline(self, bundle: str, scanner: str, first: int, last: int) -> None:
        """Writes that a person found the images of `scanner` from day `first` to day `last` in order.

        Args:
            bundle: digest of the bundle that judged the images.
            scanner: as in `Observation.scanner`.
            first: ordinal of the first day; above `last` for an empty baseline, after which the reference counts again.
            last: ordinal of the last day, included.

        Raises:
            DataError: the folder cannot be written.
        """
        columns = "bundle, scanner, first, last"
        self._insert(f"INSERT INTO baselines ({columns}) VALUES (?, ?, ?, ?)", (bundle, scanner, first, last))

    def read(self, bundle: str) -> Observations:
        """Reads all that the bundle of that digest judged, by day and then in the order of arrival.

        Raises:
            DataError: the store is damaged.
        """
        query = (
            "SELECT judged.id, judged.day, scanner, unit, verdict, probability, statistics, embedding, readings.day, label, readings.id, "
            f"{', '.join(REFERENCE_GROUPS.values())} "
            "FROM judged LEFT JOIN readings ON image = judged.id WHERE bundle = ? ORDER BY judged.day, judged.id"
        )
        return _observations(self._select(query, (bundle,)))

    def read_baselines(self, bundle: str, found: Observations) -> tuple[Baseline, ...]:
        """Reads the baselines of a bundle, as positions in `found`.

        Args:
            bundle: digest.
            found: what `read` gave for the same bundle.

        Raises:
            DataError: the store is damaged.
        """
        rows = self._select("SELECT scanner, first, last FROM baselines WHERE bundle = ? ORDER BY id", (bundle,))
        return tuple(
            Baseline(scanner, *(int(row) for row in np.searchsorted(found.days, [first, last + 1])))
            for scanner, first, last in rows
        )

    def bundles(self) -> list[tuple[str, int]]:
        """Lists (digest, images) of each bundle that judged here, the latest last.

        Raises:
            DataError: the store is damaged.
        """
        return self._select("SELECT bundle, COUNT(*) FROM judged GROUP BY bundle ORDER BY MAX(id)", ())

    def _insert(self, statement: str, values: tuple[Any, ...]) -> int:
        with self._connection() as connection:
            return int(connection.execute(statement, values).lastrowid or 0)

    def _select(self, query: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        if not self.path.exists():
            return []
        with self._connection() as connection:
            return connection.execute(query, values).fetchall()

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.touch(mode=0o600)
            with closing(sqlite3.connect(self.path, timeout=BUSY_SEC)) as connection, connection:
                connection.execute("PRAGMA foreign_keys = ON")
                connection.executescript(_SCHEMA)
                _add_group_columns(connection)
                yield connection
        except (OSError, sqlite3.Error) as error:
            raise DataError(f"{self.path}: {type(error).__name__}; check its owner and permissions, or restore it") from error

    def _unit(self, patient: str | None) -> str:
        """An opaque word for `patient`; one of its own for an image whose patient is unknown."""
        if patient is None:
            return secrets.token_hex(8)
        return hmac.new(
            drawn_once(self.folder / KEY_FILE, lambda: secrets.token_bytes(32)), patient.encode(), sha256
        ).hexdigest()[:16]


def _add_group_columns(connection: sqlite3.Connection) -> None:
    """Adds the columns of the patients' groups to a store of an earlier version, in which no group is known."""
    there = {row[1] for row in connection.execute("PRAGMA table_info(judged)")}
    missing = [name for name in REFERENCE_GROUPS.values() if name not in there]
    if not missing:
        return
    connection.execute("BEGIN IMMEDIATE")  # of two that come at once, the second finds them there
    there = {row[1] for row in connection.execute("PRAGMA table_info(judged)")}
    for name in missing:
        if name not in there:
            connection.execute(f"ALTER TABLE judged ADD COLUMN {name} TEXT NOT NULL DEFAULT ''")
    connection.commit()


def _observations(rows: list[tuple[Any, ...]]) -> Observations:
    columns = list(zip(*rows, strict=True)) if rows else [()] * (11 + len(KINDS))
    _, days, scanners, units, verdicts, probabilities, statistics, embedding, read_days, labels, readings, *groups = columns
    verdicts = tuple("pneumonia" if said == "finding" else said for said in verdicts)  # both are: not normal
    verdict = np.array(verdicts, np.str_)
    refused = verdict == REFUSED_VERDICT
    score = np.where(refused, np.nan, np.array(probabilities, np.float64))
    read = [(day, reading) for day, reading in zip(read_days, readings, strict=True) if reading is not None]
    order = {reading: rank for rank, (_, reading) in enumerate(sorted(read))}
    return Observations(
        days=np.array(days, np.int64),
        scanners=np.array(scanners, np.str_),
        units=np.array(units, np.str_),
        statistics=_matrix(statistics),
        embedding=_matrix(embedding),
        probabilities=score,
        refused=refused,
        expected_errors=np.where(verdict == "pneumonia", 1.0 - score, score),
        corrected=np.array([label is not None and label != said for label, said in zip(labels, verdicts, strict=True)], np.bool_),
        read_order=np.array([-1 if reading is None else order[reading] for reading in readings], np.int64),
        read_days=np.array([-1 if day is None else day for day in read_days], np.int64),
        groups=encode_words(groups),
    )


def _matrix(blobs: tuple[bytes, ...]) -> Floats:
    return np.stack([np.frombuffer(blob, "<f4") for blob in blobs]).astype(np.float64) if blobs else np.empty((0, 0))


def today() -> int:
    """Returns the ordinal of the day by the site's own clock."""
    return date.today().toordinal()
