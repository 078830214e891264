"""Features are what the classifier sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.compute import build_compute
from common.config import ModelConfig, ModelName
from common.data.dataset import Dataset
from common.data.report import DataReport
from common.features import compute_features
from common.inference import predict
from common.models import build_model, classifier_of


def draw_dataset(images: int) -> Dataset:
    pixels = np.random.default_rng(0).integers(0, 256, (images, 32, 32)).astype(np.uint8)
    names = tuple(str(number) for number in range(images))
    return Dataset(pixels, np.zeros(images, dtype=np.int64), names, names, DataReport())


@pytest.mark.parametrize("name", ["scattering", "small_cnn", "resnet18"])
def test_the_classifier_of_the_features_is_the_network(name: ModelName) -> None:
    cfg, data, compute = ModelConfig(name=name, scattering_scale=2), draw_dataset(5), build_compute("cpu", "fp32")
    model = build_model(cfg, "binary", 0)
    features = compute_features(model, data, compute, cfg.in_channels, batch_size=2)
    assert features.shape == (5, classifier_of(model).in_features) and features.dtype == np.float32
    logits = classifier_of(model)(torch.from_numpy(features)).detach().double()
    np.testing.assert_allclose(torch.softmax(logits, 1).numpy(), predict(model, data, compute, 1, 5), atol=1e-5)
    assert not classifier_of(model)._forward_pre_hooks
