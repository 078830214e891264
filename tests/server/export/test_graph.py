"""The exported graph: the same numbers as PyTorch, for every network of the registry, in float32 and int8."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from pneumofed.common.config.choices import ModelName
from pneumofed.common.config.classes import LabelTask
from pneumofed.common.config.experiment import ModelConfig
from pneumofed.common.errors import BundleError
from pneumofed.common.model_bundle.predictor import open_session
from pneumofed.common.models.build import build_model, classifier_of
from pneumofed.server.export import graph
from pneumofed.server.export.graph import ExportedNetwork, export_onnx, quantize_onnx, run_torch

NAMES = get_args(ModelName)


def images(n: int, size_px: int) -> np.ndarray:
    return np.random.default_rng(0).random((n, 1, size_px, size_px), np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_features_are_the_classifiers_input_and_the_mean_of_the_activations(name: ModelName) -> None:
    network = build_model(ModelConfig(name=name), "three_class", seed=0)
    exported = ExportedNetwork(network, 1).eval()
    with torch.inference_mode():
        logits, features, *maps = exported(torch.from_numpy(images(2, 32)))
        torch.testing.assert_close(classifier_of(network)(features), logits)
    if maps:
        torch.testing.assert_close(maps[0].mean(dim=(2, 3)), features, atol=1e-5, rtol=1e-4)
    assert len(exported.outputs) == 2 + len(maps)


def test_the_activation_map_is_the_derivative_of_the_score() -> None:
    network = build_model(ModelConfig(name="small_cnn"), "three_class", seed=1)
    with torch.inference_mode():
        _, features, activations, cam = ExportedNetwork(network, 1).eval()(torch.from_numpy(images(2, 64)))
    features = features.clone().requires_grad_()
    found = classifier_of(network)(features)
    (torch.logsumexp(found[:, 1:], dim=1) - found[:, 0]).sum().backward()
    assert features.grad is not None
    torch.testing.assert_close((activations * features.grad[:, :, None, None]).sum(dim=1), cam, atol=1e-5, rtol=1e-4)


def test_no_folder_of_this_machine_is_in_the_files_that_hospitals_get(tmp_path: Path) -> None:
    export_onnx(build_model(ModelConfig(name="small_cnn"), "binary", seed=0), 1, 32, tmp_path / "model.onnx")
    quantize_onnx(tmp_path / "model.onnx", tmp_path / "model_int8.onnx", iter([images(4, 32)]))
    for name in ("model.onnx", "model_int8.onnx"):
        content = (tmp_path / name).read_bytes()
        assert not [text for text in (b'.py"', b"site-packages", b"stack_trace", str(Path.cwd()).encode()) if text in content]


@pytest.mark.slow
def test_a_network_that_cannot_be_exported_is_refused_with_the_reason_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "real_numbers", lambda _: nullcontext())  # with complex numbers, which ONNX has not
    network = build_model(ModelConfig(name="scattering"), "binary", seed=0)
    before = run_torch(network, 1, images(2, 64))
    with pytest.raises(BundleError, match=r"ScatteringLinear cannot be exported.*complex"):
        export_onnx(network, 1, 64, tmp_path / "model.onnx")
    np.testing.assert_array_equal(run_torch(network, 1, images(2, 64))[0], before[0])


def test_the_int8_graph_gives_the_same_numbers_on_processors_that_cut_off_sums_of_products(tmp_path: Path) -> None:
    """The reference computes with exact sums. With weights of 8 bits an x86 processor without VNNI is far from it."""
    network = build_model(ModelConfig(name="small_cnn"), "binary", seed=0).eval()
    export_onnx(network, 1, 32, tmp_path / "model.onnx")
    quantize_onnx(tmp_path / "model.onnx", tmp_path / "int8.onnx", iter([images(32, 32)]))
    made = onnx.load(tmp_path / "int8.onnx")
    weights = [onnx.numpy_helper.to_array(one) for one in made.graph.initializer if one.data_type == onnx.TensorProto.INT8]
    assert any(one.size > 100 for one in weights) and max(np.abs(one.astype(int)).max() for one in weights) <= 64
    exact, found = ReferenceEvaluator(made), open_session(made.SerializeToString(), threads=1)
    for mine, yours in zip(found.run(None, {"image": images(4, 32)}), exact.run(None, {"image": images(4, 32)}), strict=True):
        np.testing.assert_allclose(mine, yours, atol=0.02 * np.abs(yours).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("task", "in_channels", "norm"), [("binary", 1, "batch"), ("three_class", 3, "group")])
def test_onnx_gives_what_pytorch_gives(name: ModelName, task: LabelTask, in_channels: int, norm: str, tmp_path: Path) -> None:
    cfg = ModelConfig(name=name, in_channels=in_channels, norm=norm, weight_standardization=norm == "group")  # type: ignore[arg-type]
    network = build_model(cfg, task, seed=0).eval()
    export_onnx(network, in_channels, 64, tmp_path / "model.onnx")
    session = open_session((tmp_path / "model.onnx").read_bytes())
    for n in (1, 5):
        expected = run_torch(network, in_channels, images(n, 64))
        for mine, yours in zip(session.run(None, {"image": images(n, 64)}), expected, strict=True):
            # Random weights make more of rounding than trained ones, for which `check_graph` allows 1e-4.
            np.testing.assert_allclose(mine, yours, atol=5e-4 * max(1.0, np.abs(yours).max()))
    quantize_onnx(tmp_path / "model.onnx", tmp_path / "int8.onnx", iter([images(8, 64)]))
    coarse = open_session((tmp_path / "int8.onnx").read_bytes())
    assert [output.name for output in coarse.get_outputs()] == [output.name for output in session.get_outputs()]
    assert all(np.isfinite(output).all() for output in coarse.run(None, {"image": images(3, 64)}))


def test_activations_that_the_network_cuts_are_cut_before_they_are_rounded(tmp_path: Path) -> None:
    """ReLU6 after a convolution: 256 steps of what is left, and not of all that the convolution gives."""
    generator = np.random.default_rng(0)
    weights = {
        "first": generator.normal(0, 8, (8, 1, 3, 3)).astype(np.float32),
        "second": generator.normal(0, 0.3, (4, 8, 1, 1)).astype(np.float32),
        "zero": np.array(0, np.float32),
        "six": np.array(6, np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["image", "first"], ["wide"], pads=[1, 1, 1, 1]),
        helper.make_node("Clip", ["wide", "zero", "six"], ["cut"]),
        helper.make_node("Conv", ["cut", "second"], ["logits"]),
    ]
    made = helper.make_graph(
        nodes,
        "cut",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 4, 16, 16])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    exact, coarse = tmp_path / "model.onnx", tmp_path / "int8.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(exact))
    quantize_onnx(exact, coarse, iter([images(64, 16)]))
    graph_ = onnx.load(str(coarse)).graph
    scales = {
        one.name: float(numpy_helper.to_array(one)) for one in graph_.initializer if one.name.endswith("_scale") and not one.dims
    }
    steps = [scales[node.input[1]] for node in graph_.node if node.op_type == "QuantizeLinear"]
    assert len(steps) >= 2 and any(np.isclose(step, 6 / 255, rtol=1e-3) for step in steps)
    assert not any(node.op_type == "Clip" for node in graph_.node), "the range of the numbers does what it did"
