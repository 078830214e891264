"""AUROC against epsilon: federated private runs on real images, by unit of privacy and seed.

    python -m benchmarks.private_auroc --data chest_xray --external external_covid_cxr \
        --epsilons 1 3 6 10 inf --units image patient --seeds 0 1 2 --out private_auroc

Each run is the project's own: sites lay out, plan, account and train as in a hospital, in one process. `inf` is the same recipe without
mechanism, once for all units, at a rate of its own: gradients that nobody clips are longer. Delta is 1 / training patients of each site.
Written are `table.md`, `curve.png` and the run folders. Runs of one seed share the hospitals' caches, so that images are decoded, and
features computed, once a seed. Exit code 1: the ledger of a site holds more than the run may have spent.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.local_runs import Run, run_all
from benchmarks.private_auroc_picture import Curve, draw_curves
from pneumofed.client.privacy.entries import total_epsilon
from pneumofed.client.privacy.ledger import Ledger
from pneumofed.common.config.choices import PrivacyUnit
from pneumofed.common.config.reader import merge, read_yaml
from pneumofed.server.runs.summary_records import MetricInterval, RunSummary
from pneumofed.simulation.hospitals.study import numbered_name

INFINITE_UNIT = "none"
"""In place of a unit: no privacy."""
RATE_WITHOUT_PRIVACY = 6.0e-3


@dataclass(frozen=True)
class Case:
    """One run that was asked for."""

    epsilon: float
    unit: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.unit}-{self.epsilon:g}-{self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """Of the experiment, beyond the recipe."""
        if math.isinf(self.epsilon):
            return {"privacy": {"mechanism": "none"}, "training": {"learning_rate": RATE_WITHOUT_PRIVACY}}
        return {"privacy": {"unit": self.unit, "target_epsilon": self.epsilon}}


@dataclass(frozen=True)
class Outcome:
    """What became of a run. Intervals are 95 % by bootstrap over patients."""

    case: Case
    test: MetricInterval
    external: MetricInterval | None
    validation: float
    spent: tuple[float, ...]
    """Epsilon in each site's ledger, composed anew from its entries; empty without privacy."""
    left_out: int
    """Answers that were missing, over all sites and rounds."""
    seconds: float


def main() -> None:
    options = _parse()
    cases = [*_cases(options)]
    for case in cases:
        _share_caches(options.out, case, options.hospitals)
    runs = [_run(case, options) for case in cases]
    outcomes = [_outcome(case, summary, options) for case, summary in zip(cases, run_all(runs, None), strict=True)]
    table = "\n".join([*_table(outcomes), "", *_describe(outcomes, options)])
    (options.out / "table.md").write_text(table + "\n", encoding="utf-8")
    draw_curves(_curves(outcomes), options.out / "curve.png")
    print(table)
    if any(max(outcome.spent, default=0.0) > outcome.case.epsilon for outcome in outcomes):
        sys.exit("a site's ledger holds more than the run's target")


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    for epsilon in options.epsilons:
        for unit in [INFINITE_UNIT] if math.isinf(epsilon) else options.units:
            yield from (Case(epsilon, unit, seed) for seed in options.seeds)


def _share_caches(out: Path, case: Case, hospitals: int) -> None:
    """What is kept of a hospital's images depends on its images alone, which all runs of a seed share."""
    run = out / case.name
    names = [numbered_name("hospital", number, hospitals) for number in range(hospitals)]
    shared = {run / "sites" / name / "cache": out / "caches" / f"{case.seed}" / name for name in names}
    shared[run / "coordinator" / "cache"] = out / "caches" / "coordinator"
    for link, folder in shared.items():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        link.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        link.symlink_to(folder.resolve())


def _run(case: Case, options: argparse.Namespace) -> Run:
    changes = {"seed": case.seed, **case.settings, "evaluation": {"every_rounds": 10_000}}
    experiment = merge(read_yaml(options.config), changes)
    simulation = {"data": options.data, "external": options.external, "hospitals": options.hospitals, "alpha": options.alpha}
    return Run(case.name, experiment, simulation, str(options.out))


