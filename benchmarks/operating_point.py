"""What a threshold of the hospital's own is worth to patients who had no part in its choice.

    python -m benchmarks.operating_point BUNDLE MANIFEST [--repeats 200] [--target 0.85]

MANIFEST is of images that the model was not trained on, e.g. `RUN/coordinator/adults.csv` of a simulation. All are judged once; then
their patients are divided in halves, `--repeats` times: one half chooses, as `pneumofed site operating-point` does, the other half are the
hospital's new patients. The model is the same in all repeats, so the spread is that of patients alone.
"""

from __future__ import annotations

import argparse
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from pneumofed.client.data.bundles import judge_records
from pneumofed.common.data.dataset import load_dataset
from pneumofed.common.data.manifest import read_manifest
from pneumofed.common.errors import DataError, EmptySiteError
from pneumofed.common.evaluation.metrics import metrics
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.evaluation.statistics import Statistics
from pneumofed.common.model_bundle.bundle import Bundle, load_bundle
from pneumofed.common.model_bundle.evaluate import choose_point
from pneumofed.common.model_bundle.predictor import Predictor
from pneumofed.common.seeds import numpy_generator

RATES = ("sensitivity", "specificity")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--target", type=float, default=None, help="as in the bundle without it")
    args = parser.parse_args()
    bundle = load_bundle(args.bundle, None)
    with tempfile.TemporaryDirectory() as cache:
        images = load_dataset(
            read_manifest(args.manifest), bundle.manifest.task, bundle.manifest.preprocessing.image, Path(cache)
        )
    found = judge_records(Predictor(bundle, threads=1), [images])
    print(
        f"{len(found)} of {len(images)} images judged, {found.labels.sum()} with pneumonia, {len(set(found.patients))} patients"
    )
    repeats = [one for seed in range(args.repeats) if (one := _halves(found, bundle, args.target, seed)) is not None]
    print(f"{len(repeats)} of {args.repeats} halves gave a threshold")
    for name, place in (
        ("at the bundle's threshold", "bundle"),
        ("at the own one", "own"),
        ("as the other half was told", "told"),
    ):
        rates = {rate: np.array([one[place, rate] for one in repeats]) for rate in RATES}
        print(
            name,
            *(
                f"{rate} {np.mean(of):.3f} ({np.quantile(of, 0.025):.3f} to {np.quantile(of, 0.975):.3f})"
                for rate, of in rates.items()
            ),
        )


def _halves(found: Predictions, bundle: Bundle, target: float | None, seed: int) -> dict[tuple[str, str], float] | None:
    """Rates of one division; None where the half that chooses is refused a threshold."""
    everyone = numpy_generator(seed, "benchmark").permutation(np.unique(found.patients))
    chooses = np.isin(found.patients, everyone[: len(everyone) // 2])
    try:
        point = choose_point(_part(found, chooses), bundle, None, target, site="half", time=datetime.now(UTC), refused=0)
    except (EmptySiteError, DataError):
        return None
    new = Statistics.of(_part(found, ~chooses))
    at_bundle, at_own = metrics(new, bundle.manifest.threshold.raw_value), metrics(new, point.point.raw_value)
    values = {("bundle", rate): at_bundle[rate] for rate in RATES} | {("own", rate): at_own[rate] for rate in RATES}
    return values | {("told", rate): point.at_own[rate].value or 0.0 for rate in RATES}


def _part(found: Predictions, rows: np.ndarray) -> Predictions:
    return Predictions(found.probabilities[rows], found.labels[rows], tuple(np.array(found.patients)[rows]))


if __name__ == "__main__":
    main()
