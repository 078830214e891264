"""Central evaluation: the coordinator evaluates the global model on sets that no hospital has seen, and on groups of their patients, to see
whom it serves less well: by cause of the pneumonia, view, age and sex."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import CoordinatorConfig, central_manifests, reference_names
from pneumofed.common.data.clinical import with_clinical
from pneumofed.common.data.dataset import Dataset, load_dataset
from pneumofed.common.data.manifest import ImageRecord, read_manifest
from pneumofed.common.evaluation.bootstrap import Bootstrap, bootstrap
from pneumofed.common.evaluation.metrics import metrics
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.evaluation.statistics import Statistics
from pneumofed.common.models.compute import Compute, build_compute
from pneumofed.common.models.features import predict_cached
from pneumofed.common.seeds import derive_seed, numpy_generator
from pneumofed.server.runs.records import Metrics
from pneumofed.server.runs.summary_records import DataCounts, MetricInterval, Results

logger = logging.getLogger(__name__)
LEAST_IN_SUBGROUP = 20
"""Images; of fewer no metric says anything."""
AGE_GROUPS = ((0, 18), (18, 40), (40, 65), (65, 200))
"""Years, from and below; 18 is the border of paediatrics."""
CAUSES = ("bacterial", "viral")
"""Labels that name the cause of a pneumonia. A group of one cause has no image without pneumonia, so sensitivity alone."""


@dataclass(frozen=True)
class CentralEvaluator:
    """The central sets, ready to be predicted.

    Attributes:
        sets: by name, what the coordinator holds of them.
        own: names of those whose patients are like the hospitals' own (`CoordinatorConfig.reference_sets`).
    """

    experiment: ExperimentConfig
    sets: Mapping[str, Dataset]
    compute: Compute
    cache_dir: Path
    own: Sequence[str] = ()

    def reference(self, most: int) -> Dataset | None:
        """Joins the `own` sets in memory, the patients of each apart; None where there is none.

        Args:
            most: images; of several sets none gives more than its equal share, so that none is drowned.
        """
        parts = []
        for name in self.own:
            rows = numpy_generator("hospital reference").permutation(len(self.sets[name]))[: most // len(self.own)]
            drawn = self.sets[name].subset(rows)
            parts.append(
                drawn if len(self.own) == 1 else replace(drawn, patients=tuple(f"{name} {one}" for one in drawn.patients))
            )
        return Dataset.join(parts) if len(parts) > 1 else next(iter(parts), None)

    def predict(self, model: nn.Module) -> dict[str, Predictions]:
        """Predicts each set with `model`. Images and patients carry opaque ids."""
        placed = self.compute.place(model)
        results = {}
        for name, dataset in self.sets.items():
            probabilities = predict_cached(placed, dataset, self.compute, self.experiment, self.cache_dir / name)
            images = tuple(digest[:16] for digest in dataset.digests)
            results[name] = Predictions(probabilities, dataset.labels, opaque_patients(dataset.patients), images)
        return results

    def results(self, predictions: Mapping[str, Predictions], threshold: float) -> dict[str, Metrics]:
        """Computes the metrics of each set at `threshold`, without intervals.

        Args:
            predictions: by set, from `predict`.
            threshold: an image counts as pneumonia if its probability reaches it.
        """
        return {name: Metrics.model_validate(metrics(Statistics.of(found), threshold)) for name, found in predictions.items()}

    def intervals(self, predictions: Mapping[str, Predictions], threshold: float) -> dict[str, Results]:
        """Computes the metrics of each set at `threshold` with bootstrap intervals by patient.

        Args:
            predictions: by set, from `predict`.
            threshold: an image counts as pneumonia if its probability reaches it.

        Returns:
            By set, each metric with its interval at `evaluation.confidence`.
        """
        found = {name: bootstrap(one, threshold, bootstrap_settings(self.experiment, name)) for name, one in predictions.items()}
        return {
            name: {metric: MetricInterval.model_validate(interval) for metric, interval in intervals.items()}
            for name, intervals in found.items()
        }

    def subgroups(self, predictions: Mapping[str, Predictions], threshold: float) -> dict[str, dict[str, Metrics]]:
        """Computes the metrics of each set's groups of patients, without intervals, where the manifest knows groups.

        Args:
            predictions: by set, from `predict`.
            threshold: an image counts as pneumonia if its probability reaches it.

        Returns:
            By set and group, as `find_subgroups` names them. A group of one cause has no image without pneumonia.
        """
        parts = {
            name: {group: found.rows(rows) for group, rows in find_subgroups(self.sets[name].records).items()}
            for name, found in predictions.items()
        }
        return {name: self.results(groups, threshold) for name, groups in parts.items() if groups}

    def data_reports(self) -> dict[str, DataCounts]:
        """Counts the images of each set that were found, used and left out."""
        return {name: DataCounts.model_validate(dataset.report.public()) for name, dataset in self.sets.items()}


def build_central_evaluator(experiment: ExperimentConfig, coordinator: CoordinatorConfig) -> CentralEvaluator:
    """Builds the evaluator over the coordinator's own sets; a set that is not configured is left out.

    Args:
        experiment: task and image size, which decide how the sets are decoded.
        coordinator: manifests of the sets, cache folder, device and threads.

    Raises:
        DataError: a set is configured but cannot be used.
    """
    cache = Path(coordinator.cache_dir or Path(coordinator.run_dir) / "cache")
    sets = {
        name: with_clinical(
            load_dataset(read_manifest(Path(path)), experiment.task, experiment.image, cache / name, keep_duplicates=True),
            experiment.clinical,
            place=f"the {name} set",
        )
        for name, path in central_manifests(coordinator).items()
    }
    compute = build_compute(coordinator.device, "fp32", coordinator.threads)
    return CentralEvaluator(experiment, sets, compute, cache, reference_names(coordinator, sets))


def bootstrap_settings(experiment: ExperimentConfig, name: str) -> Bootstrap:
    """Builds the bootstrap of one set: the same draws of patients for every model that is evaluated on it.

    Args:
        experiment: number of resamples, confidence and seed.
        name: of the set; each has its own draws.
    """
    cfg = experiment.evaluation
    return Bootstrap(cfg.bootstrap_samples, cfg.confidence, derive_seed(experiment.seed, name, "bootstrap"))


def opaque_patients(patients: tuple[str, ...]) -> tuple[str, ...]:
    """Replaces names by running numbers in the order of first appearance, since a patient's own name must not stand in a run folder."""
    numbers: dict[str, str] = {}
    return tuple(numbers.setdefault(patient, f"p{len(numbers) + 1:05d}") for patient in patients)