def _outcome(case: Case, summary: RunSummary, options: argparse.Namespace) -> Outcome:
    from pneumofed.server.runs.folder import RunFolder

    run = options.out / case.name
    history = RunFolder(run).read_history()
    ledgers = [Ledger(folder / "ledger.sqlite") for folder in sorted((run / "sites").glob("hospital-*"))]
    return Outcome(
        case,
        summary.central("test")["auroc"],
        summary.central("external").get("auroc"),
        _defined(summary.validation.auroc if summary.validation else None),
        tuple(_spent(ledger, case) for ledger in ledgers if ledger.exists()),
        sum(len(line.failures) + len(line.left_out) for line in history) + len(history) * len(summary.absent or ()),
        summary.seconds or 0.0,
    )


def _defined(value: float | None) -> float:
    return math.nan if value is None else value


def _spent(ledger: Ledger, case: Case) -> float:
    entries = [recorded.entry for lineage in ledger.lineages() for recorded in lineage.entries]
    unit: PrivacyUnit = "patient" if case.unit == "patient" else "image"
    return total_epsilon(entries, min(entry.delta for entry in entries), unit)


def _table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    seeds = sorted({outcome.case.seed for outcome in outcomes})
    yield (
        "| epsilon | unit | test AUROC, mean | "
        + " | ".join(f"seed {seed}" for seed in seeds)
        + " | external, mean | external, each | most in a ledger |"
    )
    yield "|" + "---|" * (6 + len(seeds))
    for epsilon, unit in sorted(
        {(outcome.case.epsilon, outcome.case.unit) for outcome in outcomes}, key=lambda key: (key[1] == INFINITE_UNIT, *key[::-1])
    ):
        row = [outcome for outcome in outcomes if (outcome.case.epsilon, outcome.case.unit) == (epsilon, unit)]
        tests = [f"{_defined(one.test.value):.3f} ({_defined(one.test.low):.3f} to {_defined(one.test.high):.3f})" for one in row]
        external = [_defined(one.external.value) for one in row if one.external]
        outside = [f"{statistics.mean(external):.3f}", ", ".join(f"{value:.3f}" for value in external)] if external else ["", ""]
        spent = max((max(one.spent, default=0.0) for one in row), default=0.0)
        mean = f"**{statistics.mean(_defined(one.test.value) for one in row):.3f}**"
        cells = [_shown(epsilon), unit, mean, *tests, *outside, f"{spent:.3f}" if spent else ""]
        yield "| " + " | ".join(cells) + " |"


def _describe(outcomes: Sequence[Outcome], options: argparse.Namespace) -> Iterator[str]:
    yield (
        f"{options.hospitals} hospitals, Dirichlet {options.alpha:g}, {options.config.name}; delta = 1 / training patients of the site; "
        "95 % intervals by bootstrap over patients."
    )
    seconds, missing = [outcome.seconds for outcome in outcomes], sum(outcome.left_out for outcome in outcomes)
    yield f"{len(outcomes)} runs, {min(seconds):.0f} to {max(seconds):.0f} s each; {missing} answers missing."
    validation = [outcome.validation for outcome in outcomes]
    yield f"Validation AUROC of the sites: {min(validation):.3f} to {max(validation):.3f}."


def _curves(outcomes: Sequence[Outcome]) -> list[Curve]:
    without = {outcome.case.seed: outcome for outcome in outcomes if outcome.case.unit == INFINITE_UNIT}
    curves = []
    for unit in sorted({outcome.case.unit for outcome in outcomes} - {INFINITE_UNIT}):
        chosen = [*(outcome for outcome in outcomes if outcome.case.unit == unit), *without.values()]
        points: dict[float, list[float]] = {}
        for outcome in chosen:
            points.setdefault(outcome.case.epsilon, []).append(_defined(outcome.test.value))
        curves.append(Curve(unit, dict(sorted(points.items()))))
    return curves


def _shown(epsilon: float) -> str:
    return "∞" if math.isinf(epsilon) else f"{epsilon:g}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder in the Kaggle layout")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hospitals", type=int, default=10)
    parser.add_argument("--external", help="folder with a labels.csv: the external set")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1.0, 3.0, 6.0, 10.0, math.inf])
    parser.add_argument("--units", nargs="+", default=["image", "patient"], choices=["image", "patient"])
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--config", type=Path, default=Path("configs/private.yaml"))
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    options.out = options.out.resolve()
    return options


if __name__ == "__main__":
    main()
