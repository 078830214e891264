"""The status of a run, derived from what it left behind, so that no process has to be alive to report it.

Evidence, strongest first: the run's own summary, Flower's status of it, the heartbeat of its process. `read_evidence` reads it from the
run folder, `derive_status` decides. `read_summary` and `read_history` read what a page shows of any run: they never raise.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pneumofed.common.errors import CheckpointError, in_a_row
from pneumofed.server.runs.events import EVENTS_FILE, Kind, describe_event, read_activity
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.runs.records import Metrics, RoundRecord, RunState
from pneumofed.server.runs.registry import now
from pneumofed.server.runs.summary_records import RunSummary
from pneumofed.server.runs.tables import Event, RunRow

SILENT_SEC = 90.0
"""A process that has not touched its heartbeat for so long is dead or stopped; it touches it every five seconds."""
ASKED_SILENT_SEC = 20.0
"""The same where somebody asks to resume the run, which says that it is dead."""
HANDOVER_SEC = 120.0
"""How long a run may take from its submission to Flower's acceptance."""


@dataclass(frozen=True)
class RunEvidence:
    """What is known of a run. Flower has to be asked before the folder is read, since a run writes its summary before it ends.

    Attributes:
        flower: Flower's status, `unknown` where it was never given the run, None where it does not answer.
        silent_sec: since the last heartbeat; None where there is none.
        checkpoint: whether there is one to go on from.
        patience_sec: how long a living process may be silent.
    """

    name: str
    flower: str | None
    summary: RunSummary = field(default_factory=RunSummary)
    history: Sequence[RoundRecord] = ()
    events: Sequence[Mapping[str, Any]] = ()
    silent_sec: float | None = None
    submitted_sec: float = 0.0
    checkpoint: bool = False
    patience_sec: float = SILENT_SEC


@dataclass(frozen=True)
class RunStatus:
    """The run's state, and for one that did not succeed why, in one sentence."""

    state: RunState
    reason: str = ""


def derive_status(evidence: RunEvidence) -> RunStatus:
    """Derives the run's state: never `succeeded` without results, never `running` without a sign of life."""
    status, flower = evidence.summary.status, evidence.flower or ""
    if status == RunState.SUCCEEDED:
        return _check_success(evidence)
    if flower == "finished:stopped" or status == RunState.STOPPED:
        return RunStatus(
            RunState.STOPPED,
            f"stopped {_where(evidence)}; {describe_resume(evidence.name, evidence.checkpoint, evidence.history)}",
        )
    if status == RunState.FAILED:
        return RunStatus(RunState.FAILED, _own_reason(evidence))
    if flower.startswith("finished"):
        return _dead(evidence, f"the coordinator's process ended without a result {_where(evidence)} (Flower: {flower})")
    if evidence.silent_sec is not None:
        if evidence.silent_sec <= evidence.patience_sec:
            return RunStatus(RunState.RUNNING if status == RunState.RUNNING else RunState.SUBMITTED)
        return _dead(evidence, f"the coordinator's process fell silent {_where(evidence)}")
    if flower in ("", "unknown") and evidence.submitted_sec > HANDOVER_SEC:
        why = "it was never handed to Flower" if flower else "the SuperLink does not answer"
        return _dead(evidence, f"the run never began: {why}")
    return RunStatus(RunState.SUBMITTED)


def describe_resume(name: str, checkpoint: bool, history: Sequence[RoundRecord]) -> str:
    """Writes the end of a sentence about a run that did not finish: how to go on with it.

    Args:
        name: of the run.
        checkpoint: whether there is one to resume from.
        history: every completed round.
    """
    if checkpoint and history:
        return f"`pneumofed server resume {name}` goes on after round {history[-1].round}"
    return f"`pneumofed server resume {name}` starts it again from the beginning"


def has_results(summary: RunSummary) -> bool:
    """Says whether any set was measured: at least one of AUROC and accuracy is a number."""
    validation = summary.validation or Metrics()
    found = [validation.auroc, validation.accuracy]
    for results in summary.results.values():
        found += [results[metric].value for metric in ("auroc", "accuracy") if metric in results]
    return any(value is not None for value in found)


