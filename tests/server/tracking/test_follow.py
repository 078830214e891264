"""Following a run: a target that is dead, hangs or is slow costs one warning and a limited time, and changes nothing of the run."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import pneumofed.server.tracking.follow as follow
import pneumofed.server.tracking.process as process
from pneumofed.cli.main import app as pneumofed
from pneumofed.common.errors import ConfigError
from pneumofed.common.ops.processes import free_port
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.runs.records import Metrics, SiteRound, SiteTraining
from pneumofed.server.tracking.facts import MARKER, MAX_SITES, gather_facts, round_numbers
from pneumofed.server.tracking.follow import following
from pneumofed.server.tracking.process import follow_to_end, follower_daemon, send_all, start_follower, stop_followers
from pneumofed.server.tracking.targets import Tracking, read_targets, register, tracking_file
from tests.server.tracking.mlflow_servers import FakeMlflow, fake_runs
from tests.server.tracking.tracked_runs import append_line, begin_run, succeed
from tests.tiny import there


def mlflow_at(address: str) -> Tracking:
    return Tracking(read_targets([f"mlflow:{address}"]))


def test_a_dead_server_is_one_warning_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "RETRY_SEC", 0.0)
    monkeypatch.setattr(follow, "LOOK_SEC", 0.05)
    app, said = begin_run(tmp_path / "run"), list[str]()
    started = time.monotonic()
    with following(app.folder, mlflow_at(f"http://127.0.0.1:{free_port()}"), said.append):
        for number in (1, 2, 3):
            app.finish_round(number)
            time.sleep(0.2)
    assert time.monotonic() - started < 5.0
    (warning,) = said
    assert "does not answer" in warning and f"pneumofed track {app.folder.path}" in warning and "goes on" in warning


def test_a_hanging_server_holds_no_round_up_and_the_end_for_a_limited_time(
    tmp_path: Path, fake: tuple[FakeMlflow, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "END_SEC", 1.0)
    server, address = fake
    server.hangs = threading.Event()
    app, said = begin_run(tmp_path / "run"), list[str]()
    with following(app.folder, mlflow_at(address), said.append):
        deadline = time.monotonic() + 20
        while not server.calls and time.monotonic() < deadline:  # from here on it hangs
            time.sleep(0.01)
        started = time.monotonic()
        for number in (1, 2, 3):
            app.finish_round(number)
        rounds = time.monotonic() - started
        succeed(app)
        ended = time.monotonic()
    assert rounds < 1.0 and 1.0 <= time.monotonic() - ended < 3.0
    (warning,) = said
    assert "has not taken the end of the run in time" in warning
    server.hangs.set()
    server.hangs = None
    send_all(app.folder, Tracking())
    kept = fake_runs(server)[0]
    assert kept.read(MARKER) == [(1, 1.0), (2, 2.0), (3, 3.0)] and len(server.runs) == 1


def test_a_server_that_comes_back_gets_everything(
    tmp_path: Path, fake: tuple[FakeMlflow, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "RETRY_SEC", 0.2)
    monkeypatch.setattr(follow, "LOOK_SEC", 0.05)
    server, address = fake
    server.status = 500
    app, said = begin_run(tmp_path / "run"), list[str]()
    with following(app.folder, mlflow_at(address), said.append):
        app.finish_round(1)
        time.sleep(0.7)
        server.status = 0
        app.finish_round(2)
        succeed(app)
    assert fake_runs(server)[0].read(MARKER) == [(1, 1.0), (2, 2.0)]
    assert len(said) == 2 and "refuses (500 INTERNAL_ERROR)" in said[0] and "has all of the run now" in said[1]


def test_a_round_whose_checkpoint_is_missing_waits_since_a_resume_repeats_it(
    tmp_path: Path, fake: tuple[FakeMlflow, str]
) -> None:
    server, address = fake
    app = begin_run(tmp_path / "run")
    app.finish_round(1)
    append_line(app, 2)  # and here the process dies
    send_all(app.folder, mlflow_at(address))
    assert fake_runs(server)[0].read(MARKER) == [(1, 1.0)]
    app.folder.keep_history_until(1)
    app.finish_round(2)
    app.end("succeeded", rounds_completed=2)
    send_all(app.folder, Tracking())
    assert fake_runs(server)[0].read("validation/auroc") == [(1, 0.9), (2, 0.9)]


def test_whatever_a_target_raises_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("secret path /data/DOE^JANE")

    monkeypatch.setattr(follow, "open_destination", broken)
    app, said = begin_run(tmp_path / "run"), list[str]()
    with following(app.folder, mlflow_at("http://127.0.0.1:1"), said.append):
        app.finish_round(1)
    assert len(said) == 1 and "RuntimeError" in said[0] and "DOE" not in said[0]


def test_a_damaged_file_about_tracking_is_a_warning_too(tmp_path: Path) -> None:
    app, said = begin_run(tmp_path / "run"), list[str]()
    tracking_file(app.folder.path).write_text("{")
    with following(app.folder, Tracking(), said.append):
        app.finish_round(1)
    assert len(said) == 1 and "is not tracked" in said[0]
    with pytest.raises(RuntimeError, match="the run's own"), following(app.folder, Tracking(), said.append):
        raise RuntimeError("the run's own")


def test_two_processes_never_track_one_run_at_once(tmp_path: Path, fake: tuple[FakeMlflow, str]) -> None:
    app, said = begin_run(tmp_path / "run"), list[str]()
    app.finish_round(1)
    with following(app.folder, mlflow_at(fake[1]), said.append):
        with pytest.raises(ConfigError, match="it is tracked there until the run is over"):
            send_all(app.folder, Tracking())
        with following(app.folder, Tracking(), said.append):
            app.finish_round(2)
        assert len(said) == 1 and "leaves it to that one" in said[0]
    assert fake_runs(fake[0])[0].read(MARKER) == [(1, 1.0), (2, 2.0)]


def test_a_run_that_nobody_tracks_is_not_written_to(tmp_path: Path) -> None:
    before = threading.active_count()
    with following(RunFolder(tmp_path / "run"), Tracking()):
        assert threading.active_count() == before
    assert not (tmp_path / "run").exists()


def test_a_run_is_followed_to_its_end_and_no_longer(
    tmp_path: Path, fake: tuple[FakeMlflow, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "QUIET_SEC", 0.5)
    server, address = fake
    app = begin_run(tmp_path / "run")

    def play() -> None:
        for number in (1, 2):
            app.finish_round(number)
            time.sleep(0.2)
        succeed(app)

    player = threading.Thread(target=play)
    player.start()
    assert follow_to_end(app.folder, mlflow_at(address), every_sec=0.05)
    player.join()
    kept = fake_runs(server)[0]
    assert (kept.status, kept.read(MARKER), kept.read("final/test/auroc")) == ("FINISHED", [(1, 1.0), (2, 2.0)], [(2, 0.9)])


def test_a_run_without_a_sign_of_life_is_left(
    tmp_path: Path, fake: tuple[FakeMlflow, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "SILENT_SEC", 0.3)
    app = begin_run(tmp_path / "run")
    assert not follow_to_end(app.folder, mlflow_at(fake[1]), every_sec=0.05)


def test_the_coordinators_follower_is_a_process_that_ends_with_the_run_and_knows_the_password_by_its_environment(
    tmp_path: Path, fake: tuple[FakeMlflow, str]
) -> None:
    server, address = fake
    app = begin_run(tmp_path / "run")
    tracking = mlflow_at(address.replace("//", "//ann:hunter2@"))
    daemon = there(start_follower("run", app.folder.path, tracking, tmp_path))
    pid = there(daemon.pid())
    app.finish_round(1)
    _until(lambda: bool(server.runs) and fake_runs(server)[0].read(MARKER) == [(1, 1.0)], 60)
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    assert b"hunter2" not in command and b"pneumofed.server.tracking.process" in command
    succeed(app)
    _until(lambda: daemon.pid() is None, 60)
    assert fake_runs(server)[0].status == "FINISHED" and "the run is over" in daemon.log.read_text()
    assert "hunter2" not in daemon.log.read_text()


def test_all_followers_are_stopped_with_the_coordinator_and_send_what_there_is(
    tmp_path: Path, fake: tuple[FakeMlflow, str]
) -> None:
    server, address = fake
    app = begin_run(tmp_path / "run")
    app.finish_round(1)
    daemon = there(start_follower("run", app.folder.path, mlflow_at(address), tmp_path))
    _until(lambda: bool(server.runs), 60)
    app.end("stopped")
    stop_followers(tmp_path)
    assert daemon.pid() is None and fake_runs(server)[0].status == "KILLED"
    assert start_follower("other", tmp_path / "untracked", Tracking(), tmp_path) is None
    assert follower_daemon("other", tmp_path).pid() is None


def test_the_command_sends_an_old_run_and_says_where_it_is(tmp_path: Path, fake: tuple[FakeMlflow, str]) -> None:
    app = begin_run(tmp_path / "run")
    app.finish_round(1)
    succeed(app)
    done = CliRunner().invoke(pneumofed, ["track", str(app.folder.path), "--to", f"mlflow:{fake[1]}"])
    assert done.exit_code == 0 and done.output == f"tracked at mlflow:{fake[1]}\n"
    again = CliRunner().invoke(pneumofed, ["track", str(app.folder.path)])
    assert again.exit_code == 0 and fake_runs(fake[0])[0].read(MARKER) == [(1, 1.0)]


@pytest.mark.parametrize(("arguments", "sentence"), [([], "name a target with --to"), (["--to", "mlflow:x"], "http://")])
def test_the_command_says_what_is_missing(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    app = begin_run(tmp_path / "run")
    done = CliRunner().invoke(pneumofed, ["track", str(app.folder.path), *arguments])
    assert isinstance(done.exception, ConfigError) and sentence in str(done.exception)
    with pytest.raises(ConfigError, match="no run folder"):
        send_all(RunFolder(tmp_path), mlflow_at("http://127.0.0.1:1"))
    assert not tracking_file(tmp_path).exists()


def test_no_path_no_sentence_and_no_invented_name_of_a_site_is_among_the_facts(tmp_path: Path) -> None:
    app = begin_run(tmp_path / "run", model={"weights": "/data/DOE^JANE/weights.pt"})
    invented = SiteTraining.of(30, {"train_loss": 0.5, "DOE^JANE": 1.0})
    trouble = {"failures": {"south": "DOE^JANE"}, "absent": {"x": "DOE^JANE"}}
    append_line(app, 1, sites={"north": SiteRound(train=invented)}, **trouble)
    app.folder.last_checkpoint.write_bytes(b"weights")
    assert "DOE" in app.folder.history.read_text()
    app.end("failed", error="/data/DOE^JANE is missing", subgroups={"test": {"sex": {"n": 1}}})
    (app.folder.path / "simulation.yaml").write_text("data: /data/DOE^JANE\nhospitals: 3\n")
    facts = there(gather_facts(app.folder, there(register(app.folder.path, mlflow_at("http://127.0.0.1:1")))))
    assert facts.rounds[0].numbers["site/north/train_loss"] == 0.5 and facts.rounds[0].numbers["round/failures"] == 1
    assert facts.params["simulation.hospitals"] == "3" and facts.params["model.weights"] == "weights.pt"
    assert "DOE" not in repr(facts) and str(tmp_path) not in repr(facts) and not [n for n in facts.final if "sex" in n]


def test_a_round_of_a_thousand_sites_is_a_few_numbers(tmp_path: Path) -> None:
    app = begin_run(tmp_path / "run")
    app.finish_round(1, tuple(f"site-{number}" for number in range(MAX_SITES + 1)))
    (line,) = app.folder.read_history()
    numbers = round_numbers(line.updated(validation=Metrics(auroc=0.9)))
    assert len(numbers) < 50 and numbers["round/sites_trained"] == MAX_SITES + 1 and list(numbers)[-1] == MARKER


def test_the_command_line_loads_no_client_of_any_target() -> None:
    import subprocess

    code = "import sys, pneumofed.cli.main; print({'httpx', 'tensorboard', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


def _until(holds: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)
