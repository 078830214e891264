"""From a run folder to a signed model bundle."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common.errors import BundleError, ConfigError
from common.keys import PrivateKey, write_node_key
from common.layout import ArraysLayout
from common.model_bundle.archive import pack
from common.model_bundle.calibration import Calibration, Method, pneumonia_score
from common.model_bundle.manifest import (
    CARD,
    NETWORK,
    QUANTIZED,
    REFERENCE,
    WEIGHTS,
    BundleManifest,
    OperatingPoint,
    Preprocessing,
    Quantization,
    ReferenceSet,
)
from common.model_bundle.pixel_statistics import NAMES, pixel_statistics
from common.model_bundle.sealing import seal_bundle
from common.model_bundle.suitability import Suitability, fit_suitability
from common.models import build_model
from common.transforms import GREY_MEAN, GREY_STD, IMAGENET_MEAN, IMAGENET_STD
from server.export.card import write_card
from server.export.checks import check_graph, measure_quantization, range_batches, run_features
from server.export.graph import export_onnx, quantize_onnx
from server.export.layouts import write_monai, write_triton
from server.export.measures import calibrate, measure_central, measure_subgroups, measure_validation
from server.export.pictures import Pictures, load_central, load_folders
from server.export.source import Source, describe_source, read_source

MOST_LOSS = 0.02
"""AUROC that int8 may cost; a graph that costs more is left out."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class ExportPlan:
    """What is asked for.

    Attributes:
        run: run folder.
        out: folder of the bundle, new or empty; the archive is written beside it.
        key: signs the bundle.
        references: folders of images, or manifests, that take the place of the run's test set as the reference.
        calibration: how probabilities are calibrated.
    """

    run: Path
    out: Path
    key: PrivateKey
    references: Sequence[Path] = ()
    calibration: Method = "temperature"

    @property
    def archive(self) -> Path:
        return self.out.with_name(f"{self.out.name}.zip")


def export_run(plan: ExportPlan, say: Say = lambda _: None) -> BundleManifest:
    """Writes the bundle folder and its archive, and returns the manifest. Both appear whole or not at all.

    Args:
        plan: what is asked for.
        say: takes a sentence about each step.

    Raises:
        ConfigError: the run or a reference does not exist, or `plan.out` holds something.
        BundleError: the run did not succeed, the network cannot be exported, or the graph is not the network.
    """
    if plan.archive.exists() or (plan.out.exists() and (not plan.out.is_dir() or any(plan.out.iterdir()))):
        raise ConfigError(f"{plan.out} or {plan.archive.name} exists: a bundle is never overwritten; give another --out")
    source = read_source(plan.run)
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=plan.out.parent, prefix=f".{plan.out.name}.") as name:
        folder = Path(name) / plan.out.name
        folder.mkdir()
        manifest = _build(plan, source, folder, say)
        archive = pack(folder, Path(name) / plan.archive.name)
        if plan.out.is_dir():
            plan.out.rmdir()
        folder.rename(plan.out)
        archive.rename(plan.archive)
    return manifest


def release_key(run: Path, say: Say = lambda _: None) -> Path:
    """The file of the coordinator's key for releases, made on first use.

    Args:
        run: a run folder. The key lies in `keys/` of its coordinator, or of a run without a coordinator folder in the run.
        say: takes a sentence if the key was made.
    """
    place = run.resolve().parent.parent / "keys"
    folder = (place if (place.parent / "coordinator.yaml").is_file() and place.is_dir() else run / "keys") / "release"
    if not (folder / "node").exists():
        public = write_node_key(folder, "pneumofed-release")
        say(f"a new key for releases was made; give {public} to the hospitals, once")
    return folder / "node"


