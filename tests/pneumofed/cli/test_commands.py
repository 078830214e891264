"""The commands as a user types them: help, wrong words, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pneumofed.cli.main import app
from pneumofed.common.errors import ConfigError, FlowerError
from pneumofed.common.ops.processes import descendants
from pneumofed.simulation.flower_simulation import parse_run_config, read_project, read_resources

PNEUMOFED = [sys.executable, "-m", "pneumofed.cli.main"]
FLOWER_SIMULATION = [sys.executable, "-m", "pneumofed.simulation.flower_simulation"]


def call(command: list[str], *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=False, cwd=cwd)


def test_help_does_not_import_what_is_heavy() -> None:
    script = "import sys; sys.argv=['pneumofed','simulate','--help']\nfrom pneumofed.cli.main import app\n"
    script += "try:\n app()\nexcept SystemExit: pass\n"
    script += "print('HEAVY', sorted({'torch', 'flwr', 'ray', 'matplotlib', 'sklearn'} & set(sys.modules)))"
    assert "HEAVY []" in subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout


def test_a_command_ends_without_a_last_search_for_garbage() -> None:
    """Behind torch it takes more than a second; what runs behind the command's own end sees its objects set aside."""
    script = "import atexit, gc, sys; atexit.register(lambda: print('ASIDE', gc.get_freeze_count() > 0))\n"
    script += "sys.argv=['pneumofed','--help']\nfrom pneumofed.cli.main import main\nmain()"
    assert "ASIDE True" in subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["simulate", "--set", "trainng.batch_size=3"], "did you mean 'training'?"),
        (["simulate", "--data", "/nowhere", "--out", "{tmp}/run"], "/nowhere"),
        (["simulate", "--external", "/nowhere", "--out", "{tmp}/run"], "give data or hospitals too"),
        (["simulate", "--resume", "--out", "{tmp}/none"], "no simulation to resume"),
        (["simulate", "--slow", "hospital-00=ten", "--out", "{tmp}/run"], "slow: expected numbers"),
        (["simulate", "--set", "strategy.buffer=2", "--strategy", "fedexp", "--out", "{tmp}/run"], "strategy.buffer is 2 but"),
        (["simulate", "--config", "{tmp}/none.yaml"], "does not exist"),
        (["report", "{tmp}"], "no run folder"),
        (["config", "--set", "rounds"], "key=value"),
    ],
)
def test_a_wrong_word_gets_one_sentence_and_no_trace(tmp_path: Path, arguments: list[str], told: str) -> None:
    done = call(PNEUMOFED, *(argument.format(tmp=tmp_path) for argument in arguments))
    assert done.returncode in (1, 2)
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_the_version_is_told_without_a_command() -> None:
    done = call(PNEUMOFED, "--version")
    assert done.returncode == 0 and done.stdout.startswith("pneumofed 0.")


def test_config_shows_the_resolved_experiment() -> None:
    done = call(PNEUMOFED, "config", "--set", "training.learning_rate=1e-4")
    assert done.returncode == 0
    assert "learning_rate: 0.0001" in done.stdout


def test_flower_simulation_needs_a_flower_app(tmp_path: Path) -> None:
    done = call(FLOWER_SIMULATION, "--app", str(tmp_path), "--num-supernodes", "2")
    assert done.returncode == 2
    assert "no pyproject.toml" in done.stderr


def test_run_config_takes_flowers_own_forms(tmp_path: Path) -> None:
    assert parse_run_config(["rounds=3 strategy.name='fedprox'", "seed=1"]) == {
        "rounds": 3,
        "strategy.name": "fedprox",
        "seed": 1,
    }
    (tmp_path / "c.toml").write_text("rounds = 2\n[strategy]\nname = 'krum'\n")
    assert parse_run_config([str(tmp_path / "c.toml")]) == {"rounds": 2, "strategy.name": "krum"}
    with pytest.raises(ConfigError):
        parse_run_config(["name=fedprox"])