def _check_success(evidence: RunEvidence) -> RunStatus:
    if not evidence.history:
        return RunStatus(RunState.FAILED, "the run says that it succeeded, but it completed no round")
    if not has_results(evidence.summary):
        return RunStatus(RunState.FAILED, "the run says that it succeeded, but its summary holds no validation or test metrics")
    return RunStatus(RunState.SUCCEEDED)


def _own_reason(evidence: RunEvidence) -> str:
    """The reason that the run gave itself, with the round if it does not name it."""
    words = str(evidence.summary.error or "the run failed and did not say why").strip()
    return words if "round" in words else f"{_where(evidence)}: {words}"


def _dead(evidence: RunEvidence, what: str) -> RunStatus:
    return RunStatus(RunState.FAILED, f"{what}; {describe_resume(evidence.name, evidence.checkpoint, evidence.history)}")


def _where(evidence: RunEvidence) -> str:
    """In which round, and on whom it waited then."""
    number, waiting = waiting_for(evidence.events)
    completed = evidence.history[-1].round if evidence.history else 0
    if number is None or number <= completed:
        return f"after round {completed}" if completed else "before the first round"
    return f"in round {number}" + (f" while it waited for {in_a_row(waiting)}" if waiting else "")


def waiting_for(events: Sequence[Mapping[str, Any]]) -> tuple[int | None, list[str]]:
    """Finds the round that was begun last in this attempt, and the sites that were asked in it and have not answered."""
    number, waiting = None, set[str]()
    for event in events:
        kind, site = event["kind"], event.get("site")
        if kind in (Kind.RUN_STARTED, Kind.RUN_RESUMED):
            number, waiting = None, set()
        elif kind == Kind.ROUND_STARTED:
            number, waiting = event["round"], set(map(str, event.get("at_work", ())))
        elif event["round"] == number and site:
            (waiting.add if kind == Kind.ASKED else waiting.discard)(str(site))
    return number, sorted(waiting)


def read_evidence(run: RunRow, flower: str | None, patience_sec: float) -> RunEvidence:
    """Reads everything that the run left behind.

    Args:
        run: its row in the registry.
        flower: Flower's status of it, asked for before this is called; None where Flower does not answer.
        patience_sec: how long a living process may be silent.
    """
    folder = RunFolder(Path(run.folder))
    return RunEvidence(
        name=run.name,
        flower=flower,
        summary=read_summary(folder),
        history=read_history(folder),
        events=read_activity(folder.path / EVENTS_FILE),
        silent_sec=_age(folder.heartbeat),
        submitted_sec=(now() - run.submitted).total_seconds(),
        checkpoint=folder.last_checkpoint.exists(),
        patience_sec=patience_sec,
    )


def read_summary(folder: RunFolder) -> RunSummary:
    """Reads the summary; empty where there is none or it is damaged."""
    try:
        return folder.read_summary()
    except CheckpointError:
        return RunSummary()


def read_history(folder: RunFolder) -> list[RoundRecord]:
    """Reads the completed rounds; none where the history is damaged, so that one run does not hide the others."""
    try:
        return folder.read_history()
    except CheckpointError:
        return []


def build_event(run: str, event: Mapping[str, Any]) -> Event:
    """Converts an event line into a line of the activity log.

    Args:
        run: name of the run.
        event: one line of `events.jsonl`.
    """
    site = event.get("site") if event.get("task") not in ("roll call", "clinical sums") else None
    return Event(
        time=time_of(event),
        run=run,
        round=event["round"] or None,
        site=str(site)[:64] if site else None,
        kind=event["kind"][:32],
        text=describe_event(event),
    )


def time_of(event: Mapping[str, Any]) -> datetime:
    """Reads when the event was; now, where the line does not say it."""
    try:
        return datetime.fromisoformat(event["time"])
    except ValueError:
        return now()


def _age(file: Path) -> float | None:
    try:
        return max(time.time() - file.stat().st_mtime, 0.0)
    except OSError:
        return None
