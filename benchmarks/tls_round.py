"""A round over the real transport against the same round in simulation: three sites, the 45 MB of ResNet18, TLS through the gateway.

    python -m benchmarks.tls_round --rounds 4

Coordinator and sites are separate processes on loopback, so the network itself costs nothing; what is measured is Flower's polling, TLS,
nginx, SQLite, and the start of a client process for each message. Needs nginx.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from pneumofed.server.runs.folder import RunFolder, describe_environment
from tests.e2e.real import NAMES, RealFederation, kaggle_source
from tests.tiny import draw_manifest

RESNET = {"model": {"name": "resnet18"}, "training": {"local_epochs": 1}, "image": {"size_px": 32}}
PRECISIONS = ("float32", "float16", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        drawn = {site: draw_manifest(folder / f"drawn-{site}", 12, seed=number) for number, site in enumerate(NAMES)}
        sources = {site: kaggle_source(manifest, folder / f"kaggle-{site}") for site, manifest in drawn.items()}
        federation = RealFederation(folder, sources)
        try:
            federation.start()
            for precision in PRECISIONS:
                strategy = {"update_precision": precision}
                federation.run(precision, rounds=options.rounds, strategy=strategy, **RESNET)
        finally:
            federation.stop()
        simulated = _simulate(folder, federation, options.rounds)
        results = {f"TLS, {precision}": _measure(federation.run_folder(precision)) for precision in PRECISIONS}
        results["simulation, float32"] = _measure(RunFolder(simulated))
    print(json.dumps(describe_environment(), indent=1))
    for what, (total, train, up) in results.items():
        print(f"{what:22} round {total:6.2f} s (median), of it training and its exchange {train:6.2f} s; {up / 1e6:6.2f} MB up")


def _measure(folder: RunFolder) -> tuple[float, float, float]:
    """Median seconds of a round and of its training phase, and bytes up of a round. The first round is left out: it starts processes."""
    lines = folder.read_history()[1:]
    total, train = [line.seconds.total or 0.0 for line in lines], [line.seconds.train or 0.0 for line in lines]
    return statistics.median(total), statistics.median(train), statistics.median(line.bytes.up for line in lines)


def _simulate(folder: Path, federation: RealFederation, rounds: int) -> Path:
    """The same experiment over three hospitals in Flower's simulation, on the images of all sites dealt evenly."""
    from pneumofed.simulation.plan import Plan, build_plan
    from pneumofed.simulation.runner import run_simulation
    from pneumofed.simulation.superlink import Resources

    experiment = federation.run_folder("float32").read_config().model_dump() | {"rounds": rounds}
    data = folder / "pooled"
    manifests = [draw_manifest(folder / "drawn-pooled", 36, seed=7), draw_manifest(folder / "drawn-test", 10, seed=8)]
    for split, manifest in zip(("train", "test"), manifests, strict=True):
        kaggle_source(manifest, data, split)
    out = folder / "simulation"
    built = build_plan(out, experiment, {"data": str(data), "hospitals": 3, "partition": "iid", "device": "cpu"})
    run_simulation(Plan(*built, run_dir=out, resources=Resources(nodes=3)), print)
    return out


if __name__ == "__main__":
    main()
