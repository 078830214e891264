"""What the records of a site say of one run: the facts of its dossier for the hospital's information governance.

    build_dossier      audit log, ledger and policy of the site, and what was handed over (`client.site.dossier_sources`), as one record
    what left          from the log's answers, each of which was written before the answer left
    withheld, refused  from answers and refusals, with the rule
    spent              from the ledger

Nothing here reads an image, the manifest or a key. What the records do not hold is None and said as unknown: lines of earlier versions
lack facts, and a site is never told that a run ended. Text of the log that could name a path is left out for a pointer to its line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pneumofed.client.federation.exposure import describe_exposure
from pneumofed.client.federation.policy import hash_policy, read_policy
from pneumofed.client.site.approval import INSTALLED
from pneumofed.client.site.dossier_sources import AttackFacts, BudgetFacts, CoordinatorFacts, ModelFacts, read_budget, studies_of
from pneumofed.client.site.folder import SiteFolder
from pneumofed.common.audit.log import (
    ANSWER_EVENT,
    APP_APPROVED,
    FAILURE_EVENT,
    MALFORMED_EVENT,
    REFUSAL_EVENT,
    REQUEST_EVENT,
    AuditEntry,
    read_entries,
)
from pneumofed.common.audit.verify import DAMAGE_SENTENCES, verify_log
from pneumofed.common.config.parties import SitePolicy
from pneumofed.common.errors import ConfigError, printable_line

OF_A_RUN = (REQUEST_EVENT, ANSWER_EVENT, REFUSAL_EVENT, FAILURE_EVENT)
NAMES_A_PATH = "(not shown, since it may name a file: see the line in the audit log)"
MOST_CHARACTERS = 300
SUITABILITY_COUNTS = {"features", "pixels", "turn"}
RunState = Literal["refused", "unfinished", "every planned round answered", "unknown"]


@dataclass(frozen=True)
class Handed:
    """What was given with the command, besides the site's own records; None where it was not."""

    model: ModelFacts | None = None
    attacks: AttackFacts | None = None
    coordinator: CoordinatorFacts | None = None


@dataclass(frozen=True)
class LogFacts:
    """The state of the audit log. `damage` is None where the chain holds; `unreadable` counts lines whose own hash is wrong."""

    path: str
    present: bool
    lines: int = 0
    head: str | None = None
    damage: str | None = None
    damaged_line: int | None = None
    unreadable: int = 0
    malformed: int = 0
    """Messages that could not be read at all, and so belong to no run."""
    of_run: int = 0


@dataclass(frozen=True)
class SentMessage:
    """One answer that left, by its line in the log; None is unknown."""

    line: int
    time: str
    work: str
    round: int | None
    secure_sum: str | None
    bytes: int | None
    arrays: tuple[str, ...]
    metrics: tuple[str, ...]
    tables: tuple[str, ...]
    """Of a survey: the fields by which patients were counted."""
    values: Mapping[str, float] | None
    report: Mapping[str, Any] | None
    sent: str | None
    data: str | None
    policy: str | None
    hash: str
    sums: tuple[str, ...] = ()
    """Clinical columns whose sums left before the first round."""

    @property
    def withheld(self) -> tuple[str, ...] | None:
        """Kinds that were kept back; None where the line does not say."""
        return None if self.report is None else tuple(self.report.get("withheld", ()))


@dataclass(frozen=True)
class HeldBack:
    """Requests that got no answer, of one rule or one class of error."""

    name: str
    times: int
    works: tuple[str, ...]
    rounds: tuple[int, ...]
    first: str
    last: str
    details: tuple[str, ...]
    lines: tuple[int, ...]


@dataclass(frozen=True)
class CodeFacts:
    """The app bundles that asked in this run, and when the log says that their hash was approved; `installed` approves by version."""

    apps: Mapping[str, str | None]
    installed_approved: bool | None


@dataclass(frozen=True)
class PolicyFacts:
    """The policy as it is now, and under which the answers of the run left: the same, another, or an unknown one."""

    hash: str | None
    values: Mapping[str, Any]
    exposure: tuple[str, ...]
    same: int
    other: int
    unknown: int


