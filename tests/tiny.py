"""A federation small enough for a second: 32-pixel images in which pneumonia is a bright patch, and a small network."""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, TypeVar

import numpy as np
import PIL.Image
import yaml
from flwr.clientapp import ClientApp

from pneumofed.client.app import app as client_app
from pneumofed.client.federation.site_data import SPLIT_KEY_FILE
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import CoordinatorConfig
from pneumofed.common.config.reader import build_config, merge
from pneumofed.common.data.manifest import ImageRecord, Manifest, write_manifest
from pneumofed.common.privacy.randomness import write_secret
from pneumofed.server.federation.run import run_federation
from pneumofed.server.runs.summary_records import RunSummary
from pneumofed.simulation.hospitals.federation import write_identities
from pneumofed.simulation.local_grid import LocalGrid

logging.getLogger("flwr").setLevel(logging.ERROR)

T = TypeVar("T")

SPLIT_KEY = hashlib.sha256(b"405").digest()
"""Under which about a quarter of each small site's patients, with both classes, are in validation."""
TINY = {
    "rounds": 2,
    "image": {"size_px": 32},
    "model": {"name": "small_cnn"},
    "training": {"local_epochs": 1, "batch_size": 8, "validation_fraction": 0.25, "precision": "fp32", "learning_rate": 5e-3},
    "evaluation": {"bootstrap_samples": 20},
}


def folder_of_process(prefix: str = "pneumofed-test-") -> Path:
    """A temporary folder for what several tests use; removed when this process ends, and not by one that was forked from it."""
    folder, process = Path(mkdtemp(prefix=prefix)), os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == process else None)
    return folder


def there(value: T | None) -> T:
    """`value`, which a test knows to be there."""
    assert value is not None
    return value


def tiny_experiment(**changes: Any) -> ExperimentConfig:
    noise = changes.get("privacy", {}).get("noise_multiplier")
    if noise is not None and noise < 0.01:  # next to none, which no run may ask for: for what a step does without noise
        experiment = tiny_experiment(**merge(changes, {"privacy": {"noise_multiplier": 1.0}}))
        privacy = experiment.privacy.model_copy(update={"noise_multiplier": noise})
        return experiment.model_copy(update={"privacy": privacy})
    return build_config(ExperimentConfig, merge(TINY, changes))


def draw_image(path: Path, label: str, generator: np.random.Generator) -> None:
    """A grey 32-pixel PNG; pneumonia adds a bright patch, so that a few steps learn something."""
    pixels = generator.integers(20, 120, (32, 32)).astype(np.uint8)
    if label != "normal":
        row, column = generator.integers(4, 18, 2)
        pixels[row : row + 10, column : column + 10] += 110
    PIL.Image.fromarray(pixels).save(path, compress_level=1)


def draw_manifest(folder: Path, patients: int, seed: int, labels: tuple[str, ...] = ("normal", "pneumonia")) -> Manifest:
    """`patients` patients with two images each, labels in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, records = np.random.default_rng(seed), []
    for number in range(patients):
        label = labels[number % len(labels)]
        for view in range(2):
            path = folder / f"{number}-{view}.png"
            draw_image(path, label, generator)
            records.append(ImageRecord(path, f"patient-{seed}-{number}", label))
    return Manifest(tuple(records))


class TinyFederation:
    """`sites` hospitals of `patients` patients below `folder`, and a coordinator with a test set."""

    def __init__(self, folder: Path, sites: int = 3, patients: int = 8) -> None:
        self.folder = folder
        self.sites = folder / "sites"
        self.key_roster: Path | None = None
        for number in range(sites):
            self.add_site(number, draw_manifest(folder / f"images-{number}", patients, seed=number))
        write_manifest(draw_manifest(folder / "test", 8, seed=1000), folder / "test.csv")

    def add_site(self, number: int, manifest: Manifest) -> None:
        work = self.sites / f"site-{number}"
        work.mkdir(parents=True, exist_ok=True)
        write_manifest(manifest, work / "manifest.csv")
        write_secret(work / SPLIT_KEY_FILE, SPLIT_KEY)  # of sites that get a policy: the same patients in every test run
        site = {
            "name": f"site-{number}",
            "manifest": str(work / "manifest.csv"),
            "work_dir": str(work),
            "threads": 1,
            "device": "cpu",
        }
        (self.sites / f"{number}.yaml").write_text(yaml.safe_dump(site))

    def give_identities(self) -> None:
        """A node key for each site, and the roster of them: what secure aggregation needs."""
        files = {yaml.safe_load(path.read_text())["name"]: path for path in sorted(self.sites.glob("*.yaml"))}
        connections, self.key_roster = write_identities(self.folder / "identities", list(files))
        for name, path in files.items():
            site = yaml.safe_load(path.read_text())
            path.write_text(yaml.safe_dump({**site, "connection": str(connections[name])}))

    def grid(self, app: ClientApp = client_app) -> LocalGrid:
        nodes = [{"partition-id": int(path.stem)} for path in sorted(self.sites.glob("*.yaml"))]
        return LocalGrid(app, nodes, {"sites": str(self.sites)})

    def run(
        self,
        name: str,
        experiment: ExperimentConfig,
        *,
        grid: LocalGrid | None = None,
        resume: bool = False,
        audit_log: Path | None = None,
        slow: dict[str, float] | None = None,
    ) -> RunSummary:
        """Runs the study in `folder/name` and returns its summary."""
        settings = CoordinatorConfig(
            run_dir=str(self.folder / name),
            test_manifest=str(self.folder / "test.csv"),
            audit_log=str(audit_log) if audit_log else None,
            key_roster=str(self.key_roster) if self.key_roster else None,
            resume=resume,
            slow=slow,
            device="cpu",
        )
        return run_federation(grid or self.grid(), experiment, settings)
