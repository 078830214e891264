"""A run at an MLflow server, the small one of the tests and the real one: every step once, whatever breaks off; nothing secret."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pneumofed.common.errors import ConfigError
from pneumofed.server.runs.records import RunState
from pneumofed.server.tracking.follow import TrackedGroup, following
from pneumofed.server.tracking.process import send_all
from pneumofed.server.tracking.targets import TOKEN, USER, Tracking, TrackingError, read_target, read_targets, tracking_file
from tests.server.coordinator_folder import METRICS
from tests.server.tracking.conftest import Mlflow
from tests.server.tracking.mlflow_servers import FakeMlflow, basic, fake_runs
from tests.server.tracking.tracked_runs import append_line, begin_run, succeed

SECRET = "hunter2"


def at(address: str) -> Tracking:
    return Tracking(read_targets([f"mlflow:{address}"]))


def test_rounds_results_settings_and_what_it_ran_on_are_at_the_server(tmp_path: Path, mlflow: Mlflow) -> None:
    app = begin_run(tmp_path / "first", seed=7)
    with following(app.folder, at(mlflow.address)):
        for number in (1, 2, 3):
            app.finish_round(number)
        succeed(app, phantom=True, app_bundle="ab" * 32)
    kept = mlflow.of(tmp_path / "first")
    assert (kept.name, kept.status) == ("first", "FINISHED")
    for name in ("round/completed", "validation/auroc", "test/log_loss", "site/north/train_loss", "site/south/sensitivity"):
        assert [step for step, _ in kept.read(name)] == [1, 2, 3], name
    assert kept.read("site/north/train_loss")[0] == (1, 0.5)
    final = {name: kept.read(f"final/test/auroc{name}") for name in ("", "_low", "_high")}
    assert final == {"": [(3, 0.9)], "_low": [(3, 0.8)], "_high": [(3, 0.95)]}
    assert (kept.params["seed"], kept.params["strategy.name"], kept.params["rounds"]) == ("7", "fedavg", "3")
    assert (kept.tags["pneumofed.app_bundle"], kept.tags["pneumofed.images"]) == ("ab" * 32, "drawn")
    assert "drawn images" in kept.tags["mlflow.note.content"]


def test_a_resumed_run_goes_on_as_the_same_one_without_being_asked_for_again(tmp_path: Path, mlflow: Mlflow) -> None:
    app = begin_run(tmp_path / "resumed")
    with following(app.folder, at(mlflow.address)):
        app.finish_round(1)
        app.end("failed")
    assert mlflow.of(app.folder.path).status == "FAILED"
    with following(app.folder, Tracking()):
        app.begin()
        app.finish_round(2)
        succeed(app)
    kept = mlflow.of(app.folder.path)
    assert (kept.status, kept.read("round/completed")) == ("FINISHED", [(1, 1.0), (2, 2.0)])
    send_all(app.folder, Tracking())
    again = mlflow.of(app.folder.path)
    assert again.metrics == kept.metrics
    assert again.read("round/completed") == [(1, 1.0), (2, 2.0)] and again.read("final/test/auroc") == [(2, 0.9)]


def test_more_numbers_than_one_call_takes_and_the_longest_settings_arrive(tmp_path: Path, mlflow: Mlflow) -> None:
    app = begin_run(tmp_path / "many")
    sites = tuple(f"site-{number:02d}" for number in range(99))
    part = {
        "train": {"train_loss": 0.5},
        "validation": {**METRICS, **dict.fromkeys(("f1", "mcc", "brier", "ece", "precision"), 0.5)},
    }
    append_line(app, 1, sites=dict.fromkeys(sites, part))
    app.folder.last_checkpoint.write_bytes(b"weights")
    succeed(app)
    send_all(app.folder, at(mlflow.address))
    kept = mlflow.of(app.folder.path)
    assert len(kept.metrics) > 1000
    assert {f"site/{name}/train_loss" for name in sites} <= kept.metrics and kept.read("site/site-89/auroc") == [(1, 0.9)]


def test_the_runs_of_a_sweep_stand_under_it_and_say_nothing_of_held_out_sets(tmp_path: Path, mlflow: Mlflow) -> None:
    group = TrackedGroup(tmp_path / "sweep", read_targets([f"mlflow:{mlflow.address}"]))
    app = begin_run(tmp_path / "sweep" / "a" / "seed-0")
    with following(app.folder, group.member("a/seed-0")):
        app.finish_round(1)
        succeed(app)
    group.finish("pneumonia", {"final/test/auroc": 0.9}, {"pneumofed.chosen": "a"}, RunState.SUCCEEDED)
    kept = mlflow.of(app.folder.path)
    (above,) = [run for run in mlflow.runs() if run.tags.get("pneumofed.chosen") == "a"]
    assert kept.name == "a/seed-0" and kept.tags["mlflow.parentRunId"] and above.name == "sweep"
    assert not [name for name in kept.metrics if "test" in name] and kept.read("validation/auroc") == [(1, 0.9)]
    assert above.read("final/test/auroc") == [(0, 0.9)]


@pytest.mark.parametrize("call", ["runs/create", "runs/log-batch", "experiments/create"])
def test_an_answer_that_is_lost_doubles_nothing(tmp_path: Path, fake: tuple[FakeMlflow, str], call: str) -> None:
    server, address = fake
    app = begin_run(tmp_path / "lost")
    app.finish_round(1)
    app.finish_round(2)
    server.lose_answer_of = call
    with pytest.raises(TrackingError, match="503"):
        send_all(app.folder, at(address))
    succeed(app)
    send_all(app.folder, Tracking())
    (kept,) = fake_runs(server)
    assert kept.read("round/completed") == [(1, 1.0), (2, 2.0)] and kept.read("site/north/auroc") == [(1, 0.9), (2, 0.9)]
    assert len(kept.params) > 100


def test_who_asks_is_told_to_the_server_and_to_nobody_else(
    tmp_path: Path, fake: tuple[FakeMlflow, str], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    server, address = fake
    caplog.set_level(logging.DEBUG)
    tracking = at(address.replace("//", f"//ann:{SECRET}@"))
    app = begin_run(tmp_path / "secret")
    app.finish_round(1)
    with following(app.folder, tracking):
        server.status = 500  # its message repeats the header
    with pytest.raises(TrackingError) as refused:
        send_all(app.folder, tracking)
    server.status = 0
    send_all(app.folder, tracking)
    assert server.authorizations == {basic("ann", SECRET)}
    told = [caplog.text, *capsys.readouterr(), repr(tracking), str(refused.value), *map(str, tracking.targets), *server.bodies]
    told += [path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert address in tracking_file(app.folder.path).read_text()
    assert not [text for text in told if SECRET in text or basic("ann", SECRET) in text or "ann:" in text]


def test_a_token_of_the_environment_is_a_bearer_token(
    tmp_path: Path, fake: tuple[FakeMlflow, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, address = fake
    monkeypatch.setenv(TOKEN, SECRET)
    app = begin_run(tmp_path / "token")
    send_all(app.folder, at(address))
    assert server.authorizations == {f"Bearer {SECRET}"}
    assert SECRET not in tracking_file(app.folder.path).read_text()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (f"mlflow:ftp://ann:{SECRET}@example.org", "http:// or https://"),
        (f"mlflow:http://ann:{SECRET}@example.org", "over https:// only"),
        (f"mlflow:https://example.org?token={SECRET}", "neither"),
        (f"mlflow:https://ann:{SECRET}@example.org:port", "cannot be read"),
        (f"mlflow:sqlite:///{SECRET}.db", "mlflow server"),
        ("mlflow", "MLFLOW_TRACKING_URI is not set"),
        (f"wandb:{SECRET}", "expected mlflow:ADDRESS"),
    ],
)
def test_a_wrong_target_is_one_sentence_that_quotes_no_secret(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as refused:
        read_target(text)
    assert SECRET not in str(refused.value)


def test_a_password_of_the_environment_goes_over_no_open_line_either(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_target("mlflow:http://example.org:5000").place == "http://example.org:5000"
    monkeypatch.setenv(USER, "ann")
    with pytest.raises(ConfigError, match="https"):
        read_target("mlflow:http://example.org:5000")
    assert read_target("mlflow:https://example.org/mlflow/").place == "https://example.org/mlflow"
    assert read_target("mlflow:http://[::1]:5000").place == "http://[::1]:5000"


def test_what_is_no_mlflow_server_is_said_so(tmp_path: Path) -> None:
    from fastapi import FastAPI
    from fastapi.responses import HTMLResponse

    from tests.serving import serving

    other = FastAPI()
    other.add_api_route("/{path:path}", lambda path: HTMLResponse("<html>"), methods=["GET", "POST"])
    app = begin_run(tmp_path / "other")
    with serving(other) as address, pytest.raises(TrackingError, match="is this an MLflow server"):
        send_all(app.folder, at(address.rstrip("/")))
