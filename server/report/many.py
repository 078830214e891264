"""More hospitals than a reader looks at one by one: distributions in place of a bar and a line for each.

Beyond `MOST_SINGLE` hospitals the report leads with `distributions`, a table of how each count is spread, draws their sizes as one
curve (`plot_sizes`) and their losses as bands (`plot_loss_bands`), and keeps the rows of the hospitals themselves folded and in one
compact table.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pneumofed.common.evaluation.plots import colour_of, legend_above, new_figure
from pneumofed.server.report.numbers import number
from pneumofed.server.report.read_run import StoredRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_SINGLE = 50
"""Hospitals that are shown one by one; more bars are thinner than a line of the picture."""
LEAST_SPREAD = 2
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""The five numbers of a box plot (Tukey 1977, "Exploratory Data Analysis", chapter 2), with NumPy's linear interpolation."""


@dataclass(frozen=True)
class Distribution:
    """How one number is spread over the hospitals that have it: lowest, quartiles and highest, as texts."""

    name: str
    hospitals: int
    values: list[str]


def distributions(run: StoredRun) -> list[Distribution]:
    """Builds the table of spreads: images, patients, share of each class, training and validation images, AUROC, rounds, failures.

    Args:
        run: whose hospitals are shown.

    Returns:
        A row for each number that at least two hospitals have; empty for `MOST_SINGLE` hospitals or fewer.
    """
    reports = run.site_reports()
    if len(reports) <= MOST_SINGLE:
        return []
    trained = Counter(site for line in run.history for site in line.trained)
    failed = Counter(site for line in run.history for site in line.trouble)
    kept = next((line for line in run.history if line.round == run.kept_round), None)
    validations = [site.validation for site in kept.sites.values() if site.validation] if kept else []
    rows: dict[str, tuple[list[float | None], int]] = {
        "Images": ([report.images for report in reports.values()], 0),
        "Patients": ([report.patients for report in reports.values()], 0),
        "Share of normal images": ([_share(report.classes) for report in reports.values()], 3),
        "Training images": ([report.train for report in reports.values()], 0),
        "Validation images": ([report.validation for report in reports.values()], 0),
        "Validation AUROC": ([found.auroc for found in validations], 3),
        "Rounds trained": ([trained[name] for name in reports], 0),
        "Rounds failed": ([failed[name] for name in reports], 0),
    }
    built = [_distribution(name, values, digits) for name, (values, digits) in rows.items()]
    return [row for row in built if row.hospitals >= LEAST_SPREAD]


def _share(classes: Mapping[str, int] | None) -> float | None:
    total = sum((classes or {}).values())
    return (classes or {}).get("normal", 0) / total if total else None


def _distribution(name: str, values: Sequence[float | None], digits: int) -> Distribution:
    known = [value for value in values if value is not None and math.isfinite(value)]
    quantiles = np.quantile(known, QUANTILES).tolist() if known else []
    return Distribution(name, len(known), [number(value, digits) if digits else _counted(value) for value in quantiles])


def _counted(value: float) -> str:
    """A whole number, or the half or quarter that a quantile of whole numbers can be."""
    return f"{value:,.2f}".rstrip("0").rstrip(".")


def plot_sizes(counts: Mapping[str, Mapping[str, int]], classes: Sequence[str]) -> Figure:
    """Draws the images of each class in hospitals ordered by size: stacked areas instead of bars, since no bar could be seen.

    Args:
        counts: images by hospital and class.
        classes: in the order of the areas, each with its colour.
    """
    figure, (ax,) = new_figure()
    mixes = sorted(counts.values(), key=lambda mix: [-sum(mix.values()), *(-mix.get(label, 0) for label in classes)])
    edges, bottom = np.arange(len(mixes) + 1), np.zeros(len(mixes))
    for index, label in enumerate(classes):
        top = bottom + np.array([mix.get(label, 0) for mix in mixes], dtype=np.float64)
        ax.stairs(top, edges, baseline=bottom, fill=True, color=colour_of(index), label=label.replace("$", r"\$"))
        bottom = top
    ax.set(xlabel=f"{len(mixes):,} hospitals, the largest first", ylabel="Images", xlim=(0, len(mixes)), ylim=(0, None))
    legend_above(figure, len(classes))
    return figure


def plot_loss_bands(rounds: Sequence[int], losses: Mapping[str, Sequence[float]], mean: Sequence[float]) -> Figure:
    """Draws training loss over rounds as bands: all hospitals, and their middle half, in the rounds in which they trained.

    Args:
        rounds: round numbers, one for each value.
        losses: by hospital, NaN in rounds in which it did not train.
        mean: over hospitals, weighted by images; NaN where unknown.
    """
    figure, (ax,) = new_figure()
    values = np.array(list(losses.values()), dtype=np.float64)
    known = np.isfinite(values).any(axis=0)
    at = np.asarray(rounds)[known]
    low, first, middle, third, high = np.nanquantile(values[:, known], QUANTILES, axis=0)
    ax.fill_between(at, low, high, color=colour_of(0), alpha=0.12, linewidth=0, label="all hospitals")
    ax.fill_between(at, first, third, color=colour_of(0), alpha=0.3, linewidth=0, label="middle half")
    ax.plot(at, middle, color=colour_of(0), linewidth=1.0, linestyle="--", label="median")
    ax.plot(rounds, mean, color=colour_of(0), linewidth=2.0, label="mean, weighted by images")
    ax.set(xlabel="Round", ylabel="Training loss", ylim=(0, None))
    ax.locator_params(axis="x", integer=True)
    legend_above(figure, 2)
    return figure
