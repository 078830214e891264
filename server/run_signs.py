"""The signs that a run leaves in its folder, for those who judge or show it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from common.errors import CheckpointError
from server.activity import EVENTS_FILE, HEARTBEAT_FILE, read_activity
from server.activity_words import describe
from server.records import RoundRecord
from server.registry.models import Event, Run, RunState
from server.registry.registry import now
from server.run_folder import RunFolder
from server.summary_records import RunSummary
from server.verdict import Signs


def read_signs(run: Run, flower: str | None, patience_sec: float) -> Signs:
    """All signs of the run; `flower` is Flower's status of it, asked for before."""
    folder = RunFolder(Path(run.folder))
    return Signs(
        name=run.name,
        flower=flower,
        summary=read_summary(folder),
        history=read_history(folder),
        events=read_activity(folder.path / EVENTS_FILE),
        silent_sec=_age(folder.path / HEARTBEAT_FILE),
        submitted_sec=(now() - run.submitted).total_seconds(),
        checkpoint=folder.last_checkpoint.exists(),
        patience_sec=patience_sec,
    )


def read_summary(folder: RunFolder) -> RunSummary:
    """The summary; empty where there is none or it is damaged."""
    try:
        return folder.read_summary()
    except CheckpointError:
        return RunSummary()


def read_history(folder: RunFolder) -> list[RoundRecord]:
    """The completed rounds; none where the history is damaged, so that one run does not hide the others."""
    try:
        return folder.read_history()
    except CheckpointError:
        return []


def forget_the_end(folder: RunFolder) -> None:
    """Takes the earlier attempt's last word and heartbeat away, which would be read as this one's."""
    summary = read_summary(folder)
    if summary.model_fields_set:
        folder.write_summary(summary.without("error").updated(status=RunState.SUBMITTED.value))
    (folder.path / HEARTBEAT_FILE).unlink(missing_ok=True)


def build_event(run: str, event: Mapping[str, Any]) -> Event:
    """The event line as a line of the activity log."""
    site = event.get("site") if event.get("task") != "roll call" else None
    return Event(
        time=time_of(event),
        run=run,
        round=event["round"] or None,
        site=str(site)[:64] if site else None,
        kind=event["kind"][:32],
        text=describe(event),
    )


def time_of(event: Mapping[str, Any]) -> datetime:
    """When the event was; now, where the line does not say it."""
    try:
        return datetime.fromisoformat(event["time"])
    except ValueError:
        return now()


def _age(file: Path) -> float | None:
    try:
        return max(time.time() - file.stat().st_mtime, 0.0)
    except OSError:
        return None
