"""A sweep: every setting and seed once, whatever interrupts it; the choice on validation, the held-out sets closed until the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import ttest_1samp
from typer.testing import CliRunner

import pneumofed.simulation.runner as runner
from pneumofed.cli.main import app
from pneumofed.common.errors import ConfigError, DataError
from pneumofed.server.runs.folder import RunFolder, best_round
from pneumofed.simulation.plan import Plan
from pneumofed.simulation.sweep import Spread, SweepConfig, plan_sweep, read_sweep, run_sweep
from tests.tiny import there

STUDY: dict[str, Any] = {
    "simulation": {"phantom_patients": 24, "hospitals": 2, "partition": "iid"},
    "settings": {
        "rounds": 1,
        "image": {"size_px": 32},
        "model": {"name": "small_cnn"},
        "training": {"precision": "fp32"},
        "evaluation": {"bootstrap_samples": 20},
    },
    "grid": {"strategy.name": ["fedavg", "fedexp"]},
    "seeds": [0, 1],
}


def study(**changes: Any) -> SweepConfig:
    return SweepConfig.model_validate({**STUDY, **changes})


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that were begun, by folder; the simulation itself is the real one."""
    names: list[str] = []
    real = runner.run_simulation

    def counted(plan: Plan, *more: Any) -> Any:
        names.append(f"{plan.run_dir.parent.name}/{plan.run_dir.name}")
        return real(plan, *more)

    monkeypatch.setattr(runner, "run_simulation", counted)
    return names


def silent(_: str) -> None:
    """Says nothing."""


def test_a_sweep_that_was_stopped_goes_on_and_opens_the_held_out_sets_of_the_choice_at_the_end(
    tmp_path: Path, begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = runner.run_simulation

    def stopped_at_the_third(plan: Plan, *more: Any) -> Any:
        if len(begun) == 2:
            raise KeyboardInterrupt
        return counted(plan, *more)

    monkeypatch.setattr(runner, "run_simulation", stopped_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(plan_sweep(study(), tmp_path, workers=1), silent)
    so_far = json.loads((tmp_path / "sweep.json").read_text())
    assert (so_far["done"], so_far["runs"]) == (2, 4) and not {"chosen", "held_out"} & so_far.keys()
    assert "test" not in json.dumps(so_far)

    monkeypatch.setattr(runner, "run_simulation", counted)
    table = run_sweep(plan_sweep(study(), tmp_path, workers=1), silent)
    names = ["strategy.name=fedavg", "strategy.name=fedexp"]
    assert begun == [f"{name}/seed-{seed}" for seed in (0, 1) for name in names]
    areas = {}
    for name in names:
        history = [RunFolder(tmp_path / name / f"seed-{seed}").read_history() for seed in (0, 1)]
        areas[name] = [there(there(lines[best_round(lines) - 1].validation).auroc) for lines in history]
    best = max(names, key=lambda name: float(np.mean(areas[name])))
    assert table.chosen == best and table.settings[best].validation == Spread.of(areas[best])
    summaries = [RunFolder(tmp_path / best / f"seed-{seed}").read_summary() for seed in (0, 1)]
    test = [there(summary.results["test"]["auroc"].value) for summary in summaries]
    assert table.held_out["test"] == Spread.of(test)
    assert run_sweep(plan_sweep(study(), tmp_path, workers=1), silent) == table and len(begun) == 4


def test_a_run_that_fails_is_named_and_the_others_go_on(
    tmp_path: Path, begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = runner.run_simulation

    def one_fails(plan: Plan, *more: Any) -> Any:
        if plan.experiment.strategy.name == "fedavg":
            raise DataError("the disk is gone")
        return counted(plan, *more)

    monkeypatch.setattr(runner, "run_simulation", one_fails)
    table = run_sweep(plan_sweep(study(seeds=[0]), tmp_path, workers=1), silent)
    assert "0" in table.settings["strategy.name=fedavg"].failed and table.chosen is None and not table.held_out
    assert begun == ["strategy.name=fedexp/seed-0"]


def test_every_combination_is_a_setting_and_seeds_come_first(tmp_path: Path) -> None:
    grid = {"strategy.name": ["fedavg", "fedexp"], "simulation.alpha": [0.1, 0.5], "training.learning_rate": [1e-3]}
    plan = plan_sweep(study(grid=grid), tmp_path)
    assert len(plan.runs) == 8 and [run.seed for run in plan.runs] == [0] * 4 + [1] * 4
    first = plan.runs[0]
    assert first.setting == "strategy.name=fedavg+simulation.alpha=0.1+training.learning_rate=0.001"
    assert first.request.alpha == 0.1 and first.request.settings["training"]["precision"] == "fp32"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"grid": {"strategy.nam": ["fedavg"]}}, "did you mean 'name'"),
        ({"grid": {"strategy.name": ["fedaverage"]}}, "strategy.name"),
        ({"grid": {"strategy.name": ["fedavg", "fedavg"]}}, "a value stands twice"),
        ({"grid": {"seed": [0, 1]}}, "seeds stand under `seeds`"),
        ({"grid": {"simulation.hospital": [2]}}, "simulation.hospital: unknown key"),
        ({"simulation": {"data": "/nowhere"}}, "/nowhere"),
    ],
)
def test_what_is_wrong_is_told_before_the_first_run(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises((ConfigError, DataError)) as caught:
        plan_sweep(study(**changes), tmp_path)
    assert told in str(caught.value) and not list(tmp_path.iterdir())


def test_a_folder_with_another_studys_run_is_refused(tmp_path: Path) -> None:
    run_sweep(plan_sweep(study(seeds=[0], grid={}), tmp_path, workers=1), silent)
    with pytest.raises(ConfigError, match=r"holds a run of other settings: image\.size_px was 32, now 48"):
        plan_sweep(study(seeds=[0], grid={}, settings={**STUDY["settings"], "image": {"size_px": 48}}), tmp_path)


def test_an_empty_list_of_values_or_seeds_is_refused(tmp_path: Path) -> None:
    wrong: dict[str, Any]
    for wrong in ({"grid": {"strategy.name": []}}, {"seeds": []}, {"sedes": [1]}):
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(wrong))
        with pytest.raises(ConfigError, match=r"study\.yaml"):
            read_sweep(tmp_path / "study.yaml")


def test_the_interval_over_seeds_is_students() -> None:
    values = [0.91, 0.93, 0.96]
    low, high = ttest_1samp(values, 0.0).confidence_interval()
    assert Spread.of(values).to_json() == pytest.approx({"mean": np.mean(values), "low": low, "high": high, "seeds": 3})
    assert Spread.of([0.9]).low is None


@pytest.mark.slow
def test_the_command_prints_the_table_and_the_choice(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**STUDY, "grid": {}}))
    told = CliRunner().invoke(
        app, ["sweep", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out"), "--workers", "1", "-q"]
    )
    assert told.exit_code == 0, told.output
    assert "chosen on validation: only" in told.stdout and "test: AUROC" in told.stdout and "over 2 seeds" in told.stdout
