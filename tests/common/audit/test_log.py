"""Audit logs: whatever is done to a line shows, and writers and crashes never break the chain."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from pneumofed.cli.audit import app
from pneumofed.common.audit.log import (
    CHAIN_START,
    LOG_RECOVERED,
    AuditLog,
    hash_arrays,
    hash_experiment,
    read_entries,
    record_run_ended,
    record_run_started,
)
from pneumofed.common.audit.verify import anchors_in, verify_log
from pneumofed.common.errors import AuditError
from pneumofed.common.wire.messages import ModelArrays
from pneumofed.server.runs.events import record_round
from pneumofed.server.runs.records import RoundBytes, RoundRecord
from tests.tiny import tiny_experiment

FACTS = st.dictionaries(
    st.text(max_size=8), st.integers() | st.text(max_size=12) | st.lists(st.integers(), max_size=3), max_size=3
)


def write_log(path: Path, lines: int) -> list[str]:
    path.unlink(missing_ok=True)
    log = AuditLog(path, "site-1")
    return [log.record("answer", round=number, bytes=45_000_000 + number) for number in range(lines)]


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("six") / "audit.jsonl"
    write_log(path, 6)
    return path


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=st.lists(FACTS, max_size=6))
def test_what_was_recorded_is_intact_and_read_again(tmp_path: Path, entries: list[dict[str, object]]) -> None:
    path = tmp_path / "audit.jsonl"
    path.unlink(missing_ok=True)
    heads = [AuditLog(path, "site-1").record("answer", values=facts) for facts in entries]
    assert [entry.facts["values"] for entry in read_entries(path)] == entries
    if entries:
        report = verify_log(path, heads)
        assert (report.intact, report.lines, report.head) == (True, len(entries), heads[-1])


@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_changed_byte_is_found_in_its_line(six: Path, tmp_path: Path, position: int, value: int) -> None:
    content = bytearray(six.read_bytes())
    position %= len(content)
    if content[position] == value:
        return
    line = content[:position].count(b"\n") + 1
    content[position] = value
    changed = tmp_path / "changed.jsonl"
    changed.write_bytes(content)
    report = verify_log(changed)
    assert not report.intact
    assert report.line == line


@pytest.mark.parametrize("line", range(5))
def test_a_removed_line_is_found(six: Path, tmp_path: Path, line: int) -> None:
    lines = lines_of(six)
    del lines[line]
    (tmp_path / "a").write_bytes(b"".join(lines))
    report = verify_log(tmp_path / "a")
    assert (report.damage, report.line) == ("removed", line + 1)


@pytest.mark.parametrize("first", range(6))
@pytest.mark.parametrize("second", range(6))
def test_two_swapped_lines_are_found(six: Path, tmp_path: Path, first: int, second: int) -> None:
    if first >= second:
        return
    lines = lines_of(six)
    lines[first], lines[second] = lines[second], lines[first]
    (tmp_path / "a").write_bytes(b"".join(lines))
    report = verify_log(tmp_path / "a")
    assert (report.damage, report.line) == ("reordered", first + 1)


@pytest.mark.parametrize("position", range(7))
@pytest.mark.parametrize("source", range(6))
def test_a_copied_line_is_found_wherever_it_is_put(six: Path, tmp_path: Path, position: int, source: int) -> None:
    lines = lines_of(six)
    lines.insert(position, lines[source])
    (tmp_path / "a").write_bytes(b"".join(lines))
    assert not verify_log(tmp_path / "a").intact


def test_a_line_replaced_by_one_with_a_right_hash_of_its_own_is_found(six: Path, tmp_path: Path) -> None:
    forged = tmp_path / "forged"
    forged.write_bytes(b"".join(lines_of(six)[:2]))
    AuditLog(forged, "site-1").record("answer", round=2, bytes=1)
    forged.write_bytes(forged.read_bytes() + b"".join(lines_of(six)[3:]))
    report = verify_log(forged)
    assert (report.damage, report.line) == ("changed", 4)


def test_a_cut_end_shows_only_against_a_known_head(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    heads = write_log(path, 4)
    path.write_bytes(b"".join(lines_of(path)[:3]))
    assert verify_log(path).intact
    assert verify_log(path, [heads[2]]).intact
    report = verify_log(path, [heads[3]])
    assert (report.damage, report.missing_heads) == ("truncated", (heads[3],))


def test_a_log_written_anew_lacks_the_heads_that_the_other_side_kept(tmp_path: Path) -> None:
    site, coordinator = tmp_path / "site.jsonl", tmp_path / "coordinator.jsonl"
    heads = write_log(site, 3)
    AuditLog(coordinator, "coordinator").record("round", heads={"site-1": heads[1], "site-2": "f" * 64})
    assert anchors_in(coordinator, "site-1") == [heads[1]]
    assert verify_log(site, anchors_in(coordinator, "site-1")).intact
    write_log(site, 3)
    assert verify_log(site).intact
    assert not verify_log(site, anchors_in(coordinator, "site-1")).intact


@pytest.mark.parametrize("kept", [1, 40, -2])
def test_a_line_cut_short_by_a_crash_is_taken_out_and_told(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "audit.jsonl"
    write_log(path, 3)
    lines = lines_of(path)
    path.write_bytes(lines[0] + lines[1] + lines[2][:kept])
    assert verify_log(path).damage == "truncated"
    AuditLog(path, "site-1").record("answer", round=9)
    entries = read_entries(path)
    assert [entry.event for entry in entries] == ["answer", "answer", LOG_RECOVERED, "answer"]
    assert entries[2].facts["bytes"] == len(lines[2][:kept])
    assert verify_log(path).intact


def test_a_line_that_lacks_its_end_alone_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    heads = write_log(path, 2)
    path.write_bytes(path.read_bytes()[:-1])
    AuditLog(path, "site-1").record("answer", round=9)
    assert verify_log(path, heads).lines == 3


def test_nothing_is_appended_to_a_damaged_last_line(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    write_log(path, 2)
    path.write_bytes(path.read_bytes().replace(b"45000001", b"45000002"))
    before = path.read_bytes()
    with pytest.raises(AuditError, match="pneumofed audit verify"):
        AuditLog(path, "site-1").record("answer")
    assert path.read_bytes() == before


def test_a_write_that_fails_leaves_the_log_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "audit.jsonl"
    write_log(path, 2)
    before, real = path.read_bytes(), os.write

    def half(descriptor: int, data: bytes) -> int:
        if len(data) < 100:
            raise OSError(28, "No space left on device")
        return real(descriptor, data[:-50])

    with monkeypatch.context() as patch:
        patch.setattr("pneumofed.common.audit.log.os.write", half)
        with pytest.raises(OSError, match="No space left"):
            AuditLog(path, "site-1").record("answer")
    assert path.read_bytes() == before


def test_a_line_longer_than_a_block_is_followed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.record("answer", names=["x" * 20] * 20_000)
    log.record("answer")
    assert (verify_log(path).intact, verify_log(path).lines) == (True, 2)


def test_the_log_is_its_owners_alone(tmp_path: Path) -> None:
    write_log(tmp_path / "work" / "audit.jsonl", 1)
    assert stat.S_IMODE((tmp_path / "work" / "audit.jsonl").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "work").stat().st_mode) == 0o700


def _write_twenty(path: Path, name: str) -> None:
    for number in range(20):
        AuditLog(path, name).record("answer", number=number)


def test_writers_at_once_keep_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_twenty, args=(path, f"writer-{number}")) for number in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert (verify_log(path).intact, verify_log(path).lines) == (True, 60)


def test_the_head_of_an_empty_log_is_none_and_then_the_last_hash(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    assert log.head() is None
    head = log.record("answer")
    assert log.head() == head
    assert read_entries(log.path)[0].previous == CHAIN_START


def test_a_run_at_the_coordinator_is_recorded_with_its_hashes(tmp_path: Path) -> None:
    log, arrays = AuditLog(tmp_path / "audit.jsonl", "coordinator"), ModelArrays(np.ones(4, np.float32), np.zeros(2, np.float32))
    line = RoundRecord(round=1, drawn=("a", "b", "c"), failures={"b": "x"}, left_out={"c": "y"}, bytes=RoundBytes(down=9, up=3))
    record_run_started(log, "run", tiny_experiment(), "a" * 64)
    record_round(log, "run", line, arrays, {"a": "b" * 64})
    record_run_ended(log, "run", "succeeded", 1)
    started, one, ended = read_entries(log.path)
    assert started.facts["config"] == hash_experiment(tiny_experiment()) != hash_experiment(tiny_experiment(seed=1))
    assert (one.facts["participants"], one.facts["weights"]) == (["a"], hash_arrays(arrays))
    assert one.facts["bytes"] == {"down": 9, "up": 3}
    assert ended.facts["status"] == "succeeded"


def test_the_command_tells_intact_logs_from_broken_ones(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    heads = write_log(good, 3)
    write_log(bad, 3)
    bad.write_bytes(b"".join([lines_of(bad)[0], lines_of(bad)[2]]))
    runner = CliRunner()
    assert runner.invoke(app, ["verify", str(good), "--head", heads[0]]).exit_code == 0
    assert runner.invoke(app, ["verify", str(good), "--head", "0" * 64]).exit_code == 1
    result = runner.invoke(app, ["verify", str(good), str(bad)])
    assert result.exit_code == 1
    assert "broken at line 2 (removed)" in result.output
    assert len(json.loads(runner.invoke(app, ["show", str(good), "--json"]).output)) == 3
