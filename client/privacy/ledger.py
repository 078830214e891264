"""The site's privacy ledger: what each private round may have revealed about its data, written before the round trains.

`Ledger.spend` composes the new entry with all earlier ones of the same data and refuses it or commits it, in one transaction: two
processes at once cannot both take what is enough for one, and a process that is killed at any point has counted the round or not begun
it. A round that is repeated, after a crash or on a second request, is another mechanism and is counted again. So the ledger never holds
less than was spent. What it cannot read, it takes for spent: see `client.privacy.ledger_file`.

A site's private work is counted here before it is done, and what can be refused before data is read is refused: training (`spend_round`,
`check_budget`), and tables of numbers with noise (`noise_paid_once`), by the plain Gaussian mechanism (Dwork and Roth 2014, appendix A).
"""

from __future__ import annotations

import math
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pneumofed.client.federation.policy_decision import LIMITS, RunRequest, Spending, decide
from pneumofed.client.federation.site_data import SiteData, class_number
from pneumofed.client.privacy.entries import DataUnits, LedgerEntry, join_lineage, level_of, round_entry, total_epsilon, unit_keys
from pneumofed.client.privacy.ledger_file import (
    Recorded,
    append_entry,
    check_mark,
    connect,
    ledger_errors,
    read_all,
    transaction,
    write_mark,
)
from pneumofed.client.privacy.plan import SitePlan
from pneumofed.common.audit.log import hash_experiment
from pneumofed.common.config.choices import PrivacyUnit
from pneumofed.common.config.classes import task_words
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import SiteConfig, SitePolicy, hospital_delta
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.errors import BudgetError, ConfigError
from pneumofed.common.privacy.accounting import Mechanism
from pneumofed.common.privacy.randomness import RandomStream, data_fingerprint, own_secret, round_key


@dataclass(frozen=True)
class Spent:
    """Epsilon with an entry counted: of all entries of its lineage and of its study there, for one unit of `level` at `delta`."""

    lineage: float
    study: float
    level: PrivacyUnit
    delta: float
    run: float
    """Of the entry's run by itself, at the run's own delta and for the run's own unit."""


@dataclass(frozen=True)
class Lineage:
    """Data with one budget, and what was spent of it."""

    number: int
    datasets: int
    images: int
    """Of its largest data set."""
    patients: int
    """Of its newest data set."""
    entries: tuple[Recorded, ...]


def check_entry(earlier: Sequence[LedgerEntry], entry: LedgerEntry, policy: SitePolicy, patients: int) -> Spent:
    """Computes what would be spent with `entry` on top of `earlier`, the entries of its lineage.

    Judged at the hospital's delta (`common.config.parties`), or at a smaller one that any of these entries was planned with.

    Args:
        earlier: what was counted before.
        entry: what is asked for.
        policy: the site's.
        patients: of the site's data now.

    Raises:
        PolicyError: the entry protects less than `min_unit`, or was planned with a larger delta than the hospital's.
        BudgetError: it would exceed a limit.
    """
    together = [*earlier, entry]
    delta, level = judged_delta(together, policy, patients), level_of(together, policy.min_unit)
    same_study = [other for other in earlier if other.study == entry.study]
    totals = total_epsilon(together, delta, level), total_epsilon([*same_study, entry], delta, level)
    spending = Spending(*totals, level, delta, patients)
    decision = decide(policy, request_of(entry), spending)
    if not decision.permit and decision.rule in LIMITS:
        limit = getattr(policy, decision.rule)
        chosen = earlier if decision.rule == "max_epsilon" else same_study
        remaining = limit - total_epsilon(
            chosen, delta, level
        )  # only where it is refused: each composition costs tenths of a second
        raise BudgetError(decision.rule, f"{decision.reason}, {max(0.0, remaining):.4g} remains", remaining)
    decision.enforce()
    same_run = [other for other in earlier if other.run == entry.run and other.unit == entry.unit]
    run = total_epsilon([*same_run, entry], entry.delta, entry.unit)
    return Spent(spending.lineage, spending.study, level, delta, run)


def judged_delta(entries: Sequence[LedgerEntry], policy: SitePolicy, patients: int) -> float:
    """Returns the delta of an account: the hospital's, or the smallest that an entry was planned with.

    Args:
        entries: of one lineage.
        policy: the site's.
        patients: of the site's data.
    """
    return min([hospital_delta(policy, patients), *(entry.delta for entry in entries)])


def request_of(entry: LedgerEntry) -> RunRequest:
    """Makes the request to count `entry`."""
    return RunRequest("train", entry.run, entry.round, entry.study, private=True, unit=entry.unit, delta=entry.delta)


