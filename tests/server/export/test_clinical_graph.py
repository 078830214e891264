"""The ONNX graph of a network with clinical values is the network: with values, with some, and with none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.reader import build_config
from pneumofed.common.model_bundle.predictor import CLINICAL_INPUT, graph_inputs, open_session
from pneumofed.common.models.build import build_model
from pneumofed.common.models.fusion import ClinicalNetwork
from pneumofed.server.export.graph import export_onnx, exported_form, quantize_onnx, run_torch

COLUMNS = [
    {"name": "temperature", "unit": "°C", "low": 34, "high": 43},
    {"name": "symptoms", "kind": "codes", "codes": ["fever", "cough"]},
]
NAN = np.nan
VALUES = np.array([[38.5, 1, 0], [NAN, 0, 1], [36.0, NAN, NAN]], np.float32)


def network_of(fusion: str) -> ClinicalNetwork:
    experiment = build_config(
        ExperimentConfig, {"model": {"name": "small_cnn"}, "clinical": {"columns": COLUMNS, "fusion": fusion}}
    )
    network = build_model(experiment.model, "binary", seed=0).eval()
    assert isinstance(network, ClinicalNetwork)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def images() -> np.ndarray:
    return np.random.default_rng(0).random((3, 1, 32, 32), dtype=np.float32)


@pytest.mark.parametrize("fusion", ["concatenate", "film"])
def test_the_activation_map_is_the_derivative_by_the_images_features(fusion: str) -> None:
    network = network_of(fusion)
    outputs = exported_form(network, 1)(torch.from_numpy(images()), torch.from_numpy(VALUES))
    logits, features, activations, cam = outputs
    torch.testing.assert_close(activations.mean(dim=(2, 3)), features)
    leaf = features.detach().requires_grad_()
    again = network.head(network.fusion(leaf, torch.from_numpy(VALUES)))
    torch.testing.assert_close(again, logits)
    (slope,) = torch.autograd.grad((again[:, 1] - again[:, 0]).sum(), leaf)
    torch.testing.assert_close(cam, (activations * slope[:, :, None, None]).sum(dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["concatenate", "film"])
def test_the_graph_is_the_network_and_int8_leaves_the_values_alone(fusion: str, tmp_path: Path) -> None:
    network = network_of(fusion)
    export_onnx(network, 1, 32, tmp_path / "model.onnx")
    session = open_session((tmp_path / "model.onnx").read_bytes())
    for rows in (slice(0, 3), slice(1, 2)):
        for values in (VALUES[rows], None):
            found = session.run(None, graph_inputs(session, images()[rows], values))
            for one, other in zip(found, run_torch(network, 1, images()[rows], values), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    quantize_onnx(tmp_path / "model.onnx", tmp_path / "int8.onnx", iter([images()]))
    graph, reached = onnx.load(str(tmp_path / "int8.onnx")).graph, {CLINICAL_INPUT}
    for node in graph.node:
        if reached.intersection(node.input):
            reached.update(node.output)
            assert node.op_type not in ("QuantizeLinear", "DequantizeLinear")
    coarse = open_session((tmp_path / "int8.onnx").read_bytes())
    exact, rough = (one.run(["logits"], graph_inputs(one, images(), VALUES))[0] for one in (session, coarse))
    assert np.abs(exact - rough).max() < 0.2 * max(1.0, np.abs(exact).max())
