"""The network as an ONNX graph, its int8 form, and the same graph for other tools: a Triton model repository, and MONAI bundle metadata
with a configuration.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from pneumofed.common.config.classes import positive_word
from pneumofed.common.config.experiment import ClinicalConfig
from pneumofed.common.errors import BundleError
from pneumofed.common.imaging.augment import normalize
from pneumofed.common.model_bundle.manifest import MONAI, NETWORK, BundleManifest
from pneumofed.common.model_bundle.predictor import CLINICAL_INPUT, WEIGHT_BITS
from pneumofed.common.models.architectures import architecture_of
from pneumofed.common.models.build import classifier_of
from pneumofed.common.models.fusion import ClinicalFusion, ClinicalNetwork, image_features
from pneumofed.common.models.layers import real_numbers

GRAPH_OUTPUTS = ("logits", "features", "activations", "cam")
ONNX_OPSET = 20
BATCH_LIMIT = 4096

Floats = npt.NDArray[np.float32]

TRITON_MODEL = "pneumofed"
TRITON_BATCH = 32
MONAI_SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
_TRITON_TYPES = {onnx.TensorProto.FLOAT: "TYPE_FP32"}


class ExportedNetwork(nn.Module):
    """What the ONNX graph computes: `image` float32 [N, 1, S, S] in [0, 1], of volumes [N, 1, D, S, S], -> `logits` [N, C], `features`
    [N, D] (the classifier's input), and for a network whose features are averages over the picture also `activations` [N, D, h, w], of
    which they are the averages, and `cam` [N, h, w]; of volumes with one dimension more.

    `cam` is the class activation map (Zhou et al. 2016, eq. 2) of the logit of P(pneumonia): the activations weighted by the
    derivative of that logit by the features. With two classes its mean over the picture, plus the difference of the biases, is
    the logit.
    """

    def __init__(self, network: nn.Module, in_channels: int) -> None:
        super().__init__()
        self.network = network.eval()
        self.in_channels = in_channels
        self._seen: dict[str, Tensor] = {}
        self._classifier = classifier_of(network)
        source = image_features(network, self._classifier)
        source.register_forward_pre_hook(lambda _, inputs: self._keep("features", inputs[0]))
        maps = architecture_of(network).maps
        if maps:
            network.get_submodule(maps).register_forward_hook(lambda _, __, output: self._keep("activations", output))

    @property
    def outputs(self) -> tuple[str, ...]:
        return GRAPH_OUTPUTS if architecture_of(self.network).maps else GRAPH_OUTPUTS[:2]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        logits = self.network(normalize(image, self.in_channels))
        return self._with_maps(logits, lambda slope: slope)

    def _with_maps(self, logits: Tensor, pull_back: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        """The outputs; `pull_back` turns a derivative by the classifier's input into one by the image's features."""
        features, activations = self._seen.pop("features"), self._seen.pop("activations", None)
        if activations is None:
            return logits, features
        weight = self._classifier.weight
        slope = pull_back(torch.softmax(logits[:, 1:], dim=1) @ weight[1:] - weight[:1])
        by_place = slope.reshape(*slope.shape, *(1 for _ in activations.shape[2:]))
        return logits, features, activations, (activations * by_place).sum(dim=1)

    def _keep(self, name: str, value: Tensor) -> None:
        self._seen[name] = value


class ExportedClinicalNetwork(ExportedNetwork):
    """The same of a network with clinical values, a second input `clinical` float32 [N, K] in their own units, NaN where not known.
    `features` are those of the image, and `cam` shows what the image adds beside these values.
    """

    def forward(self, image: Tensor, clinical: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        fusion = self.network.fusion
        assert isinstance(fusion, ClinicalFusion)
        logits = self.network(normalize(image, self.in_channels), clinical)
        return self._with_maps(logits, lambda slope: fusion.pull_back(slope, clinical))


def exported_form(network: nn.Module, in_channels: int) -> ExportedNetwork:
    """Wraps a network for export, in evaluation mode.

    Args:
        network: of `common.models.build.build_model`.
        in_channels: of the network, 1 or 3.
    """
    kind = ExportedClinicalNetwork if isinstance(network, ClinicalNetwork) else ExportedNetwork
    return kind(network, in_channels).eval()


def export_onnx(network: nn.Module, in_channels: int, size: int | tuple[int, ...], path: Path) -> None:
    """Writes the network as the ONNX graph of `ExportedNetwork` with a batch of any size up to `BATCH_LIMIT`. Leaves it in
    evaluation mode.

    Args:
        network: of `common.models.build.build_model`.
        in_channels: of the network, 1 or 3; the graph itself takes one channel.
        size: side of the square input in pixels, or the shape of a volume, (slices, S, S).
        path: the file to write.

    Raises:
        BundleError: torch cannot export this network; the text says why.
    """
    exported = exported_form(network, in_channels)
    examples = [torch.zeros(2, 1, *((size, size) if isinstance(size, int) else size))]
    if isinstance(network, ClinicalNetwork):
        examples.append(network.fusion.missing(2))
    with real_numbers(exported), torch.inference_mode():
        exported(*examples)  # fills caches with real tensors, where tracing would leave its own
    rows = torch.export.Dim("n", min=1, max=BATCH_LIMIT)
    names = ["image", CLINICAL_INPUT][: len(examples)]
    shapes = {name: {0: rows} for name in names}
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), real_numbers(exported):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                exported,
                tuple(examples),
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=names,
                output_names=list(exported.outputs),
                opset_version=ONNX_OPSET,
                external_data=False,
                verbose=False,
            )
        if program is None:
            raise BundleError("torch.onnx gave no graph")
        onnx.save(without_traces(program.model_proto), str(path))
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError, TypeError) as error:
        raise BundleError(f"{type(network).__name__} cannot be exported as ONNX: {_root_of(error)}") from error
    finally:
        logger.setLevel(level)


def without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """Takes out of `model` where its nodes come from, and returns it.

    The exporter notes the stack trace of each node, so the folders of the coordinator's machine, and the file goes to every hospital.
    """
    parts = [model.graph, *model.functions]
    named = [model, *parts, *model.graph.input, *model.graph.output, *model.graph.initializer]
    named += [item for part in parts for item in (*part.node, *part.value_info)]
    for item in named:
        del item.metadata_props[:]
        item.doc_string = ""
    return model


def _root_of(error: BaseException) -> str:
    """The first line of the error that began it: the exporter wraps it in advice to its own developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0] or type(error).__name__


