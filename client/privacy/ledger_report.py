"""A ledger for people: what was spent, whether it can be relied on, and what a run would spend on top.

accounts, runs_table    what was spent of each lineage's budget, and by which runs
verify_ledger           the ledger compared with itself, with another accountant and with the audit log
forecast                what a run would spend at a site, round by round, in numbers; `draw_forecast` as a curve. Counts nothing
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from rich.table import Table

from pneumofed.client.federation.policy import only
from pneumofed.client.federation.policy_decision import LIMITS, ArrivalFacts, RunRequest, TrainingData, decide
from pneumofed.client.federation.requests import audit_log
from pneumofed.client.federation.site_data import SiteData, load_site
from pneumofed.client.privacy.entries import DataUnits, LedgerEntry, level_of, round_entry, total_epsilon
from pneumofed.client.privacy.ledger import Lineage, check_entry, judged_delta, open_ledger
from pneumofed.client.privacy.plan import SitePlan, count_units
from pneumofed.common.audit.log import ANSWER_EVENT, AuditEntry, read_entries
from pneumofed.common.config.choices import PrivacyUnit
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import SiteConfig, SitePolicy
from pneumofed.common.errors import AuditError, ConfigError, PolicyError, counted
from pneumofed.common.files import atomic_write

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
        aside = f"; {counted(self.open_rounds, 'round')} trained without privacy, not in it" if self.open_rounds else ""
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


CURVE_POINTS = 24
"""Points of the curve, at most: each is a composition of its own."""
PRIVACY_KEYS = (*LIMITS, "max_delta", "min_unit", "min_patients_private")
"""Keys of the policy that limit what private training may reveal."""


@dataclass(frozen=True)
class Forecast:
    """A run's numbers at one site and its epsilon after some of its rounds; the first point is round 0."""

    study: str
    unit: PrivacyUnit
    sampling_rate: float
    steps_per_round: int
    noise_multiplier: float
    delta: float
    rounds: tuple[int, ...]
    alone: tuple[float, ...]
    """Of the run by itself, for its own unit at its own delta."""
    together: tuple[float, ...]
    """Of all that was spent on the data, for one unit of `level` at `judged_delta`: what the limit is about."""
    level: PrivacyUnit
    judged_delta: float
    limit: float | None
    refused_from: int | None
    """The first round that the site would refuse."""
    refusal: str | None

    def sentences(self) -> list[str]:
        """The forecast for people."""
        last, unit = self.rounds[-1], self.unit
        numbers = f"each round draws {100 * self.sampling_rate:.3g} % of the {unit}s {self.steps_per_round} times"
        limit = "no limit is set" if self.limit is None else f"the limit is {self.limit:g}"
        so_far = f"epsilon {self.together[0]:.3g} before it and {self.together[-1]:.3g} after it"
        found = [
            f"{self.study}: {counted(last, 'round')}; {numbers}, noise {self.noise_multiplier:.4g}",
            f"the run alone: epsilon {self.alone[-1]:.3g} of one {unit} at delta {self.delta:.2g}",
            f"all runs on this data: {so_far}, of one {self.level} at delta {self.judged_delta:.2g}; {limit}",
        ]
        if self.refused_from is None:
            return [*found, "all rounds are within the policy"]
        return [*found, f"round {self.refused_from} would be refused: {self.refusal}"]


def forecast(config: SiteConfig, experiment: ExperimentConfig, policy: SitePolicy) -> Forecast:
    """Computes what the run would spend on the site's present data.

    Args:
        config: the site's own.
        experiment: of the run.
        policy: the site's; only its limits of privacy are judged here.

    Raises:
        ConfigError: the experiment is not private, or the site has too few patients for it.
        DataError: the data cannot be used.
        PolicyError: the ledger cannot be read.
    """
    site = load_site(config, experiment)
    plan = SitePlan.of(experiment, count_units(site.train.patients, experiment.privacy.unit), site.patients)
    units = DataUnits.of(site)
    earlier, entry = open_ledger(config).earlier(units), round_entry("planned", 1, experiment, units, plan)
    rounds = sorted({round(number) for number in np.linspace(0, plan.rounds, min(plan.rounds, CURVE_POINTS) + 1)})
    delta, level = judged_delta([*earlier, entry], policy, site.patients), level_of([*earlier, entry], policy.min_unit)
    refused_from, refusal = _first_refusal(earlier, entry, site, policy, experiment)
    return Forecast(
        experiment.name,
        plan.unit,
        plan.sampling_rate,
        plan.steps_per_round,
        plan.noise_multiplier,
        plan.delta,
        tuple(rounds),
        tuple(plan.epsilon_after(number) for number in rounds),
        tuple(total_epsilon([*earlier, *[entry] * number], delta, level) for number in rounds),
        level,
        delta,
        policy.max_epsilon,
        refused_from,
        refusal,
    )


def _first_refusal(
    earlier: Sequence[LedgerEntry], entry: LedgerEntry, site: SiteData, policy: SitePolicy, experiment: ExperimentConfig
) -> tuple[int | None, str | None]:
    """The first round that is refused, and why; later rounds cost more, so that halving finds it."""

    request = RunRequest.of(experiment, "train", entry.run, 1)
    rules, rounds, trained = (
        only(policy, *PRIVACY_KEYS),
        experiment.rounds,
        TrainingData(len(set(site.train.patients)), site.patients),
    )
    for facts in (ArrivalFacts(datetime.min), trained):  # no rule of these asks for the time
        decision = decide(rules, request, facts)
        if not decision.permit:
            return 1, decision.reason

    def reason(number: int) -> str | None:
        try:
            check_entry([*earlier, *[entry] * (number - 1)], entry, policy, site.patients)
        except PolicyError as error:
            return str(error)
        return None

    first = 1 + bisect_left(range(1, rounds + 1), True, key=lambda number: reason(number) is not None)
    return (first, reason(first)) if first <= rounds else (None, None)


BLUE, ORANGE, RED, GREY = "#1f5fa8", "#c96a12", "#b3261e", "#5f6368"


def draw_forecast(forecast: Forecast, path: Path) -> None:
    """Writes the picture (PNG) to `path`: the run by itself, all runs on the data, the limit, and where the site would refuse.

    Args:
        forecast: of a run at one site.
        path: a file there is replaced.

    Raises:
        ConfigError: the file cannot be written.
    """
    # who only shows what was spent must not wait for it
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(forecast.rounds, forecast.together, color=ORANGE, marker="o", markersize=3, label=_of_all(forecast))
    axes.plot(forecast.rounds, forecast.alone, color=BLUE, marker="o", markersize=3, label=_of_run(forecast))
    if forecast.limit is not None:
        axes.axhline(forecast.limit, color=RED, linestyle="--", label=f"limit {forecast.limit:g}")
    if forecast.refused_from is not None:
        axes.axvspan(forecast.refused_from - 0.5, forecast.rounds[-1] + 0.5, color=GREY, alpha=0.2, label="refused", linewidth=0)
    axes.set(xlabel="round", ylabel="epsilon", title=f"{forecast.study}: privacy spent", xlim=(0, forecast.rounds[-1] + 0.5))
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    try:
        with atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=150)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; choose another place with --out") from error


def _of_all(forecast: Forecast) -> str:
    return f"all runs on this data, one {forecast.level}, delta {forecast.judged_delta:.1e}"


def _of_run(forecast: Forecast) -> str:
    return f"this run alone, one {forecast.unit}, delta {forecast.delta:.1e}"
