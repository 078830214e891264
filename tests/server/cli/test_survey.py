"""`pneumofed server survey` and `pneumofed simulate --survey` as a script sees them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pneumofed.cli.main import app
from pneumofed.common.errors import ConfigError, FlowerError
from pneumofed.server.app import experiment_of, read_coordinator
from pneumofed.server.cli import coordinator as commands
from pneumofed.server.federation.survey import run_survey
from pneumofed.server.operations import processes, service
from tests.server.coordinator_folder import write_coordinator
from tests.tiny import TinyFederation


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A coordinator folder whose SuperLink runs a survey over two sites at once."""
    federation = TinyFederation(tmp_path / "sites", sites=2, patients=40)
    submitted: list[Mapping[str, str]] = []

    def submit(_: Path, run_config: Mapping[str, str]) -> int:
        submitted.append(run_config)
        run_survey(federation.grid(), experiment_of(run_config), read_coordinator(run_config))
        return len(submitted)

    monkeypatch.setattr(processes, "submit", submit)
    monkeypatch.setattr(processes, "run_status", lambda *_: "finished:completed")
    folder = tmp_path / "coordinator"
    return write_coordinator(folder).path


def call(place: Path, *arguments: str) -> Any:
    return CliRunner().invoke(commands.app, ["survey", *arguments, "--folder", str(place)])


def test_a_survey_is_asked_once_and_shown_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = call(place, "before", "--ask", "label", "--ask", "images", "--set", "image.size_px=32")
    assert first.exit_code == 0, first.output
    assert "2 hospitals answered, with about 80 patients" in first.output.replace("\n", " ")
    assert (place / "surveys" / "before" / "report.html").is_file()
    monkeypatch.setattr(processes, "submit", lambda *_: pytest.fail("asked again"))
    told = json.loads(call(place, "before", "--json", "--auroc", "0.8").stdout)
    assert told["assumptions"]["auroc"] == 0.8
    assert set(told["answers"]["site-0"]["tables"]) == {"label", "images"}
    assert (place / "state" / "audit.jsonl").is_file()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("../x",), "run name"),
        (("before", "--ask", "name"), "survey"),
        (("before", "--auroc", "1.5"), "auroc"),
        (("before", "--set", "secure_aggregation.enabled=true"), "secure_aggregation"),
    ],
)
def test_bad_input_is_one_sentence(place: Path, arguments: tuple[str, ...], sentence: str) -> None:
    result = call(place, *arguments)
    assert isinstance(result.exception, ConfigError)
    assert sentence in str(result.exception)
    assert not (place / "surveys").exists()


def test_a_survey_that_ends_without_an_answer_says_where_to_look(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.processes, "submit", lambda *_: 1)
    monkeypatch.setattr(service.processes, "run_status", lambda *_: "finished:failed")
    result = call(place, "before")
    assert isinstance(result.exception, FlowerError)
    assert "finished:failed" in str(result.exception)


def test_a_simulation_is_surveyed_and_can_be_run_in_the_same_folder(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    usual = [
        "simulate",
        "--phantoms",
        "80",
        "--hospitals",
        "2",
        "--partition",
        "iid",
        "--image-size",
        "32",
        "--out",
        out,
        "--quiet",
    ]
    shown = CliRunner().invoke(app, [*usual, "--survey", "--workers", "1", "--json"])
    assert shown.exit_code == 0, shown.output
    told = json.loads(shown.stdout)
    assert told["page"] == str(tmp_path / "run" / "survey" / "report.html")
    assert set(told["answers"]) == {"hospital-00", "hospital-01"}
    assert "These are drawn images" in Path(told["page"]).read_text()
    refused = CliRunner().invoke(app, [*usual, "--survey", "--baselines"])
    assert isinstance(refused.exception, ConfigError)
    small = ["--rounds", "1", "--workers", "1", "--set", "model.name=small_cnn", "--set", "evaluation.bootstrap_samples=0"]
    assert CliRunner().invoke(app, [*usual, *small]).exit_code == 0
    assert (tmp_path / "run" / "report.html").is_file()
