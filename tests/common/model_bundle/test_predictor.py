"""Predictor: the same preprocessing as training, calibrated probabilities with intervals, one verdict an image."""

from __future__ import annotations

from base64 import b64decode
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from pneumofed.common.errors import BundleError
from pneumofed.common.imaging.augment import normalize
from pneumofed.common.imaging.types import Image
from pneumofed.common.model_bundle import predictor as predictor_module
from pneumofed.common.model_bundle.bundle import Bundle
from pneumofed.common.model_bundle.predictor import Predictor, model_input
from pneumofed.common.model_bundle.suitability import Reason
from pneumofed.common.models.build import classifier_of
from pneumofed.server.export.graph import run_torch
from tests.model_bundles import PREPROCESSING, open_test_bundle, phantom_images, small_network


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return open_test_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def predictor(bundle: Bundle) -> Predictor:
    return Predictor(bundle, threads=1)


def test_the_graph_gives_what_pytorch_gives(predictor: Predictor) -> None:
    squares = np.stack([model_input(image.pixels, PREPROCESSING) for image, _ in phantom_images(6, seed=3)])[:, None]
    outputs = predictor.run(squares)
    for name, expected in zip(("logits", "features", "activations", "cam"), run_torch(small_network(), 1, squares), strict=True):
        np.testing.assert_allclose(outputs[name], expected, atol=2e-5)


def test_the_probe_of_the_processor_is_one_product_of_integers() -> None:
    x, w, y = (
        onnx.helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (
            ("x", onnx.TensorProto.UINT8, [1, 8]),
            ("w", onnx.TensorProto.INT8, [8, 1]),
            ("y", onnx.TensorProto.INT32, [1, 1]),
        )
    )
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "g", [x, w], [y])
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    assert made == onnx.load_from_string(b64decode(predictor_module._PRODUCT))


def test_a_graph_with_weights_of_8_bits_is_refused_where_the_processor_cuts_off_their_sums(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor_module, "saturates", lambda: True)
    assert Predictor(bundle, "int8", threads=1)  # made with 7 bits
    monkeypatch.setattr(predictor_module, "WEIGHT_BITS", "not there")
    with pytest.raises(BundleError, match="exported again"):
        Predictor(bundle, "int8", threads=1)
    assert Predictor(bundle, threads=1)
    monkeypatch.setattr(predictor_module, "saturates", lambda: False)
    assert Predictor(bundle, "int8", threads=1)


def test_the_weights_load_as_the_same_network(bundle: Bundle, predictor: Predictor) -> None:
    squares = np.stack([model_input(image.pixels, PREPROCESSING) for image, _ in phantom_images(2, seed=3)])[:, None]
    with torch.inference_mode():
        logits = bundle.load_network()(normalize(torch.from_numpy(squares), 1)).numpy()
    np.testing.assert_allclose(predictor.run(squares)["logits"], logits, atol=2e-5)


def test_judgements_are_calibrated_probabilities_with_intervals_and_verdicts(predictor: Predictor) -> None:
    images = phantom_images(40, seed=5)
    found = predictor.judge([image for image, _ in images])
    for judgement in found:
        predicted = judgement.prediction
        assert (predicted is None) == bool(judgement.reasons) == (judgement.verdict == "cannot judge")
        if predicted is None:
            continue
        assert 0.0 <= predicted.low <= predicted.probability <= predicted.high <= 1.0
        assert sum(predicted.classes.values()) == pytest.approx(1.0)
        assert predicted.classes["pneumonia"] == pytest.approx(predicted.probability)
        assert judgement.verdict == ("pneumonia" if predicted.probability >= judgement.threshold else "normal")
    hits = [
        (judgement.prediction.probability >= 0.5) == label
        for judgement, (_, label) in zip(found, images, strict=True)
        if judgement.prediction
    ]
    assert len(hits) > 30
    assert np.mean(hits) > 0.75  # the head did learn something: tests may rely on both verdicts


def test_a_judgement_names_its_image_and_its_model(predictor: Predictor) -> None:
    images = [image for image, _ in phantom_images(2, seed=5)]
    found = predictor.judge(images, ["/archive/DOE^JANE/1.dcm", "b"])
    assert [judgement.image for judgement in found] == ["/archive/DOE^JANE/1.dcm", "b"]
    assert "DOE" not in repr(found[0])
    assert (found[0].model, found[0].model_digest) == (predictor.manifest.name, predictor.bundle.digest)
    assert found[0].threshold == predictor.manifest.threshold.value
    assert found[0].calibrated == (predictor.manifest.calibration.method != "none")
    assert [judgement.image for judgement in predictor.judge(images)] == ["0", "1"]
    with pytest.raises(ValueError, match="a name for each of 2"):
        predictor.judge(images, ["a"])


def test_no_judgement_has_both_numbers_and_reasons(predictor: Predictor) -> None:
    judgement = predictor.judge([phantom_images(1, seed=2)[0][0]])[0]
    with pytest.raises(ValueError, match="either"):
        replace(judgement, reasons=(Reason.COLOUR,))
    with pytest.raises(ValueError, match="either"):
        replace(judgement, prediction=None)


def test_an_image_is_judged_alike_alone_and_among_others(predictor: Predictor) -> None:
    images = [image for image, _ in phantom_images(20, seed=7)]
    together, alone = predictor.judge(images)[17].prediction, predictor.judge([images[17]])[0].prediction
    assert together and alone
    assert together.probability == pytest.approx(alone.probability, abs=1e-6)


def test_the_activation_map_adds_up_to_the_score(bundle: Bundle, predictor: Predictor) -> None:
    found = predictor.judge([phantom_images(1, seed=2)[0][0]])[0].prediction
    assert found and found.activation_map is not None
    bias = classifier_of(bundle.load_network()).bias.detach().numpy()
    assert found.activation_map.mean() + bias[1] - bias[0] == pytest.approx(found.score, abs=1e-4)


def test_what_is_no_radiograph_is_not_judged(predictor: Predictor) -> None:
    image = phantom_images(1, seed=2)[0][0]
    noise = np.random.default_rng(0).random((64, 64), np.float32)
    judgement = predictor.judge([Image(noise, image.info)])[0]
    assert judgement.verdict == "cannot judge" and set(judgement.reasons) <= set(Reason)
    assert judgement.prediction is None
    assert judgement.explanation.count("; ") == len(judgement.reasons) - 1
    assert judgement.features.shape and judgement.suitability  # for the monitor, which counts refusals


def test_int8_is_close_to_float32(bundle: Bundle, predictor: Predictor) -> None:
    images = [image for image, _ in phantom_images(20, seed=9)]
    exact, coarse = predictor.judge(images), Predictor(bundle, "int8", threads=1).judge(images)
    pairs = [(first.prediction, second.prediction) for first, second in zip(exact, coarse, strict=True)]
    difference = [abs(first.probability - second.probability) for first, second in pairs if first and second]
    assert 0 < max(difference) < 0.25


def test_no_image_gives_no_judgement(predictor: Predictor) -> None:
    assert predictor.judge([]) == []


def test_prepare_keeps_256_grey_levels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).random((50, 40), np.float32)
    square = model_input(pixels, PREPROCESSING)
    assert square.dtype == np.float32 and square.shape == (32, 32)
    np.testing.assert_array_equal(np.rint(square * 255).astype(np.uint8) / np.float32(255), square)
