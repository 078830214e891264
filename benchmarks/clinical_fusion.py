"""What clinical values add to a radiograph, where the optimum is known: federated AUROC beside that of the Bayes classifier.

    python -m benchmarks.clinical_fusion                                             phantoms, about two minutes
    python -m benchmarks.clinical_fusion --real FOLDER --rounds 6                    age, sex and view of a real set with a labels.csv

Phantom patients get values by the model of `simulation.phantoms.clinical`, in which image and values each carry a part of the truth. Four
hospitals train on the image only, and with both by each kind of fusion. Each fused model is judged once more on the images only, as where
nobody has values. On real images no optimum is known; a set of few patients from many hospitals shows what weak values do.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.local_runs import Run, run_all
from pneumofed.common.config.parties import CoordinatorConfig
from pneumofed.common.config.reader import build_config, read_yaml
from pneumofed.common.data.manifest import ImageRecord, Manifest, write_manifest
from pneumofed.common.evaluation.bootstrap import Bootstrap, bootstrap
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.seeds import derive_seed
from pneumofed.simulation.phantoms.clinical import PHANTOM_SCHEMA, bayes_auroc, give_values
from pneumofed.simulation.phantoms.image import mark_folder
from pneumofed.simulation.phantoms.phantom import draw_patients, draw_picture

FUSIONS = ("concatenate", "film")
HOSPITALS = 4
REAL_SCHEMA: dict[str, Any] = {
    "columns": [
        {"name": "age", "unit": "years", "low": 0, "high": 120},
        {"name": "sex", "kind": "codes", "codes": ["F", "M"]},
        {"name": "view", "kind": "codes", "codes": ["AP", "AP Supine", "PA"]},
    ]
}


def main() -> None:
    parser = argparse.ArgumentParser(description="What clinical values add to a radiograph.")
    parser.add_argument("--patients", type=int, default=1200)
    parser.add_argument("--real", type=Path, help="folder with a labels.csv that has age, sex and view, in the place of phantoms")
    parser.add_argument("--image-size", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        data = str(options.real) if options.real else str(draw_set(Path(folder) / "set", options))
        schema = REAL_SCHEMA if options.real else PHANTOM_SCHEMA.model_dump()
        runs = [_run(fusion, data, schema, options, folder) for fusion in ("image only", *FUSIONS)]
        run_all(runs)
        rows = {run.name: judge(Path(folder) / run.name, values=True) for run in runs}
        rows |= {f"{name}, judged on the image only": judge(Path(folder) / name, values=False) for name in FUSIONS}
    print(json.dumps({**vars(options), "real": str(options.real or ""), "seconds": round(time.perf_counter() - started)}))
    for name, found in rows.items():
        print(f"{name:40} test AUROC {found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})")
    if not options.real:
        for name, seen in {"image": {"values": False}, "values": {"image": False}, "image and values": {}}.items():
            print(f"{'optimum from ' + name:40} test AUROC {bayes_auroc(**seen):.3f}")


def draw_set(folder: Path, options: argparse.Namespace) -> Path:
    """Draws phantoms, one image a patient, and gives them values; returns their table.

    Args:
        folder: new.
        options: number of patients, side of the images, seed.
    """
    folder.mkdir()
    mark_folder(folder, f"{options.patients} patients with clinical values, seed {options.seed}")
    records = []
    for patient in draw_patients("train", options.patients, options.seed):
        path = folder / f"{patient.number}-{patient.label}.png"
        pixels = draw_picture(patient, 1, "train", options.seed, max(64, options.image_size))
        Image.fromarray(np.round(pixels * 255.0).astype(np.uint8)).save(path)
        records.append(ImageRecord(path, f"{patient.label}-{patient.number}", patient.label))
    (manifest,) = give_values([Manifest(tuple(records))], derive_seed(options.seed, "clinical values"))
    write_manifest(manifest, folder / "manifest.csv")
    return folder / "manifest.csv"


def _run(fusion: str, data: str, schema: dict[str, Any], options: argparse.Namespace, folder: str) -> Run:
    experiment: dict[str, Any] = {
        "rounds": options.rounds,
        "seed": options.seed,
        "image": {"size_px": options.image_size},
        "model": {"name": "small_cnn"},
        "training": {"local_epochs": 3, "batch_size": 16, "learning_rate": 4e-3, "precision": "fp32"},
        "evaluation": {"every_rounds": options.rounds, "bootstrap_samples": 0},
    }
    if fusion != "image only":
        experiment["clinical"] = {**schema, "fusion": fusion}
    simulation = {"data": data, "hospitals": HOSPITALS, "partition": "iid", "hold_out": {"test": 0.4}}
    return Run(fusion.replace(" ", "-"), experiment, simulation, folder)


def judge(run: Path, *, values: bool) -> dict[str, float]:
    """Computes the AUROC of a run's model on its test set, with its 95 % interval by patient.

    Args:
        run: its folder.
        values: whether the model sees the test patients' clinical values.
    """
    from pneumofed.server.federation.central_evaluation import build_central_evaluator
    from pneumofed.server.runs.checkpoints import read_checkpoint
    from pneumofed.server.runs.folder import RunFolder

    settings = build_config(CoordinatorConfig, read_yaml(run / "coordinator" / "coordinator.yaml"))
    checkpoint = read_checkpoint(RunFolder(run).best_checkpoint)
    evaluator = build_central_evaluator(checkpoint.experiment, settings)
    if not values:
        sets = {name: replace(found, clinical=None) for name, found in evaluator.sets.items()}
        evaluator = replace(evaluator, sets=sets)
    found: Predictions = evaluator.predict(_network(checkpoint))["test"]
    area = bootstrap(found, 0.5, Bootstrap(500))["auroc"]
    return {name: float(area[name]) for name in ("value", "low", "high")}


def _network(checkpoint: Any) -> Any:
    from pneumofed.common.models.build import build_model
    from pneumofed.common.wire.parameter_layout import ArraysLayout

    network = build_model(checkpoint.experiment.model.without_weights(), checkpoint.experiment.task, seed=0)
    ArraysLayout.of(network).load(network, checkpoint.arrays.parameters, checkpoint.arrays.statistics)
    return network


if __name__ == "__main__":
    main()
