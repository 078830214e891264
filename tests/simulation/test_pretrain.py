"""First weights from drawn pictures: repeatable, loadable, traceable, and learnt from pictures that can be told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from pneumofed.cli.main import app
from pneumofed.common.config.experiment import ExperimentConfig, ModelConfig
from pneumofed.common.config.reader import build_config, merge
from pneumofed.common.errors import ConfigError
from pneumofed.common.models.build import build_model, classifier_of
from pneumofed.simulation.phantoms.other_images import PROCESSES, draw_process, draw_process_picture
from pneumofed.simulation.plan import PretrainSource
from pneumofed.simulation.pretrain import draw_pictures, pretrain_network

SOURCES: tuple[PretrainSource, ...] = get_args(PretrainSource)
SMALL = {
    "rounds": 1,
    "image": {"size_px": 32},
    "model": {"name": "small_cnn", "norm": "group"},
    "training": {"precision": "fp32"},
}


def experiment(**changes: Any) -> ExperimentConfig:
    return build_config(ExperimentConfig, merge(SMALL, changes))


def silent(_: str) -> None:
    pass


@pytest.mark.parametrize("source", SOURCES)
def test_a_network_starts_from_the_file_with_a_classifier_of_its_own(tmp_path: Path, source: PretrainSource) -> None:
    pretrain_network(source, experiment(), 40, tmp_path / "weights.pt", silent)
    cfg = ModelConfig(name="small_cnn", norm="group", weights=str(tmp_path / "weights.pt"))
    model, random = build_model(cfg, "binary", 3), build_model(cfg.without_weights(), "binary", 3)
    stored = torch.load(tmp_path / "weights.pt", weights_only=True)["state_dict"]
    assert stored and all(torch.equal(model.state_dict()[name], tensor) for name, tensor in stored.items())
    assert torch.equal(classifier_of(model).weight, classifier_of(random).weight)
    assert not torch.equal(model.state_dict()["stages.3.0.weight"], random.state_dict()["stages.3.0.weight"])


def test_the_file_says_what_it_was_made_from_and_the_same_again_gives_the_same(tmp_path: Path) -> None:
    told: list[str] = []
    first = pretrain_network("random-processes", experiment(rounds=2), 40, tmp_path / "a.pt", told.append)
    again = pretrain_network(
        "random-processes", experiment(rounds=2, training={"local_epochs": 3}), 40, tmp_path / "b.pt", silent
    )
    other = pretrain_network("random-processes", experiment(rounds=2, seed=1), 40, tmp_path / "c.pt", silent)
    a, b, c = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in "abc")
    assert a["provenance"] == first == again
    assert (first["source"], first["seed"], first["images"], first["epochs"]) == ("random-processes", 0, 40, 2)
    assert first["images_sha256"] != other["images_sha256"]
    assert ExperimentConfig.model_validate_json(first["experiment"]) == experiment(rounds=2, training={"local_epochs": 1})
    assert all(torch.equal(a["state_dict"][name], b["state_dict"][name]) for name in a["state_dict"])
    assert not all(torch.equal(a["state_dict"][name], c["state_dict"][name]) for name in a["state_dict"])
    assert len(told) == 2


@pytest.mark.parametrize("source", SOURCES)
def test_pictures_are_pure_in_the_seed_and_show_every_class(source: PretrainSource) -> None:
    first, again, other = (draw_pictures(source, 40, 32, seed) for seed in (0, 0, 1))
    assert first.pixels.shape == (40, 32, 32) and first.pixels.dtype == np.uint8
    assert np.array_equal(first.pixels, again.pixels) and not np.array_equal(first.pixels, other.pixels)
    assert set(first.labels) == set(range(PROCESSES if source == "random-processes" else 3))
    assert len(np.unique(first.pixels, axis=0)) == 40


def test_too_few_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"at least {PROCESSES}"):
        pretrain_network("random-processes", experiment(), PROCESSES - 1, tmp_path / "weights.pt", silent)
    assert not (tmp_path / "weights.pt").exists()


def test_a_network_of_a_classifier_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to learn"):
        pretrain_network("phantoms", experiment(model={"name": "scattering"}), 12, tmp_path / "weights.pt", silent)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 1000), st.integers(32, 80))
def test_a_process_fills_the_grey_scale_and_stays_in_it(number: int, seed: int, size_px: int) -> None:
    picture = draw_process_picture(draw_process(number, seed), size_px, np.random.default_rng(seed))
    assert picture.shape == (size_px, size_px) and picture.dtype == np.float32
    assert 0.0 <= picture.min() < 0.4 and 0.6 < picture.max() <= 1.0


def test_a_steeper_spectrum_gives_a_smoother_picture() -> None:
    def roughness(slope: float) -> float:
        process = draw_process(0, 0)
        smooth = type(process)(**{**vars(process), "slope": slope, "texture": 0.2, "smallest": 1e-4, "largest": 2e-4})
        picture = draw_process_picture(smooth, 64, np.random.default_rng(0))
        return float(np.abs(np.diff(picture, axis=0)).mean())

    assert roughness(0.5) > 1.5 * roughness(1.5)


def test_the_command_writes_the_file(tmp_path: Path) -> None:
    out = tmp_path / "weights.pt"
    arguments = [
        "pretrain",
        "--source",
        "phantoms",
        "--model",
        "small_cnn",
        "--images",
        "12",
        "--epochs",
        "1",
        "--image-size",
        "32",
    ]
    done = CliRunner().invoke(app, [*arguments, "--out", str(out), "--set", "model.norm=group"])
    assert done.exit_code == 0, done.output
    assert torch.load(out, weights_only=True)["provenance"]["source"] == "phantoms"
