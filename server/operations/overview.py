"""The coordinator's processes and sites as they are now, and the registry brought up to date with them.

`observe_federation` asks processes and SuperLink and gives an `Overview`. `site_states` derives what each site does now from its connection
and the event lines of the run that goes on; `round_now` is the round of that run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from pneumofed.common.errors import FlowerError
from pneumofed.common.wire.keys import key_fingerprint, read_public_key
from pneumofed.server.operations import processes
from pneumofed.server.operations.settings import CoordinatorFolder
from pneumofed.server.runs.events import Kind
from pneumofed.server.runs.registry import Registry, now
from pneumofed.server.runs.tables import KeyState, SiteRow

SiteState = Literal[
    "training", "evaluating", "connected", "late", "refused", "lost", "failed", "left out", "absent", "disconnected",
    "never connected", "revoked", "unknown",
]  # fmt: skip
EventFacts = Mapping[str, Any]


@dataclass(frozen=True)
class SiteNow:
    """A site's state and, where there is more to say, a sentence."""

    state: SiteState
    detail: str = ""


@dataclass(frozen=True)
class Link:
    """A site's connection: True, False, or None where the SuperLink does not answer."""

    connected: bool | None
    detail: str = ""
    revoked: bool = False


@dataclass(frozen=True)
class RoundNow:
    """The round that goes on."""

    number: int
    started: datetime
    deadline: datetime | None
    sites: tuple[str, ...] = ()


def this_attempt(events: Sequence[EventFacts]) -> list[EventFacts]:
    """Finds the events since the run was begun or resumed last."""
    begins = [index for index, event in enumerate(events) if event["kind"] in (Kind.RUN_STARTED, Kind.RUN_RESUMED)]
    return list(events[begins[-1] :]) if begins else list(events)


def round_now(events: Sequence[EventFacts]) -> RoundNow | None:
    """Finds the round that was begun and is not done; None between rounds, and after the run's end."""
    found: RoundNow | None = None
    for event in this_attempt(events):
        if event["kind"] == Kind.ROUND_STARTED and (started := read_time(event)):
            seconds = event.get("deadline_sec")
            deadline = started + timedelta(seconds=seconds) if isinstance(seconds, int | float) and seconds < 1e9 else None
            sites = event.get("sites")
            found = RoundNow(event["round"], started, deadline, tuple(map(str, sites)) if isinstance(sites, list) else ())
        elif event["kind"] in (Kind.ROUND_DONE, Kind.RUN_ENDED):
            found = None
    return found


def site_states(links: Mapping[str, Link], events: Sequence[EventFacts], now: datetime) -> dict[str, SiteNow]:
    """Derives the state of every known site and of every other that takes part, by name.

    Args:
        links: each known site's connection.
        events: event lines of the run that goes on; empty where none does.
        now: the time to compare deadlines with, in UTC.
    """
    attempt = this_attempt(events)
    current = round_now(events)
    last = {
        str(event["site"]): event
        for event in attempt
        if event.get("site") and event.get("task") not in ("roll call", "clinical sums")
    }
    names = sorted({*links, *last})
    return {name: _state(links.get(name), last.get(name), current, now) for name in names}


def _state(link: Link | None, event: EventFacts | None, current: RoundNow | None, now: datetime) -> SiteNow:
    if link and link.revoked:
        return SiteNow("revoked", "its key is no longer accepted")
    here = link.connected if link else None
    if event is None or event["kind"] in (Kind.JOINED, Kind.ANSWERED) or (event["kind"] == Kind.LATE and event.get("arrived")):
        return _idle(link, event)
    where = f"round {event['round']}" if event["round"] else "the roll call"
    if event["kind"] == Kind.ASKED:
        return _working(event, here, current, now)
    if event["kind"] == Kind.LOST and here:
        return SiteNow("connected", f"lost in {where}, connected again")
    states: dict[str, SiteState] = {
        Kind.LATE: "late", Kind.REFUSED: "refused", Kind.LOST: "lost", Kind.FAILED: "failed", Kind.LEFT_OUT: "left out",
    }  # fmt: skip
    reason = str(event.get("reason") or "")
    if event["kind"] == Kind.ABSENT:
        return SiteNow("refused" if reason.startswith(("PolicyError", "BudgetError")) else "absent", reason)
    return SiteNow(states.get(event["kind"], "unknown"), f"{where}: {reason}" if reason else where)


def _working(event: EventFacts, here: bool | None, current: RoundNow | None, now: datetime) -> SiteNow:
    number = event["round"]
    if here is False:
        return SiteNow("lost", f"round {number}: asked, and no longer connected")
    asked = read_time(event)
    if current and current.number == number and current.deadline and asked:
        deadline = asked + (current.deadline - current.started)
        if now > deadline:
            return SiteNow("late", f"round {number}: past the deadline")
    return SiteNow("evaluating" if event.get("task") == "evaluate" else "training", f"round {number}")


def _idle(link: Link | None, event: EventFacts | None) -> SiteNow:
    if link is None or link.connected is None:
        return SiteNow("connected" if event else "unknown", _answered(event) if event else "the SuperLink does not answer")
    if link.connected:
        return SiteNow("connected", _answered(event))
    never = "not connected yet" in link.detail or link.detail == "not registered"
    return SiteNow("never connected" if never else "disconnected", link.detail)


def _answered(event: EventFacts | None) -> str:
    if event is None or event["kind"] != Kind.ANSWERED:
        return ""
    seconds = event.get("seconds")
    return f"round {event['round']}: answered" + (f" after {seconds:.0f} s" if isinstance(seconds, int | float) else "")


def read_time(event: EventFacts) -> datetime | None:
    """Reads when the event was; None where the line says nothing that can be read, or no zone."""
    try:
        found = datetime.fromisoformat(str(event["time"]))
    except ValueError:
        return None
    return found if found.tzinfo else None


@dataclass(frozen=True)
class Overview:
    """Processes, and each site's connection by name."""

    processes: tuple[processes.ProcessState, ...]
    links: Mapping[str, Link]
    taken: datetime


def observe_federation(folder: CoordinatorFolder, registry: Registry) -> Overview:
    """Looks at what runs and who is connected; the registry keeps the keys and when each site was seen.

    Args:
        folder: of the coordinator.
        registry: is brought up to date.

    Raises:
        ConfigError: the folder is no coordinator folder, or a file in `sites/` is no public key.
    """
    keys = {name: key_fingerprint(read_public_key(path)) for name, path in folder.site_keys().items()}
    registry.sync_sites(keys)
    moment = now()
    try:
        state = processes.process_status(folder.path)
    except FlowerError as error:
        process = processes.ProcessState("superlink", None, False, str(error))
        return Overview((process,), build_links(registry.sites(), None), moment)
    for site in state.sites:
        if site.connected:
            registry.see_site(site.name, moment)
    answers = any(process.name == "superlink" and process.serving for process in state.processes)
    return Overview(state.processes, build_links(registry.sites(), state if answers else None), moment)


def build_links(sites: Sequence[SiteRow], state: processes.CoordinatorState | None) -> dict[str, Link]:
    """Builds each site's connection by name.

    Args:
        sites: those in the registry.
        state: processes and sites as the SuperLink knows them; None where it does not answer: connections are then unknown.
    """
    reported = {site.name: site for site in state.sites} if state else {}
    links = {}
    for site in sites:
        found = reported.get(site.name)
        links[site.name] = Link(
            connected=found.connected if found else None,
            detail=found.detail if found else "",
            revoked=site.state == KeyState.REVOKED,
        )
    return links
