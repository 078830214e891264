"""Entries of a ledger: what they cost together, for a patient or for an image, and which data each of them is about.

Level of the account. Where all entries protect images, and the policy asks for no more, epsilon is that of one image added or removed.
As soon as one entry of the data protects patients, or the policy asks for it, epsilon is that of one patient added or removed with all
images, and each entry that protects images is counted as the following mechanism of a patient.

    Let a patient have at most k images and a step draw each with rate q. Without the patient the sum is N(0, s^2) up to a shift; with
    the patient it is moved by a vector of length j C at most, j ~ Binomial(k, q): a mixture of Gaussians, which is no easier to tell
    from N(0, s^2) than the one-dimensional mixture with shifts j C (Choquette-Choo et al. 2024, "Privacy amplification for matrix
    mechanisms", lemma 4.5; Ganesh 2024, arXiv 2401.10294, theorem 1). Such mixtures grow with their shifts in the stochastic order
    (ibid.), and j <= k [j > 0], where P(j > 0) = 1 - (1 - q)^k. So the step is at most the sampled Gaussian mechanism of rate
    1 - (1 - q)^k and noise multiplier sigma / k. Steps compose adaptively, hence entries do.

The other way does not hold: an entry that protects patients says nothing as small of one image among several of a patient, whose
removal replaces the patient's record in place of removing it. So an account with such entries is kept for patients.

Lineage of the data. Data sets that share an image or a patient are one lineage, with one budget. A content hash of a data set by itself
would give a site a fresh budget with each image that it adds. So the ledger keeps a keyed hash of every image's content and every
patient's name that a private run used. Data that shares any of them with earlier data joins that data's lineage, and lineages that it
connects become one. All entries of a lineage count for all its images: too much for those added later, too little for none. Two files of
one image that differ in any byte, under two names of the patient, are two.
"""

from __future__ import annotations

import hashlib
import hmac
import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pneumofed.client.federation.site_data import SiteData
from pneumofed.client.privacy.plan import SitePlan
from pneumofed.common.audit.log import canonical, hash_experiment
from pneumofed.common.config.choices import PrivacyUnit
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.errors import ConfigError
from pneumofed.common.privacy.accounting import AccountantName, Mechanism, epsilon

Purpose = Literal["training", "counts"]
LINEAGE_SCHEMA = (
    "CREATE TABLE dataset (id TEXT PRIMARY KEY, lineage INTEGER NOT NULL, images INTEGER NOT NULL, patients INTEGER NOT NULL)",
    "CREATE TABLE unit (key BLOB PRIMARY KEY, lineage INTEGER NOT NULL) WITHOUT ROWID",
)


@dataclass(frozen=True)
class LedgerEntry:
    """One mechanism that a site plans to run: one round of one run, or what else it releases. A repetition is another entry."""

    run: str
    """The run's token."""
    round: int
    study: str
    """Name of the experiment."""
    experiment: str
    """Its hash, as in the audit log."""
    purpose: Purpose
    unit: PrivacyUnit
    images_per_patient: int
    """Most images that a patient of the data has."""
    mechanism: Mechanism
    delta: float
    """With which the run was planned."""

    def __post_init__(self) -> None:
        if self.images_per_patient < 1:
            raise ConfigError(f"a patient has one image at least, got {self.images_per_patient}")
        if not 0.0 < self.delta < 1.0:
            raise ConfigError(f"delta must be in (0, 1), got {self.delta}")


@dataclass(frozen=True)
class DataUnits:
    """The images of a site's data by their content, and whose they are; row i of each is the same image."""

    digests: Sequence[str]
    patients: Sequence[str]

    @classmethod
    def of(cls, site: SiteData) -> DataUnits:
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


def round_entry(run: str, round_number: int, experiment: ExperimentConfig, units: DataUnits, plan: SitePlan) -> LedgerEntry:
    """Makes the entry of one training round.

    Args:
        run: the run's token.
        round_number: from 1.
        experiment: of the run.
        units: the site's data.
        plan: what the round does.
    """
    return LedgerEntry(
        run,
        round_number,
        experiment.name,
        hash_experiment(experiment),
        "training",
        plan.unit,
        units.images_per_patient,
        plan.round_mechanism(),
        plan.delta,
    )


def level_of(entries: Iterable[LedgerEntry], least: PrivacyUnit) -> PrivacyUnit:
    """Returns whose epsilon the account of `entries` is: a patient's if any of them, or `least`, says so.

    Args:
        entries: of one lineage.
        least: the policy's `min_unit`.
    """
    return "patient" if least == "patient" or any(entry.unit == "patient" for entry in entries) else "image"


def total_epsilon(entries: Sequence[LedgerEntry], delta: float, level: PrivacyUnit, accountant: AccountantName = "prv") -> float:
    """Computes epsilon at `delta` of all `entries` for one unit of `level`, an upper bound.

    Args:
        entries: of one lineage, in any order; none give 0.
        delta: in (0, 1).
        level: whose epsilon it is.
        accountant: that composes the mechanisms.

    Raises:
        ConfigError: an entry protects patients and `level` is image.
    """
    return epsilon([mechanism_at(entry, level) for entry in entries], delta, accountant)


def mechanism_at(entry: LedgerEntry, level: PrivacyUnit) -> Mechanism:
    """Returns the mechanism that bounds `entry` for one unit of `level` (see the head of this module).

    Args:
        entry: of the ledger.
        level: patient or image.

    Raises:
        ConfigError: the entry protects patients and `level` is image.
    """
    if entry.unit == level:
        return entry.mechanism
    if level == "image":
        raise ConfigError("an entry that protects patients has no account for images")
    images, mechanism = entry.images_per_patient, entry.mechanism
    return replace(
        mechanism,
        sampling_rate=1.0 - (1.0 - mechanism.sampling_rate) ** images,
        noise_multiplier=mechanism.noise_multiplier / images,
    )


def unit_keys(secret: bytes, digests: Iterable[str], patients: Iterable[str]) -> set[bytes]:
    """Computes what the ledger keeps of images and patients: HMAC-SHA256 under the ledger's own key, 16 bytes.

    Args:
        secret: the ledger's own key.
        digests: SHA-256 of images.
        patients: their names in the site's manifest.
    """
    names = {f"image {digest}" for digest in digests} | {f"patient {patient}" for patient in patients}
    return {hmac.digest(secret, name.encode(), "sha256")[:16] for name in names}


def join_lineage(connection: sqlite3.Connection, units: DataUnits, keys: set[bytes]) -> int:
    """Joins the data to a lineage, to which all its units now belong; lineages that it connects become one.

    Args:
        connection: an open ledger, in a transaction of the caller.
        units: the data.
        keys: of `units` (see `unit_keys`).

    Returns:
        The number of the lineage, from 1.
    """
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
