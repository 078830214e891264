"""The registry's own rules, whoever calls it in whatever order."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pneumofed.common.errors import ConfigError
from pneumofed.server.runs.records import RunState
from pneumofed.server.runs.registry import Registry
from pneumofed.server.runs.tables import Event


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=st.lists(st.sampled_from([*RunState][1:]), max_size=6))
def test_nothing_but_resume_leads_out_of_a_final_state(registry: Registry, moves: list[RunState]) -> None:
    name = f"run-{len(registry.runs())}"
    registry.add_run(name, "{}", Path("/runs") / name)
    for move in moves:
        before = registry.run(name)
        changed = registry.move(name, move, "because")
        after = registry.run(name)
        if RunState(before.state).final:
            assert not changed
            assert (after.state, after.reason, after.ended) == (before.state, before.reason, before.ended)
        elif changed:
            assert after.state == move
            assert (after.ended is not None) == move.final


@pytest.mark.parametrize("state", [RunState.FAILED, RunState.STOPPED])
def test_resume_opens_what_failed_or_was_stopped(registry: Registry, state: RunState) -> None:
    registry.add_run("one", "{}", Path("/runs/one"))
    registry.move("one", state, "because")
    run = registry.resume("one")
    assert (run.state, run.reason, run.ended) == ("submitted", "", None)
    with pytest.raises(ConfigError, match="is submitted"):
        registry.resume("one")


def test_sites_are_registered_revoked_and_registered_anew(registry: Registry) -> None:
    registry.sync_sites({"north": "a", "south": "b"})
    registry.sync_sites({"north": "a"})
    registry.sync_sites({"north": "a"})
    assert [(site.name, site.state) for site in registry.sites()] == [("north", "registered"), ("south", "revoked")]
    registry.sync_sites({"north": "a", "south": "c"})
    assert [(site.fingerprint, site.state) for site in registry.sites()] == [("a", "registered"), ("c", "registered")]
    assert [(event.kind, event.site) for event in registry.events()] == [
        ("registered", "north"),
        ("registered", "south"),
        ("revoked", "south"),
        ("registered", "south"),
    ]


def test_first_and_last_seen_only_grow(registry: Registry) -> None:
    registry.sync_sites({"north": "a"})
    first = datetime(2026, 1, 1, tzinfo=UTC)
    for hours in (0, 2, 1):
        registry.see_site("north", first + timedelta(hours=hours))
    registry.see_site("nobody", first)
    site = registry.sites()[0]
    assert (site.first_seen, site.last_seen) == (first, first + timedelta(hours=2))


def test_events_are_taken_once(registry: Registry) -> None:
    registry.add_run("one", "{}", Path("/runs/one"))

    def lines(count: int) -> list[Event]:
        return [Event(time=datetime.now(UTC), run="one", kind="joined", text=str(number)) for number in range(count)]

    assert [registry.take_events("one", lines(count)) for count in (2, 2, 5, 3)] == [2, 0, 3, 0]
    assert [event.text for event in registry.events("one") if event.kind == "joined"] == ["0", "1", "2", "3", "4"]
    assert registry.take_events("unknown", lines(1)) == 0


def test_events_come_in_pages(registry: Registry) -> None:
    for number in range(5):
        registry.note("note", str(number))
    last = registry.events(limit=2)
    assert [event.text for event in last] == ["3", "4"]
    assert [event.text for event in registry.events(after=last[0].id)] == ["4"]