def find_subgroups(records: Sequence[ImageRecord | None]) -> dict[str, NDArray[np.int64]]:
    """Finds the groups of a set that its manifest knows and that are neither all of it nor smaller than `LEAST_IN_SUBGROUP`.

    Args:
        records: manifest row of each image; None where it is not known.

    Returns:
        By name (`cause viral`, `sex F`, `age 18 to 39`, `view AP`), the positions of the group's images, ascending. An image may be in
        several groups, and in none.
    """
    found = {}
    for name, belongs in _groups([record for record in records if record is not None]).items():
        rows = np.flatnonzero([record is not None and belongs(record) for record in records]).astype(np.int64)
        if LEAST_IN_SUBGROUP <= len(rows) < len(records):
            found[name] = rows
    return found


def _groups(records: Sequence[ImageRecord]) -> dict[str, Callable[[ImageRecord], bool]]:
    groups: dict[str, Callable[[ImageRecord], bool]] = {}
    for cause in CAUSES:
        groups[f"cause {cause}"] = lambda record, cause=cause: record.label == cause  # type: ignore[misc]
    for sex in sorted({record.sex for record in records if record.sex}):
        groups[f"sex {sex}"] = lambda record, sex=sex: record.sex == sex  # type: ignore[misc]
    for low, high in AGE_GROUPS:
        name = f"age {low} to {high - 1}" if high < 200 else f"age {low} and over"
        groups[name] = lambda record, low=low, high=high: record.age_years is not None and low <= record.age_years < high  # type: ignore[misc]
    for view in sorted({record.view for record in records if record.view}):
        groups[f"view {view}"] = lambda record, view=view: record.view == view  # type: ignore[misc]
    return groups
