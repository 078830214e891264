"""What a ledger says, for people, and a check of whether it can be relied on.

accounts, runs_table    what was spent of each lineage's budget, and by which runs
verify_ledger           the ledger compared with itself, with another accountant and with the audit log
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from pneumofed.client.federation.requests import audit_log
from pneumofed.client.privacy.entries import LedgerEntry, level_of, total_epsilon
from pneumofed.client.privacy.ledger import Lineage, judged_delta
from pneumofed.client.privacy.spending import open_ledger
from pneumofed.common.audit.log import ANSWER_EVENT, AuditEntry, read_entries
from pneumofed.common.config.experiment import PrivacyUnit
from pneumofed.common.config.parties import SiteConfig, SitePolicy
from pneumofed.common.errors import AuditError, PolicyError

EPSILON_TOLERANCE = 0.01
"""How far the epsilon that an entry holds may be from one that is computed anew, as a share of it: libraries change their rounding."""


@dataclass(frozen=True)
class RunAccount:
    """One run on one lineage. `epsilon` is only of this run, as are those of other runs: they do not add up."""

    study: str
    run: str
    entries: int
    last: str
    noise_multipliers: tuple[float, ...]
    epsilon: float


@dataclass(frozen=True)
class Account:
    """One lineage and what was spent of its budget."""

    lineage: int
    datasets: int
    images: int
    level: PrivacyUnit
    delta: float
    epsilon: float
    remaining: float | None
    """None without a limit."""
    runs: tuple[RunAccount, ...]

    def sentence(self) -> str:
        remaining = "no limit is set" if self.remaining is None else f"{self.remaining:.3g} remains"
        data = f"data {self.lineage} ({self.images} images, {self.datasets} version{'s' * (self.datasets > 1)})"
        return f"{data}: epsilon {self.epsilon:.3g} of one {self.level} at delta {self.delta:.2g}; {remaining}"


def accounts(lineages: Sequence[Lineage], limits: SitePolicy) -> list[Account]:
    """Computes the account of each lineage under the site's present limits.

    Args:
        lineages: as `Ledger.lineages` gives them; one without entries has no account.
        limits: the site's policy now.
    """
    return [_account(lineage, limits) for lineage in lineages if lineage.entries]


def runs_table(account: Account) -> Table:
    """Lists the runs of an account for people."""
    shown = Table(box=None, pad_edge=False)
    for heading in ("study", "run", "rounds", "last", "noise", "epsilon alone"):
        shown.add_column(heading, overflow="fold")
    for run in account.runs:
        noises = ", ".join(f"{noise:.3g}" for noise in run.noise_multipliers)
        shown.add_row(run.study, run.run, str(run.entries), run.last, noises, f"{run.epsilon:.3g}")
    return shown


@dataclass(frozen=True)
class LedgerReport:
    """The result of `verify_ledger`; it holds if nothing is a problem."""

    entries: int
    problems: tuple[str, ...]
    open_rounds: int
    """Training rounds that were answered without privacy. No ledger can count those."""

    @property
    def intact(self) -> bool:
        return not self.problems

    def sentence(self) -> str:
        state = "unbroken, recomputed and compared with the audit log" if self.intact else "not to be relied on"
        aside = f"; {self.open_rounds} rounds were trained without privacy and are not in it" if self.open_rounds else ""
        return f"{self.entries} entries, {state}{aside}"


def verify_ledger(config: SiteConfig) -> LedgerReport:
    """Checks the ledger of a site: its chain, the epsilon of each lineage by the other accountant, its rounds by the audit log.

    Law: of a sound ledger, changing, removing or inserting any entry makes a problem.
    """
    try:
        lineages = open_ledger(config).lineages()
    except PolicyError as error:
        return LedgerReport(0, (str(error),), 0)
    lines, problems = _audit_lines(config)
    entries = [recorded.entry for lineage in lineages for recorded in lineage.entries]
    counted = Counter((entry.run, entry.round) for entry in entries if entry.purpose == "training")
    problems += [problem for lineage in lineages for problem in _epsilon_problems(lineage)] + _missing(lines, counted)
    open_rounds = sum("epsilon" not in line.facts.get("metrics", ()) for line in lines)
    return LedgerReport(len(entries), tuple(problems), open_rounds)


def _account(lineage: Lineage, limits: SitePolicy) -> Account:
    entries = [recorded.entry for recorded in lineage.entries]
    delta, level = judged_delta(entries, limits, lineage.patients), level_of(entries, limits.min_unit)
    spent = total_epsilon(entries, delta, level)
    remaining = None if limits.max_epsilon is None else max(0.0, limits.max_epsilon - spent)
    runs = list(dict.fromkeys((entry.study, entry.run) for entry in entries))
    accounted = tuple(_run_account(lineage, study, run, delta, level) for study, run in runs)
    return Account(lineage.number, lineage.datasets, lineage.images, level, delta, spent, remaining, accounted)


def _run_account(lineage: Lineage, study: str, run: str, delta: float, level: PrivacyUnit) -> RunAccount:
    recorded = [other for other in lineage.entries if (other.entry.study, other.entry.run) == (study, run)]
    entries: list[LedgerEntry] = [other.entry for other in recorded]
    noises = tuple(sorted({entry.mechanism.noise_multiplier for entry in entries}))
    return RunAccount(study, run, len(entries), recorded[-1].time, noises, total_epsilon(entries, delta, level))


def _epsilon_problems(lineage: Lineage) -> list[str]:
    """The last entry holds the epsilon of all: it must come out again, and stay below that of the looser accountant."""
    if not lineage.entries:
        return []
    last, entries = lineage.entries[-1], [recorded.entry for recorded in lineage.entries]
    stated = math.inf if last.epsilon is None else last.epsilon
    again, other = (total_epsilon(entries, last.delta, last.level, accountant) for accountant in ("prv", "rdp"))
    where = f"data {lineage.number}: entry {last.number} says epsilon {stated:.4g}"
    if not math.isclose(stated, again, rel_tol=EPSILON_TOLERANCE, abs_tol=EPSILON_TOLERANCE):
        return [f"{where}, its mechanisms give {again:.4g}"]
    if stated > other * (1.0 + EPSILON_TOLERANCE) + EPSILON_TOLERANCE:
        return [f"{where}, above the {other:.4g} of the other accountant, which is the looser one"]
    return []


def _audit_lines(config: SiteConfig) -> tuple[list[AuditEntry], list[str]]:
    """Answered training rounds of the audit log; a log that is missing has none, as at a site without a policy."""
    log = audit_log(config)
    if not Path(log.path).exists():
        return [], []
    try:
        entries = read_entries(log.path)
    except AuditError as error:
        return [], [str(error)]
    return [line for line in entries if line.event == ANSWER_EVENT and line.facts.get("work") == "train"], []


def _missing(lines: Sequence[AuditEntry], counted: Mapping[tuple[str, int], int]) -> list[str]:
    private = [line for line in lines if "epsilon" in line.facts.get("metrics", ())]
    answered = Counter((str(line.facts.get("run")), int(line.facts.get("round", 0))) for line in private)
    return [
        f"round {number} of run {run} was answered {times} times and counted {counted.get((run, number), 0)} times"
        for (run, number), times in sorted(answered.items())
        if counted.get((run, number), 0) < times
    ]
