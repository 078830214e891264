"""Tracked simulations and sweeps: the run is the same with and without, and what is chosen on validation stays so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from pneumofed.cli.main import app
from pneumofed.common.ops.processes import free_port
from pneumofed.runs import simulate
from pneumofed.server.runs.checkpoints import read_checkpoint
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.tracking.targets import read_targets, tracking_file
from pneumofed.simulation.sweep import plan_sweep, run_sweep
from tests.server.tracking.mlflow_servers import FakeMlflow, fake_runs, fake_server
from tests.simulation.test_sweep import silent, study

SMALL = {
    "model.name": "small_cnn",
    "evaluation.bootstrap_samples": 20,
    "training.precision": "fp32",
    "training.batch_size": 8,
}


def run_small(out: Path, rounds: int = 2, track: str | Sequence[str] = ()) -> RunFolder:
    small: dict[str, Any] = {"phantoms": 24, "hospitals": 2, "image_size": 32, "partition": "iid", "workers": 1}
    simulate(rounds=rounds, set=SMALL, out=out, track=track, **small)
    return RunFolder(out)


def test_a_run_with_a_dead_server_is_the_run_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = run_small(tmp_path / "plain")
    tracked = run_small(tmp_path / "tracked", track=f"mlflow:http://127.0.0.1:{free_port()}")
    weights = [read_checkpoint(folder.last_checkpoint).arrays.parameters for folder in (plain, tracked)]
    assert np.array_equal(weights[0], weights[1])
    lines = [[line.without("seconds", "sites").to_json() for line in folder.read_history()] for folder in (plain, tracked)]
    assert lines[0] == lines[1] and tracked.has_succeeded
    assert capsys.readouterr().err.count("tracking:") == 1
    assert not tracking_file(plain.path).exists()


@pytest.mark.slow
def test_a_simulation_is_tracked_with_its_results_and_its_app_bundle(tmp_path: Path) -> None:
    server = FakeMlflow()
    with fake_server(server) as address:
        folder = run_small(tmp_path / "run", 1, track=[f"mlflow:{address}"])
        simulate(resume=True, baselines=True, out=folder.path)
    (kept,) = fake_runs(server)
    summary = folder.read_summary()
    external = summary.central("external")["auroc"]
    found = [kept.read(f"final/external/auroc{end}") for end in ("", "_low", "_high")]
    assert found == [[(1, value)] for value in (external.value, external.low, external.high)]
    assert kept.read("baseline/pooled/external/auroc")[0][0] == 1 and kept.read("round/completed") == [(1, 1.0)]
    assert (kept.status, kept.tags["pneumofed.kind"], kept.tags["pneumofed.images"]) == ("FINISHED", "simulation", "drawn")
    assert len(kept.tags["pneumofed.app_bundle"]) == 64 and kept.params["simulation.hospitals"] == "2"
    assert kept.read("site/hospital-00/train_loss")[0][0] == 1


@pytest.mark.slow
def test_a_sweep_is_a_group_of_runs_whose_held_out_results_stay_closed_until_the_choice(tmp_path: Path) -> None:
    server, out = FakeMlflow(), tmp_path / "sweep"
    with fake_server(server) as address:
        targets = read_targets([f"mlflow:{address}"])
        run_sweep(plan_sweep(study(seeds=[0]), out, workers=1), silent)  # the first time nobody thought of it
        table = run_sweep(plan_sweep(study(seeds=[0]), out, workers=1, track=targets), silent)
        run_sweep(plan_sweep(study(seeds=[0]), out, workers=1), silent)  # and now it is remembered
    above, *members = sorted(fake_runs(server), key=lambda run: run.name != "sweep")
    assert sorted(run.name for run in members) == [f"strategy.name={name}/seed-0" for name in ("fedavg", "fedexp")]
    assert len({run.tags["mlflow.parentRunId"] for run in members}) == 1
    assert not [name for run in members for name in run.metrics if "external" in name or "test" in name]
    assert all(run.read("round/completed") == [(1, 1.0)] and run.status == "FINISHED" for run in members)
    assert above.tags["pneumofed.chosen"] == table.chosen and above.status == "FINISHED"
    assert above.read("final/external/auroc") == [(0, table.held_out["external"].mean)]


def test_a_wrong_target_ends_the_command_before_anything_is_drawn(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["simulate", "--phantoms", "24", "--out", str(tmp_path / "run"), "--track", "mlflow:here"])
    assert done.exit_code != 0 and "http://" in str(done.exception) and not (tmp_path / "run").exists()