def test_backend_config_is_read_and_unknown_keys_are_refused() -> None:
    text = json.dumps(
        {"client_resources": {"num_cpus": 2, "num_gpus": 0.25}, "init_args": {"num_cpus": 4, "address": "10.0.0.1:6379"}}
    )
    resources = read_resources(3, text, verbose=False)
    assert (resources.client_cpus, resources.client_gpus, resources.cpus, resources.ray_address) == (2, 0.25, 4, "10.0.0.1:6379")
    for wrong in ("[]", "no json", '{"clients": {}}', '{"client_resources": {"num_cpu": 1}}'):
        with pytest.raises(ConfigError, match="--backend-config"):
            read_resources(3, wrong, verbose=False)


def test_a_project_without_flower_section_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    with pytest.raises(ConfigError, match=r"tool\.flwr\.app"):
        read_project(tmp_path)


OTHER_SERVER = """
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    import pathlib, time
    while len(list(grid.get_node_ids())) < 2:
        time.sleep(0.1)
    pathlib.Path(context.run_config["mark"]).write_text(str(context.run_config["value"]))
    if context.run_config["fail"]:
        raise RuntimeError("asked to fail")
"""
OTHER_PROJECT = """
[project]
name = "other"
version = "1.0.0"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "someone"
[tool.flwr.app.components]
serverapp = "other.server:app"
clientapp = "other.client:app"
[tool.flwr.app.config]
mark = ""
value = 0
fail = false
"""


def write_other_app(folder: Path) -> None:
    (folder / "other").mkdir(parents=True)
    (folder / "other" / "__init__.py").write_text("")
    (folder / "other" / "server.py").write_text(OTHER_SERVER)
    (folder / "other" / "client.py").write_text("from flwr.clientapp import ClientApp\napp = ClientApp()\n")
    (folder / "pyproject.toml").write_text(OTHER_PROJECT)


@pytest.mark.slow
def test_a_run_ends_when_what_starts_apps_has_died(tmp_path: Path) -> None:
    from pneumofed.simulation import superlink as flower

    write_other_app(tmp_path / "app")
    with flower.private_superlink(tmp_path / "log", {}) as running:
        (executor,) = [pid for pid in descendants(running.pid) if flower.EXECUTOR in flower._command_line(pid)]
        os.kill(executor, signal.SIGKILL)
        with pytest.raises(FlowerError, match="flower-superexec is not running"):
            flower.run_app(running, tmp_path / "app", {}, flower.Resources(2), None, lambda: None)


@pytest.mark.slow
def test_any_flower_app_runs_and_a_failed_run_is_an_error(tmp_path: Path) -> None:
    from pneumofed.simulation.flower_simulation import run_app_over_nodes

    write_other_app(tmp_path / "app")
    mark, resources = tmp_path / "mark", '{"client_resources": {"num_cpus": 1}}'
    run_app_over_nodes(tmp_path / "app", 2, [f"mark='{mark}' value=7"], resources, verbose=False)
    assert mark.read_text() == "7"
    with pytest.raises(FlowerError, match="failed"):
        run_app_over_nodes(tmp_path / "app", 2, [f"mark='{mark}' fail=true"], resources, verbose=False)


def test_ctrl_c_in_a_run_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pneumofed.simulation.runner.run_simulation", interrupt)
    result = CliRunner().invoke(app, ["simulate", "--out", str(tmp_path / "run")])
    assert result.exit_code == 130
    assert "no round was completed; start it again without --resume" in result.stderr.replace("\n", " ")


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_and_leaves_no_process(tmp_path: Path, sign: signal.Signals) -> None:
    arguments = [
        "simulate",
        "--hospitals",
        "2",
        "--rounds",
        "40",
        "--image-size",
        "32",
        "--set",
        "model.name=small_cnn",
        "--out",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen(
        [*PNEUMOFED, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a shell starts background jobs with SIGINT ignored, and this test may be one
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    history, deadline = tmp_path / "run" / "history.jsonl", time.monotonic() + 200
    while time.monotonic() < deadline and not (history.exists() and history.read_text().count("\n") >= 2):
        time.sleep(0.2)
    started = descendants(process.pid)
    os.kill(process.pid, sign)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert summary["rounds_completed"] >= 2
    assert "Traceback" not in output
    assert len(started) >= 3  # the process that imports once, and a worker a hospital
    assert not [pid for pid in started if pid != process.pid and Path(f"/proc/{pid}/exe").exists()]
