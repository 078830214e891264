"""Central evaluation: the coordinator judges the global model on sets that no hospital has seen."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import CoordinatorConfig
from pneumofed.common.data.dataset import Dataset, load_dataset
from pneumofed.common.data.manifest import read_manifest
from pneumofed.common.evaluation.bootstrap import Bootstrap, bootstrap
from pneumofed.common.evaluation.metrics import metrics
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.evaluation.statistics import Statistics
from pneumofed.common.models.compute import Compute, build_compute
from pneumofed.common.models.features import predict_cached
from pneumofed.common.seeds import derive_seed
from pneumofed.server.runs.records import Metrics
from pneumofed.server.runs.summary_records import DataCounts, MetricInterval, Results

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CentralEvaluator:
    """The central sets, ready to be predicted. `sets` maps `test` and `external` to what the coordinator holds of them."""

    experiment: ExperimentConfig
    sets: Mapping[str, Dataset]
    compute: Compute
    cache_dir: Path

    def predict(self, model: nn.Module) -> dict[str, Predictions]:
        """Predictions of `model` on each set. Images and patients carry opaque ids."""
        placed = self.compute.place(model)
        results = {}
        for name, dataset in self.sets.items():
            probabilities = predict_cached(placed, dataset, self.compute, self.experiment, self.cache_dir / name)
            images = tuple(digest[:16] for digest in dataset.digests)
            results[name] = Predictions(probabilities, dataset.labels, opaque_patients(dataset.patients), images)
        return results

    def results(self, predictions: Mapping[str, Predictions], threshold: float) -> dict[str, Metrics]:
        """Metrics of each set at `threshold`, without intervals."""
        return {name: Metrics.model_validate(metrics(Statistics.of(found), threshold)) for name, found in predictions.items()}

    def intervals(self, predictions: Mapping[str, Predictions], threshold: float) -> dict[str, Results]:
        """Metrics of each set at `threshold` with bootstrap intervals by patient."""
        found = {name: bootstrap(one, threshold, bootstrap_settings(self.experiment, name)) for name, one in predictions.items()}
        return {
            name: {metric: MetricInterval.model_validate(interval) for metric, interval in intervals.items()}
            for name, intervals in found.items()
        }

    def data_reports(self) -> dict[str, DataCounts]:
        """What became of each set's images, in counts."""
        return {name: DataCounts.model_validate(dataset.report.public()) for name, dataset in self.sets.items()}


def build_central_evaluator(experiment: ExperimentConfig, coordinator: CoordinatorConfig) -> CentralEvaluator:
    """The judge over the coordinator's own sets; a set that is not configured is left out.

    Raises:
        DataError: a set is configured but cannot be used.
    """
    manifests = {"test": coordinator.test_manifest, "external": coordinator.external_manifest}
    cache = Path(coordinator.cache_dir or Path(coordinator.run_dir) / "cache")
    sets = {
        name: load_dataset(read_manifest(Path(path)), experiment.task, experiment.image, cache / name, keep_duplicates=True)
        for name, path in manifests.items()
        if path
    }
    return CentralEvaluator(experiment, sets, build_compute(coordinator.device, "fp32", coordinator.threads), cache)


def bootstrap_settings(experiment: ExperimentConfig, name: str) -> Bootstrap:
    """The bootstrap of the set `name`: the same draws of patients for every model judged on it."""
    cfg = experiment.evaluation
    return Bootstrap(cfg.bootstrap_samples, cfg.confidence, derive_seed(experiment.seed, name, "bootstrap"))


def opaque_patients(patients: tuple[str, ...]) -> tuple[str, ...]:
    """Running numbers in the order of first appearance, since a patient's own name must not stand in a run folder."""
    numbers: dict[str, str] = {}
    return tuple(numbers.setdefault(patient, f"p{len(numbers) + 1:05d}") for patient in patients)
