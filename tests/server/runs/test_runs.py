"""A run's life at the coordinator: whatever dies, the registry ends up with the truth and a way to go on."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import yaml

from pneumofed.common.config.experiment import ExperimentConfig, ModelConfig
from pneumofed.common.config.parties import CoordinatorConfig
from pneumofed.common.config.reader import build_config, experiment_from_json
from pneumofed.common.errors import ConfigError, FlowerError
from pneumofed.common.ops import study_code
from pneumofed.common.ops.app_bundle import build_bundle, hash_bundle
from pneumofed.common.ops.study_code import read_study_code
from pneumofed.server.runs.runs import Runs
from tests.own_network import NETWORK, write
from tests.server.coordinator_folder import APP_HASH, METRICS, FakeFlower, FakeServerApp, open_runs, write_coordinator


@pytest.fixture
def flower() -> FakeFlower:
    return FakeFlower()


@pytest.fixture
def runs(tmp_path: Path, flower: FakeFlower) -> Runs:
    return open_runs(write_coordinator(tmp_path), flower)


def begin(runs: Runs, flower: FakeFlower, name: str = "one") -> FakeServerApp:
    """A submitted run whose process has begun."""
    run = runs.submit(name, ExperimentConfig(rounds=3))
    flower.statuses[int(run.flower_run_id or 0)] = "running"
    app = FakeServerApp(Path(run.folder))
    app.begin()
    return app


def state(runs: Runs, name: str = "one") -> tuple[str, str]:
    runs.reconcile()
    run = runs.registry.run(name)
    return run.state, run.reason


def test_a_submitted_run_has_its_folder_settings_and_hash(runs: Runs, flower: FakeFlower, tmp_path: Path) -> None:
    run = runs.submit("one", ExperimentConfig(rounds=3))
    config = flower.submitted[0]
    settings = build_config(CoordinatorConfig, yaml.safe_load(Path(config["coordinator"]).read_text()))
    assert settings.run_dir == run.folder == str(tmp_path.resolve() / "runs" / "one")
    assert not settings.resume
    assert experiment_from_json(config["experiment"]).rounds == 3
    assert (run.state, run.flower_run_id, run.app_hash) == ("submitted", "1", APP_HASH)
    assert Path(run.folder).stat().st_mode & 0o777 == 0o700
    assert Path(config["coordinator"]).stat().st_mode & 0o777 == 0o600


def test_a_studys_own_network_stays_in_the_run_folder_and_goes_into_the_app(
    runs: Runs, flower: FakeFlower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = read_study_code(f"{write(tmp_path)}:build_net")
    run = runs.submit("one", ExperimentConfig(rounds=3, model=build_config(ModelConfig, {"name": code.name})))
    assert (Path(run.folder) / "study_code" / "net.py").read_bytes() == code.source
    assert run.app_hash == hash_bundle(build_bundle([code])) != hash_bundle(build_bundle())
    monkeypatch.setattr(study_code, "_known", {})  # as in another process, after the file was changed
    write(tmp_path, NETWORK + "# changed\n")
    app = FakeServerApp(Path(run.folder))
    app.begin()
    app.end("failed", error="x")
    runs.reconcile()
    assert runs.resume("one").app_hash == run.app_hash
    (Path(run.folder) / "study_code" / "net.py").unlink()
    monkeypatch.setattr(study_code, "_known", {})
    with pytest.raises(ConfigError, match="is no part of the code here"):
        runs.submit("two", ExperimentConfig(rounds=3, model=build_config(ModelConfig, {"name": code.name})))
    assert state(runs, "two")[0] == "failed"


def test_a_test_set_that_is_not_there_stops_the_run_before_it_begins(tmp_path: Path, flower: FakeFlower) -> None:
    runs = open_runs(write_coordinator(tmp_path, test_manifest="data/test.csv"), flower)
    with pytest.raises(ConfigError, match=r"test_manifest.*no file"):
        runs.submit("one", ExperimentConfig())
    assert not runs.registry.runs()


@pytest.mark.parametrize("name", ["..", "../one", "a/b", "", ".hidden", "a..b", "x" * 65, "a\n", "ä", "-rf"])
def test_names_that_are_no_folder_names_are_refused(runs: Runs, name: str) -> None:
    with pytest.raises(ConfigError, match="run name"):
        runs.submit(name, ExperimentConfig())


def test_a_name_is_used_once(runs: Runs) -> None:
    runs.submit("one", ExperimentConfig())
    with pytest.raises(ConfigError, match="exists"):
        runs.submit("one", ExperimentConfig())


def test_a_run_that_flower_does_not_take_failed_and_says_so(runs: Runs, flower: FakeFlower) -> None:
    flower.down = True
    with pytest.raises(FlowerError):
        runs.submit("one", ExperimentConfig())
    assert state(runs) == ("failed", "Flower did not take the run: the SuperLink does not answer")


def test_a_run_goes_from_submitted_over_running_to_succeeded(runs: Runs, flower: FakeFlower) -> None:
    run = runs.submit("one", ExperimentConfig())
    assert state(runs)[0] == "submitted"
    app = FakeServerApp(Path(run.folder))
    app.begin()
    assert state(runs)[0] == "running"
    app.begin_round(1)
    app.finish_round(1)
    app.end("succeeded", validation=METRICS, test={"auroc": {"value": 0.9, "low": 0.8, "high": 0.95}})
    assert state(runs) == ("succeeded", "")


@pytest.mark.parametrize("results", [{}, {"validation": {"auroc": None, "accuracy": None}}, {"test": {"auroc": {"value": None}}}])
def test_success_without_results_is_a_failure(runs: Runs, flower: FakeFlower, results: dict[str, object]) -> None:
    app = begin(runs, flower)
    app.finish_round(1)
    app.end("succeeded", **results)
    found, reason = state(runs)
    assert found == "failed"
    assert "no validation or test metrics" in reason


def test_success_without_a_round_is_a_failure(runs: Runs, flower: FakeFlower) -> None:
    begin(runs, flower).end("succeeded", validation=METRICS)
    assert state(runs) == ("failed", "the run says that it succeeded, but it completed no round")


def test_a_failed_run_keeps_its_own_words(runs: Runs, flower: FakeFlower) -> None:
    app = begin(runs, flower)
    app.end("failed", error="round 1: 1 good updates, 2 are needed (strategy.min_sites). south: Timeout: no reply within 60 s")
    assert state(runs) == (
        "failed",
        "round 1: 1 good updates, 2 are needed (strategy.min_sites). south: Timeout: no reply within 60 s",
    )


def test_words_that_name_no_round_get_it(runs: Runs, flower: FakeFlower) -> None:
    app = begin(runs, flower)
    app.finish_round(1)
    app.begin_round(2)
    app.end("failed", error="the disk is full")
    assert state(runs)[1] == "in round 2 while it waited for north and south: the disk is full"


def test_a_process_that_died_is_not_running_and_says_where(runs: Runs, flower: FakeFlower) -> None:
    app = begin(runs, flower)
    app.begin_round(1)
    app.finish_round(1)
    app.begin_round(2)
    app.activity.note("answered", round=2, site="north", task="train", seconds=1.0)
    flower.statuses[1] = "finished:failed"
    found, reason = state(runs)
    assert found == "failed"
    assert reason == (
        "the coordinator's process ended without a result in round 2 while it waited for south (Flower: finished:failed); "
        "`pneumofed server resume one` goes on after round 1"
    )
    assert app.folder.read_summary().status == "failed"  # the folder tells the same
    assert app.folder.read_summary().rounds_completed == 1


@pytest.mark.parametrize("flower_status", ["running", None])
def test_a_silent_process_is_closed_whatever_flower_says(runs: Runs, flower: FakeFlower, flower_status: str | None) -> None:
    app = begin(runs, flower)
    assert state(runs)[0] == "running"
    old = time.time() - 1000
    os.utime(app.folder.path / "heartbeat", (old, old))
    flower.down = flower_status is None
    found, reason = state(runs)
    assert found == "failed"
    assert "fell silent before the first round" in reason
    assert "server resume one" in reason
    assert flower_status is None or flower.statuses[1] == "finished:stopped"  # it cannot come back beside a resumed one


def test_a_superlink_that_is_away_does_not_end_a_living_run(runs: Runs, flower: FakeFlower) -> None:
    begin(runs, flower)
    flower.down = True
    assert state(runs)[0] == "running"


def test_reconciling_twice_is_the_same_as_once(runs: Runs, flower: FakeFlower) -> None:
    app = begin(runs, flower)
    app.begin_round(1)
    flower.statuses[1] = "finished:failed"

    def look() -> object:
        runs.reconcile()
        run = runs.registry.run("one")
        return run.state, run.reason, run.ended, [event.text for event in runs.registry.events("one")], app.folder.read_summary()

    assert look() == look()


def test_a_last_word_after_the_end_changes_nothing(runs: Runs, flower: FakeFlower) -> None:
    app = begin(runs, flower)
    runs.stop("one")
    app.finish_round(1)
    app.end("succeeded", validation=METRICS)
    assert state(runs)[0] == "stopped"


def test_a_stopped_run_says_who_and_where(runs: Runs, flower: FakeFlower) -> None:
    app = begin(runs, flower)
    app.finish_round(1)
    run = runs.stop("one", "somebody")
    assert (run.state, run.reason) == (
        "stopped",
        "stopped by somebody after 1 completed rounds; `pneumofed server resume one` goes on after round 1",
    )
    assert flower.statuses[1] == "finished:stopped"
    assert app.folder.read_summary().status == "stopped"


def test_what_cannot_be_stopped_is_not_called_stopped(runs: Runs, flower: FakeFlower) -> None:
    begin(runs, flower)
    flower.down = True
    with pytest.raises(FlowerError):
        runs.stop("one")
    assert state(runs)[0] == "running"


def test_stopping_what_has_ended_leaves_it(runs: Runs, flower: FakeFlower) -> None:
    app = begin(runs, flower)
    app.end("failed", error="round 1: no")
    assert runs.stop("one").state == "failed"


def test_resume_goes_on_from_the_checkpoint(runs: Runs, flower: FakeFlower) -> None:
    app = begin(runs, flower)
    app.finish_round(1)
    app.end("failed", error="round 2: no")
    assert state(runs)[0] == "failed"
    run = runs.resume("one")
    assert (run.state, run.reason, run.flower_run_id, run.ended) == ("submitted", "", "2", None)
    assert build_config(CoordinatorConfig, yaml.safe_load(Path(flower.submitted[1]["coordinator"]).read_text())).resume
    assert flower.submitted[1]["experiment"] == flower.submitted[0]["experiment"]
    assert state(runs)[0] == "submitted"  # the first attempt's last word is not the second's
    app.begin()
    assert state(runs)[0] == "running"


def test_resume_without_a_checkpoint_begins_again(runs: Runs, flower: FakeFlower) -> None:
    begin(runs, flower)
    flower.statuses[1] = "finished:failed"
    assert "starts it again from the beginning" in state(runs)[1]
    runs.resume("one")
    assert not build_config(CoordinatorConfig, yaml.safe_load(Path(flower.submitted[1]["coordinator"]).read_text())).resume


def test_only_what_failed_or_was_stopped_is_resumed(runs: Runs, flower: FakeFlower) -> None:
    app = begin(runs, flower)
    with pytest.raises(ConfigError, match="is running"):
        runs.resume("one")
    app.finish_round(1)
    app.end("succeeded", validation=METRICS)
    with pytest.raises(ConfigError, match="is succeeded"):
        runs.resume("one")
    with pytest.raises(ConfigError, match="no run 'two'; the latest are one"):
        runs.resume("two")


def test_a_damaged_summary_does_not_stop_the_watch(runs: Runs, flower: FakeFlower) -> None:
    app = begin(runs, flower)
    app.folder.summary.write_text("{")
    flower.statuses[1] = "finished:failed"
    assert state(runs)[0] == "failed"


def test_events_stand_in_the_log_once_and_sites_are_seen(runs: Runs, flower: FakeFlower) -> None:
    runs.registry.sync_sites({"north": "SHA256:x"})
    app = begin(runs, flower)
    app.begin_round(1)
    state(runs)
    app.finish_round(1)
    state(runs)
    texts = [event.text for event in runs.registry.events("one")]
    assert texts.count("round 1 began with 2 sites") == 1
    assert texts.count("north answered for training after 1.5 s") == 1
    assert runs.registry.sites()[0].last_seen is not None


def test_the_pages_watch_does_not_close_what_is_being_resumed(
    runs: Runs, flower: FakeFlower, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = begin(runs, flower)
    app.finish_round(1)
    app.end("failed", error="round 2: no")
    assert state(runs)[0] == "failed"
    flower.meanwhile = runs.reconcile
    monkeypatch.setattr("pneumofed.server.runs.status.HANDOVER_SEC", 0.5)
    time.sleep(0.6)  # long after the first submission
    assert runs.resume("one").state == "submitted"


def test_a_run_that_was_never_handed_over_is_closed(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.registry.add_run("one", ExperimentConfig().model_dump_json(), Path("/no/such/folder"))
    assert state(runs)[0] == "submitted"
    monkeypatch.setattr("pneumofed.server.runs.status.HANDOVER_SEC", 0.0)
    assert "never handed to Flower" in state(runs)[1]


def test_asking_to_resume_shortens_the_patience_with_a_silent_process(runs: Runs, flower: FakeFlower) -> None:
    app = begin(runs, flower)
    old = time.time() - 30
    os.utime(app.folder.path / "heartbeat", (old, old))
    assert state(runs)[0] == "running"
    assert runs.resume("one").state == "submitted"
    assert flower.statuses[1] == "finished:stopped"


@pytest.mark.parametrize("status", ["succeeded", "failed"])
def test_whoever_looks_writes_the_report_of_a_run_that_ended(runs: Runs, flower: FakeFlower, status: str) -> None:
    app = begin(runs, flower)
    app.finish_round(1)
    state(runs)
    runs.write_reports()
    assert not app.folder.report.exists()  # it goes on
    app.end(status, validation=METRICS, error="round 2: south was lost")
    assert state(runs)[0] == status
    runs.write_reports()
    written = app.folder.report.stat().st_mtime_ns
    runs.write_reports()
    assert app.folder.report.stat().st_mtime_ns == written


def test_a_resumed_run_gets_a_new_report_when_it_ends(runs: Runs, flower: FakeFlower) -> None:
    app = begin(runs, flower)
    app.finish_round(1)
    app.end("failed", error="round 2: south was lost")
    state(runs)
    runs.write_reports()
    assert 'class="badge failed"' in app.folder.report.read_text()
    runs.resume("one")
    runs.write_reports()
    assert 'class="badge failed"' in app.folder.report.read_text()  # the last one stays until there is another
    app.begin()
    app.finish_round(2)
    app.end("succeeded", validation=METRICS)
    assert state(runs)[0] == "succeeded"
    runs.write_reports()
    assert 'class="badge succeeded"' in app.folder.report.read_text()


def test_a_report_that_fails_is_logged_once_and_leaves_the_run_as_it_is(
    runs: Runs, flower: FakeFlower, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app = begin(runs, flower)
    app.finish_round(1)
    app.end("succeeded", validation=METRICS)

    def fail(_: Path) -> Path:
        raise OSError("the disk is full")

    monkeypatch.setattr("pneumofed.server.report.report.write_report", fail)
    assert state(runs)[0] == "succeeded"
    runs.write_reports()
    runs.write_reports()
    assert len([record for record in caplog.records if "could not be written" in record.message]) == 1
    assert state(runs)[0] == "succeeded"
    monkeypatch.undo()
    runs.write_reports()  # the process that failed does not try for ever
    assert not app.folder.report.exists()
    again = Runs(runs.folder, runs.registry, flower, lambda: APP_HASH)
    again.write_reports()
    assert app.folder.report.exists()


def test_a_run_without_a_folder_gets_no_report(runs: Runs, flower: FakeFlower) -> None:
    flower.down = True
    with pytest.raises(FlowerError):
        runs.submit("one", ExperimentConfig())
    runs.write_reports()
    assert not (runs.folder.runs / "one" / "report.html").exists()
