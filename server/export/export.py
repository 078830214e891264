"""From a run folder to a signed model bundle: `export_run`.

Steps: load the kept network, export it as ONNX and check that the graph is the network (`check_graph`), quantise it and measure what int8
costs (`measure_quantization`), calibrate, measure on every set, write card, reference and files for other tools, sign and pack.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pneumofed.common.config.experiment import ModelConfig
from pneumofed.common.config.parties import reference_names
from pneumofed.common.errors import BundleError, ConfigError, counted
from pneumofed.common.folder_lock import owned
from pneumofed.common.imaging.augment import GREY_MEAN, GREY_STD, IMAGENET_MEAN, IMAGENET_STD
from pneumofed.common.model_bundle.bundle import pack
from pneumofed.common.model_bundle.calibration import Calibration, Method, pneumonia_score
from pneumofed.common.model_bundle.image_statistics import PIXEL_STATISTICS, pixel_statistics
from pneumofed.common.model_bundle.manifest import (
    CARD,
    MIN_REFERENCE_IMAGES,
    NETWORK,
    QUANTIZED,
    REFERENCE,
    REFERENCE_GROUPS,
    WEIGHTS,
    BundleManifest,
    OperatingPoint,
    Preprocessing,
    Quantization,
    ReferenceSet,
)
from pneumofed.common.model_bundle.sealing import seal_bundle
from pneumofed.common.model_bundle.suitability import Suitability, fit_suitability
from pneumofed.common.models.build import build_empty
from pneumofed.common.models.fusion import with_standardization
from pneumofed.common.ops.study_code import FOLDER, describe_name, find_study_code, is_study_code, write_codes
from pneumofed.common.wire.keys import PrivateKey, write_node_key
from pneumofed.common.wire.parameter_layout import ArraysLayout
from pneumofed.server.export.card import Refusals, write_card
from pneumofed.server.export.graph import export_onnx, quantize_onnx, write_monai, write_triton
from pneumofed.server.export.graph_checks import (
    ExportImages,
    check_graph,
    count_refusals,
    join_sets,
    load_central,
    load_folders,
    measure_quantization,
    range_batches,
    run_features,
)
from pneumofed.server.export.measures import (
    StatedAges,
    calibrate,
    first_of_each,
    measure_central,
    measure_population,
    measure_subgroups,
    measure_validation,
)
from pneumofed.server.export.source import Source, describe_source, find_hospital_limits, read_finished_run

MOST_AUROC_LOSS, MOST_CHANGE = 0.02, 0.02
"""AUROC that int8 may cost, and by how much it may move probabilities on average, on each set of the reference; else it is left out."""

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
        ages: by held-out set, the age groups of its patients where no row states them.
    """

    run: Path
    out: Path
    key: PrivateKey
    references: Sequence[Path] = ()
    calibration: Method = "temperature"
    ages: StatedAges = field(default_factory=dict)

    @property
    def archive(self) -> Path:
        return self.out.with_name(f"{self.out.name}.zip")

    @property
    def staging(self) -> Path:
        """Returns the folder beside `out` in which both are made."""
        return self.out.with_name(f".{self.out.name}.export")


def export_run(plan: ExportPlan, say: Say = lambda _: None) -> BundleManifest:
    """Writes the bundle folder and its archive, and returns the manifest. Both appear whole or not at all; after a kill between the two
    the next export to the same place completes them.

    Args:
        plan: what is asked for.
        say: takes a sentence about each step.

    Raises:
        ConfigError: the run or a reference does not exist, `plan.out` holds something, or another export writes there.
        BundleError: the run did not succeed, the network cannot be exported, or the graph is not the network.
    """
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    with owned(plan.staging, "export", "pneumofed export", "wait for it, or give another --out"):
        try:
            if _complete(plan):
                raise ConfigError(
                    f"an earlier export to {plan.out} was ended from outside at its very last step; its bundle and "
                    f"{plan.archive.name} are whole now. Use them, or give another --out"
                )
            _check_new(plan)
            return _export(plan, say)
        finally:
            _complete(plan)
            _remove_staged(plan)
            shutil.rmtree(plan.staging, ignore_errors=True)


