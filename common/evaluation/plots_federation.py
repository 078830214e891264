"""Figures of a federated run: metrics over rounds, and hospitals beside one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from common.evaluation.figures import FAINT, TEXT_PT, colour_of, label_line, legend_above, marker_of, new_figure, style_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_NAMED_SITES = 25  # more names than this are not readable in 4.5 inches
Series = Mapping[str, Sequence[float]]


def training_curves(rounds: Sequence[int], auroc: Series, loss: Series, best_round: int | None = None) -> Figure:
    """AUROC above loss over rounds.

    Args:
        rounds: R round numbers.
        auroc: R values for each series, by name (validation, test, external); NaN where a round was not judged.
        loss: as `auroc`; a name that is in both has one colour in both.
        best_round: the round whose model was kept, marked by a vertical line.
    """
    figure, (top, bottom) = new_figure(2, (1.3, 1.0))
    names = list(dict.fromkeys([*auroc, *loss]))
    for ax, series in ((top, auroc), (bottom, loss)):
        for name, values in series.items():
            _over_rounds(ax, rounds, values, names.index(name))
        if best_round is not None:
            ax.axvline(best_round, color=FAINT, linewidth=1.2, zorder=0)
        _label_ends(ax, rounds, series, names)
    if best_round is not None:
        label_line(top, best_round, f"kept: round {best_round}", at_top=False)
    top.set(ylabel="AUROC")
    bottom.set(ylabel="Loss", xlabel="Round")
    bottom.locator_params(axis="x", integer=True)
    return figure


def sites(
    alone: Mapping[str, float], federated: Mapping[str, float], lines: Mapping[str, float], metric: str = "AUROC"
) -> Figure:
    """One row a hospital: `metric` of its own model (open) and of the federated model (filled), by rising value of its own.

    Args:
        alone: by hospital, of the model that it trained alone.
        federated: by hospital, of the federated model on the same images; may lack hospitals or be empty.
        lines: values drawn across all rows, by name, e.g. of the federated and the pooled model on the test set.
        metric: its name on the axis.
    """
    figure, (ax,) = new_figure()
    names = sorted(alone, key=lambda name: (np.nan_to_num(alone[name], nan=-np.inf), name))
    rows = np.arange(len(names))
    own, joint = np.array([alone[name] for name in names]), np.array([federated.get(name, np.nan) for name in names])
    size = 7.0 if len(names) <= MAX_NAMED_SITES else 3.5
    ax.hlines(rows, own, joint, color=FAINT, linewidth=size / 4)
    dots: dict[str, Any] = {"marker": "o", "markersize": size, "linestyle": "none"}
    ax.plot(own, rows, color=colour_of(1), markerfacecolor="white", label="hospital alone", **dots)
    if federated:
        ax.plot(joint, rows, color=colour_of(0), label="federated, at hospital", **dots)
    for index, (name, value) in enumerate(lines.items()):
        ax.axvline(value, linewidth=1.4, zorder=0, label=f"{name} {value:.3f}", **style_of(index and index + 1))
    _name_rows(ax, [name if np.isfinite(alone[name]) else f"{name}\n(undefined)" for name in names], metric)
    ax.set_xlabel(metric)
    legend_above(figure, 2 if len(lines) > 1 and federated else 3)
    return figure


def _name_rows(ax: Axes, names: Sequence[str], metric: str) -> None:
    ax.grid(visible=False, axis="y")
    margin = max(0.7, len(names) / 50)
    ax.set_ylim(-margin, max(len(names), 1) - 1 + margin)
    if len(names) <= MAX_NAMED_SITES:
        ax.set_yticks(range(len(names)), names)
        return
    ax.set_yticks([])
    ax.set_ylabel(f"{len(names)} hospitals by rising {metric} alone")


def _over_rounds(ax: Axes, rounds: Sequence[int], values: Sequence[float], index: int) -> None:
    points = np.asarray(values, dtype=float)
    known = np.isfinite(points)
    ax.plot(np.asarray(rounds)[known], points[known], linewidth=1.8, marker=marker_of(index), markersize=4, **style_of(index))


def _label_ends(ax: Axes, rounds: Sequence[int], series: Series, names: Sequence[str]) -> None:
    """Names each line at its last point, labels pushed apart so that they do not overlap."""
    last = {name: values[known[-1]] for name, values in series.items() if len(known := np.flatnonzero(np.isfinite(values)))}
    low, high = ax.get_ylim()
    heights = _spread([(value - low) / (high - low) for value in last.values()], gap=0.13)
    for (name, value), height in zip(last.items(), heights, strict=True):
        ax.annotate(
            f"{name} {value:.3f}", (1.0, height), (4, 0), xycoords="axes fraction", textcoords="offset points", va="center",
            fontsize=TEXT_PT, color=colour_of(names.index(name)), annotation_clip=False,
        )  # fmt: skip


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """`heights` moved up as little as makes them `gap` apart, then all down if they left [0, 1]."""
    order = np.argsort(heights, kind="stable")
    placed = list(heights)
    for lower, upper in pairwise(order.tolist()):
        placed[upper] = max(placed[upper], placed[lower] + gap)
    excess = max([0.0, *(height - 1.0 for height in placed)])
    return [height - excess for height in placed]
