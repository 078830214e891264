"""Real radiographs over the real transport: three hospitals as processes of their own, each with its data from another source.

    python -m benchmarks.real_transport --data chest_xray --images 300 --image-size 64 --rounds 3

`north` has a folder in the Kaggle layout, `river` a folder of DICOM files, `hill` an Orthanc archive asked over DICOMweb; the coordinator
judges on images of the test folder. The same run in one process follows: its weights are compared bit for bit. Needs nginx and Orthanc.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pneumofed.common.data.manifest import Manifest
from pneumofed.common.data.sources.public_sets import read_kaggle
from pneumofed.server.runs.checkpoints import read_checkpoint
from pneumofed.server.runs.folder import RunFolder, describe_environment
from tests.e2e.real import NAMES, RealFederation, Source, archive_source, call, dicom_source, kaggle_source
from tests.orthanc import Orthanc, run_orthanc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--images", type=int, default=300, help="of each hospital")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "orthanc").mkdir()
        with run_orthanc(folder / "orthanc") as archive:
            test, _ = read_kaggle(options.data, ("test",))
            federation = RealFederation(folder, _sources(folder, archive, options), test)
            try:
                federation.start()
                real = _run(federation, options)
            finally:
                federation.stop()
            books = [call("audit", "verify", str(path)).stdout.strip() for path in sorted(folder.rglob("audit.jsonl"))]
        simulated = federation.simulate("real", folder / "simulated")
        report = {"options": {key: str(value) for key, value in vars(options).items()}, "environment": describe_environment()}
        print(json.dumps(report, indent=1))
        _tell(real, simulated)
    print("\n".join(books))


def _sources(folder: Path, archive: Orthanc, options: argparse.Namespace) -> dict[str, Source]:
    train, _ = read_kaggle(options.data)
    patients = np.random.default_rng(options.seed).permutation(sorted(set(train.patients)))
    parts = dict(zip(NAMES, np.array_split(patients, len(NAMES)), strict=True))
    images = {name: _of(train, set(part.tolist()), options.images) for name, part in parts.items()}
    return {
        "north": kaggle_source(images["north"], folder / "kaggle"),
        "river": dicom_source(images["river"], folder / "dicom"),
        "hill": archive_source(images["hill"], folder / "archive", archive),
    }


def _of(manifest: Manifest, patients: set[str], images: int) -> Manifest:
    found = [record for record in manifest.records if record.patient in patients]
    order = np.random.default_rng(0).permutation(len(found))[:images]
    return Manifest(tuple(found[index] for index in order))


def _run(federation: RealFederation, options: argparse.Namespace) -> RunFolder:
    changes: dict[str, Any] = {"model": {"name": "resnet18"}, "image": {"size_px": options.image_size}}
    changes["training"] = {"learning_rate": 4e-4, "batch_size": 32, "local_epochs": 2, "precision": "auto"}
    federation.submit("real", rounds=options.rounds, seed=options.seed, **changes)
    state = federation.wait("real", 1200)
    if state["state"] != "succeeded":
        raise SystemExit(federation.tell("real"))
    return federation.run_folder("real")


def _tell(real: RunFolder, simulated: RunFolder) -> None:
    first, second = (read_checkpoint(folder.last_checkpoint).arrays for folder in (real, simulated))
    same = np.array_equal(first.parameters, second.parameters) and np.array_equal(first.statistics, second.statistics)
    print("weights bit for bit those of one process:", same)
    for what, folder in (("real", real), ("one process", simulated)):
        summary, seconds = folder.read_summary(), [line.seconds.total or 0.0 for line in folder.read_history()]
        auroc = summary.central("test")["auroc"]
        images = {site: report.train for site, report in summary.sites.items()}
        print(f"{what:12} test AUROC {auroc.value:.4f} ({auroc.low:.4f} to {auroc.high:.4f})  training images {images}")
        print(f"{'':12} seconds a round: median {statistics.median(seconds):.1f} of {[round(value, 1) for value in seconds]}")


if __name__ == "__main__":
    main()
