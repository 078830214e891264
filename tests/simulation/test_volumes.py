"""CT volumes the whole way: phantoms, hospitals, rounds, a bundle, answers; and whether a map in three dimensions points at the lesion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom

import pneumofed
from pneumofed.client.federation.training import RoundPlan, build_setup, train_locally
from pneumofed.common.config.experiment import AugmentationConfig
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.data.manifest import DataReport
from pneumofed.common.imaging.augment import to_model_input
from pneumofed.common.models.build import build_model
from pneumofed.common.models.compute import build_compute
from pneumofed.common.models.features import predict_probabilities
from pneumofed.common.wire.keys import read_private_key
from pneumofed.inference.explain.cam import volume_map
from pneumofed.server.export.export import ExportPlan, export_run, release_key
from pneumofed.server.report.read_run import read_run
from pneumofed.server.runs.checkpoints import read_checkpoint
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.runs.summary_records import RunSummary
from pneumofed.simulation.phantoms.clinical import PHANTOM_SCHEMA
from pneumofed.simulation.plan import SimulationRequest, plan_simulation
from pneumofed.simulation.runner import run_simulation
from tests.tiny import there, tiny_experiment


def simulate(out: Path, hospitals: int = 2, **settings: Any) -> RunSummary:
    request = SimulationRequest(
        config=Path("ct"), phantoms=24, hospitals=hospitals, partition="iid", rounds=1, engine="local", workers=1, out=out,
        settings={"image": {"size_px": 32, "slices": 8}, "evaluation": {"bootstrap_samples": 20}, **settings},
    )  # fmt: skip
    return run_simulation(plan_simulation(request), lambda _: None)


@pytest.mark.slow
def test_hospitals_train_on_volumes_and_the_bundle_judges_a_series(tmp_path: Path) -> None:
    summary = simulate(tmp_path / "run")
    assert (summary.status, summary.phantom, set(summary.results)) == ("succeeded", True, {"test", "external"})
    report = (tmp_path / "run" / "report.html").read_text()
    assert "CT of the chest" in report
    assert "seen from the front" in report
    key = read_private_key(release_key(tmp_path / "run"))
    export_run(ExportPlan(tmp_path / "run", tmp_path / "bundle", key))
    model = pneumofed.open_bundle(tmp_path / "bundle", threads=1)
    assert model.manifest.preprocessing.slices == 8
    assert "8 axial slices of 32 x 32 pixels" in model.card
    assert "seen from the front" in model.card
    series = sorted(path for path in (tmp_path / "run" / "phantoms" / "test").glob("*/*"))
    answers = model.predict(series)
    assert len(answers) >= 6
    assert {answer.status for answer in answers} <= {"judged", "cannot judge"}
    assert any(answer.status == "judged" for answer in answers)


@pytest.mark.slow
def test_volumes_train_privately(tmp_path: Path) -> None:
    private = {"mechanism": "dp_sgd", "noise_multiplier": 1.0, "expected_batch_size": 4, "physical_batch_size": 2}
    settings: dict[str, Any] = {
        "model": {"norm": "group"}, "privacy": private, "loss": {"logit_adjustment": False},
    }  # fmt: skip
    summary = simulate(tmp_path / "private", **settings)
    assert summary.status == "succeeded"
    spent = read_run(tmp_path / "private").history[-1].epsilons
    assert len(spent) == 2
    assert min(spent.values()) > 0


@pytest.mark.slow
def test_a_secure_sum_over_volumes_is_the_plain_mean_to_the_stated_error(tmp_path: Path) -> None:
    found, records = {}, {}
    secret: dict[str, Any] = {"secure_aggregation": {"enabled": True}}
    common: dict[str, Any] = {"image": {"size_px": 64, "slices": 8}, "training": {"batch_size": 2}}
    for name, changes in {"secret": secret, "plain": {"strategy": {"weight_by": "hospitals"}}}.items():
        simulate(tmp_path / name, hospitals=3, **common, **changes)
        found[name] = read_checkpoint(RunFolder(tmp_path / name).last_checkpoint).arrays
        records[name] = RunFolder(tmp_path / name).read_history()[0]
    summed = there(records["secret"].secure_sum)
    assert summed.summed == ("hospital-00", "hospital-01", "hospital-02") and summed.clipped == 0
    assert summed.images == sum(there(there(site.train).num_examples) for site in records["plain"].sites.values())
    bound = there(summed.error_bound) + 1e-7  # of float32 besides
    assert bound < 1e-6  # one step of the optimizer moves a weight by 5e-4
    assert np.abs(found["secret"].parameters - found["plain"].parameters).max() <= bound
    np.testing.assert_allclose(found["secret"].statistics, found["plain"].statistics, atol=1e-4)
    assert there(records["secret"].validation).n == there(records["plain"].validation).n


@pytest.mark.slow
def test_volumes_train_beside_clinical_values_and_are_exported_so(tmp_path: Path) -> None:
    summary = simulate(tmp_path / "run", clinical=PHANTOM_SCHEMA.model_dump(mode="json"))
    assert summary.status == "succeeded"
    export_run(ExportPlan(tmp_path / "run", tmp_path / "bundle", read_private_key(release_key(tmp_path / "run"))))
    model = pneumofed.open_bundle(tmp_path / "bundle", threads=1)
    assert model.takes_volumes and model.clinical is not None
    series = sorted((tmp_path / "run" / "phantoms" / "test").glob("*/*"))
    answers = model.predict(series, [{"temperature": 39.0, "cough": True}] * len(series))
    judged = [one for one in answers if one.status == "judged"]
    assert judged and all(one.image_only is not None for one in judged)


def draw_balls(count: int, seed: int) -> tuple[Dataset, np.ndarray]:
    """Grey noise, in every second volume with a brighter ball; and the ball's middle, int64 [count, 3]."""
    generator = np.random.default_rng(seed)
    places = np.stack([generator.integers(low, high, count) for low, high in ((3, 13), (8, 56), (8, 56))], axis=1)
    volumes = generator.normal(80.0, 12.0, (count, 16, 64, 64))
    z, y, x = np.ogrid[:16, :64, :64]
    for number, (slice_, row, column) in enumerate(places):
        if number % 2:
            volumes[number] += 110.0 * (((z - slice_) / 2.5) ** 2 + ((y - row) / 5.0) ** 2 + ((x - column) / 5.0) ** 2 < 1.0)
    names = tuple(map(str, range(count)))
    pixels = np.clip(volumes, 0, 255).astype(np.uint8)
    return Dataset(pixels, (np.arange(count) % 2).astype(np.int64), names, names, DataReport()), places


