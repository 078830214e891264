"""Simulated time to the same AUROC, synchronous and asynchronous rounds, where one hospital is slow.

    python -m benchmarks.asynchronous
    python -m benchmarks.asynchronous --data chest_xray --model resnet18 --image-size 128 --target 0.95

Time is that of the virtual clock (`server.federation.asynchronous`): one unit is the training of a round at a hospital that is not slow,
and nothing else takes time. Both ways run the same number of rounds with the same hospitals, seeds and schedule, so that a round is worth
about the same; only which updates it waits for differs. Two AUROCs are watched: of the hospitals' pooled validation patients, as the run
itself sees it, in an asynchronous round of those hospitals that are not at work; and of the held-out test set, the same images each time.
Each run repeats bit for bit.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pneumofed.server.runs.records import RoundRecord
from pneumofed.simulation.phantoms.phantom import write_phantoms
from pneumofed.simulation.plan import SimulationRequest, plan_simulation
from pneumofed.simulation.runner import run_simulation

SETS = ("validation", "test")
Run = list[RoundRecord]


def run(options: argparse.Namespace, data: Path, seed: int, out: Path, buffer: int | None) -> Run:
    """The rounds of one run."""
    from pneumofed.server.runs.folder import RunFolder

    settings: dict[str, Any] = {
        "training": {
            "batch_size": options.batch_size,
            "local_epochs": 1,
            "validation_fraction": 0.25,
            "learning_rate": options.learning_rate,
        },
        "strategy": {} if buffer is None else {"buffer": buffer},
        "evaluation": {"bootstrap_samples": 0},
    }
    request = SimulationRequest(
        data=data,
        hospitals=options.hospitals,
        partition=options.partition,
        slow={f"hospital-{options.hospitals - 1:02d}": options.slow},
        model=options.model,
        rounds=options.rounds,
        image_size=options.image_size,
        seed=seed,
        settings=settings,
        out=out,
        workers=options.workers,
    )
    run_simulation(plan_simulation(request), lambda _: None)
    return RunFolder(out).read_history()


def reached(rounds: Run, name: str, target: float) -> RoundRecord | None:
    """The first round whose AUROC on the set is the target at least."""
    for line in rounds:
        found = line.measured.get(name)
        if found is not None and found.auroc is not None and found.auroc >= target:
            return line
    return None


def describe(found: Sequence[RoundRecord | None], value: Callable[[RoundRecord], float]) -> str:
    """Each seed's number; a dash where the target was not reached."""
    return " / ".join("-" if line is None else f"{value(line):g}" for line in found)


def last_auroc(rounds: Run, name: str) -> float:
    found = rounds[-1].measured[name].auroc
    return float("nan") if found is None else found


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Simulated time to an AUROC with one slow hospital, with and without waiting for it."
    )
    parser.add_argument("--data", type=Path, help="Kaggle layout; else phantoms are drawn for each seed")
    parser.add_argument("--phantoms", type=int, default=240)
    parser.add_argument("--hospitals", type=int, default=4)
    parser.add_argument("--partition", default="iid")
    parser.add_argument("--slow", type=float, default=10.0, help="how many times as long the last hospital takes")
    parser.add_argument("--buffer", type=int, help="K; unset all hospitals but one")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--model", default="small_cnn")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--target", type=float, default=0.85)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    buffer = options.buffer or options.hospitals - 1
    ways: dict[str, int | None] = {"synchronous": None, f"buffer of {buffer}": buffer}
    found: dict[str, list[Run]] = {name: [] for name in ways}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="pneumofed-") as folder:
        for seed in options.seeds:
            data = options.data or Path(folder) / f"phantoms-{seed}"
            if options.data is None:
                write_phantoms(data, options.phantoms, seed, 64)
            for name, size in ways.items():
                found[name].append(run(options, data, seed, Path(folder) / f"{seed}-{size}", size))
                print(f"seed {seed}, {name}: {time.perf_counter() - started:.0f} s", flush=True)
    show(found, options.target)


def show(found: dict[str, list[Run]], target: float) -> None:
    """Prints the table."""
    seeds = len(next(iter(found.values())))
    print(f"\n{seeds} seeds; '-': not reached\n")
    print(
        f"| rounds | set | round that reaches {target:g} | simulated time then | AUROC of the last round | time of the last round |"
    )
    print("|---|---|---|---|---|---|")
    for name, runs in found.items():
        for kind in SETS:
            lines = [reached(rounds, kind, target) for rounds in runs]
            ends = [last_auroc(rounds, kind) for rounds in runs]
            spread = f"{statistics.mean(ends):.3f} ({min(ends):.3f} to {max(ends):.3f})"
            clock = describe([rounds[-1] for rounds in runs], lambda line: line.simulated_time or 0.0)
            reach = describe(lines, lambda line: line.round), describe(lines, lambda line: line.simulated_time or 0.0)
            print(f"| {name} | {kind} | {reach[0]} | {reach[1]} | {spread} | {clock} |")
    stale = [old for run in next(reversed(found.values())) for line in run for old in line.staleness.values() if old]
    if stale:
        print(f"\n{len(stale)} stale updates, {min(stale)} to {max(stale)} rounds old, mean {statistics.mean(stale):.1f}")


if __name__ == "__main__":
    main()
