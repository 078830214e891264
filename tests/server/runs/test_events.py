"""The event lines of a run: every line whole, no failure of the writer reaches the run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pneumofed.server.runs.events import Activity, Heartbeat, Kind, kind_of_failure, read_activity


def test_events_come_back_in_order_with_their_facts(tmp_path: Path) -> None:
    activity = Activity(tmp_path / "events.jsonl")
    activity.note(Kind.ROUND_STARTED, round=1, sites=["north", "south"], deadline_sec=60.0)
    activity.note(Kind.ANSWERED, round=1, site="north", seconds=2.5, bytes=10)
    first, second = read_activity(activity.path)
    assert (first["kind"], first["round"], first["sites"]) == ("round_started", 1, ["north", "south"])
    assert "site" not in first
    assert (second["site"], second["seconds"], second["bytes"]) == ("north", 2.5, 10)
    assert first["time"] <= second["time"]


def test_a_line_cut_by_a_crash_costs_that_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    Activity(path).note(Kind.JOINED, round=0, site="north")
    with path.open("ab") as file:
        file.write(b'{"time": "2026-01-31T09:1')
    Activity(path).note(Kind.JOINED, round=0, site="south")
    assert [event["site"] for event in read_activity(path)] == ["north", "south"]


def test_a_full_disk_does_not_reach_the_run(caplog: pytest.LogCaptureFixture) -> None:
    activity = Activity(Path("/dev/full"))
    activity.note(Kind.JOINED, round=0, site="north")
    activity.note(Kind.JOINED, round=0, site="south")
    assert len(caplog.records) == 1  # told once, not with every line


def test_numbers_that_are_none_in_json_become_null(tmp_path: Path) -> None:
    activity = Activity(tmp_path / "events.jsonl")
    activity.note(Kind.ROUND_DONE, round=1, seconds=float("nan"))
    assert read_activity(activity.path)[0]["seconds"] is None


def test_lines_of_another_kind_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'[]\n3\n{"kind": "late"}\n\xff\xfe\n{"time": "t", "kind": "late", "round": 2}\n')
    assert [event["round"] for event in read_activity(path)] == [2]


def test_no_file_means_no_events(tmp_path: Path) -> None:
    assert read_activity(tmp_path / "events.jsonl") == []


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("Timeout", Kind.LATE),
        ("PolicyError", Kind.REFUSED),
        ("Unreachable", Kind.LOST),
        ("Flower error 3", Kind.LOST),
        ("DataError", Kind.FAILED),
    ],
)
def test_failures_have_a_kind(error: str, kind: Kind) -> None:
    assert kind_of_failure(error) is kind


def test_heartbeat_goes_on_while_the_block_runs_and_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "heartbeat"
    with Heartbeat(path, every_sec=0.02):
        time.sleep(0.05)
        first = path.stat().st_mtime_ns
        time.sleep(0.2)
        assert path.stat().st_mtime_ns > first
    last = path.stat().st_mtime_ns
    time.sleep(0.1)
    assert path.stat().st_mtime_ns == last


def test_heartbeat_survives_a_missing_folder(tmp_path: Path) -> None:
    with Heartbeat(tmp_path / "none" / "heartbeat", every_sec=0.01):
        time.sleep(0.05)
