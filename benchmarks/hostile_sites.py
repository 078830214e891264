"""What one hostile hospital does to the model, by strategy: test AUROC with it, against the same run without it.

    python -m benchmarks.hostile_sites --data chest_xray --image-size 32 --rounds 8 --seeds 0 1

The hostile hospital is one of ten with equal shares of the patients (`iid`), so that the run without it differs by little else.
`scaled` and `nan` are what the checks before the arithmetic leave out; `flipped` (labels swapped) passes them and is for the robust
strategies.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from typing import Any

from benchmarks.local_runs import Deed, Run, build_parser, run_all

STRATEGIES: dict[str, dict[str, Any]] = {
    "fedavg": {"name": "fedavg"},
    "fedmedian": {"name": "fedmedian"},
    "fedtrimmedavg": {"name": "fedtrimmedavg", "trim_fraction": 0.2},
    "krum": {"name": "krum", "malicious_sites": 1},
    "multikrum": {"name": "multikrum", "malicious_sites": 1},
}
DEEDS: tuple[Deed, ...] = ("absent", "flipped", "scaled", "nan")


def main() -> None:
    parser = build_parser("What one hostile hospital does to the model.")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cases = [(name, deed, seed) for name in options.strategies for deed in _deeds(name) for seed in options.seeds]
        summaries = run_all([_run(*case, options, folder) for case in cases])
    aurocs = {case: summary.auroc("test") for case, summary in zip(cases, summaries, strict=True)}
    print(json.dumps(vars(options)))
    for name in options.strategies:
        for deed in _deeds(name)[1:]:
            pairs = [(aurocs[name, "absent", seed], aurocs[name, deed, seed]) for seed in options.seeds]
            shown = "  ".join(f"{without:.4f} -> {value:.4f}" for without, value in pairs)
            mean = statistics.mean(value - without for without, value in pairs)
            print(f"{name:14} {deed:8} without -> with, a seed each: {shown}   mean difference {mean:+.4f}")


def _deeds(strategy: str) -> tuple[Deed, ...]:
    """What the checks leave out is the same under every strategy, so it is run with one."""
    return DEEDS if strategy == "fedavg" else DEEDS[:2]


def _run(strategy: str, deed: Deed, seed: int, options: argparse.Namespace, folder: str) -> Run:
    experiment = {
        "rounds": options.rounds,
        "seed": seed,
        "image": {"size_px": options.image_size},
        "training": {"local_epochs": 1},
        "strategy": STRATEGIES[strategy],
        "evaluation": {"every_rounds": options.rounds, "bootstrap_samples": 0},
    }
    simulation = {"data": options.data, "hospitals": options.hospitals, "partition": "iid"}
    return Run(f"{strategy}-{deed}-{seed}", experiment, simulation, folder, deed)


if __name__ == "__main__":
    main()
