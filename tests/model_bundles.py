"""A small signed bundle in about a second, for the tests of all that uses bundles: a small network whose head learnt phantoms.

`make_bundle(folder)` writes it; `phantom_images(n, seed)` draws images for it. Its ONNX graph is written by hand, since torch's exporter
takes many seconds; that it computes what `ExportedNetwork` does is tested in `tests/common/model_bundle`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from pneumofed.common.config.classes import read_task
from pneumofed.common.config.experiment import ClinicalConfig, ModelConfig
from pneumofed.common.imaging.augment import GREY_MEAN, GREY_STD, normalize
from pneumofed.common.imaging.types import Image, ImageInfo
from pneumofed.common.model_bundle.bundle import Bundle, load_bundle
from pneumofed.common.model_bundle.calibration import fit_calibration, pneumonia_score
from pneumofed.common.model_bundle.image_statistics import PIXEL_STATISTICS, pixel_statistics
from pneumofed.common.model_bundle.manifest import (
    CARD,
    NETWORK,
    QUANTIZED,
    REFERENCE,
    WEIGHTS,
    BundleManifest,
    CardFacts,
    OperatingPoint,
    Preprocessing,
    Provenance,
    ReferenceSet,
)
from pneumofed.common.model_bundle.population import GroupKind, JudgedGroup, JudgedPopulation, SiteMix
from pneumofed.common.model_bundle.predictor import CLINICAL_INPUT, graph_inputs, model_input, open_session
from pneumofed.common.model_bundle.sealing import seal_bundle
from pneumofed.common.model_bundle.suitability import fit_suitability
from pneumofed.common.models.architectures import SmallCNN
from pneumofed.common.models.build import build_model
from pneumofed.common.models.fusion import ClinicalNetwork, image_state
from pneumofed.common.seeds import derive_seed
from pneumofed.common.wire.keys import NodeKey, PrivateKey, parse_private_key
from pneumofed.simulation.phantoms.phantom import draw_patients, draw_picture

SIZE_PX = 32
PREPROCESSING = Preprocessing(size_px=SIZE_PX, fit="pad", in_channels=1, mean=(GREY_MEAN,), std=(GREY_STD,))
MODEL = ModelConfig(name="small_cnn")


@lru_cache
def signing_key() -> PrivateKey:
    return parse_private_key(NodeKey.generate("coordinator").private, "test")


@lru_cache
def phantom_images(count: int, seed: int = 0, size_px: int = 64) -> tuple[tuple[Image, int], ...]:
    """`count` phantoms as `read_image` would give them, each with its label (1: pneumonia)."""
    found = []
    for patient in draw_patients("train", count, seed):
        pixels = np.ascontiguousarray(draw_picture(patient, 1, "train", seed, size_px), np.float32)
        info = ImageInfo("png", pixels.shape[0], pixels.shape[1], 8, view=patient.view)
        found.append((Image(pixels, info), int(patient.label != "normal")))
    return tuple(found)


@lru_cache
def small_network() -> nn.Module:
    """A random small network whose norms and classifier were fitted to 64 phantoms."""
    network = build_model(MODEL, "binary", derive_seed("test bundle"))
    squares, labels = _squares(64, seed=0)
    inputs = normalize(torch.from_numpy(squares[:, None]), 1)
    assert isinstance(network, SmallCNN)
    with torch.no_grad():
        network.train()
        for _ in range(20):
            network(inputs)
        network.eval()
        features = network.stages(inputs).mean(dim=(2, 3)).double()
        centre = features.mean(dim=0)
        targets = torch.from_numpy(2.0 * labels - 1.0)
        gram = (features - centre).T @ (features - centre) + 0.3 * torch.eye(features.shape[1], dtype=torch.float64)
        slope = torch.linalg.solve(gram, (features - centre).T @ targets)
        network.head.weight.copy_(torch.stack([-slope, slope]).float())
        offset = float(slope @ centre)
        network.head.bias.copy_(torch.tensor([offset, -offset]))
    return network


def make_bundle(
    folder: Path,
    *,
    key: PrivateKey | None = None,
    name: str = "phantom-test",
    population: JudgedPopulation | None = None,
    classes: tuple[str, str] = ("normal", "pneumonia"),
    clinical: ClinicalConfig | None = None,
    provenance: Provenance | None = None,
) -> Path:
    """Writes a small signed bundle of two classes into `folder` and returns `folder`; with `clinical` it takes such values."""
    folder.mkdir(parents=True, exist_ok=True)
    network = small_network() if clinical is None else clinical_network(clinical)
    torch.save(network.state_dict(), folder / WEIGHTS)
    (folder / NETWORK).write_bytes(small_graph(network))
    (folder / QUANTIZED).write_bytes(_quantized())
    (folder / CARD).write_text("# A model for tests\n\nTrained on phantoms: it says nothing about patients.\n")
    squares, labels = _squares(120, seed=1)
    session = open_session(small_graph(network), threads=1)
    logits, features, *_ = session.run(None, graph_inputs(session, squares[:, None]))
    scores, statistics = pneumonia_score(logits), pixel_statistics(squares)
    calibration = fit_calibration(scores, 1.0 - labels, 1.0 * labels, "temperature_and_bias", fitted_on="120 phantoms")
    np.savez(
        folder / REFERENCE,
        features=features,
        probabilities=calibration.probability(scores).astype(np.float32),
        pixel_statistics=statistics,
    )
    manifest = BundleManifest(
        name=name,
        created=datetime(2026, 1, 1, tzinfo=UTC),
        task=read_task(classes),
        classes=classes,
        preprocessing=PREPROCESSING,
        model=MODEL if clinical is None else MODEL.model_copy(update={"clinical": clinical}),
        threshold=OperatingPoint(value=calibration.move(0.5), policy="half", target=0.5, raw_value=0.5),
        calibration=calibration,
        suitability=fit_suitability(squares, features, statistics),
        reference=ReferenceSet(sets=("phantoms",), images=len(squares), statistics=PIXEL_STATISTICS),
        population=population,
        card=CardFacts(sites=2, training_images=64, training_patients=64, phantom=True, provenance=provenance),
    )
    seal_bundle(folder, manifest, key or signing_key())
    return folder


def clinical_network(schema: ClinicalConfig) -> ClinicalNetwork:
    """`small_network` beside clinical values, of which the first number counts, and that it is known."""
    network, image = build_model(MODEL.model_copy(update={"clinical": schema}), "binary", 0), small_network()
    assert isinstance(network, ClinicalNetwork) and isinstance(image, SmallCNN)
    width = network.fusion.features
    with torch.no_grad():
        network.load_state_dict(image_state(image.state_dict(), "image.head."), strict=False)
        for tensor in (network.fusion.reader.weight, network.fusion.reader.bias, network.head.weight):
            tensor.zero_()
        network.fusion.reader.weight[0, 0], network.fusion.reader.weight[0, schema.slots] = 0.5, -0.1
        network.head.weight[:, :width] = image.head.weight
        network.head.weight[:, width] = torch.tensor([-1.0, 1.0])
        network.head.bias.copy_(image.head.bias)
    return network.eval()


def judged_on(**groups: str) -> JudgedPopulation:
    """A population of which each group that is named, by kind and with blanks between them, was judged on 100 patients."""

    def group(kind: str, name: str) -> JudgedGroup:
        half: dict[str, Any] = {"patients_with_pneumonia": 50, "patients_without": 50, "images_with_pneumonia": 50}
        return JudgedGroup(held_out="test", kind=cast("GroupKind", kind), groups=(name,), images=100, patients=100, **half)

    found = tuple(group(kind, name) for kind, names in groups.items() for name in names.split())
    return JudgedPopulation(groups=found, mix=SiteMix(sites=2))


def open_test_bundle(folder: Path) -> Bundle:
    """The bundle of `make_bundle`, written into `folder` and opened."""
    return load_bundle(make_bundle(folder), [signing_key().public_key()])


def small_graph(network: nn.Module) -> bytes:
    """The ONNX graph of a grey `SmallCNN` of two classes, as `ExportedNetwork` defines it."""
    state = {name.removeprefix("image."): tensor.numpy() for name, tensor in network.state_dict().items()}
    clinical = isinstance(network, ClinicalNetwork)
    weights: dict[str, np.ndarray] = {"mean": np.array(GREY_MEAN, np.float32), "std": np.array(GREY_STD, np.float32)}
    weights["places"] = np.array([2, 3])
    nodes = [helper.make_node("Sub", ["image", "mean"], ["centred"]), helper.make_node("Div", ["centred", "std"], ["x0"])]
    for stage in range(4):
        prefix = f"stages.{stage}"
        factor = state[f"{prefix}.1.weight"] / np.sqrt(state[f"{prefix}.1.running_var"] + 1e-5)
        weights[f"w{stage}"] = state[f"{prefix}.0.weight"] * factor[:, None, None, None]
        weights[f"b{stage}"] = state[f"{prefix}.1.bias"] - state[f"{prefix}.1.running_mean"] * factor
        end = "activations" if stage == 3 else f"x{stage + 1}"
        nodes += [
            helper.make_node("Conv", [f"x{stage}", f"w{stage}", f"b{stage}"], [f"c{stage}"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", [f"c{stage}"], [f"r{stage}"]),
            helper.make_node("MaxPool", [f"r{stage}"], [end], kernel_shape=[2, 2], strides=[2, 2]),
        ]
    weights |= {"head": state["head.weight"][:, :128], "bias": state["head.bias"], "channel": np.array([1])}
    weights["slope"] = (weights["head"][1] - weights["head"][0])[None, :, None, None]
    nodes += [
        helper.make_node("ReduceMean", ["activations", "places"], ["features"], keepdims=0),
        helper.make_node("Gemm", ["features", "head", "bias"], ["of_image" if clinical else "logits"], transB=1),
        helper.make_node("Mul", ["activations", "slope"], ["weighted"]),
        helper.make_node("ReduceSum", ["weighted", "channel"], ["cam"], keepdims=0),
    ]
    given = [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, SIZE_PX, SIZE_PX])]
    if clinical:
        weights |= {
            "mid": state["fusion.mean"],
            "spread": state["fusion.deviation"],
            "values_head": state["head.weight"][:, 128:],
        }
        weights |= {"reader": state["fusion.reader.weight"], "reader_bias": state["fusion.reader.bias"]}
        nodes += _clinical_nodes()
        given.append(helper.make_tensor_value_info(CLINICAL_INPUT, TensorProto.FLOAT, ["n", len(weights["mid"])]))
    side = SIZE_PX // 16
    shapes = {"logits": [2], "features": [128], "activations": [128, side, side], "cam": [side, side]}
    graph = helper.make_graph(
        nodes,
        "small_cnn",
        given,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *shape]) for name, shape in shapes.items()],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _clinical_nodes() -> list[onnx.NodeProto]:
    """What `ClinicalFusion` does with values, side by side with the image's features."""
    node = helper.make_node
    return [
        node("IsNaN", [CLINICAL_INPUT], ["unknown"]),
        node("Where", ["unknown", "mid", CLINICAL_INPUT], ["filled"]),
        node("Sub", ["filled", "mid"], ["from_mid"]),
        node("Div", ["from_mid", "spread"], ["known"]),
        node("Cast", ["unknown"], ["marks"], to=TensorProto.FLOAT),
        node("Concat", ["known", "marks"], ["encoded"], axis=1),
        node("Gemm", ["encoded", "reader", "reader_bias"], ["read"], transB=1),
        node("Tanh", ["read"], ["hidden"]),
        node("Gemm", ["hidden", "values_head"], ["of_values"], transB=1),
        node("Add", ["of_image", "of_values"], ["logits"]),
    ]


@lru_cache
def _quantized() -> bytes:
    import tempfile

    from pneumofed.server.export.graph import quantize_onnx

    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name) / "float32.onnx", Path(name) / "int8.onnx"
        source.write_bytes(small_graph(small_network()))
        quantize_onnx(source, target, iter([_squares(64, seed=0)[0][:, None]]))
        return target.read_bytes()


@lru_cache
def _squares(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(float32 [N, S, S], int64 [N]): phantoms as the network's input, and their labels."""
    drawn = phantom_images(count, seed)
    return np.stack([model_input(image.pixels, PREPROCESSING) for image, _ in drawn]), np.array([label for _, label in drawn])