@dataclass(frozen=True)
class Dossier:
    """All facts of one run at one site."""

    site: str
    run: str
    study: str | None
    written: str
    version: str
    first: str | None
    last: str | None
    log: LogFacts
    terms: Mapping[str, Any] | None
    configs: tuple[str, ...]
    coordinators: tuple[str, ...]
    coordinator_heads: int
    requests: int
    sent: tuple[SentMessage, ...]
    refusals: tuple[HeldBack, ...]
    failures: tuple[HeldBack, ...]
    code: CodeFacts
    policy: PolicyFacts
    budget: BudgetFacts
    handed: Handed

    @property
    def rounds_planned(self) -> int | None:
        return self.terms.get("rounds") if self.terms else None

    @property
    def rounds_trained(self) -> tuple[int, ...]:
        return tuple(sorted({one.round for one in self.sent if one.work == "train" and isinstance(one.round, int)}))

    @property
    def state(self) -> RunState:
        """How far the run came, by this site's log only; a site is not told that a run ended."""
        planned = self.rounds_planned
        if not self.sent and self.refusals:
            return "refused"
        if planned is None:
            return "unknown"
        return "every planned round answered" if set(self.rounds_trained) >= set(range(1, planned + 1)) else "unfinished"

    @property
    def unanswered(self) -> int:
        """Requests of which the log holds no end, as of a process that was stopped."""
        ended = len(self.sent) + sum(one.times for one in (*self.refusals, *self.failures))
        return max(0, self.requests - ended)


