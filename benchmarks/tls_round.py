"""A round over the real transport against the same round in simulation: three sites, the 45 MB of ResNet18, TLS through the gateway.

    python -m benchmarks.tls_round --rounds 6 [--only "float32" "secure"]

Plain rounds in float32 and int8, and secure ones, each also without validation (`evaluation.validate_every_rounds`) or judged with the next
round's training (`evaluation.with_training`). Coordinator and sites
are separate processes on loopback, so the network itself costs nothing; what is measured is Flower's polling, TLS, nginx, SQLite, and
the fork for each message. Needs nginx.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from pneumofed.common.ops.processes import Daemon
from pneumofed.server.runs.folder import RunFolder, describe_environment
from tests.e2e.real import NAMES, RealFederation, kaggle_source
from tests.tiny import draw_manifest

RESNET = {"model": {"name": "resnet18"}, "training": {"local_epochs": 1}, "image": {"size_px": 32}}
SELDOM = {"evaluation": {"every_rounds": 1000, "validate_every_rounds": 1000}}
TOGETHER = {"evaluation": {"with_training": True}}
SECURE = {"secure_aggregation": {"enabled": True, "max_examples": 24}}  # all images of a site
RUNS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, no validation": SELDOM,
    "float32, judged with training": TOGETHER,
    "int8": {"strategy": {"update_precision": "int8"}},
    "secure": SECURE,
    "secure, no validation": {**SECURE, **SELDOM},
    "secure, judged with training": {**SECURE, **TOGETHER},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--rounds", type=int, default=6, help="of each run; the first is not counted, the last is always validated"
    )
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="these runs, and no simulation")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        drawn = {site: draw_manifest(folder / f"drawn-{site}", 12, seed=number) for number, site in enumerate(NAMES)}
        sources = {site: kaggle_source(manifest, folder / f"kaggle-{site}") for site, manifest in drawn.items()}
        federation = RealFederation(folder, sources)
        try:
            federation.start()
            for what in options.only:
                federation.run(_name(what), rounds=options.rounds, **RESNET, **RUNS[what])
            largest = {"SuperLink": _largest(Daemon("superlink", federation.coordinator / "state"))}
            largest |= {f"SuperNode {name}": _largest(Daemon("supernode", federation.site(name) / "work")) for name in NAMES}
        finally:
            federation.stop()
        results = {f"TLS, {what}": _measure(federation.run_folder(_name(what))) for what in options.only}
        if len(options.only) == len(RUNS):
            results["simulation, float32"] = _measure(RunFolder(_simulate(folder, federation, options.rounds)))
    print(json.dumps(describe_environment(), indent=1))
    print("largest resident memory, MB: " + ", ".join(f"{what} {size}" for what, size in largest.items()))
    for what, (total, train, up) in results.items():
        print(f"{what:34} round {total:6.2f} s (median), of it training and its exchange {train:6.2f} s; {up / 1e6:6.2f} MB up")


def _largest(daemon: Daemon) -> int:
    """Most memory that the process had so far, in MB (VmHWM, proc(5))."""
    status = Path(f"/proc/{daemon.pid()}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) // 1024


def _name(what: str) -> str:
    return what.replace(", ", "-").replace(" ", "-")


def _measure(folder: RunFolder) -> tuple[float, float, float]:
    """Median seconds of a round and of its training phase, and bytes up of a round. The first round is left out: it starts processes; in
    a run without validation the last one too, which has it."""
    lines = folder.read_history()[1:]
    lines = [line for line in lines if line.validation is None] or lines
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
