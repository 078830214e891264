"""What a site does now, from event lines and its connection."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pneumofed.server.operations.overview import Link, round_now, site_states

START = datetime(2026, 1, 31, 9, 0, tzinfo=UTC)
HERE, AWAY = Link(True, "connected"), Link(False, "disconnected since 09:00")


def line(kind: str, round_: int = 1, seconds: float = 0.0, **facts: Any) -> dict[str, Any]:
    return {"time": (START + timedelta(seconds=seconds)).isoformat(), "kind": kind, "round": round_, **facts}


ROUND = [line("run_started", 0), line("round_started", deadline_sec=60.0, sites=["north"])]
ASKED = line("asked", site="north", task="train")


def state(*events: dict[str, Any], link: Link = HERE, after: float = 10.0) -> str:
    return site_states({"north": link}, [*ROUND, *events], START + timedelta(seconds=after))["north"].state


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([], "connected"),
        ([ASKED], "training"),
        ([line("asked", site="north", task="evaluate")], "evaluating"),
        ([ASKED, line("answered", site="north", task="train", seconds_=3)], "connected"),
        ([ASKED, line("late", site="north", task="train", reason="no reply")], "late"),
        ([ASKED, line("late", site="north"), line("late", site="north", arrived=True)], "connected"),
        ([ASKED, line("refused", site="north", reason="rule")], "refused"),
        ([ASKED, line("failed", site="north")], "failed"),
        ([ASKED, line("left_out", site="north", reason="NaN")], "left out"),
        ([line("absent", 0, site="north", reason="PolicyError: rule")], "refused"),
        ([line("absent", 0, site="north", reason="Timeout: no reply")], "absent"),
    ],
)
def test_the_last_event_of_a_site_tells_its_state(events: list[dict[str, Any]], expected: str) -> None:
    assert state(*events) == expected


def test_a_site_past_its_deadline_is_late_before_the_coordinator_says_so() -> None:
    assert state(ASKED, after=59) == "training"
    assert state(ASKED, after=61) == "late"


def test_a_site_that_went_away_while_it_was_asked_is_lost() -> None:
    assert state(ASKED, link=AWAY) == "lost"


def test_a_lost_site_that_came_back_is_connected() -> None:
    lost = line("lost", site="north", reason="gone")
    assert state(ASKED, lost, link=AWAY) == "lost"
    assert state(ASKED, lost, link=HERE) == "connected"


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        (AWAY, "disconnected"),
        (Link(False, "registered, not connected yet"), "never connected"),
        (Link(None), "unknown"),
        (Link(True, revoked=True), "revoked"),
    ],
)
def test_without_a_run_the_connection_tells(link: Link, expected: str) -> None:
    assert site_states({"north": link}, [], START)["north"].state == expected


def test_a_resumed_run_forgets_the_earlier_attempt() -> None:
    events = [*ROUND, ASKED, line("run_resumed", 1)]
    assert site_states({"north": HERE}, events, START)["north"].state == "connected"
    assert round_now(events) is None


def test_the_roll_call_is_no_site() -> None:
    assert list(site_states({}, [line("asked", 0, site="12345", task="roll call")], START)) == []


def test_a_round_that_is_done_is_not_going_on() -> None:
    found = round_now(ROUND)
    assert found is not None
    assert (found.number, found.deadline) == (1, START + timedelta(seconds=60))
    assert round_now([*ROUND, line("round_done")]) is None
    assert round_now([*ROUND, line("run_ended")]) is None
