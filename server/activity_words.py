"""What an event line says, as a sentence for the activity log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.activity import Kind

TASKS = {
    "train": "training",
    "evaluate": "evaluation",
    "roll call": "the roll call",
    "keys": "its keys",
    "shares": "its shares",
    "confirmation": "its confirmation",
    "unmasking": "unmasking",
}


def describe(event: Mapping[str, Any]) -> str:
    """One sentence on the event; facts that are missing are left out."""
    site, task = event.get("site") or "a site", TASKS.get(str(event.get("task")), "this round")
    reason = f": {event['reason']}" if event.get("reason") else ""
    words = {
        Kind.RUN_STARTED: f"the run began, {event.get('rounds', '?')} rounds are planned",
        Kind.RUN_RESUMED: f"the run went on after round {event['round']}",
        Kind.JOINED: f"{site} joined",
        Kind.ABSENT: f"{site} takes no part{reason}",
        Kind.ROUND_STARTED: f"round {event['round']} began with {_count(event.get('sites'))}",
        Kind.ASKED: f"{site} was asked for {task}",
        Kind.ANSWERED: f"{site} answered for {task}{_after(event)}",
        Kind.LATE: f"{site} was late with {task}{reason}",
        Kind.REFUSED: f"{site} refused {task}{reason}",
        Kind.LOST: f"{site} was lost in {task}{reason}",
        Kind.FAILED: f"{site} failed in {task}{reason}",
        Kind.LEFT_OUT: f"the reply of {site} was left out{reason}",
        Kind.ROUND_DONE: f"round {event['round']} was done{_after(event)}",
        Kind.RUN_ENDED: f"the coordinator's process ended the run as {event.get('status', 'unknown')}",
    }
    if event["kind"] == Kind.LATE and event.get("arrived"):
        return f"the late reply of {site} for {task} arrived and was dropped"
    return words.get(event["kind"], f"{event['kind']}{reason}")


def _after(event: Mapping[str, Any]) -> str:
    seconds, size = event.get("seconds"), event.get("bytes")
    told = f" after {seconds:.1f} s" if isinstance(seconds, int | float) else ""
    return told + (f" with {size / 1e6:.1f} MB" if isinstance(size, int | float) else "")


def _count(sites: Any) -> str:
    number = len(sites) if isinstance(sites, list) else 0
    return f"{number} site{'' if number == 1 else 's'}"
