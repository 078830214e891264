"""Seconds a round and peak memory of a simulation with ten, a hundred and a thousand hospitals, one table.

    python -m benchmarks.many_hospitals                                  5 drawn images a hospital, the small network, the local engine
    python -m benchmarks.many_hospitals --hospitals 20 --data chest_xray --image-size 64 --set model.name=resnet18

Memory is the proportional set size (/proc/PID/smaps_rollup) summed over all processes of the run and sampled twice a second, so that pages
which processes share count once. The parts of a round are those of the later ones.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pneumofed.common.ops.processes import descendants
from pneumofed.server.runs.folder import RunFolder

IMAGES_A_PATIENT = 1.46
"""Of the drawn sets, measured."""
COLUMNS = ("hospitals", "images", "data, s", "first round, s", "a later round, s", "train", "aggregate", "evaluate", "central")
MEMORY_COLUMNS = ("peak before the rounds, MiB", "peak in the rounds, MiB", "run folder, MiB", "report, MiB", "wall, s")


@dataclass(frozen=True)
class Sample:
    """Memory of the run at one time, and how many rounds were done by then."""

    mib: float
    rounds: int


def memory_mib(pids: set[int]) -> float:
    """Sums the proportional set size of processes; those that have ended count nothing."""
    total = 0
    for pid in pids:
        try:
            lines = (Path("/proc") / str(pid) / "smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def command_of(options: argparse.Namespace, hospitals: int, out: Path) -> list[str]:
    """Builds the command line of one run."""
    patients = max(8, hospitals, round(options.images * hospitals / IMAGES_A_PATIENT))
    source = ["--data", options.data] if options.data else ["--phantoms", str(patients)]
    settings = ["training.local_epochs=1", "evaluation.bootstrap_samples=0", "evaluation.every_rounds=1000", *options.set]
    if not any(value.startswith("model.name") for value in settings):
        settings.append("model.name=small_cnn")
    run = [sys.executable, "-m", "pneumofed.cli.main", "simulate", *source, "--hospitals", str(hospitals), "--partition", "iid"]
    run += [
        "--engine",
        options.engine,
        "--image-size",
        str(options.image_size),
        "--rounds",
        str(options.rounds),
        "--out",
        str(out),
    ]
    run += ["--workers", str(options.workers)] if options.engine == "local" else []
    return run + [part for value in settings for part in ("--set", value)]


def measure(options: argparse.Namespace, hospitals: int, out: Path) -> dict[str, str]:
    """Runs one simulation and returns a row of the table.

    Raises:
        SystemExit: the simulation failed; its output is shown.
    """
    folder, samples, started = RunFolder(out), list[Sample](), time.perf_counter()
    log = out.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(command_of(options, hospitals, out), stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            done = len(folder.history.read_bytes().splitlines()) if folder.history.is_file() else -1
            samples.append(Sample(memory_mib({process.pid, *descendants(process.pid)}), done))
            time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"the run with {hospitals} hospitals ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    return _row(folder, samples, time.perf_counter() - started)


def _row(folder: RunFolder, samples: Sequence[Sample], wall: float) -> dict[str, str]:
    history, summary = folder.read_history(), folder.read_summary()
    later = history[1:] or history
    means = {part: sum(getattr(line.seconds, part) or 0.0 for line in later) / len(later) for part in (*COLUMNS[5:], "total")}
    size = sum(path.stat().st_size for path in folder.path.rglob("*") if path.is_file() and "phantoms" not in path.parts)
    before = [sample.mib for sample in samples if sample.rounds <= 0] or [0.0]
    during = [sample.mib for sample in samples if sample.rounds >= 0]
    images = sum(site.images or 0 for site in summary.sites.values())
    seconds = [summary.wall.data if summary.wall else 0.0, history[0].seconds.total, means["total"], *list(means.values())[:-1]]
    memory = [max(before), max(during), size / 2**20, folder.report.stat().st_size / 2**20, wall]
    return dict(
        zip(
            (*COLUMNS, *MEMORY_COLUMNS),
            [
                str(len(summary.sites)),
                str(images),
                *(f"{value or 0.0:.2f}" for value in seconds),
                *(f"{value:.0f}" for value in memory),
            ],
            strict=True,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hospitals", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--images", type=int, default=5, help="drawn images a hospital, about")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", choices=("local", "flower"), default="local")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--data", help="folder in the Kaggle layout, in place of drawn images")
    parser.add_argument("--set", action="append", default=[], help="a setting of the experiment, e.g. strategy.name=fedmedian")
    options = parser.parse_args()
    print("| " + " | ".join((*COLUMNS, *MEMORY_COLUMNS)) + " |\n" + "|---" * (len(COLUMNS) + len(MEMORY_COLUMNS)) + "|")
    for hospitals in options.hospitals:
        with tempfile.TemporaryDirectory() as name:
            print("| " + " | ".join(measure(options, hospitals, Path(name) / "run").values()) + " |", flush=True)


if __name__ == "__main__":
    main()
