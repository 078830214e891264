"""The same graph for other tools: a Triton model repository, and MONAI bundle metadata with a configuration."""

from __future__ import annotations

import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx

from pneumofed.common.model_bundle.manifest import MONAI, NETWORK, BundleManifest

TRITON_MODEL = "pneumofed"
TRITON_BATCH = 32
MONAI_SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
_TRITON_TYPES = {onnx.TensorProto.FLOAT: "TYPE_FP32"}


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
    image = {
        "type": "image",
        "format": "magnitude",
        "modality": "CR",
        "num_channels": channels,
        "spatial_shape": [side, side],
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": False,
        "channel_def": {str(number): "grey" for number in range(channels)},
    }
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
        "task": "Pneumonia on frontal chest radiographs",
        "description": "A network that hospitals trained together by federated learning; see card.md.",
        "authors": "the hospitals of the federation",
        "copyright": "as the federation agreed",
        "data_source": "the hospitals' own radiographs, which never left them",
        "data_type": "dicom, jpeg, png, tiff, bmp or webp",
        "image_classes": "one grey radiograph, normalised as bundle.json says",
        "label_classes": ", ".join(f"{number} is {name}" for number, name in enumerate(manifest.classes)),
        "pred_classes": "one logit a class; calibration and threshold are in bundle.json",
        "intended_use": "Research. No medical device; see the limits of use in card.md.",
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": prediction}},
    }


def monai_inference(manifest: BundleManifest) -> dict[str, Any]:
    """Builds a MONAI configuration whose `network_def` is the network with its weights, verified; it needs pneumofed installed."""
    return {
        "imports": ["$import pneumofed"],
        "bundle_root": ".",
        "network_def": "$pneumofed.open_bundle(@bundle_root).network",
        "image_size_px": manifest.preprocessing.size_px,
        "mean": list(manifest.preprocessing.mean),
        "std": list(manifest.preprocessing.std),
    }


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(source, target)