@pytest.mark.slow
def test_a_map_in_three_dimensions_points_at_the_lesion_more_often_than_chance() -> None:
    """The pointing game (Zhang et al. 2018, section 4.1), with half a cell's tolerance in the plane and a slice along the axis."""
    experiment = tiny_experiment(
        rounds=5,
        image={"slices": 16, "size_px": 64},
        model={"name": "resnet18_slices"},
        augmentation=dict.fromkeys(AugmentationConfig.model_fields, 0.0),
        training={"batch_size": 8, "learning_rate": 1e-3},
    )
    (train, _), (test, places), compute = draw_balls(64, 0), draw_balls(40, 1), build_compute("cpu", "fp32", threads=1)
    network = build_model(experiment.model, experiment.task, 0)
    for number in range(1, experiment.rounds + 1):
        plan = RoundPlan(experiment, number, "site")
        train_locally(build_setup(network, [32, 32], plan, compute), train, plan)
    network.eval()
    sure = predict_probabilities(network, test, compute, 1, 64)[:, 1]
    assert np.median(sure[1::2]) > sure[::2].max()  # else there is nothing to point at
    reach = np.array([3, 13, 13])
    hits = 0
    for row in range(1, 40, 2):
        volume = to_model_input(torch.from_numpy(np.array(test.pixels[row : row + 1])))
        found = volume_map(network, volume, detail="finer-layer")
        hits += bool((np.abs(np.array(found.peak()) - places[row]) <= reach).all())
    chance = float(np.prod((2 * reach + 1) / np.array([16, 64, 64])))
    assert binom.sf(hits - 1, 20, chance) < 0.01, f"{hits} of 20, by chance {20 * chance:.1f}"
