"""The curve of AUROC over epsilon, as a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = {"image": "#1f5fa8", "patient": "#c96a12"}


@dataclass(frozen=True)
class Curve:
    """Test AUROCs of each seed by epsilon, ascending; infinity is the run without privacy."""

    unit: str
    points: dict[float, list[float]]


def draw_curves(curves: Sequence[Curve], path: Path) -> None:
    """Writes the picture (PNG) to `path`: the mean over seeds as a line, each seed as a dot. Epsilons stand at equal distances."""
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ticks = sorted({epsilon for curve in curves for epsilon in curve.points})
    place = {epsilon: number for number, epsilon in enumerate(ticks)}
    for number, curve in enumerate(curves):
        colour, shift = COLOURS[curve.unit], 0.06 * (number - (len(curves) - 1) / 2)
        at = [place[epsilon] + shift for epsilon in curve.points]
        axes.plot(
            at,
            [statistics.mean(found) for found in curve.points.values()],
            color=colour,
            label=f"one {curve.unit} (mean of seeds)",
        )
        for x, found in zip(at, curve.points.values(), strict=True):
            axes.plot([x] * len(found), found, color=colour, linestyle="none", marker="o", markersize=4, alpha=0.6)
    axes.set_xticks(range(len(ticks)), ["no privacy" if math.isinf(epsilon) else f"{epsilon:g}" for epsilon in ticks])
    axes.set(xlabel="epsilon at each site, delta = 1 / its patients", ylabel="test AUROC")
    axes.grid(alpha=0.25)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)
