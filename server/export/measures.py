"""What an export measures and on which images, and the same graph for other tools.

Calibration on the hospitals' validation statistics (`calibrate`) and metrics of the result on validation, central sets and subgroups
(`measure_...`). `ExportImages` are the images that an export needs at the coordinator: to check the graph, to quantise it, and as the
reference of later use; `load_central` and `load_folders` load them. `write_triton` writes a Triton model repository, `write_monai` MONAI
bundle metadata.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from scipy.special import expit

from pneumofed.common.config.experiment import ImageConfig
from pneumofed.common.config.parties import central_manifests
from pneumofed.common.data.cache import decode_for_cache, load_digests
from pneumofed.common.data.dataset import load_dataset
from pneumofed.common.data.manifest import ImageRecord, read_manifest
from pneumofed.common.errors import BundleError, ConfigError, ImageError
from pneumofed.common.evaluation.bootstrap import Bootstrap, ConfidenceInterval, bootstrap
from pneumofed.common.evaluation.metrics import metrics
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.evaluation.statistics import CALIBRATION_BINS, Statistics
from pneumofed.common.model_bundle.calibration import Calibration, Method, fit_calibration
from pneumofed.common.model_bundle.manifest import MONAI, NETWORK, BundleManifest, IntervalEstimate, Measured
from pneumofed.common.seeds import numpy_generator
from pneumofed.server.export.source import Source
from pneumofed.server.federation.central_evaluation import bootstrap_settings
from pneumofed.server.federation.subgroups import find_subgroups
from pneumofed.server.report.numbers import approximate
from pneumofed.server.runs.records import Metrics

CARD_METRICS = (
    "auroc",
    "sensitivity",
    "specificity",
    "accuracy",
    "ece",
    "brier",
    "log_loss",
    "accuracy_three_class",
    "auroc_macro",
)

NO_STATISTICS = "the run kept no validation statistics"
FEDBN_HAS_NO_CALIBRATION = (
    "under FedBN validation, and so the choice of round and threshold, is of networks with each hospital's own normalisation layers; "
    "this one has their average, which no hospital trained with"
)

MOST_IMAGES_OF_A_SET = 2000
"""Of each set: more make no statistic of use better."""
TRITON_MODEL = "pneumofed"
TRITON_BATCH = 32
MONAI_SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
_TRITON_TYPES = {onnx.TensorProto.FLOAT: "TYPE_FP32"}
Reals = npt.NDArray[np.float64]


def calibrate(source: Source, method: Method) -> Calibration:
    """Fits the calibration on the hospitals' validation patients, whose images stayed where they are: their counts by score
    suffice.

    Args:
        source: the finished run; without validation statistics nothing is fitted, and the result says why.
        method: what is fitted.
    """
    if source.validation is None:
        return Calibration(
            fitted_on=f"not fitted: {FEDBN_HAS_NO_CALIBRATION if source.experiment.strategy.name == 'fedbn' else NO_STATISTICS}"
        )
    scores, negatives, positives = score_histogram(source.validation)
    return fit_calibration(
        scores,
        negatives,
        positives,
        method,
        fitted_on=f"{source.validation.n} images of the hospitals' validation patients, who were not trained on",
        design_effect=max(1.0, source.images_per_patient),
    )


def score_histogram(statistics: Statistics) -> tuple[Reals, Reals, Reals]:
    """Counts images by score: (logit in the middle of each occupied bin, normal images, images of pneumonia in it), float64
    [B].

    A bin of the federated grid is 0.02 wide in the logit; scores beyond its ends count as being there.
    """
    occupied = statistics.histograms[0].any(axis=0)
    negatives, positives = statistics.histograms[0][:, occupied].astype(np.float64)
    with np.errstate(divide="ignore"):
        lower, upper = (
            np.log(edge) - np.log1p(-edge) for edge in (statistics.grid.lower[occupied], statistics.grid.upper[occupied])
        )
    middle = np.where(np.isfinite(lower) & np.isfinite(upper), (lower + upper) / 2, np.where(np.isfinite(upper), upper, lower))
    return middle, negatives, positives


def calibrate_predictions(predictions: Predictions, calibration: Calibration) -> Predictions:
    """Replaces the probabilities by calibrated ones.

    Args:
        predictions: of the network itself.
        calibration: the one that the bundle holds.
    """
    logits = np.log(np.maximum(predictions.probabilities, np.finfo(np.float64).tiny))
    found = calibration.class_probabilities(logits)
    return Predictions(found, predictions.labels, predictions.patients, predictions.images)


def measure_central(source: Source, calibration: Calibration | None) -> list[Measured]:
    """Measures the run's central sets with bootstrap intervals by patient.

    Args:
        source: the finished run with its predictions.
        calibration: applied before measuring; None measures the network's own probabilities.
    """
    threshold = source.threshold if calibration is None else calibration.move(source.threshold)
    found = []
    for name, predictions in source.run.predictions.items():
        shown = predictions if calibration is None else calibrate_predictions(predictions, calibration)
        found.append(_measure(name, shown, threshold, bootstrap_settings(source.experiment, name)))
    return found


def measure_subgroups(
    source: Source, calibration: Calibration, records: Mapping[str, Mapping[str, ImageRecord]]
) -> list[Measured]:
    """Measures the groups of the central sets that `find_subgroups` finds.

    Args:
        source: the finished run with its predictions.
        calibration: applied before measuring.
        records: by set, its manifest rows by the first 16 digits of their file's SHA-256.
    """
    threshold, found = calibration.move(source.threshold), []
    for name, predictions in source.run.predictions.items():
        known = [records.get(name, {}).get(image) for image in predictions.images]
        for group, rows in find_subgroups(known).items():
            part = calibrate_predictions(predictions.rows(rows), calibration)
            found.append(_measure_group(f"{name}, {group}", part, threshold, bootstrap_settings(source.experiment, name)))
    return found


def measure_validation(source: Source, calibration: Calibration) -> list[Measured]:
    """Measures the hospitals' validation patients from their statistics; intervals take images as independent.

    Args:
        source: the finished run.
        calibration: applied before calibration error, Brier score and log loss are computed; the threshold's metrics do not
            depend on it.

    Returns:
        One set, or none where the run kept no validation statistics.
    """
    if source.validation is None or not source.validation.n:
        return []
    counted = Metrics.model_validate(metrics(source.validation, source.threshold))
    estimates = {name: IntervalEstimate(value=e.value, low=e.low, high=e.high) for name, e in approximate(counted).items()}
    for name, value in _proper_scores(source.validation, calibration).items():
        estimates[name] = IntervalEstimate(value=value)
    shown = {name: estimates[name] for name in CARD_METRICS if name in estimates}
    return [Measured(name="validation", images=source.validation.n, positives=source.validation.n_positive, metrics=shown)]


def _proper_scores(statistics: Statistics, calibration: Calibration) -> dict[str, float]:
    """Calibration error, Brier score and log loss of the calibrated probabilities, each bin's images at its middle."""
    scores, negatives, positives = score_histogram(statistics)
    p, n = expit(calibration.slope * scores + calibration.intercept), negatives.sum() + positives.sum()
    z = calibration.slope * scores + calibration.intercept
    bins = np.minimum((p * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    gap = np.bincount(bins, weights=(negatives + positives) * p - positives, minlength=CALIBRATION_BINS)
    return {
        "ece": float(np.abs(gap).sum() / n),
        "brier": float((negatives * p**2 + positives * (1 - p) ** 2).sum() / n),
        "log_loss": float((positives * np.logaddexp(0, -z) + negatives * np.logaddexp(0, z)).sum() / n),
    }


def _measure_group(name: str, predictions: Predictions, threshold: float, settings: Bootstrap) -> Measured:
    """As `_measure`, but the counts of a group may be so small that a bootstrap finds no width; Wilson's and Newcombe's intervals do."""
    measured = _measure(name, predictions, threshold, settings)
    closed = approximate(Metrics.model_validate(metrics(Statistics.of(predictions), threshold)))
    estimates = {
        metric: IntervalEstimate(value=e.value, low=e.low, high=e.high)
        for metric, e in closed.items()
        if metric in measured.metrics
    }
    return measured.model_copy(update={"metrics": {**measured.metrics, **estimates}})


def _measure(name: str, predictions: Predictions, threshold: float, settings: Bootstrap) -> Measured:
    found = bootstrap(predictions, threshold, settings)
    return Measured(
        name=name,
        images=len(predictions),
        positives=int((predictions.labels != 0).sum()),
        patients=len(set(predictions.patients)),
        metrics={metric: _estimate(found[metric]) for metric in CARD_METRICS if metric in found},
    )


def _estimate(interval: ConfidenceInterval) -> IntervalEstimate:
    value, low, high = (
        float(number) if np.isfinite(number) else None for number in (interval["value"], interval["low"], interval["high"])
    )
    return IntervalEstimate(value=value, low=low, high=high)


@dataclass(frozen=True, eq=False)
class ExportImages:
    """Images of one set as the network sees them.

    Attributes:
        name: `test`, `external` or `reference`.
        pixels: uint8 [N, S, S].
        labels: int64 [N] of the task; None where nobody labelled them.
        records: manifest rows by the first 16 digits of their file's SHA-256, as in the run's predictions; empty without a manifest.
        patients: of each image; None where nobody knows.
        skipped: files that could not be used.
    """

    name: str
    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64] | None
    records: dict[str, ImageRecord]
    patients: tuple[str, ...] | None = None
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.pixels)

    def inputs(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Builds the graph's input for the images at `index`, float32 [n, 1, S, S] in [0, 1]."""
        return (self.pixels[index].astype(np.float32) / np.float32(255.0))[:, None]

    def draw(self, purpose: str, most: int = MOST_IMAGES_OF_A_SET) -> npt.NDArray[np.int64]:
        """Draws positions in random order, the same each time.

        Args:
            purpose: names the draw; each purpose has its own order.
            most: how many at most.

        Returns:
            int64 [n], n up to `most`.
        """
        return numpy_generator("export", purpose, self.name).permutation(len(self))[:most].astype(np.int64)


def load_central(source: Source) -> list[ExportImages]:
    """Loads the run's central sets through the coordinator's cache; those whose manifest is gone are left out."""
    if source.coordinator is None:
        return []
    settings, experiment = source.coordinator, source.experiment
    cache = Path(settings.cache_dir or Path(settings.run_dir) / "cache")
    found = []
    for name, manifest in central_manifests(settings).items():
        if Path(manifest).is_file():
            records = read_manifest(Path(manifest)).records
            dataset = load_dataset(
                read_manifest(Path(manifest)), experiment.task, experiment.image, cache / name, keep_duplicates=True
            )
            digests = load_digests([record.path for record in records], cache / name, 1)
            by_digest = {str(digest)[:16]: record for digest, record in zip(digests, records, strict=True)}
            found.append(ExportImages(name, dataset.pixels, dataset.labels, by_digest, dataset.patients))
    return found


def load_folders(folders: Sequence[Path], image: ImageConfig) -> ExportImages:
    """Loads all images below `folders`, whatever their names. Files that cannot be read are counted in `skipped`.

    Args:
        folders: each a folder, or a manifest (.csv).
        image: how images are fitted into squares.

    Raises:
        ConfigError: a folder does not exist.
        BundleError: no image can be used.
    """
    paths = [path for folder in folders for path in _files(folder)]
    order = numpy_generator("export", "folders").permutation(len(paths))[:MOST_IMAGES_OF_A_SET]
    squares, skipped = [], 0
    for position in sorted(order):
        try:
            squares.append(decode_for_cache(paths[position], image))
        except ImageError:
            skipped += 1
    if not squares:
        raise BundleError(
            f"none of the {len(paths)} files of --reference is an image that can be read; give a folder of radiographs"
        )
    return ExportImages("reference", np.stack(squares), None, {}, skipped=skipped)


def _files(folder: Path) -> list[Path]:
    if folder.is_dir():
        return sorted(path for path in folder.rglob("*") if path.is_file())
    if folder.suffix.lower() == ".csv" and folder.is_file():
        return [record.path for record in read_manifest(folder).records]
    raise ConfigError(f"--reference {folder}: expected a folder of images or a manifest (.csv)")


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