def _complete(plan: ExportPlan) -> bool:
    """Moves the archive to its place where an export was ended between its two last steps; reports whether one was."""
    archive = plan.staging / plan.archive.name
    broken_off = archive.exists() and not (plan.staging / plan.out.name).exists() and plan.out.is_dir()
    if broken_off and not plan.archive.exists():
        archive.rename(plan.archive)
        return True
    return False


def _remove_staged(plan: ExportPlan) -> None:
    """Removes what an export left in staging; the archive first, since by itself it means that the bundle is in its place."""
    (plan.staging / plan.archive.name).unlink(missing_ok=True)
    shutil.rmtree(plan.staging / plan.out.name, ignore_errors=True)


def _check_new(plan: ExportPlan) -> None:
    if plan.archive.exists() or (plan.out.exists() and (not plan.out.is_dir() or any(plan.out.iterdir()))):
        raise ConfigError(f"{plan.out} or {plan.archive.name} exists: a bundle is never overwritten; give another --out")


def _export(plan: ExportPlan, say: Say) -> BundleManifest:
    source = read_finished_run(plan.run)
    _remove_staged(plan)
    folder = plan.staging / plan.out.name
    folder.mkdir()
    manifest = _build(plan, source, folder, say)
    archive = pack(folder, plan.staging / plan.archive.name)
    if plan.out.is_dir():
        plan.out.rmdir()
    folder.rename(plan.out)
    archive.rename(plan.archive)  # where it ends before this line: `_complete`
    return manifest


