"""Runs of a coordinator: tracked beside the ServerApp, through a resume, and never a reason for a run not to start."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.errors import ConfigError
from pneumofed.server.tracking.facts import MARKER
from pneumofed.server.tracking.process import follower_daemon, stop_followers
from pneumofed.server.tracking.targets import read_tracked
from tests.server.cli.test_coordinator import Coordinator
from tests.server.coordinator_folder import APP_HASH, FakeServerApp
from tests.server.tracking.mlflow_servers import FakeMlflow, fake_runs


@pytest.fixture
def coordinator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Coordinator]:
    made = Coordinator(tmp_path, monkeypatch)
    yield made
    stop_followers(made.folder.state)


def begin(coordinator: Coordinator) -> FakeServerApp:
    app = coordinator.server_app()
    app.folder.write_config(ExperimentConfig(rounds=2))
    app.begin()
    return app


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_run_is_tracked_from_its_submission_through_a_resume(coordinator: Coordinator, fake: tuple[FakeMlflow, str]) -> None:
    server, address = fake
    result = coordinator.call("run", "one", "--track", f"mlflow:{address}")
    assert result.exit_code == 0 and "track-one.log" in result.stdout
    app = begin(coordinator)
    app.finish_round(1)
    until(lambda: bool(server.runs) and fake_runs(server)[0].read(MARKER) == [(1, 1.0)])
    coordinator.flower.statuses[1] = "finished:failed"
    app.end("failed", error="round 2: south was lost")
    until(lambda: follower_daemon("one", coordinator.folder.state).pid() is None)
    assert fake_runs(server)[0].status == "FAILED"

    assert coordinator.call("resume", "one").exit_code == 0
    app.begin()
    app.finish_round(2)
    until(lambda: fake_runs(server)[0].read(MARKER) == [(1, 1.0), (2, 2.0)])
    stop_followers(coordinator.folder.state)
    (kept,) = fake_runs(server)
    assert (kept.name, kept.tags["pneumofed.app_bundle"], kept.tags["pneumofed.kind"]) == ("one", APP_HASH, "federation")


def test_a_wrong_target_is_refused_before_the_run_is_submitted(coordinator: Coordinator) -> None:
    result = coordinator.call("run", "one", "--track", "mlflow:here")
    assert isinstance(result.exception, ConfigError) and not coordinator.flower.submitted


def test_a_follower_that_cannot_be_started_is_a_warning(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pneumofed.server.tracking.process.start_follower", refuse)
    result = coordinator.call("run", "one", "--track", "mlflow:http://127.0.0.1:1")
    assert result.exit_code == 0 and "submitted: one" in result.stdout
    assert "one is not tracked" in result.output and "--follow" in result.output


def test_a_run_that_is_not_tracked_has_no_follower(coordinator: Coordinator) -> None:
    assert coordinator.call("run", "one").exit_code == 0
    assert not list(coordinator.folder.state.glob("track-*")) and read_tracked(coordinator.folder.runs / "one") is None
