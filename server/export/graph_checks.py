"""The images that an export needs at the coordinator, and what is found on them: whether an exported graph is its network, and what int8
costs. They also serve to quantise the graph, and as the reference of later use.

check_graph             float32 against PyTorch, image by image
measure_quantization    int8 against float32, in AUROC
count_refusals          how many images the bundle would not judge
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import nn

from pneumofed.common.config.experiment import ImageConfig
from pneumofed.common.config.parties import central_manifests
from pneumofed.common.data.cache import decode_for_cache
from pneumofed.common.data.clinical import with_clinical
from pneumofed.common.data.dataset import load_dataset
from pneumofed.common.data.manifest import ImageRecord, read_manifest
from pneumofed.common.errors import BundleError, ConfigError, ImageError
from pneumofed.common.evaluation.bootstrap import Bootstrap, bootstrap
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.imaging.patient_groups import PatientGroups, groups_of
from pneumofed.common.imaging.types import ImageInfo
from pneumofed.common.model_bundle.calibration import Calibration, pneumonia_score
from pneumofed.common.model_bundle.image_statistics import as_pictures, pixel_statistics
from pneumofed.common.model_bundle.manifest import GraphCheck, IntervalEstimate, Quantization
from pneumofed.common.model_bundle.predictor import graph_inputs, open_session
from pneumofed.common.model_bundle.series import find_series, read_series_header
from pneumofed.common.model_bundle.suitability import Inputs, Reason, Suitability, check_suitability
from pneumofed.common.seeds import numpy_generator
from pneumofed.server.export.card import Refusals
from pneumofed.server.export.graph import run_torch
from pneumofed.server.export.source import Source

MOST_IMAGES_OF_A_SET = 2000
"""Of each set: more make no statistic of use better."""

GRAPH_TOLERANCE = 1e-4
"""Largest difference from PyTorch with which a graph is given to anybody."""
CHECKED_IMAGES = 128
RANGE_IMAGES = 128
"""From which the ranges of int8 are taken; Krishnamoorthi 2018 (arXiv 1806.08342, section 3.1.4) finds about a hundred enough."""
CHECKED_VOLUMES = 32
"""In place of both numbers: each is as much work as its slices, and has as many places to take ranges from."""
COMPARED_IMAGES = 1000
GRAPH_BATCH = 16
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class ExportImages:
    """Images of one set as the network sees them.

    Attributes:
        name: of a held-out set, or `reference`.
        pixels: uint8 [N, S, S], of volumes [N, slices, S, S].
        labels: int64 [N] of the task; None where nobody labelled them.
        records: manifest rows by the first 16 digits of their file's SHA-256, as in the run's predictions; empty without a manifest.
        patients: of each image; None where nobody knows.
        skipped: files that could not be used.
        groups: of the patient of each image; empty where nobody knows.
        clinical: clinical values, float32 [N, K]; None where the model takes none, or none is known.
        sizes: of several sets that were joined, the images of each, in order.
    """

    name: str
    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64] | None
    records: dict[str, ImageRecord]
    patients: tuple[str, ...] | None = None
    skipped: int = 0
    groups: tuple[PatientGroups, ...] = ()
    clinical: npt.NDArray[np.float32] | None = None
    sizes: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)

    def inputs(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Builds the graph's input for the images at `index`, float32 [n, 1, S, S] in [0, 1], of volumes [n, 1, slices, S, S]."""
        return (self.pixels[index].astype(np.float32) / np.float32(255.0))[:, None]

    def pictures(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Shows the images at `index` as statistics see them, float32 [n, S, S], volumes from the front (`as_pictures`)."""
        return as_pictures(self.pixels[index])

    @property
    def are_volumes(self) -> bool:
        return self.pixels.ndim == 4

    def batches(self, index: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """Divides positions into lots that a graph runs on at a time; a volume by itself, which is as large as its slices."""
        size = 1 if self.are_volumes else GRAPH_BATCH
        return [index[start : start + size] for start in range(0, len(index), size)]

    def values(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.float32] | None:
        """Picks the clinical values of the images at `index`, float32 [n, K]."""
        return None if self.clinical is None else self.clinical[index]

    def draw(self, purpose: str, most: int = MOST_IMAGES_OF_A_SET) -> npt.NDArray[np.int64]:
        """Draws positions, int64 [n], in random order, the same each time; of no joined set more than its share, so that none is drowned.

        Args:
            purpose: names the draw; each purpose has its own order.
            most: how many at most.
        """
        order = numpy_generator("export", purpose, self.name).permutation(len(self))
        part = np.searchsorted(np.cumsum(self.sizes[:-1]), order, side="right")
        for number in range(len(self.sizes)):
            order[np.flatnonzero(part == number)[most // len(self.sizes) :]] = -1
        return order[order >= 0][:most].astype(np.int64)


def load_central(source: Source) -> list[ExportImages]:
    """Loads the run's central sets through the coordinator's cache; those whose manifest is gone are left out."""
    if source.coordinator is None:
        return []
    settings, experiment = source.coordinator, source.experiment
    cache = Path(settings.cache_dir or Path(settings.run_dir) / "cache")
    found = []
    for name, manifest in central_manifests(settings).items():
        if Path(manifest).is_file():
            records = read_manifest(Path(manifest))
            dataset = load_dataset(records, experiment.task, experiment.image, cache / name, keep_duplicates=True)
            dataset = with_clinical(dataset, experiment.clinical, place=f"the {name} set")
            by_digest = {digest[:16]: record for digest, record in zip(dataset.digests, dataset.records, strict=True)}
            groups = tuple(groups_of(record.age_years, record.sex, record.view) for record in dataset.records)
            known = dataset.pixels, dataset.labels, by_digest, dataset.patients
            found.append(ExportImages(name, *known, groups=groups, clinical=dataset.clinical))
    return found


def join_sets(parts: Sequence[ExportImages]) -> ExportImages:
    """Joins the images of one or more labelled sets as one, the patients of each apart; a single set stays what it is."""
    if len(parts) == 1:
        return parts[0]
    values = [part.clinical for part in parts if part.clinical is not None]
    return ExportImages(
        " and ".join(part.name for part in parts),
        np.concatenate([part.pixels for part in parts]),
        np.concatenate([part.labels for part in parts if part.labels is not None]),
        {digest: record for part in parts for digest, record in part.records.items()},
        tuple(f"{part.name} {patient}" for part in parts for patient in part.patients or map(str, range(len(part)))),
        groups=tuple(groups for part in parts for groups in part.groups or (PatientGroups(),) * len(part)),
        clinical=np.concatenate(values) if len(values) == len(parts) else None,
        sizes=tuple(map(len, parts)),
    )


def load_folders(folders: Sequence[Path], image: ImageConfig) -> ExportImages:
    """Loads all images below `folders`, whatever their names. Files that cannot be read are counted in `skipped`.

    Args:
        folders: each a folder, or a manifest (.csv).
        image: how images are fitted into squares.

    Raises:
        ConfigError: a folder does not exist.
        BundleError: no image can be used.
    """
    known = {path: groups for folder in folders for path, groups in _files(folder, series=image.slices > 0).items()}
    paths = list(known)
    order = numpy_generator("export", "folders").permutation(len(paths))[:MOST_IMAGES_OF_A_SET]
    squares, groups, skipped = [], [], 0
    for position in sorted(order):
        try:
            squares.append(decode_for_cache(paths[position], image))
            groups.append(known[paths[position]] or _groups_in(paths[position]))
        except ImageError:
            skipped += 1
    if not squares:
        raise BundleError(
            f"none of the {len(paths)} files of --reference is an image that can be read; give a folder of radiographs"
        )
    return ExportImages("reference", np.stack(squares), None, {}, skipped=skipped, groups=tuple(groups))


def _files(folder: Path, *, series: bool) -> dict[Path, PatientGroups | None]:
    """The files, with the groups that a manifest states; of CT the folders of series and the NIfTI files."""
    if folder.is_dir() and series:
        return dict.fromkeys(find_series([folder]))
    if folder.is_dir():
        return dict.fromkeys(sorted(path for path in folder.rglob("*") if path.is_file()))
    if folder.suffix.lower() == ".csv" and folder.is_file():
        return {one.path: groups_of(one.age_years, one.sex, one.view) for one in read_manifest(folder).records}
    raise ConfigError(f"--reference {folder}: expected a folder of images or a manifest (.csv)")


def _groups_in(path: Path) -> PatientGroups:
    """The groups that a DICOM file states, or the first one of a series; nothing is known of others."""
    from pneumofed.common.imaging.dicom_header import read_header

    try:
        header = read_series_header(path) if path.is_dir() else read_header(path)
    except ImageError:
        return PatientGroups()
    if header is None:
        return PatientGroups()
    return groups_of(header.age_years, header.sex, header.view)


def count_refusals(graph: Path, part: ExportImages, suitability: Suitability) -> Refusals:
    """Counts the images of one set that the bundle would refuse to judge.

    Args:
        graph: the ONNX file.
        part: the set; at most `COMPARED_IMAGES` of it are tried.
        suitability: of the bundle.
    """
    index = part.draw("refusals", COMPARED_IMAGES)
    _, features = run_features(graph, part, index)
    squares = part.pictures(index)
    info = ImageInfo(
        "png", squares.shape[1], squares.shape[2], 8
    )  # what the files say of themselves is not asked: only the tests are
    inputs = Inputs(squares, features, pixel_statistics(squares), [info] * len(index), part.are_volumes)
    results = check_suitability(suitability, inputs)
    reasons = [result.reasons for result in results]
    return Refusals(part.name, len(index), sum(map(bool, reasons)), sum(Reason.FAR_FROM_REFERENCE in found for found in reasons))


def check_graph(network: nn.Module, in_channels: int, graph: Path, pictures: list[ExportImages]) -> GraphCheck:
    """Measures how far `graph` is from `network` on images of all sets.

    Args:
        network: in evaluation mode.
        in_channels: of the network, 1 or 3.
        graph: the ONNX file.
        pictures: the sets; `CHECKED_IMAGES` of each are tried.

    Returns:
        Largest differences: in a logit, in P(pneumonia), in any other output.

    Raises:
        BundleError: P(pneumonia) differs by more than `GRAPH_TOLERANCE`, or another output, relative to its largest value.
    """
    session = open_session(graph.read_bytes())
    worst, images = np.zeros(3), 0
    for part in pictures:
        index = part.draw("graph", CHECKED_VOLUMES if part.are_volumes else CHECKED_IMAGES)
        images += len(index)
        for rows in part.batches(index):
            inputs = part.inputs(rows)
            for values in (
                (part.values(rows), None) if part.clinical is not None else (None,)
            ):  # with them, and the image by itself
                mine = session.run(None, graph_inputs(session, inputs, values))
                worst = np.maximum(worst, _differences(mine, run_torch(network, in_channels, inputs, values)))
    found = GraphCheck(images=images, logits=float(worst[0]), probability=float(worst[1]), features=float(worst[2]))
    if not worst.max() <= GRAPH_TOLERANCE:  # NaN fails too
        raise BundleError(
            f"the ONNX graph differs from PyTorch by {worst.max():.2g} on {images} images, "
            f"{GRAPH_TOLERANCE:g} is allowed: nothing was exported"
        )
    return found


def range_batches(parts: Sequence[ExportImages]) -> list[Floats]:
    """Loads the images that int8 takes its ranges from, as many of each set, float32 [n, 1, S, S] each."""
    return [one.inputs(rows) for one in parts for rows in one.batches(one.draw("int8 ranges", _range_images(one) // len(parts)))]


def measure_quantization(
    part: ExportImages, graphs: tuple[Path, Path], calibration: Calibration, threshold: float
) -> Quantization:
    """Measures what int8 costs against float32, on images that its ranges were not taken from where there are others.

    Args:
        part: one set.
        graphs: files of the float32 and of the int8 graph.
        calibration: what turns logits into probabilities.
        threshold: on the calibrated probability.
    """
    order, ranges = part.draw("int8 ranges"), _range_images(part)
    index = order[ranges:][:COMPARED_IMAGES] if len(order) > ranges else order
    exact, coarse = (run_logits(graph, part, index) for graph in graphs)
    first, second = (calibration.probability(pneumonia_score(logits)) for logits in (exact, coarse))
    return Quantization(
        name=part.name,
        images=len(index),
        calibration_images=min(len(order), ranges),
        auroc_float32=_auroc(exact, part, index),
        auroc_int8=_auroc(coarse, part, index),
        mean_difference=float(np.abs(first - second).mean()),
        max_difference=float(np.abs(first - second).max()),
        changed_decisions=int(((first >= threshold) != (second >= threshold)).sum()),
    )


def run_logits(graph: Path, part: ExportImages, index: npt.NDArray[np.int64]) -> Floats:
    """Computes the logits of images with ONNX Runtime, float32 [n, C].

    Args:
        graph: the ONNX file.
        part: one set.
        index: int64 [n], positions in the set.
    """
    session = open_session(graph.read_bytes())
    found = [session.run(["logits"], graph_inputs(session, part.inputs(rows), part.values(rows))) for rows in part.batches(index)]
    return np.concatenate([logits for (logits,) in found])


def run_features(graph: Path, part: ExportImages, index: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Computes logits and features of images with ONNX Runtime.

    Args:
        graph: the ONNX file.
        part: one set.
        index: int64 [n], positions in the set.

    Returns:
        Logits float32 [n, C] and features float32 [n, D].
    """
    session = open_session(graph.read_bytes())
    names = ["logits", "features"]
    found = [session.run(names, graph_inputs(session, part.inputs(rows), part.values(rows))) for rows in part.batches(index)]
    return np.concatenate([logits for logits, _ in found]), np.concatenate([features for _, features in found])


def _range_images(part: ExportImages) -> int:
    return CHECKED_VOLUMES if part.are_volumes else RANGE_IMAGES


def _differences(graph: list[Floats], torch: tuple[Floats, ...]) -> npt.NDArray[np.float64]:
    """(of a logit, of P(pneumonia), of anything else), all but the second relative to the largest value where that is above 1."""
    logits = float(np.abs(graph[0] - torch[0]).max()) / max(1.0, float(np.abs(torch[0]).max()))
    first, second = (Calibration().probability(pneumonia_score(values[0])) for values in (graph, torch))
    others = [
        float(np.abs(mine - yours).max()) / max(1.0, float(np.abs(yours).max()))
        for mine, yours in zip(graph[1:], torch[1:], strict=True)
    ]
    return np.array([logits, float(np.abs(first - second).max()), max(others)])


def _auroc(logits: Floats, part: ExportImages, index: npt.NDArray[np.int64]) -> IntervalEstimate:
    """With its bootstrap interval by patient; undefined where nobody labelled the images."""
    if part.labels is None:
        return IntervalEstimate(value=None)
    patients = tuple(part.patients[row] for row in index) if part.patients else tuple(map(str, index))
    predictions = Predictions.from_logits(logits, part.labels[index], patients)
    found = bootstrap(predictions, 0.5, Bootstrap())["auroc"]
    known = {name: float(found[name]) if np.isfinite(found[name]) else None for name in ("value", "low", "high")}
    return IntervalEstimate(**known)