def release_key(run: Path, say: Say = lambda _: None) -> Path:
    """Finds the file of the coordinator's key for releases, made on first use.

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
    records = {part.name: part.records for part in central}
    population = measure_population(source, records, plan.ages)
    own = find_reference(plan, source, central)
    pictures = central if not plan.references else [*own, *central]
    network = load_network(source)
    torch.save(network.state_dict(), folder / WEIGHTS)
    name = source.experiment.model.name
    write_codes(folder / FOLDER, [find_study_code(name)] if is_study_code(name) else [])
    say(f"exporting {describe_name(name)} as ONNX")
    in_channels = source.experiment.model.in_channels
    image = source.experiment.image
    export_onnx(network, in_channels, image.shape if image.slices else image.size_px, folder / NETWORK)
    checked = check_graph(network, in_channels, folder / NETWORK, pictures)
    say(f"ONNX differs from PyTorch by at most {checked.probability:.1e} in probability on {counted(checked.images, 'image')}")
    calibration = calibrate(source, plan.calibration)
    threshold = calibration.move(source.threshold)
    losses = _quantize(folder, own, central, calibration, threshold, say)
    described, suitability = _write_reference(folder, own, calibration)
    hospitals = None if plan.references else find_hospital_limits(source, say)
    suitability = hospitals.suitability if hospitals else suitability
    refusals = _say_limits(folder, described, suitability, pictures, say)
    say("measuring")
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
        model=_described_model(source, network),
        threshold=OperatingPoint(
            value=threshold,
            policy=source.experiment.evaluation.threshold_policy,
            target=source.experiment.evaluation.target,
            raw_value=source.threshold,
        ),
        calibration=calibration,
        suitability=suitability,
        reference=described,
        population=population,
        card=facts,
    )
    card = write_card(manifest, refusals, hospitals, source.run.summary.personal_of)
    (folder / CARD).write_text(card, encoding="utf-8")
    write_triton(folder)
    write_monai(folder, manifest)
    return seal_bundle(folder, manifest, plan.key)


def find_reference(plan: ExportPlan, source: Source, central: Sequence[ExportImages]) -> list[ExportImages]:
    """Finds the sets whose images later ones must be like.

    Args:
        plan: names folders in their place, or none.
        source: the run, whose coordinator says which held-out sets are of patients like the hospitals' own.
        central: all held-out sets; a BundleError where there is none.
    """
    if plan.references:
        return [load_folders(plan.references, source.experiment.image)]
    present = {part.name: part for part in central}
    names = reference_names(source.coordinator, present) if source.coordinator else []
    if not names:
        raise BundleError("the run's central images are gone; give --reference FOLDER of radiographs to check the graph with")
    return [present[name] for name in names]


def _described_model(source: Source, network: nn.Module) -> ModelConfig:
    """The section of the network, with what clinical numbers are standardised by where it takes some."""
    model = source.experiment.model.without_weights()
    if model.clinical is None:
        return model
    return model.model_copy(update={"clinical": with_standardization(model.clinical, network)})


def load_network(source: Source) -> nn.Module:
    """Builds the kept model of the run, in evaluation mode."""
    network = build_empty(source.experiment.model, source.experiment.task)
    ArraysLayout.of(network).load(network, source.checkpoint.arrays.parameters, source.checkpoint.arrays.statistics)
    return network.eval()


def _preprocessing(source: Source) -> Preprocessing:
    image, channels = source.experiment.image, source.experiment.model.in_channels
    mean, std = ((GREY_MEAN,), (GREY_STD,)) if channels == 1 else (IMAGENET_MEAN, IMAGENET_STD)
    return Preprocessing(size_px=image.size_px, fit=image.fit, in_channels=channels, mean=mean, std=std, slices=image.slices)


def _quantize(
    folder: Path,
    own: Sequence[ExportImages],
    central: Sequence[ExportImages],
    calibration: Calibration,
    threshold: float,
    say: Say,
) -> list[Quantization]:
    """Writes the int8 graph and returns what it costs on each labelled set, or on the reference where none is labelled.

    A graph that costs too much on one of the reference's sets is removed again: depthwise convolutions with wide ranges, as EfficientNet's,
    can lose everything (Krishnamoorthi 2018, arXiv 1806.08342, section 3.1.5).
    """
    graphs, names = (folder / NETWORK, folder / QUANTIZED), {part.name for part in own}
    quantize_onnx(*graphs, iter(range_batches(own)))
    losses = [measure_quantization(part, graphs, calibration, threshold) for part in central or own]
    for one in [one for one in losses if one.name in names] or losses:
        loss = (one.auroc_float32.value or 0.0) - (one.auroc_int8.value or 0.0)
        say(f"int8 changes probabilities by {one.mean_difference:.4f} on average ({one.name}), AUROC by {-loss:+.4f}")
        if loss > MOST_AUROC_LOSS or one.mean_difference > MOST_CHANGE:
            say("int8 costs too much with this network and is left out")
            graphs[1].unlink()
            return []
    return losses


def _write_reference(folder: Path, own: Sequence[ExportImages], calibration: Calibration) -> tuple[ReferenceSet, Suitability]:
    reference = join_sets(own)
    index = reference.draw("reference")
    logits, features = run_features(folder / NETWORK, reference, index)
    squares = reference.pictures(index)
    statistics = pixel_statistics(squares)
    probabilities = calibration.probability(pneumonia_score(logits)).astype(np.float32)
    patients = None if reference.patients is None else [reference.patients[row] for row in index]
    kept = first_of_each(patients or list(index))  # drift is measured by patients that are independent of each other
    arrays: dict[str, Any] = {"features": features, "probabilities": probabilities, "pixel_statistics": statistics}
    if reference.labels is not None:
        arrays["labels"] = (reference.labels[index] > 0).astype(np.int64)
    if reference.groups:
        of_image = [dict(reference.groups[row].known()) for row in index]
        arrays |= {name: np.array([groups.get(kind, "") for groups in of_image]) for kind, name in REFERENCE_GROUPS.items()}
    np.savez_compressed(folder / REFERENCE, **{name: values[kept] for name, values in arrays.items()})
    described = ReferenceSet(sets=tuple(part.name for part in own), images=len(kept), statistics=PIXEL_STATISTICS)
    return described, fit_suitability(squares, features, statistics, patients=patients)


def _say_limits(
    folder: Path, reference: ReferenceSet, suitability: Suitability, pictures: Sequence[ExportImages], say: Say
) -> list[Refusals]:
    """Says at export what would otherwise be found in use: a reference too small to watch drift, and how many images are refused."""
    if reference.images < MIN_REFERENCE_IMAGES:
        say(
            f"the reference has {counted(reference.images, 'patient')}: with fewer than {MIN_REFERENCE_IMAGES} drift cannot be watched, "
            "and the reading room and `monitor` will refuse to; give more images with --reference"
        )
    found = [count_refusals(folder / NETWORK, part, suitability) for part in pictures]
    for one in found:
        say(f"{one.name}: {one.refused} of {one.images} images cannot be judged, {one.far} as far from the reference")
    return found
