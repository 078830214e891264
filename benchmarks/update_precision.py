"""Updates in 32, 16 and 8 bits: bytes on the wire, and the test AUROC of otherwise equal runs.

python -m benchmarks.update_precision --data chest_xray --image-size 32 --rounds 8 --seeds 0 1
"""

from __future__ import annotations

import argparse
import json
import tempfile

from benchmarks.local_runs import Run, build_parser, run_all

PRECISIONS = ("float32", "float16", "int8")


def main() -> None:
    options = build_parser("Updates in 32, 16 and 8 bits.").parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [_run(precision, seed, options, folder) for seed in options.seeds for precision in PRECISIONS]
        summaries = dict(zip([run.name for run in runs], run_all(runs), strict=True))
    print(json.dumps(vars(options)))
    for name, summary in summaries.items():
        up = (summary.bytes.up if summary.bytes else 0) / summary.rounds_completed / options.hospitals / 1e6
        print(f"{name:12} {up:7.2f} MB an update   test AUROC {summary.auroc('test'):.4f}")


def _run(precision: str, seed: int, options: argparse.Namespace, folder: str) -> Run:
    experiment = {
        "rounds": options.rounds,
        "seed": seed,
        "image": {"size_px": options.image_size},
        "training": {"local_epochs": 1},
        "strategy": {"update_precision": precision},
        "evaluation": {"every_rounds": options.rounds, "bootstrap_samples": 0},
    }
    return Run(f"{precision}-{seed}", experiment, {"data": options.data, "hospitals": options.hospitals}, folder)


if __name__ == "__main__":
    main()
