"""`pneumofed server run --wait` and `resume --wait`: a run followed in the terminal until it has ended."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from server.activity import EVENTS_FILE, read_activity
from server.records import RoundRecord
from server.registry.models import Run, RunState
from server.run_folder import RunFolder
from server.run_signs import read_history
from server.runs import Runs, read_experiment
from server.site_states import round_now, site_states

EVERY_SEC = 1.0
COLOURS = {
    "training": "cyan", "evaluating": "cyan", "connected": "green", "late": "yellow", "left out": "yellow", "refused": "red",
    "lost": "red", "failed": "red", "submitted": "cyan", "running": "cyan", "succeeded": "green", "stopped": "yellow",
}  # fmt: skip


def follow(runs: Runs, name: str, console: Console, every_sec: float = EVERY_SEC) -> Run:
    """The run once it has ended. A terminal shows it alive; elsewhere each new line of the activity log is printed."""
    run = runs.registry.run(name)
    if console.is_terminal:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while not RunState(run.state).final:
                run = _look(runs, name)
                live.update(picture(run), refresh=True)
                time.sleep(every_sec)
        console.print(picture(run))
        return run
    last = 0
    while True:
        run = _look(runs, name)
        for event in runs.registry.events(name, after=last, limit=1000):
            last = event.id
            if event.run == name:
                console.print(f"{event.time:%H:%M:%S}  {event.text}", markup=False)
        if RunState(run.state).final:
            return run
        time.sleep(every_sec)


def picture(run: Run) -> RenderableType:
    """The run as it is now: state, rounds, sites."""
    folder = RunFolder(Path(run.folder))
    history, events = read_history(folder), read_activity(folder.path / EVENTS_FILE)
    rounds = read_experiment(run).rounds
    head = Text.assemble(
        (run.name, "bold"), "  ", (run.state, COLOURS.get(run.state, "")), f"  {len(history)} of {rounds} rounds"
    )
    current = None if RunState(run.state).final else round_now(events)
    if current:
        head.append(f"  round {current.number}" + (f" until {current.deadline:%H:%M:%S} UTC" if current.deadline else ""))
    parts: list[RenderableType] = [head, ProgressBar(total=rounds, completed=len(history), width=48)]
    if run.reason:
        parts.append(Text(run.reason, style=COLOURS.get(run.state, "")))
    if history:
        parts.append(_rounds(history[-6:]))
    if current:
        parts.append(_sites(events))
    return Group(*parts)


def _look(runs: Runs, name: str) -> Run:
    runs.reconcile()
    return runs.registry.run(name)


def _rounds(history: list[RoundRecord]) -> Table:
    table = Table("round", "sites", "validation", "test", "external", "s", box=None, padding=(0, 2, 0, 0))
    for line in history:
        areas = [_number(found.auroc if found else None) for found in (line.validation, line.test, line.external)]
        seconds = "–" if line.seconds.total is None else f"{line.seconds.total:.1f}"
        table.add_row(str(line.round), f"{len(line.trained)}/{len(line.drawn)}", *areas, seconds)
    return table


def _sites(events: list[dict[str, Any]]) -> Table:
    table = Table("site", "now", "", box=None, padding=(0, 2, 0, 0))
    states: Mapping[str, Any] = site_states({}, events, datetime.now(UTC))
    for name, now in states.items():
        table.add_row(Text(name), Text(now.state, style=COLOURS.get(now.state, "")), Text(now.detail))
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
