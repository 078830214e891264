"""Training on features gives the weights that training on images gives, and is chosen only where it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pneumofed.client.federation.training import RoundPlan, TrainingSetup, build_setup, choose_examples, train_locally
from pneumofed.common.config.experiment import AugmentationConfig, ExperimentConfig
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.models.build import build_model, classifier_of
from pneumofed.common.models.compute import Precision, build_compute
from pneumofed.common.models.features import FeatureSet
from pneumofed.common.wire.parameter_layout import ArraysLayout
from tests.client.federation.test_training import tiny_data
from tests.tiny import TinyFederation, tiny_experiment

OFF: dict[str, Any] = dict.fromkeys(AugmentationConfig.model_fields, 0.0)
PRIVATE: dict[str, Any] = {
    "loss": {"logit_adjustment": False},
    "privacy": {"mechanism": "dp_sgd", "unit": "image", "noise_multiplier": 1.0, "expected_batch_size": 8, "accountant": "rdp"},
}


def experiment_of(name: str, norm: str = "group", **changes: Any) -> ExperimentConfig:
    model = {"name": name, "norm": norm, "freeze": "none" if name == "scattering" else "head_only"}
    return tiny_experiment(model=model, augmentation=OFF, **changes)


def build(experiment: ExperimentConfig, data: Dataset, precision: Precision) -> tuple[TrainingSetup, RoundPlan]:
    from pneumofed.client.privacy.dp_sgd import PrivateRound, build_private_setup
    from pneumofed.client.privacy.plan import SitePlan

    model, plan, compute = (
        build_model(experiment.model, "binary", 1),
        RoundPlan(experiment, 1, "site"),
        build_compute("cpu", precision),
    )
    if experiment.privacy.mechanism == "none":
        return build_setup(model, [10, 10], plan, compute), plan
    private = PrivateRound.of(SitePlan.of(experiment, len(data), len(data)), data, b"k" * 32, secure=False)
    return build_private_setup(model, private, plan, compute), plan


def trained(experiment: ExperimentConfig, cache: Path | None, precision: Precision = "fp32") -> np.ndarray:
    data = tiny_data(20)
    setup, plan = build(experiment, data, precision)
    examples = choose_examples(setup.model, data, plan, setup.compute, cache) if cache else data
    assert isinstance(examples, FeatureSet) == bool(cache)
    train_locally(setup, examples, plan)
    return ArraysLayout.of(setup.model).flatten(setup.model)[0]


@pytest.mark.parametrize("private", [{}, PRIVATE], ids=["plain", "private"])
@pytest.mark.parametrize(("name", "tolerance"), [("scattering", 0.0), ("small_cnn", 1e-5)])
def test_features_give_the_weights_that_images_give(tmp_path: Path, name: str, tolerance: float, private: dict[str, Any]) -> None:
    """Bit for bit where the body treats each image by itself; convolutions round otherwise with another number of rows."""
    experiment = experiment_of(name, **private)
    with_images, first, again = (trained(experiment, cache) for cache in (None, tmp_path, tmp_path))
    np.testing.assert_allclose(first, with_images, atol=tolerance, rtol=0)
    np.testing.assert_array_equal(first, again)


def test_features_of_a_body_with_dropout_and_skipped_blocks_do_too(tmp_path: Path) -> None:
    experiment = experiment_of("efficientnet_lite0")
    np.testing.assert_allclose(trained(experiment, tmp_path), trained(experiment, None), atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_private_head_trains_on_features_of_such_a_body(tmp_path: Path, norm: str) -> None:
    """The noise's key depends on every bit of the gradient, which another number of rows rounds otherwise: it repeats by itself."""
    experiment = experiment_of("efficientnet_lite0", norm, **PRIVATE)
    first, again = (trained(experiment, tmp_path) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    untrained = ArraysLayout.of(model := build_model(experiment.model, "binary", 1)).flatten(model)[0]
    assert 0 < np.count_nonzero(first != untrained) <= sum(parameter.numel() for parameter in classifier_of(model).parameters())


def test_private_training_leaves_the_statistics_of_a_frozen_body_as_they_came() -> None:
    experiment, data = experiment_of("efficientnet_lite0", "batch", **PRIVATE), tiny_data(20)
    setup, plan = build(experiment, data, "fp32")
    layout = ArraysLayout.of(setup.model)
    before = layout.flatten(setup.model)[1].copy()
    train_locally(setup, data, plan)  # on the images, which run through the whole network
    assert before.size and np.array_equal(layout.flatten(setup.model)[1], before)


def test_in_bfloat16_too(tmp_path: Path) -> None:
    experiment = experiment_of("scattering")
    np.testing.assert_array_equal(trained(experiment, tmp_path, "bf16"), trained(experiment, None, "bf16"))


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ({"name": "scattering"}, {"augmentation": {**OFF, "contrast": 0.1}}),
        ({"name": "small_cnn"}, {}),
        ({"name": "small_cnn", "freeze": "last_block"}, {}),
        ({"name": "small_cnn", "head_first_rounds": 1}, {}),
        ({"name": "efficientnet_lite0", "freeze": "last_block"}, {}),
        ({"name": "scattering"}, {"training": {"early_fraction": 0.5}, "image": {"size_px": 64}}),
    ],
    ids=["augmentation", "no freeze", "last block", "two phases", "dropout that learns", "smaller images"],
)
def test_images_are_taken_where_features_would_be_others(tmp_path: Path, model: dict[str, Any], changes: dict[str, Any]) -> None:
    experiment = tiny_experiment(**{"augmentation": OFF, "model": model, **changes})
    data, compute = tiny_data(2), build_compute("cpu", "fp32")
    plan = RoundPlan(experiment, 1, "site")
    assert choose_examples(build_model(experiment.model, "binary", 0), data, plan, compute, tmp_path) is data
    assert not [*tmp_path.iterdir()]


def test_a_federation_computes_features_once_at_each_party(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path, sites=2)
    federation.run("run", experiment_of("scattering", **PRIVATE))
    files = {str(path.relative_to(tmp_path).parent.parent): path for path in tmp_path.rglob("features/*.features")}
    assert len([*tmp_path.rglob("features/*.features")]) == 5  # training and validation images of each site, the test images
    assert set(files) == {"sites/site-0/cache", "sites/site-1/cache", "run/cache/test"}
