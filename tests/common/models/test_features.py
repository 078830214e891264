"""Features are what the classifier sees; kept ones are those computed anew, whatever became of the files."""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

from pneumofed.common.config.choices import ModelName
from pneumofed.common.config.experiment import ModelConfig
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.data.manifest import DataReport
from pneumofed.common.models import features as module
from pneumofed.common.models.build import build_model, classifier_of
from pneumofed.common.models.compute import build_compute
from pneumofed.common.models.features import (
    compute_features,
    has_fixed_body,
    load_features,
    predict_cached,
    predict_probabilities,
)
from tests.tiny import tiny_experiment

CFG = ModelConfig(name="small_cnn", norm="group", freeze="head_only")
CPU = build_compute("cpu", "fp32")


def draw_dataset(images: int, seed: int = 0) -> Dataset:
    pixels = np.random.default_rng(seed).integers(0, 256, (images, 32, 32)).astype(np.uint8)
    names = tuple(str(number) for number in range(images))
    return Dataset(pixels, np.zeros(images, dtype=np.int64), names, names, DataReport())


def draw_model(cfg: ModelConfig = CFG, seed: int = 0) -> torch.nn.Module:
    model = build_model(cfg, "binary", seed)
    with torch.no_grad():
        classifier_of(model).weight.normal_()
    return model


def kept(cache: Path) -> list[Path]:
    return sorted((cache / "features").glob("*.features"))


@pytest.mark.parametrize("name", ["scattering", "small_cnn", "resnet18"])
def test_the_classifier_of_the_features_is_the_network(name: ModelName) -> None:
    cfg, data = ModelConfig(name=name, scattering_scale=2), draw_dataset(5)
    model = draw_model(cfg)
    features = compute_features(model, data, CPU, cfg.in_channels)
    assert features.shape == (5, classifier_of(model).in_features) and features.dtype == np.float32
    logits = classifier_of(model)(torch.from_numpy(features)).detach().double()
    np.testing.assert_allclose(torch.softmax(logits, 1).numpy(), predict_probabilities(model, data, CPU, 1, 5), atol=1e-5)
    assert not classifier_of(model)._forward_pre_hooks


@pytest.mark.parametrize("name", ["scattering", "small_cnn"])
def test_a_network_is_judged_alike_with_features_and_with_images(tmp_path: Path, name: ModelName) -> None:
    experiment = tiny_experiment(model={"name": name, "freeze": "head_only"}, evaluation={"batch_size": 7})
    data, model = draw_dataset(70), draw_model(experiment.model)
    direct = predict_probabilities(model, data, CPU, 1, 7)
    for _ in range(2):
        np.testing.assert_allclose(predict_cached(model, data, CPU, experiment, tmp_path), direct, atol=1e-6, rtol=0)
    assert len(kept(tmp_path)) == 1


def test_only_a_body_that_no_round_changes_is_fixed() -> None:
    for cfg, fixed in (
        (ModelConfig(name="scattering"), True),
        (CFG, True),
        (ModelConfig(name="small_cnn"), False),
        (ModelConfig(name="small_cnn", freeze="last_block"), False),
        (ModelConfig(name="small_cnn", head_first_rounds=1), False),
    ):
        assert has_fixed_body(build_model(cfg, "binary", 0), cfg) is fixed


def test_what_features_depend_on_has_another_file_and_the_classifier_has_not(tmp_path: Path) -> None:
    model, data = draw_model(), draw_dataset(3)
    first = load_features(model, data, CPU, CFG, tmp_path)
    with torch.no_grad():
        classifier_of(model).weight.add_(1.0)
    np.testing.assert_array_equal(load_features(model, data, CPU, CFG, tmp_path), first)
    assert len(kept(tmp_path)) == 1
    others = (
        load_features(draw_model(seed=1), data, CPU, CFG, tmp_path),
        load_features(model, draw_dataset(3, seed=1), CPU, CFG, tmp_path),
        load_features(model, data, build_compute("cpu", "bf16"), CFG, tmp_path),
    )
    assert len(kept(tmp_path)) == 4
    assert not any(np.array_equal(other, first) for other in others)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "longer"])
def test_a_damaged_file_is_computed_again(tmp_path: Path, damage: str) -> None:
    model, data = draw_model(), draw_dataset(3)
    first = np.array(load_features(model, data, CPU, CFG, tmp_path))
    (file,) = kept(tmp_path)
    content = file.read_bytes()
    flipped = bytes([content[0] ^ 1]) + content[1:]
    file.write_bytes({"cut": content[:-40], "flipped": flipped, "empty": b"", "longer": content + b"1"}[damage])
    np.testing.assert_array_equal(load_features(model, data, CPU, CFG, tmp_path), first)
    assert file.read_bytes() == content


def test_files_are_the_owners_alone_and_the_oldest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FEATURE_FILES", 2)
    for seed in range(4):
        load_features(draw_model(), draw_dataset(2, seed), CPU, CFG, tmp_path)
    assert len(kept(tmp_path)) == 2
    assert {file.stat().st_mode & 0o777 for file in [*kept(tmp_path)]} == {0o600}
    assert (tmp_path / "features").stat().st_mode & 0o777 == 0o700


def test_a_full_disk_costs_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=0))
    model, data = draw_model(), draw_dataset(3)
    np.testing.assert_array_equal(load_features(model, data, CPU, CFG, tmp_path), compute_features(model, data, CPU, 1))
    assert not kept(tmp_path)


def _load(cache: Path) -> float:
    torch.set_num_threads(1)
    return float(load_features(draw_model(), draw_dataset(40), CPU, CFG, cache).sum())


@pytest.mark.slow
def test_two_processes_may_ask_at_once(tmp_path: Path) -> None:
    with get_context("spawn").Pool(2) as pool:
        sums = pool.map(_load, [tmp_path] * 4)
    assert len(set(sums)) == 1 and len(kept(tmp_path)) == 1
