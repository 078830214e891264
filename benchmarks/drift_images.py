"""Held-out real images of a run, and what changed scanners make of them, in the numbers that drift is told by; kept in a cache folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pneumofed.client.federation.site_data import load_site, read_site_config
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.data.dataset import Dataset, load_dataset
from pneumofed.common.data.manifest import DataReport
from pneumofed.common.data.sources.public_sets import read_kaggle
from pneumofed.common.imaging.images import fit_square
from pneumofed.common.model_bundle.calibration import fit_calibration, pneumonia_score
from pneumofed.common.model_bundle.image_statistics import PIXEL_STATISTICS, pixel_statistics
from pneumofed.common.models.build import build_model, classifier_of
from pneumofed.common.models.compute import build_compute
from pneumofed.common.models.features import compute_features
from pneumofed.common.seeds import numpy_generator
from pneumofed.common.wire.parameter_layout import ArraysLayout
from pneumofed.inference.monitor.reference import Observations, Reference
from pneumofed.server.runs.checkpoints import read_checkpoint
from pneumofed.simulation.phantoms.scanners import VirtualScanner, apply

Rows = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

FIRST_DAY = 739_000
PATIENTS_A_DAY, DAYS_A_WEEK = 20, 5
REFERENCE_PATIENTS, QUIET_PATIENTS = 250, 100
SCANNERS = {
    "contrast +0.9": VirtualScanner("", contrast=0.9),
    "contrast +0.45": VirtualScanner("", contrast=0.45),
    "contrast -0.8": VirtualScanner("", contrast=-0.8),
    "gamma 1.55 (darker)": VirtualScanner("", gamma=1.55),
    "blur 0.012": VirtualScanner("", blur=0.012),
    "noise 0.05": VirtualScanner("", noise=0.05),
    "blur 0.006": VirtualScanner("", blur=0.006),
    "noise 0.02": VirtualScanner("", noise=0.02),
    "collimation 0.05": VirtualScanner("", collimation=0.05),
    "zoom 1.12": VirtualScanner("", zoom=1.12),
}
"""Each property at the end of the range that the simulation draws from, and some within."""
INVERTED, RESOLUTION = "MONOCHROME1 not inverted", "half the resolution"


@dataclass(frozen=True)
class Pool:
    """Images, one a patient: features [N, D], scores [N] before calibration, statistics [N, K], labels [N]."""

    features: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float64]
    statistics: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]

    def take(self, rows: Rows) -> Pool:
        return Pool(*(values[rows] for values in vars(self).values()))


@dataclass(frozen=True)
class Bench:
    """What every measurement needs.

    Attributes:
        plain: all patients, as they are.
        early, late: rows of `plain`: those before a change, and those after it.
        changed: by change, the patients `late` as it shows them.
    """

    plain: Pool
    early: Rows
    late: Rows
    changed: dict[str, Pool]

    def reference(self, rows: Rows, name: str) -> Reference:
        own = self.plain.take(rows)
        arrays: dict[str, npt.NDArray[Any]] = {"features": own.features, "probabilities": self.probabilities(own)}
        return Reference.of(name, PIXEL_STATISTICS, arrays | {"pixel_statistics": own.statistics, "labels": own.labels})

    def probabilities(self, pool: Pool) -> npt.NDArray[np.float64]:
        positive = self.plain.labels.astype(np.float64)
        fitted = fit_calibration(self.plain.scores, 1.0 - positive, positive, "temperature", fitted_on="the pool")
        return fitted.probability(pool.scores)

    def observe(self, pool: Pool, reference: Reference, patients_a_day: int = PATIENTS_A_DAY) -> Observations:
        """`pool` as it arrives, on five days a week, read by a reader who is always right."""
        n, p = len(pool.labels), self.probabilities(pool)
        working = np.arange(n) // patients_a_day
        days = FIRST_DAY + working // DAYS_A_WEEK * 7 + working % DAYS_A_WEEK
        called = p >= 0.5
        return Observations(
            days=days,
            scanners=np.full(n, "scanner A"),
            units=np.arange(n).astype(np.str_),
            statistics=pool.statistics.astype(np.float64),
            embedding=reference.embedding.map(pool.features),
            probabilities=p,
            refused=np.zeros(n, np.bool_),
            expected_errors=np.where(called, 1.0 - p, p),
            corrected=called != (pool.labels == 1),
            read_order=np.arange(n),
            read_days=days,
        )


def load_bench(run: Path, data: Path, cache: Path) -> Bench:
    """The first image of each validation patient of the run's hospitals and of each test patient, by the run's best network."""
    checkpoint = read_checkpoint(run / "checkpoints" / "best.pt")
    cfg = checkpoint.experiment
    model = build_model(cfg.model.without_weights(), cfg.task, seed=0)
    ArraysLayout.of(model).load(model, checkpoint.arrays.parameters, checkpoint.arrays.statistics)
    images, labels = _images(run, data, cache, cfg)
    plain = _pool(model, images, labels, cache / "plain.npz")
    rows = numpy_generator("drift bench", "late").permutation(len(labels))
    early, late = np.split(rows, [REFERENCE_PATIENTS + QUIET_PATIENTS])
    changed = {}
    for name in (*SCANNERS, INVERTED, RESOLUTION):
        file = cache / f"{name.split(' (')[0].replace(' ', '_')}.npz"
        changed[name] = _pool(model, images[late], labels[late], file, name)
    return Bench(plain, early, late, changed)


def _images(run: Path, data: Path, cache: Path, cfg: ExperimentConfig) -> tuple[Pixels, Rows]:
    """uint8 [N, S, S] and labels [N]: the first image of each patient."""
    file = cache / "images.npz"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        parts = [_first_images(held_out) for held_out in _held_out(run, data, cache, cfg)]
        np.savez(file, images=np.concatenate([part[0] for part in parts]), labels=np.concatenate([part[1] for part in parts]))
    with np.load(file) as arrays:
        return arrays["images"], arrays["labels"]


def _held_out(run: Path, data: Path, cache: Path, cfg: ExperimentConfig) -> Iterator[Dataset]:
    manifest, _ = read_kaggle(data, ("test",))
    yield load_dataset(manifest, cfg.task, cfg.image, cache / "test")
    for path in sorted((run / "sites").glob("*.yaml")):
        config = read_site_config(path)
        yield load_site(config.model_copy(update={"work_dir": str(cache / config.name)}), cfg).validation


def _first_images(data: Dataset) -> tuple[Pixels, Rows]:
    rows = np.sort(np.unique(np.array(data.patients), return_index=True)[1])
    return np.asarray(data.pixels[rows]), data.labels[rows]


def _change(images: Pixels, name: str) -> Pixels:
    rng = numpy_generator("drift bench", name)
    shown = [_show_image((image / np.float32(255.0)).astype(np.float32), name, rng) for image in images]
    return np.rint(np.stack(shown) * 255.0).astype(np.uint8)


def _show_image(image: npt.NDArray[np.float32], name: str, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    if name == INVERTED:
        return 1.0 - image
    if name == RESOLUTION:
        return fit_square(fit_square(image, len(image) // 2, "pad"), len(image), "pad")
    return apply(image, SCANNERS[name], rng)


def _pool(model: torch.nn.Module, images: Pixels, labels: Rows, file: Path, change: str = "") -> Pool:
    if not file.exists():
        _compute(model, _change(images, change) if change else images, labels, file)
    with np.load(file) as arrays:
        return Pool(arrays["features"], arrays["scores"], arrays["statistics"], labels)


def _compute(model: torch.nn.Module, images: Pixels, labels: Rows, file: Path) -> None:
    each = tuple(str(row) for row in range(len(labels)))
    data = Dataset(images, labels, each, each, DataReport())
    features = compute_features(model, data, build_compute("cpu", "fp32"), 1)
    classifier = classifier_of(model)
    logits = features @ classifier.weight.detach().numpy().T + classifier.bias.detach().numpy()
    statistics = pixel_statistics((images / np.float32(255.0)).astype(np.float32))
    np.savez(file, features=features, scores=pneumonia_score(logits), statistics=statistics)