def _build(plan: ExportPlan, source: Source, folder: Path, say: Say) -> BundleManifest:
    central = load_central(source)
    reference = load_folders(plan.references, source.experiment.image) if plan.references else next(iter(central), None)
    if reference is None:
        raise BundleError("the run's central images are gone; give --reference FOLDER of radiographs to check the graph with")
    pictures = central if not plan.references else [reference, *central]
    network = load_network(source)
    torch.save(network.state_dict(), folder / WEIGHTS)
    say(f"exporting {source.experiment.model.name} as ONNX")
    in_channels = source.experiment.model.in_channels
    export_onnx(network, in_channels, source.experiment.image.size_px, folder / NETWORK)
    checked = check_graph(network, in_channels, folder / NETWORK, pictures)
    say(f"ONNX differs from PyTorch by at most {checked.probability:.1e} in probability on {checked.images} images")
    calibration = calibrate(source, plan.calibration)
    threshold = calibration.move(source.threshold)
    losses = _quantize(folder, reference, central, calibration, threshold, say)
    described, suitability = _write_reference(folder, reference, calibration)
    say("measuring")
    records = {part.name: part.records for part in central}
    facts = describe_source(source).model_copy(
        update={
            "onnx": checked,
            "quantization": tuple(losses),
            "measured": (
                *measure_validation(source, calibration),
                *measure_central(source, calibration),
                *measure_subgroups(source, calibration, records),
            ),
            "uncalibrated": (*measure_validation(source, Calibration()), *measure_central(source, None)),
        }
    )
    manifest = BundleManifest(
        name=source.experiment.name,
        created=datetime.now(UTC).replace(microsecond=0),
        task=source.experiment.task,
        classes=source.classes,
        preprocessing=_preprocessing(source),
        model=source.experiment.model.without_weights(),
        threshold=OperatingPoint(
            value=threshold,
            policy=source.experiment.evaluation.threshold_policy,
            target=source.experiment.evaluation.target,
            raw_value=source.threshold,
        ),
        calibration=calibration,
        suitability=suitability,
        reference=described,
        card=facts,
    )
    (folder / CARD).write_text(write_card(manifest), encoding="utf-8")
    write_triton(folder)
    write_monai(folder, manifest)
    return seal_bundle(folder, manifest, plan.key)


def load_network(source: Source) -> nn.Module:
    """The kept model of the run, in evaluation mode."""
    network = build_model(source.experiment.model.without_weights(), source.experiment.task, seed=0)
    ArraysLayout.of(network).load(network, source.checkpoint.arrays.parameters, source.checkpoint.arrays.statistics)
    return network.eval()


def _preprocessing(source: Source) -> Preprocessing:
    image, channels = source.experiment.image, source.experiment.model.in_channels
    mean, std = ((GREY_MEAN,), (GREY_STD,)) if channels == 1 else (IMAGENET_MEAN, IMAGENET_STD)
    return Preprocessing(size_px=image.size_px, fit=image.fit, in_channels=channels, mean=mean, std=std)


def _quantize(
    folder: Path, reference: Pictures, central: Sequence[Pictures], calibration: Calibration, threshold: float, say: Say
) -> list[Quantization]:
    """Writes the int8 graph and returns what it costs on each labelled set, or on the reference where none is labelled.

    A graph that costs more than `MOST_LOSS` is removed again: depthwise convolutions with wide ranges, as EfficientNet's, can lose
    everything (Krishnamoorthi 2018, arXiv 1806.08342, section 3.1.5).
    """
    graphs = folder / NETWORK, folder / QUANTIZED
    quantize_onnx(*graphs, iter(range_batches(reference)))
    losses = [measure_quantization(part, graphs, calibration, threshold) for part in central or [reference]]
    first = losses[0]
    loss = (first.auroc_float32.value or 0.0) - (first.auroc_int8.value or 0.0)
    say(f"int8 changes probabilities by {first.mean_difference:.4f} on average ({first.name}), AUROC by {-loss:+.4f}")
    if loss > MOST_LOSS or first.mean_difference > 5 * MOST_LOSS:
        say("int8 costs too much with this network and is left out")
        graphs[1].unlink()
        return []
    return losses


def _write_reference(folder: Path, reference: Pictures, calibration: Calibration) -> tuple[ReferenceSet, Suitability]:
    index = reference.draw("reference")
    logits, features = run_features(folder / NETWORK, reference, index)
    squares = reference.inputs(index)[:, 0]
    statistics = pixel_statistics(squares)
    probabilities = calibration.probability(pneumonia_score(logits)).astype(np.float32)
    patients = None if reference.patients is None else [reference.patients[row] for row in index]
    kept = first_of_each(patients or list(index))  # drift is told by patients that are independent of each other
    arrays: dict[str, Any] = {"features": features, "probabilities": probabilities, "pixel_statistics": statistics}
    if reference.labels is not None:
        arrays["labels"] = (reference.labels[index] > 0).astype(np.int64)
    np.savez_compressed(folder / REFERENCE, **{name: values[kept] for name, values in arrays.items()})
    described = ReferenceSet(sets=(reference.name,), images=len(kept), statistics=NAMES)
    return described, fit_suitability(squares, features, statistics, patients=patients)


def first_of_each(patients: Sequence[Hashable]) -> list[int]:
    """Positions of the first image of each patient, in order."""
    seen: dict[Hashable, int] = {}
    for position, patient in enumerate(patients):
        seen.setdefault(patient, position)
    return list(seen.values())
