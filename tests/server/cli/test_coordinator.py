"""`pneumofed server` as a script sees it: exit codes and output. The SuperLink is a fake; `tests/e2e` has the real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pneumofed.common.errors import ConfigError, FlowerError
from pneumofed.server.cli import coordinator as commands
from pneumofed.server.operations import service
from pneumofed.server.operations.overview import Overview
from pneumofed.server.operations.settings import CoordinatorFolder
from pneumofed.server.runs.registry import now, open_registry
from pneumofed.server.runs.runs import Runs
from tests.own_network import write
from tests.server.coordinator_folder import APP_HASH, METRICS, FakeFlower, FakeServerApp, write_coordinator


class Coordinator:
    """A coordinator folder, its fake SuperLink, and the command line over both."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.flower = write_coordinator(path), FakeFlower()
        self.during_look = lambda: None
        monkeypatch.setattr(service, "open_runs", self._open)
        monkeypatch.setattr("pneumofed.server.operations.overview.observe_federation", lambda *_: Overview((), {}, now()))
        monkeypatch.setattr(service, "observe_federation", lambda *_: Overview((), {}, now()))
        monkeypatch.setattr("pneumofed.server.runs.runs.REFRESH_SEC", 0.01)

    def _open(self, place: CoordinatorFolder) -> Runs:
        return Runs(place, open_registry(place), self.flower, lambda: APP_HASH)

    def call(self, *arguments: str) -> Any:
        return CliRunner().invoke(commands.app, [*arguments, "--folder", str(self.folder.path)])

    def server_app(self, name: str = "one") -> FakeServerApp:
        return FakeServerApp(self.folder.runs / name)


@pytest.fixture
def coordinator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Coordinator:
    return Coordinator(tmp_path, monkeypatch)


def succeed(coordinator: Coordinator) -> None:
    app = coordinator.server_app()
    app.begin()
    app.begin_round(1)
    app.finish_round(1)
    app.end("succeeded", validation=METRICS)


def test_a_run_is_submitted_and_shown(coordinator: Coordinator) -> None:
    assert coordinator.call("run", "one", "--set", "rounds=3").exit_code == 0
    told = json.loads(coordinator.call("status", "--json").stdout)
    assert [(run["name"], run["state"], run["app_hash"]) for run in told["runs"]] == [("one", "submitted", APP_HASH)]
    assert "one" in coordinator.call("status").stdout


def test_a_studys_own_network_is_tried_and_the_hash_to_approve_is_said(coordinator: Coordinator, tmp_path: Path) -> None:
    done = coordinator.call("run", "one", "--model", f"{write(tmp_path)}:build_net")
    assert done.exit_code == 0
    run = json.loads(coordinator.call("status", "--json").stdout)["runs"][0]
    assert f"pneumofed site approve {run['app_hash']}" in done.stdout.replace("\n", " ") and run["app_hash"] != APP_HASH
    refused = coordinator.call("run", "two", "--model", f"{write(tmp_path, 'def build(): return 7')}:build")
    assert isinstance(refused.exception, ConfigError) and "returns int, expected a network" in str(refused.exception)
    assert len(json.loads(coordinator.call("status", "--json").stdout)["runs"]) == 1


def test_waiting_for_a_run_that_succeeds_is_0(coordinator: Coordinator) -> None:
    coordinator.flower.meanwhile = lambda: succeed(coordinator)
    result = coordinator.call("run", "one", "--wait")
    assert result.exit_code == 0
    assert "north answered for training after 1.5 s" in result.stdout
    assert "one succeeded" in result.stdout
    assert (coordinator.folder.runs / "one" / "report.html").exists()


def test_waiting_for_a_run_that_fails_is_1_and_says_why(coordinator: Coordinator) -> None:
    coordinator.flower.meanwhile = lambda: coordinator.server_app().end("failed", error="round 1: south was lost")
    result = coordinator.call("run", "one", "--wait")
    assert result.exit_code == 1
    assert "round 1: south was lost" in result.stdout
    assert coordinator.call("status", "one").exit_code == 1
    assert "badge failed" in (coordinator.folder.runs / "one" / "report.html").read_text()


def test_a_run_that_nobody_waited_for_has_its_report_after_the_first_look(coordinator: Coordinator) -> None:
    coordinator.call("run", "one")
    succeed(coordinator)
    report = coordinator.folder.runs / "one" / "report.html"
    assert not report.exists()
    assert coordinator.call("status").exit_code == 0
    assert report.exists()


def test_success_without_results_is_1(coordinator: Coordinator) -> None:
    coordinator.flower.meanwhile = lambda: coordinator.server_app().end("succeeded")
    assert coordinator.call("run", "one", "--wait").exit_code == 1


def test_interrupting_the_wait_is_130_and_leaves_the_run(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pneumofed.server.runs.runs.follow", interrupt)
    result = coordinator.call("run", "one", "--wait")
    assert result.exit_code == 130
    assert "the run goes on" in result.stdout
    assert coordinator.flower.statuses[1] == "pending"


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "../one"),
        ("run", "one", "--set", "rounds=-1"),
        ("run", "one", "--set", "roundz=1"),
        ("run", "one", "--config", "/no/such/file.yaml"),
        ("status", "nope"),
        ("resume", "nope"),
        ("stop", "nope"),
    ],
)
def test_wrong_use_is_an_error_of_configuration(coordinator: Coordinator, arguments: tuple[str, ...]) -> None:
    """`pneumofed` makes 2 of a ConfigError and 1 of any other of ours; see `cli.main.main`."""
    result = coordinator.call(*arguments)
    assert isinstance(result.exception, ConfigError)


def test_a_folder_that_is_none_is_an_error_of_configuration(tmp_path: Path) -> None:
    result = CliRunner().invoke(commands.app, ["status", "--folder", str(tmp_path)])
    assert isinstance(result.exception, ConfigError)
    assert not list(tmp_path.iterdir())  # nothing was made there


def test_a_superlink_that_does_not_answer_is_a_failure(coordinator: Coordinator) -> None:
    coordinator.flower.down = True
    assert isinstance(coordinator.call("run", "one").exception, FlowerError)
    assert coordinator.call("status", "one").exit_code == 1


def test_a_stopped_run_is_resumed(coordinator: Coordinator) -> None:
    coordinator.call("run", "one")
    result = coordinator.call("stop", "one")
    assert result.exit_code == 0
    assert "stopped" in result.stdout
    assert coordinator.call("status", "one").exit_code == 1
    coordinator.flower.meanwhile = lambda: succeed(coordinator)
    assert coordinator.call("resume", "one", "--wait").exit_code == 0
    assert isinstance(coordinator.call("resume", "one").exception, ConfigError)
