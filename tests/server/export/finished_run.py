"""A finished run's folder as a study leaves it, made without a federation: the small network of `tests.model_bundles` on phantoms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import yaml

from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import CoordinatorConfig
from pneumofed.common.data.manifest import ImageRecord, Manifest, write_manifest
from pneumofed.common.evaluation.bootstrap import Bootstrap, bootstrap
from pneumofed.common.evaluation.metrics import choose_threshold
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.evaluation.statistics import FEDERATED_GRID, Statistics
from pneumofed.common.imaging.augment import normalize, to_model_input
from pneumofed.common.imaging.images import fit_square
from pneumofed.common.wire.messages import ModelArrays
from pneumofed.common.wire.parameter_layout import ArraysLayout
from pneumofed.server.federation.central_evaluation import build_central_evaluator
from pneumofed.server.runs.checkpoints import Checkpoint, write_checkpoint
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.runs.records import Metrics, RoundRecord
from pneumofed.server.runs.summary_records import RunSummary
from tests.model_bundles import phantom_images, small_network
from tests.tiny import tiny_experiment


def write_finished_run(path: Path, *, patients: int = 60) -> RunFolder:
    """Writes the folder of a run that succeeded: one round, two sites, a test set whose manifest knows sex and view."""
    experiment = tiny_experiment(rounds=1, evaluation={"bootstrap_samples": 20, "threshold_policy": "youden"})
    folder = RunFolder(path)
    folder.prepare()
    folder.write_config(experiment)
    (path / "environment.json").write_text(json.dumps({"git": {"commit": "c" * 40, "dirty": False}}))
    settings = _write_central(path, patients)
    evaluator = build_central_evaluator(experiment, settings)
    network = small_network()
    validation = _validation(experiment)
    threshold = choose_threshold(validation, "youden")
    predictions = evaluator.predict(network)
    predictions["test"].write_csv(folder.predictions("test"))
    arrays = ModelArrays(*ArraysLayout.of(network).flatten(network))
    write_checkpoint(folder.best_checkpoint, Checkpoint(experiment, "run-0", 1, arrays, {}), network)
    folder.write_validation(1, validation)
    site = {"found": 40, "used": 40, "patients": 20, "train": 32, "validation": 8, "classes": {"normal": 16, "pneumonia": 24}}
    folder.append_history(RoundRecord(round=1, drawn=("a", "b"), validation=Metrics(auroc=0.9), sites={}))
    folder.write_summary(
        RunSummary.model_validate(
            {
                "status": "succeeded",
                "phantom": True,
                "app_bundle": "a" * 64,
                "threshold": vars(threshold),
                "classes": ["normal", "pneumonia"],
                "sites": {"a": site, "b": site},
                "data": evaluator.data_reports(),
                "test": bootstrap(predictions["test"], threshold.value, Bootstrap(20)),
            }
        )
    )
    return folder


def _write_central(path: Path, patients: int) -> CoordinatorConfig:
    images = path.parent / "central"
    images.mkdir(parents=True)
    records = []
    for number, (image, label) in enumerate(phantom_images(patients, seed=11)):
        file = images / f"{number}.png"
        PIL.Image.fromarray(np.rint(image.pixels * 255).astype(np.uint8)).save(file)
        sex = "F" if number % 2 else "M"
        records.append(ImageRecord(file, f"patient-{number}", ("normal", "pneumonia")[label], view="PA", sex=sex))
    write_manifest(Manifest(tuple(records)), images / "test.csv")
    settings = CoordinatorConfig(run_dir=str(path), test_manifest=str(images / "test.csv"), device="cpu", threads=1)
    (path / "coordinator.yaml").write_text(yaml.safe_dump(settings.model_dump()))
    return settings


def _validation(experiment: ExperimentConfig) -> Statistics:
    """Of the small network on other phantoms, as two hospitals would have sent it."""
    drawn = phantom_images(80, seed=12)
    pixels = np.stack([np.rint(fit_square(image.pixels, 32, experiment.image.fit) * 255).astype(np.uint8) for image, _ in drawn])
    with torch.inference_mode():
        logits = small_network()(normalize(to_model_input(pixels), 1)).double().numpy()
    labels = np.array([label for _, label in drawn])
    return Statistics.of(Predictions.from_logits(logits, labels, tuple(map(str, range(80)))), FEDERATED_GRID)
