"""A whole simulation, from phantoms to report, with both engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pneumofed.common.errors import CheckpointError, ConfigError, DataError
from pneumofed.server.runs.checkpoints import read_checkpoint
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.runs.summary_records import RunSummary
from pneumofed.simulation.phantoms.phantom import write_phantoms
from pneumofed.simulation.plan import EngineName, Plan, build_plan
from pneumofed.simulation.runner import run_simulation
from pneumofed.simulation.superlink import Resources
from tests.tiny import there

SMALL: dict[str, Any] = {
    "rounds": 2,
    "image": {"size_px": 32},
    "model": {"name": "small_cnn"},
    "training": {"precision": "fp32"},
    "evaluation": {"bootstrap_samples": 20},
}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder / "set", patients=24, seed=0, size_px=64)
    return folder / "set"


def run(
    out: Path,
    data: Path,
    *,
    engine: EngineName = "local",
    resume: bool = False,
    baselines: bool = False,
    hospitals: int = 2,
    workers: int = 1,
    slow: dict[str, float] | None = None,
    **changes: Any,
) -> RunSummary:
    virtual = {"data": str(data), "external": str(data / "external"), "hospitals": hospitals, "device": "cpu", "partition": "iid"}
    virtual |= {"slow": slow or {}}
    built = build_plan(out, {**SMALL, **changes}, virtual, resume=resume)
    return run_simulation(
        Plan(*built, out, Resources(hospitals), engine, resume, baselines, workers),
        lambda _: None,
    )


def final_weights(out: Path) -> np.ndarray:
    return read_checkpoint(RunFolder(out).last_checkpoint).arrays.parameters


def test_flower_and_the_local_engine_give_the_same_weights_bit_for_bit(tmp_path: Path, phantoms: Path) -> None:
    flower = run(tmp_path / "flower", phantoms, engine="flower")
    run(tmp_path / "local", phantoms)
    assert flower.status == "succeeded"
    np.testing.assert_array_equal(final_weights(tmp_path / "flower"), final_weights(tmp_path / "local"))


@pytest.mark.parametrize("precision", ["float32", *(pytest.param(name, marks=pytest.mark.slow) for name in ("float16", "int8"))])
def test_workers_give_the_same_weights_bit_for_bit(tmp_path: Path, phantoms: Path, precision: str) -> None:
    strategy = {"update_precision": precision}
    run(tmp_path / "one", phantoms, hospitals=3, strategy=strategy)
    run(tmp_path / "two", phantoms, hospitals=3, workers=2, strategy=strategy)
    np.testing.assert_array_equal(final_weights(tmp_path / "one"), final_weights(tmp_path / "two"))


@pytest.mark.slow
@pytest.mark.parametrize("other", [{"workers": 3}, {"engine": "flower"}])
def test_asynchronous_rounds_repeat_bit_for_bit_on_any_engine(tmp_path: Path, phantoms: Path, other: dict[str, Any]) -> None:
    """The virtual clock says whose update is next, whichever comes first."""
    asked: dict[str, Any] = {"hospitals": 3, "rounds": 4, "strategy": {"buffer": 2}, "slow": {"hospital-00": 2.5}}
    run(tmp_path / "one", phantoms, **asked)
    run(tmp_path / "other", phantoms, **asked, **other)
    np.testing.assert_array_equal(final_weights(tmp_path / "one"), final_weights(tmp_path / "other"))
    lines = [RunFolder(tmp_path / name).read_history() for name in ("one", "other")]
    assert [line.staleness for line in lines[0]] == [line.staleness for line in lines[1]]
    assert any(line.stale for line in lines[0])


def test_a_simulation_with_a_slow_hospital_knows_it_by_name_and_keeps_it(tmp_path: Path, phantoms: Path) -> None:
    with pytest.raises(ConfigError, match="hospital-07 is no hospital; there are hospital-00, hospital-01"):
        run(tmp_path / "unknown", phantoms, slow={"hospital-07": 10.0})
    with pytest.raises(ConfigError, match=r"enough_sites closes rounds as real replies come.*take strategy\.buffer"):
        run(tmp_path / "real", phantoms, slow={"hospital-00": 10.0}, strategy={"enough_sites": 1})
    run(tmp_path / "run", phantoms, slow={"hospital-00": 10.0}, rounds=1)
    assert RunFolder(tmp_path / "run").read_history()[0].simulated_time == 10.0
    assert yaml.safe_load((tmp_path / "run" / "simulation.yaml").read_text())["slow"] == {"hospital-00": 10.0}


def test_virtual_hospitals_sum_in_secret_with_keys_of_their_own(tmp_path: Path, phantoms: Path) -> None:
    summary = run(tmp_path, phantoms, hospitals=3, rounds=1, secure_aggregation={"enabled": True})
    line = RunFolder(tmp_path).read_history()[0]
    assert summary.status == "succeeded"
    assert there(line.secure_sum).summed == ("hospital-00", "hospital-01", "hospital-02")
    assert there(there(line.secure_sum).images) > 0


@pytest.mark.slow
def test_secure_sums_in_flower_and_in_the_local_engine_are_equal_bit_for_bit(tmp_path: Path, phantoms: Path) -> None:
    """Any actor may serve any hospital in any step: what a site must remember is in its folder."""
    run(tmp_path / "flower", phantoms, engine="flower", hospitals=3, secure_aggregation={"enabled": True})
    for workers in (1, 2):
        out = tmp_path / f"local-{workers}"
        run(out, phantoms, hospitals=3, workers=workers, secure_aggregation={"enabled": True})
        np.testing.assert_array_equal(final_weights(tmp_path / "flower"), final_weights(out))


def test_a_run_leaves_what_scripts_rely_on(tmp_path: Path, phantoms: Path) -> None:
    run(tmp_path, phantoms, baselines=True)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["rounds_completed"], summary["phantom"]) == ("succeeded", 2, True)
    for central_set in ("test", "external"):
        for metric in ("auroc", "accuracy", "sensitivity", "specificity", "brier", "ece"):
            assert {"value", "low", "high"} <= set(summary[central_set][metric])
    assert summary["seconds"] > 0
    assert summary["bytes"]["total"] == summary["bytes"]["up"] + summary["bytes"]["down"] > 0
    assert summary["baselines"]["pooled"]["test"]["auroc"]["value"] is not None
    assert set(summary["baselines"]["alone"]) == {"hospital-00", "hospital-01"}
    assert set(summary["baselines"]["lead"]["test"]) == {
        "best_alone",
        "over_pooled",
        "over_best_alone",
        "over_alone",
        "simultaneous",
    }
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 2
    for name in (
        "report.html",
        "config.yaml",
        "environment.json",
        "checkpoints/best.pt",
        "checkpoints/last.pt",
        "predictions/test.csv",
    ):
        assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize("ema_decay", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_the_baseline_of_one_hospital_is_the_federation_of_one(tmp_path: Path, phantoms: Path, ema_decay: float) -> None:
    """Both start from the same weights, and the generators take in the same site's name."""
    summary = run(tmp_path, phantoms, hospitals=1, baselines=True, strategy={"ema_decay": ema_decay})
    alone = there(summary.baselines).alone["hospital-00"]
    assert alone.central("test")["auroc"] == summary.central("test")["auroc"]
    assert alone.threshold == summary.threshold


