"""Continual learning on real images, end to end: does the gate release a model that learnt from readers, and stop one that was spoilt?

    python -m benchmarks.continual --data DATA --external EXTERNAL --out FOLDER

Hospitals begin with part of their patients, and some labels are wrong. Run 1 trains on that. Then the reading rooms' exports correct the
wrong labels and bring the other patients; run 2 goes on from run 1's bundle, and the gate compares the two. Run 3 goes on from run 1's
bundle too, but two hospitals have normal and pneumonia exchanged.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pneumofed.client.data.feedback import add_feedback
from pneumofed.client.federation.site_data import read_site_config
from pneumofed.client.site.folder import SiteFolder
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import SiteConfig
from pneumofed.common.config.reader import build_config, merge
from pneumofed.common.data.manifest import ImageRecord, Manifest, read_manifest, write_manifest
from pneumofed.common.data.tables import TableWriter
from pneumofed.common.evaluation.comparison import Margins
from pneumofed.common.model_bundle.bundle import Bundle, start_values
from pneumofed.common.seeds import numpy_generator
from pneumofed.common.wire.keys import NodeKey, PrivateKey, parse_private_key
from pneumofed.server.release.gate import Evidence, decide_release
from pneumofed.server.release.release import write_release_page
from pneumofed.server.runs.records import CENTRAL_SETS
from pneumofed.server.runs.summary_records import RunSummary

FLIPPED_SITES = 2


@dataclass(frozen=True)
class Bench:
    """One benchmark: `folder` holds the runs, `experiment` is what all of them share."""

    folder: Path
    experiment: dict[str, Any]
    configs: Sequence[SiteConfig]
    coordinator: Path
    key: PrivateKey

    def run(self, name: str, parent: Bundle | None) -> tuple[RunSummary, Bundle]:
        """Trains over the sites as they are now, from `parent` if there is one; the summary and the bundle of the best round."""
        from pneumofed.client.app import app as client_app
        from pneumofed.common.config.parties import CoordinatorConfig
        from pneumofed.common.config.reader import read_yaml
        from pneumofed.server.federation.run import run_federation
        from pneumofed.simulation.local_grid import LocalGrid

        start = start_values(parent, parent.folder) if parent else {}
        experiment = build_config(ExperimentConfig, merge(self.experiment, start))
        settings = build_config(CoordinatorConfig, {**read_yaml(self.coordinator), "run_dir": str(self.folder / name)})
        nodes = [{"partition-id": number} for number in range(len(self.configs))]
        grid = LocalGrid(client_app, nodes, {"sites": str(self.folder / "layout" / "sites")})
        summary = run_federation(grid, experiment, settings)
        return summary, seal_run(self.folder / name, experiment, parent, self.key)

    def evidence(self, old: Bundle, new: Bundle) -> Evidence:
        from pneumofed.client.data.bundles import compare_at_site
        from pneumofed.server.release.release import Sets, compare_on_sets

        sets = Sets.of_run(self.folder / "layout")
        sites = {config.name: compare_at_site(config, old, new).comparison for config in self.configs}
        return Evidence(
            compare_on_sets(old, new, sets.manifests, sets.cache), sites, list(sites), len(sites), tuple(sets.manifests)
        )


def seal_run(run: Path, experiment: ExperimentConfig, parent: Bundle | None, key: PrivateKey) -> Bundle:
    """The bundle of the run's best round, with weights and no graph: the gate needs none."""
    from datetime import UTC, datetime

    import torch

    from pneumofed.common.config.classes import classes_of
    from pneumofed.common.imaging.augment import GREY_MEAN, GREY_STD
    from pneumofed.common.model_bundle.bundle import load_bundle
    from pneumofed.common.model_bundle.calibration import Calibration
    from pneumofed.common.model_bundle.manifest import (
        WEIGHTS,
        BundleManifest,
        CardFacts,
        OperatingPoint,
        Preprocessing,
        Provenance,
    )
    from pneumofed.common.model_bundle.sealing import hash_bundle_file, seal_bundle
    from pneumofed.server.runs.folder import RunFolder

    files, folder = RunFolder(run), run / "bundle"
    folder.mkdir()
    checkpoint = torch.load(files.best_checkpoint, weights_only=True)
    torch.save(checkpoint["model"], folder / WEIGHTS)
    threshold, image = files.read_summary().threshold, experiment.image
    assert threshold is not None  # a run that succeeded has one
    origin = Provenance(
        pneumofed="benchmark",
        run=checkpoint["run"],
        round=checkpoint["round"],
        checkpoint=hash_bundle_file(files.best_checkpoint),
        config=hash_bundle_file(files.config),
        split_seed=experiment.split_seed,
        validation_fraction=experiment.training.validation_fraction,
        parent=parent.digest if parent else None,
    )
    point = OperatingPoint(
        value=threshold.value,
        policy=experiment.evaluation.threshold_policy,
        target=experiment.evaluation.target,
        raw_value=threshold.value,
    )
    manifest = BundleManifest(
        name=run.name,
        created=datetime.now(UTC),
        task=experiment.task,
        classes=classes_of(experiment.task),
        preprocessing=Preprocessing(size_px=image.size_px, fit=image.fit, in_channels=1, mean=(GREY_MEAN,), std=(GREY_STD,)),
        model=experiment.model.without_weights(),
        threshold=point,
        calibration=Calibration(),
        card=CardFacts(sites=0, training_images=0, training_patients=0, provenance=origin),
    )
    seal_bundle(folder, manifest, key)
    return load_bundle(folder, [key.public_key()])