class Ledger:
    """The ledger at `path`, shared by any number of processes of its site. It is made by the first entry."""

    def __init__(self, path: Path, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.path, self._now = Path(path), now

    def spend(self, entry: LedgerEntry, units: DataUnits, policy: SitePolicy) -> Spent:
        """Counts `entry`, which is about the data of `units`, on the disk; only then may its mechanism run.

        Args:
            entry: what is about to run.
            units: all data of the site for the entry's experiment.
            policy: the site's, as it stood when the message came.

        Returns:
            Epsilon with the entry counted.

        Raises:
            PolicyError: as `check_entry`, or (rule `ledger`) the ledger is damaged, missing or cannot be written; nothing is counted.
            BudgetError: as `check_entry`; nothing is counted.
        """
        with ledger_errors(self.path), closing(connect(self.path)) as connection:
            with transaction(connection):
                known, secret = read_all(connection)
                check_mark(self.path, known)
                lineage = join_lineage(connection, units, unit_keys(secret, units.digests, units.patients))
                earlier = [other.entry for other in _of_lineage(connection, known, lineage)]
                spent = check_entry(earlier, entry, policy, len(set(units.patients)))
                new = Recorded(
                    len(known) + 1,
                    self._now().isoformat(timespec="seconds"),
                    units.dataset,
                    entry,
                    spent.lineage if math.isfinite(spent.lineage) else None,
                    spent.delta,
                    spent.level,
                )
                append_entry(connection, new, known)
            # in a transaction of its own, so that no older state is noted over a newer one
            with transaction(connection):
                write_mark(self.path, read_all(connection)[0])
        return spent

    def foresee(self, run: str, experiment: str, policy: SitePolicy) -> None:
        """Refuses, without the data and writing nothing, the next round of a run whose last one is an entry here and cost the same.

        Args:
            run: the run's token.
            experiment: its hash, as in the audit log.
            policy: the site's, as it stood when the message came.

        Raises:
            PolicyError, BudgetError: as `spend`.
        """
        for lineage in self.lineages():
            earlier = [other.entry for other in lineage.entries]
            same = [entry for entry in earlier if (entry.run, entry.experiment, entry.purpose) == (run, experiment, "training")]
            if same:
                check_entry(earlier, same[-1], policy, lineage.patients)

    def earlier(self, units: DataUnits) -> list[LedgerEntry]:
        """Reads the entries that data of `units` inherits; writes nothing.

        Raises:
            PolicyError: the ledger is damaged or missing.
        """
        with ledger_errors(self.path):
            if not self.exists():
                return []
            with closing(connect(self.path)) as connection:
                connection.execute("BEGIN IMMEDIATE")  # closing undoes it: the data joins for as long as it is asked
                known, secret = read_all(connection)
                check_mark(self.path, known)
                lineage = join_lineage(connection, units, unit_keys(secret, units.digests, units.patients))
                return [other.entry for other in _of_lineage(connection, known, lineage)]

    def exists(self) -> bool:
        """Reports whether anything was spent here.

        Raises:
            PolicyError: something was, and the ledger is gone.
        """
        if self.path.exists():
            return True
        check_mark(self.path, [])
        return False

    def lineages(self) -> list[Lineage]:
        """Reads all data with its entries, in the order in which it came.

        Raises:
            PolicyError: the ledger is damaged or missing.
        """
        with ledger_errors(self.path):
            if not self.exists():
                return []
            with closing(connect(self.path)) as connection, transaction(connection):
                known, _ = read_all(connection)
                check_mark(self.path, known)
                rows = connection.execute("SELECT lineage, COUNT(*), MAX(images) FROM dataset GROUP BY lineage ORDER BY lineage")
                patients = dict(connection.execute("SELECT id, patients FROM dataset").fetchall())
                return [
                    Lineage(number, datasets, images, patients[entries[-1].dataset] if entries else 0, entries)
                    for number, datasets, images in rows.fetchall()
                    for entries in [tuple(_of_lineage(connection, known, number))]
                ]


def _of_lineage(connection: sqlite3.Connection, known: Sequence[Recorded], lineage: int) -> list[Recorded]:
    datasets = {row[0] for row in connection.execute("SELECT id FROM dataset WHERE lineage = ?", (lineage,))}
    return [recorded for recorded in known if recorded.dataset in datasets]


def open_ledger(config: SiteConfig) -> Ledger:
    """Opens the site's ledger; no file is made before its first entry."""
    return Ledger(Path(config.work_dir) / "ledger.sqlite")


def spend_round(
    run: str, round_number: int, experiment: ExperimentConfig, site: SiteData, plan: SitePlan, policy: SitePolicy
) -> Spent:
    """Counts the training of one round, which may begin once this has returned. To be called for each attempt, a repeated one too.

    Args:
        run: the run's token.
        round_number: from 1.
        experiment: of the run.
        site: the site's data.
        plan: what the round does.
        policy: the site's, as it stood when the message came.

    Raises:
        PolicyError, BudgetError: policy or ledger refuse the round (see `Ledger.spend`); it must not train.
    """
    units = DataUnits.of(site)
    entry = round_entry(run, round_number, experiment, units, plan)
    return open_ledger(site.config).spend(entry, units, policy)


def check_budget(config: SiteConfig, policy: SitePolicy, experiment: ExperimentConfig, run: str) -> None:
    """Refuses a later round of a private run that the ledger is sure to refuse, before any data is read.

    The first round of a run is refused by `spend_round`, once the data is known and before it trains.

    Args:
        config: the site's own.
        policy: the site's, as it stood when the message came.
        experiment: of the run.
        run: the run's token.

    Raises:
        PolicyError, BudgetError: as `Ledger.spend`.
    """
    open_ledger(config).foresee(run, hash_experiment(experiment), policy)


def noised_counts(site: SiteData, experiment: ExperimentConfig, policy: SitePolicy) -> list[int]:
    """Counts training images of each class, and validation images, with noise by the site's policy; none is below 0.

    Where the policy protects patients, `images_counted` of each are counted at most, so that the noise is of a deviation which no
    patient's data decides: `count_noise` times so many, for images `count_noise` (one image more or less moves one number by one).

    Args:
        site: the site's data.
        experiment: of the run.
        policy: the site's, with `count_noise` set.

    Raises:
        PolicyError, BudgetError, ConfigError: as `noise_paid_once`; nothing was released.
    """
    most = policy.images_counted if policy.min_unit == "patient" else None
    labels, validation = _counted(site.train, most), _counted(site.validation, most)
    exact = [*np.bincount(labels, minlength=class_number(experiment)).tolist(), len(validation)]
    about = (data_fingerprint(site.train), data_fingerprint(site.validation), task_words(experiment.task), repr(most))
    stream, deviation = noise_paid_once("counts", about, site.config, DataUnits.of(site), experiment, policy)
    noisy = np.asarray(exact) + deviation * (most or 1) * stream.normal(len(exact)).numpy()
    return [max(0, round(float(value))) for value in noisy]


def _counted(data: Dataset, most: int | None) -> NDArray[np.int64]:
    """Labels of all images, or of the first `most` of each patient."""
    seen, kept = Counter[str](), []
    for row, patient in enumerate(data.patients):
        seen[patient] += 1
        if most is None or seen[patient] <= most:
            kept.append(row)
    return data.labels[kept]


def noise_paid_once(
    kind: str, about: Sequence[str], config: SiteConfig, units: DataUnits, experiment: ExperimentConfig, policy: SitePolicy
) -> tuple[RandomStream, float]:
    """Pays for the noise of one table, before it is drawn; whoever asks for the same table again gets the same noise for nothing.

    What is paid for is the very noise: another table, and another key of the site's, is another mechanism and is paid for.

    Args:
        kind: of the table.
        about: all that its numbers and their order depend on.
        config: the site's own.
        units: whose data it is about.
        experiment: of the run.
        policy: the site's, with `count_noise` set.

    Returns:
        A stream of standard normals, and the deviation for each unit by which one patient, or image (`min_unit`), moves the table in L2.

    Raises:
        PolicyError, BudgetError: as `Ledger.spend`.
        ConfigError: the policy sets no noise.
    """
    if policy.count_noise is None:
        raise ConfigError("the policy sets no count_noise")
    secret, parts = own_secret(Path(config.work_dir)), (kind, *about, units.dataset, policy.min_unit, repr(policy.count_noise))
    token, ledger = round_key(secret, ("paid", *parts)).hex()[:16], open_ledger(config)
    if not any(entry.purpose == "counts" and entry.run == token for entry in ledger.earlier(units)):
        mechanism, delta = Mechanism(1.0, policy.count_noise, 1), hospital_delta(policy, len(set(units.patients)))
        name, images = experiment.name, units.images_per_patient
        entry = LedgerEntry(token, 0, name, hash_experiment(experiment), "counts", policy.min_unit, images, mechanism, delta)
        ledger.spend(entry, units, policy)
    return RandomStream(round_key(secret, ("noise", *parts))), policy.count_noise