def run_torch(network: nn.Module, in_channels: int, images: Floats, values: Floats | None = None) -> tuple[Floats, ...]:
    """Computes with PyTorch what the graph computes.

    Args:
        network: of `common.models.build.build_model`.
        in_channels: of the network, 1 or 3.
        images: float32 [N, 1, S, S] in [0, 1].
        values: float32 [N, K], clinical values; None where the network has none, or none is known.

    Returns:
        The outputs in the order of `ExportedNetwork.outputs`.
    """
    inputs = [torch.from_numpy(images)]
    if isinstance(network, ClinicalNetwork):
        inputs.append(network.fusion.missing(len(images)) if values is None else torch.from_numpy(values))
    with torch.inference_mode():
        return tuple(output.numpy() for output in exported_form(network, in_channels)(*inputs))


def quantize_onnx(source: Path, target: Path, batches: Iterator[Floats]) -> None:
    """Writes the graph `source` with int8 weights (by channel) within +-64 and uint8 activations as `target`.

    Seven bits and not eight, since processors without VNNI, as many in hospitals are, add two products in 16 bits and cut off what does
    not fit (`common.model_bundle.predictor.saturates`): the same graph would answer otherwise there than where its loss was measured.

    Static quantisation: the ranges of the activations are taken from `batches` of images, float32 [N, 1, S, S] in [0, 1], or volumes
    [N, 1, D, S, S] (Jacob et al. 2018, section 3; ONNX Runtime's QDQ format). The classifier and what follows it stay in float32, and so
    does all that clinical values enter.

    Args:
        source: the float32 graph.
        target: the file to write.
        batches: images of the kind that the network will see, float32 [n, 1, S, S] in [0, 1] each; the iterator is used up.

    Raises:
        BundleError: ONNX Runtime cannot quantise this graph.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader
    from onnxruntime.quantization.shape_inference import quant_pre_process

    inputs = onnx.load(str(source)).graph.input
    second = {one.name: one.type.tensor_type.shape.dim[1].dim_value for one in inputs if one.name == CLINICAL_INPUT}

    class Batches(CalibrationDataReader):
        def get_next(self) -> dict[str, Floats] | None:
            batch = next(batches, None)
            return (
                None if batch is None else {"image": batch, **{name: _missing(len(batch), size) for name, size in second.items()}}
            )

    with tempfile.TemporaryDirectory(prefix="pneumofed-int8-") as name:
        prepared = Path(name) / "prepared.onnx"
        try:
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(target),
                Batches(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "MaxPool", "Add", "Relu", "Clip"],
                nodes_to_exclude=_nodes_after(onnx.load(str(prepared)), CLINICAL_INPUT),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                reduce_range=True,
            )
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise BundleError(f"the graph cannot be quantised ({type(error).__name__}: {error})") from error
    made = onnx.load(str(target))
    onnx.helper.set_model_props(made, {WEIGHT_BITS: "7"})
    onnx.save(made, str(target))


def _missing(rows: int, slots: int) -> Floats:
    return np.full((rows, slots), np.nan, dtype=np.float32)


def _nodes_after(model: onnx.ModelProto, name: str) -> list[str]:
    """Names of the nodes that the input `name` enters, directly or through others; a graph's nodes stand in the order of their runs."""
    reached, found = {name}, []
    for node in model.graph.node:
        if reached.intersection(node.input):
            reached.update(node.output)
            found.append(node.name)
    return found


