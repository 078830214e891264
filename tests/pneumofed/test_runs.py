"""Runs as a user of the API makes and opens them: one path with the command, the command's keys, the project's errors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import pneumofed
from pneumofed.cli.main import app
from pneumofed.runs import flatten, unfold
from pneumofed.server.runs.checkpoints import read_checkpoint
from pneumofed.server.runs.folder import RunFolder
from pneumofed.simulation.phantoms.phantom import write_phantoms
from pneumofed.simulation.plan import SimulationRequest, demo_request, plan_simulation
from tests.server.export.finished_run import write_finished_run

TINY: dict[str, Any] = {
    "model.name": "small_cnn",
    "training.precision": "fp32",
    "training": {"batch_size": 8},
    "evaluation.bootstrap_samples": 20,
}
KEYS: dict[str, Any] = {
    "workers": 1,
    "hospitals": 2,
    "rounds": 2,
    "partition": "iid",
    "image_size": 32,
    "phantoms": 24,
    "set": TINY,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pneumofed.Run:
    return pneumofed.simulate(out=tmp_path_factory.mktemp("runs") / "run", **{**KEYS, "workers": None})


def refused(**keys: Any) -> str:
    with pytest.raises(pneumofed.PneumofedError) as caught:
        pneumofed.simulate(**keys)
    return str(caught.value)


def test_a_run_holds_what_it_left(run: pneumofed.Run) -> None:
    assert run.status == "succeeded" and run.folder.is_absolute()
    assert run.summary["rounds_completed"] == 2 and run.summary["phantom"] is True
    assert run.config["training"]["batch_size"] == 8 and run.config["model"]["name"] == "small_cnn"
    assert run.report.read_text().startswith("<!")


def test_the_history_is_a_flat_row_for_each_round(run: pneumofed.Run) -> None:
    assert [row["round"] for row in run.history] == [1, 2]
    for row in run.history:
        assert not any(isinstance(value, dict) for value in row.values())
        assert 0 <= row["test.auroc"] <= 1 and row["seconds.total"] > 0 and row["drawn"] == ["hospital-00", "hospital-01"]


def test_progress_is_reported_round_by_round(tmp_path: Path) -> None:
    told: list[str] = []
    rounds_seen: list[int] = []

    def say(text: str) -> None:
        told.append(text)
        if text.startswith("round"):
            rounds_seen.append(len(RunFolder(tmp_path / "run").read_history()))

    pneumofed.simulate(out=tmp_path / "run", progress=say, **KEYS)
    assert [text.split()[1] for text in told if text.startswith("round")] == ["1/2", "2/2"]
    assert rounds_seen == [1, 2]


def test_the_command_and_the_function_are_one_path(run: pneumofed.Run, tmp_path: Path) -> None:
    command = ["simulate", "--hospitals", "2", "--rounds", "2", "--partition", "iid", "--image-size", "32", "--phantoms", "24"]
    settings = {
        "model.name": "small_cnn",
        "training.precision": "fp32",
        "training.batch_size": 8,
        "evaluation.bootstrap_samples": 20,
    }
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    done = CliRunner().invoke(app, [*command, "--workers", "1", "--out", str(tmp_path / "run"), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["run_folder"] == str(tmp_path / "run") and told["status"] == "succeeded"
    assert "round   2/2" in done.stderr
    other = pneumofed.open_run(tmp_path / "run")
    assert other.config == run.config
    first, second = (read_checkpoint(RunFolder(one.folder).last_checkpoint).arrays.parameters for one in (run, other))
    np.testing.assert_array_equal(first, second)


def test_the_weights_are_the_kept_model(run: pneumofed.Run) -> None:
    import torch

    kept = torch.load(run.folder / "checkpoints" / "best.pt", weights_only=True)["model"]
    found = run.weights()
    assert set(found) == set(kept)
    for name, array in found.items():
        np.testing.assert_array_equal(array, kept[name].numpy())


def test_a_folder_of_images_and_its_own_external_set(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "set", patients=24, seed=0, size_px=64)
    keys = {**KEYS, "phantoms": None, "rounds": 1}
    run = pneumofed.simulate(tmp_path / "set", external=str(tmp_path / "set" / "external"), out=str(tmp_path / "run"), **keys)
    assert {"test", "external"} <= set(run.summary) and not (run.folder / "phantoms").exists()


def test_the_session_keeps_its_threads_and_its_seeds(tmp_path: Path) -> None:
    import torch

    torch.set_num_threads(2)
    try:
        state = torch.random.get_rng_state()
        pneumofed.simulate(out=tmp_path / "run", **{**KEYS, "rounds": 1})
        assert torch.get_num_threads() == 2 and torch.equal(torch.random.get_rng_state(), state)
    finally:
        torch.set_num_threads(1)


@pytest.mark.slow
def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    def stop(text: str) -> None:
        if text.startswith("round   1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pneumofed.simulate(out=tmp_path / "run", progress=stop, **KEYS)
    assert pneumofed.open_run(tmp_path / "run").status == "stopped"
    assert pneumofed.simulate(out=tmp_path / "run", resume=True).status == "succeeded"


def test_runs_lie_below_runs_and_the_newest_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = plan_simulation(SimulationRequest()).run_dir
    first.mkdir(parents=True)
    assert plan_simulation(SimulationRequest()).run_dir != first and first.parent == Path("runs")
    assert "no run below" in refused(resume=True)


def test_export_gives_an_opened_bundle(tmp_path: Path) -> None:
    run = pneumofed.open_run(write_finished_run(tmp_path / "run", patients=24).path)
    told: list[str] = []
    bundle = run.export(progress=told.append)
    assert bundle.bundle.folder == run.folder / "bundle" and (run.folder / "bundle.zip").is_file()
    assert told and bundle.manifest.card.phantom
    with pytest.raises(pneumofed.PneumofedError, match="never overwritten"):
        run.export()


def test_a_run_that_did_not_succeed_is_not_exported(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("rounds: 1\n")
    with pytest.raises(pneumofed.PneumofedError, match="no run that succeeded"):
        pneumofed.open_run(tmp_path).export()
    assert not (tmp_path / "keys").exists()


def test_a_folder_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(pneumofed.PneumofedError, match="no run folder"):
        pneumofed.open_run(tmp_path)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"hospital": 4}, "hospital: unknown key; did you mean 'hospitals'?"),
        ({"learning_rate": 1e-3}, "set={'training.learning_rate'"),
        ({"set": {"trainng.batch_size": 3}}, "did you mean 'training'?"),
        ({"set": {"training": {"learning_rat": 3}}}, "did you mean 'learning_rate'?"),
        ({"set": {"rounds": 2, "rounds.x": 3}}, "rounds"),
        ({"set": ["rounds=3"]}, "expected a dictionary"),
        ({"partition": "dirichlt"}, "did you mean 'dirichlet'?"),
        ({"strategy": "fedpox"}, "did you mean 'fedprox'?"),
        ({"engine": "flwr"}, "engine: expected flower or local"),
        ({"engine": "local", "gpus": 0.5}, "engine: shares of a GPU and Ray clusters are of Flower's engine"),
        ({"engine": "flower", "workers": 2}, "workers: they are of the local engine"),
        ({"hospitals": 0}, "hospitals"),
        ({"rounds": 0}, "rounds"),
        ({"data": "/nowhere"}, "/nowhere"),
        ({"data": "/nowhere", "phantoms": 20}, "leave out data or phantoms"),
        ({"config": "none.yaml"}, "does not exist"),
        ({"strategy": "krum", "hospitals": 2}, "needs 3 replies"),
    ],
)
def test_a_wrong_key_is_answered_as_the_command_answers(
    keys: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told in refused(**keys)


def test_the_demo_asks_for_what_it_did() -> None:
    plan = plan_simulation(demo_request(Path("runs/demo")))
    assert (plan.experiment.name, plan.experiment.rounds, plan.experiment.image.size_px) == ("demo", 8, 64)
    assert (plan.experiment.strategy.wait_for_sites, plan.experiment.training.batch_size) == (3, 16)
    simulation = plan.simulation
    dealt = (simulation.hospitals, simulation.partition, simulation.alpha, simulation.phantom_patients)
    assert dealt == (3, "dirichlet", 1.0, 180)
    assert plan.baselines and plan.engine == "local" and plan.workers == min(3, os.cpu_count() or 1)


def test_nested_values_become_a_flat_row_and_back() -> None:
    nested = {"round": 1, "test": {"auroc": 0.9, "of": {"x": None}}, "failures": {}, "drawn": ["a"]}
    assert flatten(nested) == {"round": 1, "test.auroc": 0.9, "test.of.x": None, "drawn": ["a"]}
    assert unfold({"a.b": 1, "a": {"c": 2}, "d": 3}) == {"a": {"b": 1, "c": 2}, "d": 3}


def test_a_notebook_shows_the_result(run: pneumofed.Run) -> None:
    shown = run._repr_html_()
    assert "succeeded" in shown and "nothing about patients" in shown and run.report.as_uri() in shown


def test_summary_is_plain_json(run: pneumofed.Run) -> None:
    assert json.loads(json.dumps(run.summary)) == run.summary