def make_site_folder(config: SiteConfig) -> SiteFolder:
    """A site folder for a simulated hospital, whose configuration otherwise lies with those of the other hospitals."""
    folder = Path(config.work_dir) / "site"
    folder.mkdir(exist_ok=True)
    (folder / "site.yaml").write_text(config.model_dump_json(exclude_none=True))
    return SiteFolder.open(folder)


def hold_back(config: SiteConfig, known: float, wrong: float, seed: int) -> Path:
    """Leaves the site `known` of its patients, `wrong` of whose images have the other label; returns the export with which its readers
    will correct these and bring the others.
    """
    path, generator = Path(config.manifest), numpy_generator(seed, config.name, "continual")
    records = read_manifest(path).records
    patients = sorted({record.patient for record in records})
    early = set(generator.permutation(patients)[: round(known * len(patients))].tolist())
    first = [record for record in records if record.patient in early]
    mistaken = set(generator.permutation(len(first))[: round(wrong * len(first))].tolist())
    kept = [exchange(record) if row in mistaken else record for row, record in enumerate(first)]
    write_manifest(Manifest(tuple(kept)), path)
    read = [first[row] for row in sorted(mistaken)] + [record for record in records if record.patient not in early]
    export = path.parent / "labels.csv"
    with export.open("w", newline="", encoding="utf-8") as file:
        writer = TableWriter(file)
        writer.write(("path", "patient", "label", "reader", "time", "case"))
        rows = enumerate(read)
        writer.write_all((r.path, r.patient, r.label, "reader", "2026-01-01T12:00:00+00:00", n) for n, r in rows)
    return export


def exchange(record: ImageRecord) -> ImageRecord:
    return replace(record, label="bacterial" if record.label == "normal" else "normal")


def build_bench(arguments: argparse.Namespace) -> Bench:
    from pneumofed.simulation.hospitals.federation import lay_out
    from pneumofed.simulation.plan import build_plan

    folder = Path(arguments.out)
    experiment = {
        "name": "continual",
        "rounds": arguments.rounds,
        "image": {"size_px": arguments.image_size},
        "model": {"name": arguments.model},
        "training": {"local_epochs": 1, "validation_fraction": 0.25, "precision": "fp32"},
        "evaluation": {"bootstrap_samples": 100, "threshold_policy": arguments.policy},
    }
    virtual = {"data": arguments.data, "external": arguments.external, "hospitals": arguments.hospitals, "partition": "iid"}
    built = build_plan(folder / "layout", experiment, {**virtual, "device": "cpu"})
    federation = lay_out(built[1], built[0], folder / "layout", resume=False)
    configs = [read_site_config(file) for file in federation.site_files]
    return Bench(
        folder, experiment, configs, federation.coordinator_file, parse_private_key(NodeKey.generate("bench").private, "bench")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder in the Kaggle layout")
    parser.add_argument("--external", required=True, help="external set: a folder with labels.csv")
    parser.add_argument("--out", required=True)
    parser.add_argument("--image-size", type=int, default=48)
    parser.add_argument("--model", default="small_cnn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hospitals", type=int, default=4)
    parser.add_argument("--known", type=float, default=0.5, help="share of the patients that run 1 has")
    parser.add_argument("--wrong", type=float, default=0.1, help="share of their images with the wrong label")
    parser.add_argument(
        "--policy", default="youden", help="of the threshold; wrong labels in validation make a specificity of 0.99 mean nothing"
    )
    arguments = parser.parse_args()

    started, bench = time.perf_counter(), build_bench(arguments)
    exports = [hold_back(config, arguments.known, arguments.wrong, seed=0) for config in bench.configs]
    first, old = bench.run("run-1", None)
    tell("run 1", first)
    told = [
        add_feedback(make_site_folder(config), export).describe() for config, export in zip(bench.configs, exports, strict=True)
    ]
    counts = {key: sum(site[key] for site in told) for key in ("found", "added", "corrected", "total", "read")}
    print(f"feedback: {counts}", flush=True)
    second, new = bench.run("run-2", old)
    tell("run 2", second)
    evidence = {"run-2": bench.evidence(old, new)}
    for config in bench.configs[:FLIPPED_SITES]:
        path = Path(config.manifest)
        write_manifest(Manifest(tuple(exchange(record) for record in read_manifest(path).records)), path)
    third, spoilt = bench.run("run-3", old)
    tell(f"run 3, labels exchanged at {FLIPPED_SITES} of {arguments.hospitals} sites", third)
    evidence["run-3"] = bench.evidence(old, spoilt)
    results: dict[str, Any] = {"feedback": counts}
    for name, bundle in (("run-2", new), ("run-3", spoilt)):
        for margins in (Margins(auroc=0.02, point=0.05), Margins(auroc=0.10, point=0.15)):
            record = decide_release((old, bundle), evidence[name], (margins, margins))
            print(
                f"\n== {name} against run-1, margins {margins.auroc} and {margins.point}\n\n{write_release_page(record)}",
                flush=True,
            )
            results[f"{name} {margins.auroc}"] = record.model_dump(mode="json")
    (bench.folder / "continual.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(f"{time.perf_counter() - started:.0f} s")


def tell(name: str, summary: RunSummary) -> None:
    areas = {place: round(summary.auroc(place), 4) for place in CENTRAL_SETS}
    validation = summary.validation and summary.validation.auroc
    print(
        f"{name}: {areas}, validation {math.nan if validation is None else validation:.4f}, {summary.seconds:.0f} s", flush=True
    )


if __name__ == "__main__":
    main()