def test_a_resumed_simulation_equals_one_never_stopped(tmp_path: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pneumofed.server.federation.run

    run(tmp_path / "whole", phantoms)
    real = pneumofed.server.federation.run._keep_round

    def interrupt(*arguments: Any) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(pneumofed.server.federation.run, "_keep_round", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", phantoms)
    summary = json.loads((tmp_path / "broken" / "summary.json").read_text())
    assert (summary["status"], summary["rounds_completed"]) == ("stopped", 1)
    assert (tmp_path / "broken" / "report.html").exists()
    monkeypatch.undo()
    assert run(tmp_path / "broken", phantoms, resume=True).status == "succeeded"
    np.testing.assert_array_equal(final_weights(tmp_path / "whole"), final_weights(tmp_path / "broken"))


def test_a_report_that_cannot_be_written_is_logged_and_fails_no_run(
    tmp_path: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Path) -> Path:
        raise ValueError("no figure")

    monkeypatch.setattr("pneumofed.server.report.report.write_report", fail)
    assert run(tmp_path, phantoms, rounds=1).status == "succeeded"
    assert "pneumofed report" in caplog.text
    assert not (tmp_path / "report.html").exists()


def test_a_run_that_fails_has_a_report(tmp_path: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise DataError("round 1: the disk is full")

    monkeypatch.setattr("pneumofed.server.federation.run._keep_round", fail)
    with pytest.raises(DataError):
        run(tmp_path, phantoms)
    assert 'class="badge failed"' in (tmp_path / "report.html").read_text()


def test_resume_needs_no_other_option_and_refuses_other_hospitals(tmp_path: Path, phantoms: Path) -> None:
    run(tmp_path, phantoms)
    experiment, simulation = build_plan(tmp_path, {}, {}, resume=True)
    assert experiment == RunFolder(tmp_path).read_config()
    assert simulation.hospitals == 2
    with pytest.raises((ConfigError, CheckpointError), match="hospitals"):
        run(tmp_path, phantoms, resume=True, hospitals=3)


def test_a_second_run_does_not_overwrite_the_first(tmp_path: Path, phantoms: Path) -> None:
    run(tmp_path, phantoms)
    before = (tmp_path / "summary.json").read_bytes()
    with pytest.raises(CheckpointError, match="--resume"):
        run(tmp_path, phantoms)
    assert (tmp_path / "summary.json").read_bytes() == before


def test_more_hospitals_than_patients_tells_both_numbers(tmp_path: Path, phantoms: Path) -> None:
    with pytest.raises(ConfigError, match="100"):
        run(tmp_path, phantoms, hospitals=100)


def test_hospitals_that_differ_are_judged_on_every_set_by_its_name(tmp_path: Path, phantoms: Path) -> None:
    write_phantoms(tmp_path / "other", patients=16, seed=1, size_px=64)
    virtual = {
        "data": str(phantoms),
        "hospitals": 2,
        "partition": "iid",
        "sources": {"adults": str(tmp_path / "other" / "train")},
        "hold_out": {"adults": 0.4},
        "held_out": {"elsewhere": str(phantoms / "external")},
        "device": "cpu",
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**SMALL, "rounds": 1, "simulation": virtual}))
    built = build_plan(tmp_path / "run", {}, {}, config_file=tmp_path / "study.yaml")
    plan = Plan(*built, run_dir=tmp_path / "run", resources=Resources(3), engine="local", baselines=True)
    summary = run_simulation(plan, lambda _: None)
    assert set(summary.sites) == {"adults", "hospital-00", "hospital-01"}
    assert set(summary.results) == {"test", "adults", "elsewhere"}
    assert summary.baselines is not None
    assert set(summary.baselines.lead["elsewhere"].over_alone) == set(summary.sites)
    (line,) = RunFolder(tmp_path / "run").read_history()
    assert set(line.held_out) == {"adults", "elsewhere"}
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "adults set" in page and "What each hospital gains" in page
    with pytest.raises(CheckpointError, match="already"):
        run_simulation(plan, lambda _: None)


def test_no_data_folder_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        run(tmp_path / "run", tmp_path / "nowhere")


def test_krum_over_two_hospitals_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs 3 replies"):
        build_plan(tmp_path, {"strategy": {"name": "krum"}}, {"hospitals": 2})


def test_a_client_larger_than_the_machine_is_refused_before_it_hangs() -> None:
    with pytest.raises(ConfigError, match="CPUs"):
        Resources(nodes=1, client_cpus=10_000).check()


def test_every_hospital_behind_its_own_scanner_runs_to_the_end(tmp_path: Path, phantoms: Path) -> None:
    virtual = {"data": str(phantoms), "hospitals": 2, "partition": "scanner", "device": "cpu"}
    built = build_plan(tmp_path, {**SMALL, "rounds": 1}, virtual)
    summary = run_simulation(Plan(*built, run_dir=tmp_path, resources=Resources(2), engine="local"), lambda _: None)
    assert summary.status == "succeeded"
    assert "external" not in summary.results