def build_dossier(
    folder: SiteFolder,
    name: str,
    hand_over: Callable[[str, Mapping[str, Any] | None], Handed] = lambda run, terms: Handed(),
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Dossier:
    """Collects what the site's records say of a run.

    Args:
        folder: the site's.
        name: the run's token, its first digits, or the study's name; empty where the site knows one run only.
        hand_over: reads what was given besides, for the run's token and the terms that it asked for.
        now: returns the time.

    Raises:
        ConfigError: no run, or more than one, is called so; names those that the site knows.
        AuditError: the audit log cannot be read.
    """
    entries = [_cleaned(entry) for entry in read_entries(folder.audit.path)]
    policy = _policy(folder)
    run, study = _find_run(name, entries, studies_of(folder.config))
    by_event = {kind: [entry for entry in entries if entry.event == kind and entry.facts.get("run") == run] for kind in OF_A_RUN}
    own = sorted((entry for some in by_event.values() for entry in some), key=lambda entry: entry.sequence)
    asked, gated = by_event[REQUEST_EVENT], [entry for entry in by_event[REFUSAL_EVENT] if "app" in entry.facts]
    terms = next((entry.facts["terms"] for entry in reversed(asked) if isinstance(entry.facts.get("terms"), dict)), None)
    sent, configs = tuple(map(_sent, by_event[ANSWER_EVENT])), _known(entry.facts.get("config") for entry in asked)
    return Dossier(
        site=folder.config.name,
        run=run,
        study=study,
        written=now().astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        version=version("pneumofed"),
        terms=terms,
        configs=configs,
        first=own[0].time if own else None,
        last=own[-1].time if own else None,
        log=_log_facts(folder, entries, len(own)),
        coordinators=_known(entry.facts.get("coordinator") for entry in own),
        coordinator_heads=len(_known(entry.facts.get("heads", {}).get("coordinator") for entry in asked)),
        requests=len(asked) + len(gated),  # the code gate refuses before a request is logged
        sent=sent,
        refusals=_held_back(by_event[REFUSAL_EVENT], "rule"),
        failures=_held_back(by_event[FAILURE_EVENT], "error"),
        code=_code(entries, own, policy),
        policy=_policy_facts(policy, sent),
        budget=read_budget(folder.config, policy, run, configs),
        handed=hand_over(run, terms),
    )


def _cleaned(entry: AuditEntry) -> AuditEntry:
    """The entry with facts that can be shown: printable text of one line, and none that may be a path."""
    return AuditEntry(**{**vars(entry), "facts": _clean(dict(entry.facts))})


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(_clean(str(key))): _clean(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_clean(part) for part in value]
    if isinstance(value, str):
        return NAMES_A_PATH if re.search(r"[/\\]", value) else printable_line(value[:MOST_CHARACTERS])
    return value


def _find_run(name: str, entries: Sequence[AuditEntry], counted: Mapping[str, str]) -> tuple[str, str | None]:
    """The token and the study of the run that is called `name`, or of the only one; `counted` are the ledger's."""
    days: dict[str, str] = {}
    studies = dict(counted)
    for entry in entries:
        run, study = entry.facts.get("run"), entry.facts.get("study")
        if entry.event in OF_A_RUN and isinstance(run, str):
            days[run] = entry.time[:10]
            studies |= {run: study} if isinstance(study, str) else {}
    days |= {run: "in the ledger only" for run in studies if run not in days}
    found = [run for run in days if run == name] or [run for run in days if run.startswith(name) or studies.get(run) == name]
    if len(found) == 1:
        return found[0], studies.get(found[0])
    listed = ", ".join(f"{run} ({studies.get(run) or 'study unknown'}, {day})" for run, day in days.items()) or "none yet"
    what = (
        f"{len(found) or 'no'} run{'s are' if found else ' is'} called {printable_line(name)!r} here"
        if name
        else "no run is named"
    )
    raise ConfigError(f"{what}; the runs that this site knows are: {listed}")


def _sent(entry: AuditEntry) -> SentMessage:
    facts = entry.facts
    stated = {key: facts.get(key) for key in ("round", "secure_sum", "bytes", "values", "report", "sent", "data", "policy")}
    arrays, metrics, tables, sums = (tuple(facts.get(key, ())) for key in ("arrays", "metrics", "tables", "sums"))
    line, work = entry.sequence, str(facts.get("work", "unknown"))
    return SentMessage(
        line=line, time=entry.time, work=work, arrays=arrays, metrics=metrics, tables=tables, hash=entry.hash, sums=sums, **stated
    )


def _held_back(entries: Sequence[AuditEntry], key: str) -> tuple[HeldBack, ...]:
    names = _known(str(entry.facts.get(key, "unknown")) for entry in entries)
    return tuple(
        HeldBack(
            name,
            len(of_name),
            _known(entry.facts.get("work") for entry in of_name),
            tuple(sorted({entry.facts["round"] for entry in of_name if isinstance(entry.facts.get("round"), int)})),
            of_name[0].time,
            of_name[-1].time,
            _known(entry.facts.get("detail") for entry in of_name),
            tuple(entry.sequence for entry in of_name),
        )
        for name in names
        for of_name in [[entry for entry in entries if str(entry.facts.get(key, "unknown")) == name]]
    )


def _log_facts(folder: SiteFolder, entries: Sequence[AuditEntry], of_run: int) -> LogFacts:
    log = folder.audit.path
    shown = str(log.relative_to(folder.path)) if log.is_relative_to(folder.path) else log.name
    if not log.exists():
        return LogFacts(shown, present=False)
    report = verify_log(log)
    return LogFacts(
        shown,
        present=True,
        lines=report.lines,
        head=report.head,
        damage=DAMAGE_SENTENCES[report.damage] if report.damage else None,
        damaged_line=report.line,
        unreadable=report.lines - len(entries),
        malformed=sum(entry.event == MALFORMED_EVENT for entry in entries),
        of_run=of_run,
    )


def _policy(folder: SiteFolder) -> SitePolicy | None:
    """The policy as it is now; None where it cannot be read, so that everything is refused."""
    try:
        return read_policy(Path(folder.policy_file))
    except ConfigError:
        return None


def _policy_facts(policy: SitePolicy | None, sent: Sequence[SentMessage]) -> PolicyFacts:
    own = hash_policy(policy) if policy else None
    stated = [one.policy for one in sent]
    same = stated.count(own) if own else 0
    unknown = stated.count(None)
    values = policy.model_dump(mode="json") if policy else {}
    return PolicyFacts(
        own, values, tuple(describe_exposure(policy)) if policy else (), same, len(stated) - same - unknown, unknown
    )


def _code(entries: Sequence[AuditEntry], own: Sequence[AuditEntry], policy: SitePolicy | None) -> CodeFacts:
    approved = {str(entry.facts.get("app")): entry.time for entry in entries if entry.event == APP_APPROVED}
    apps = _known(entry.facts.get("app") for entry in own)
    return CodeFacts({app: approved.get(app) for app in apps}, None if policy is None else INSTALLED in policy.approved_apps)


def _known(values: Iterable[Any]) -> tuple[str, ...]:
    """The texts among `values`, each once, in their order."""
    return tuple(dict.fromkeys(value for value in values if isinstance(value, str)))