def write_triton(folder: Path) -> None:
    """Writes `triton/pneumofed/config.pbtxt` and `1/model.onnx`, a hard link where the disk has them: `tritonserver
    --model-repository triton` serves it.

    Shapes are those of the graph without the batch, as Triton's model configuration asks for where `max_batch_size` is above 0.
    """
    place = folder / "triton" / TRITON_MODEL
    (place / "1").mkdir(parents=True)
    graph = onnx.load(folder / NETWORK).graph
    tensors = [("input", tensor) for tensor in graph.input] + [("output", tensor) for tensor in graph.output]
    lines = [f'name: "{TRITON_MODEL}"', 'platform: "onnxruntime_onnx"', f"max_batch_size: {TRITON_BATCH}", "dynamic_batching { }"]
    for kind, tensor in tensors:
        dims = ", ".join(str(size.dim_value) for size in tensor.type.tensor_type.shape.dim[1:])
        data_type = _TRITON_TYPES[tensor.type.tensor_type.elem_type]
        lines.append(f'{kind} [ {{ name: "{tensor.name}" data_type: {data_type} dims: [ {dims} ] }} ]')
    (place / "config.pbtxt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _link(folder / NETWORK, place / "1" / "model.onnx")


def write_monai(folder: Path, manifest: BundleManifest) -> None:
    """Writes `metadata.json`, and for tools that expect MONAI's folders `configs/metadata.json` and `configs/inference.json`.

    Args:
        folder: of the bundle.
        manifest: what is described.
    """
    (folder / "configs").mkdir()
    metadata = json.dumps(monai_metadata(manifest), indent=1) + "\n"
    (folder / MONAI).write_text(metadata, encoding="utf-8")
    (folder / "configs" / MONAI).write_text(metadata, encoding="utf-8")
    (folder / "configs" / "inference.json").write_text(json.dumps(monai_inference(manifest), indent=1) + "\n", encoding="utf-8")


def monai_metadata(manifest: BundleManifest) -> dict[str, Any]:
    """MONAI's bundle metadata (MONAI Bundle Specification, "metadata.json File") of the PyTorch network, input normalised."""
    side, channels = manifest.preprocessing.size_px, manifest.preprocessing.in_channels
    slices, word = manifest.preprocessing.slices, "CT volumes" if manifest.preprocessing.slices else "radiographs"
    image = {
        "type": "image",
        "format": "hounsfield" if slices else "magnitude",
        "modality": "CT" if slices else "CR",
        "num_channels": channels,
        "spatial_shape": [slices, side, side] if slices else [side, side],
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": False,
        "channel_def": {str(number): "grey" for number in range(channels)},
    }
    clinical = {} if manifest.model.clinical is None else {"clinical": _describe_clinical(manifest.model.clinical)}
    prediction = {
        "type": "probabilities",
        "format": "classes",
        "num_channels": len(manifest.classes),
        "spatial_shape": [len(manifest.classes)],
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": False,
        "channel_def": {str(number): name for number, name in enumerate(manifest.classes)},
    }
    return {
        "schema": MONAI_SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": "exported by pneumofed"},
        "monai_version": "1.5.0",
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {"pneumofed": version("pneumofed"), "onnxruntime": version("onnxruntime")},
        "name": manifest.name,
        "task": f"{_diseases(manifest)} on {'CT volumes of the chest' if slices else 'frontal chest radiographs'}",
        "description": "A network that hospitals trained together by federated learning; see card.md.",
        "authors": "the hospitals of the federation",
        "copyright": "as the federation agreed",
        "data_source": f"the hospitals' own {word}, which never left them",
        "data_type": "dicom or nifti" if slices else "dicom, jpeg, png, tiff, bmp or webp",
        "image_classes": f"one grey {word[:-1]}, normalised as bundle.json says",
        "label_classes": ", ".join(f"{number} is {name}" for number, name in enumerate(manifest.classes)),
        "pred_classes": "one logit a class; calibration and threshold are in bundle.json",
        "intended_use": "Research. No medical device; see the limits of use in card.md.",
        "network_data_format": {"inputs": {"image": image, **clinical}, "outputs": {"pred": prediction}},
    }


def _describe_clinical(schema: ClinicalConfig) -> dict[str, Any]:
    names = [f"{column.name} {word}".strip() for column in schema.columns for word in column.codes or (column.unit or "",)]
    return {
        "type": "tabular",
        "format": "values",
        "num_channels": schema.slots,
        "spatial_shape": [schema.slots],
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": False,
        "channel_def": {str(number): name for number, name in enumerate(names)},
    }


def _diseases(manifest: BundleManifest) -> str:
    return "Pneumonia" if positive_word(manifest.classes) == "pneumonia" else ", ".join(manifest.classes[1:]).capitalize()


def monai_inference(manifest: BundleManifest) -> dict[str, Any]:
    """Builds a MONAI configuration whose `network_def` is the network with its weights, verified; it needs pneumofed installed."""
    return {
        "imports": ["$import pneumofed"],
        "bundle_root": ".",
        "network_def": "$pneumofed.open_bundle(@bundle_root).network",
        "image_size_px": manifest.preprocessing.size_px,
        **({"slices": manifest.preprocessing.slices} if manifest.preprocessing.slices else {}),
        "mean": list(manifest.preprocessing.mean),
        "std": list(manifest.preprocessing.std),
    }


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(source, target)
