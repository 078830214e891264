"""What one hostile hospital does to the model, by strategy: test AUROC with it, against the same run without it.

    python -m benchmarks.hostile_sites --data chest_xray --image-size 32 --rounds 8

The hostile hospital is one of ten with equal shares of the patients (`iid`), so that the run without it differs by little else.
`scaled` and `nan` are what the checks before the arithmetic leave out; `flipped` (labels swapped) passes them and is for the robust
strategies.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from typing import Any

from benchmarks.local_runs import Deed, Run, run_all

STRATEGIES: dict[str, dict[str, Any]] = {
    "fedavg": {"name": "fedavg"},
    "fedmedian": {"name": "fedmedian"},
    "fedtrimmedavg": {"name": "fedtrimmedavg", "trim_fraction": 0.2},
    "krum": {"name": "krum", "malicious_sites": 1},
}
DEEDS: tuple[Deed, ...] = ("absent", "flipped", "scaled", "nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", required=True)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--hospitals", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [_run(name, deed, options, folder) for name in options.strategies for deed in _deeds(name)]
        aurocs = {run.name: summary["test"]["auroc"]["value"] for run, summary in zip(runs, run_all(runs), strict=True)}
    print(json.dumps(vars(options)))
    for name in options.strategies:
        without = aurocs[f"{name}-absent"]
        for deed in _deeds(name)[1:]:
            value = aurocs[f"{name}-{deed}"]
            print(f"{name:14} without {without:.4f}   {deed:8} {value:.4f}   difference {value - without:+.4f}")


def _deeds(strategy: str) -> tuple[Deed, ...]:
    """What the checks leave out is the same under every strategy, so it is run with one."""
    return DEEDS if strategy == "fedavg" else DEEDS[:2]


def _run(strategy: str, deed: Deed, options: argparse.Namespace, folder: str) -> Run:
    experiment = {
        "rounds": options.rounds,
        "seed": options.seed,
        "image": {"size_px": options.image_size},
        "strategy": STRATEGIES[strategy],
        "evaluation": {"every_rounds": options.rounds, "bootstrap_samples": 0},
    }
    simulation = {"data": options.data, "hospitals": options.hospitals, "partition": "iid"}
    return Run(f"{strategy}-{deed}", experiment, simulation, folder, deed)


if __name__ == "__main__":
    main()
