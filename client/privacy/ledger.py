"""The site's privacy ledger: what each private round may have revealed about its data, written before the round trains.

`Ledger.spend` composes the new entry with all earlier ones of the same data and refuses it or commits it, in one transaction: two
processes at once cannot both take what is enough for one, and a process that is killed at any point has counted the round or not begun
it. A round that is repeated, after a crash or on a second request, is another mechanism and is counted again. So the ledger never holds
less than was spent. What it cannot read, it takes for spent: see `client.privacy.ledger_file`.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pneumofed.client.federation.policy_decision import LIMITS, RunRequest, Spending, decide
from pneumofed.client.privacy.delta import hospital_delta
from pneumofed.client.privacy.entries import DataUnits, LedgerEntry, join_lineage, level_of, total_epsilon, unit_keys
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
from pneumofed.common.config.experiment import PrivacyUnit
from pneumofed.common.config.parties import SitePolicy
from pneumofed.common.errors import BudgetError


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

    Judged at the hospital's delta (`client.privacy.delta`), or at a smaller one that any of these entries was planned with.

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
