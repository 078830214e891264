"""Which data an entry of the ledger is about: data sets that share an image or a patient are one lineage, with one budget.

A content hash alone would give a site a fresh budget with each image that it adds. So the ledger keeps a keyed hash of every image's
content and every patient's name that a private run used. Data that shares any of them with earlier data joins that data's lineage, and
lineages that it connects become one. All entries of a lineage count for all its images: too much for those added later, too little for
none. Two files of one image that differ in any byte, under two names of the patient, are two.
"""

from __future__ import annotations

import hashlib
import hmac
import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from client.site import Site
from common.hash_chain import canonical

SCHEMA = (
    "CREATE TABLE dataset (id TEXT PRIMARY KEY, lineage INTEGER NOT NULL, images INTEGER NOT NULL, patients INTEGER NOT NULL)",
    "CREATE TABLE unit (key BLOB PRIMARY KEY, lineage INTEGER NOT NULL) WITHOUT ROWID",
)


@dataclass(frozen=True)
class DataUnits:
    """The images of a site's data by their content, and whose they are; row i of each is the same image."""

    digests: Sequence[str]
    patients: Sequence[str]

    @classmethod
    def of(cls, site: Site) -> DataUnits:
        """All data of the site for an experiment: validation is judged by the model that was trained on the rest."""
        return cls([*site.train.digests, *site.validation.digests], [*site.train.patients, *site.validation.patients])

    @property
    def dataset(self) -> str:
        """SHA-256 over the content of the images, in any order."""
        return hashlib.sha256(canonical(sorted(self.digests))).hexdigest()

    @property
    def images_per_patient(self) -> int:
        """Most images of a patient."""
        return max(Counter(self.patients).values())


def unit_keys(secret: bytes, digests: Iterable[str], patients: Iterable[str]) -> set[bytes]:
    """What the ledger keeps of images and patients: HMAC-SHA256 under the ledger's own key, 16 bytes."""
    names = {f"image {digest}" for digest in digests} | {f"patient {patient}" for patient in patients}
    return {hmac.digest(secret, name.encode(), "sha256")[:16] for name in names}


def join_lineage(connection: sqlite3.Connection, units: DataUnits, keys: set[bytes]) -> int:
    """The lineage of the data, to which all its units now belong; lineages that it connects become one."""
    connection.execute("CREATE TEMP TABLE asked (key BLOB PRIMARY KEY) WITHOUT ROWID")
    connection.executemany("INSERT INTO asked VALUES (?)", ((key,) for key in keys))
    found = {row[0] for row in connection.execute("SELECT DISTINCT lineage FROM unit JOIN asked USING (key)")}
    (last,) = connection.execute("SELECT COALESCE(MAX(lineage), 0) FROM dataset").fetchone()
    lineage = min(found, default=last + 1)
    for other in found - {lineage}:
        connection.execute("UPDATE dataset SET lineage = ? WHERE lineage = ?", (lineage, other))
        connection.execute("UPDATE unit SET lineage = ? WHERE lineage = ?", (lineage, other))
    connection.executemany("INSERT OR IGNORE INTO unit VALUES (?, ?)", ((key, lineage) for key in keys))
    row = (units.dataset, lineage, len(units.digests), len(set(units.patients)))
    connection.execute("INSERT OR IGNORE INTO dataset VALUES (?, ?, ?, ?)", row)
    return lineage
