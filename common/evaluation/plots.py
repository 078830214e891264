"""Figures of how a model does on sets of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from common.evaluation.bootstrap import Interval
from common.evaluation.curves import precision_recall_curve, reliability, roc_curve
from common.evaluation.figures import FAINT, INK, TEXT_PT, colour_of, label_line, legend_above, marker_of, new_figure, style_of
from common.evaluation.metrics import metrics
from common.evaluation.predictions import Predictions
from common.evaluation.statistics import Statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class EvaluatedSet:
    """One evaluated set as figures show it.

    Attributes:
        name: as in the legend, e.g. "Test".
        statistics: of the model on this set.
        threshold: the operating point, marked on the curves.
        intervals: of its metrics, shown where known.
        confidence: of the intervals.
    """

    name: str
    statistics: Statistics
    threshold: float
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    confidence: float = 0.95


def roc(sets: Sequence[EvaluatedSet]) -> Figure:
    """ROC curves in one figure, each with its operating point and its AUROC with interval."""
    figure, (ax,) = new_figure()
    ax.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    for index, one in enumerate(sets):
        at = metrics(one.statistics, one.threshold)
        ax.plot(*roc_curve(one.statistics), linewidth=1.8, label=_headline(one, "auroc", "AUROC"), **style_of(index))
        label = f"threshold {one.threshold:.2f}: sensitivity {_short(at['sensitivity'])}, specificity {_short(at['specificity'])}"
        _mark(ax, (1 - at["specificity"], at["sensitivity"]), index, label)
    ax.set(xlabel="1 − specificity", ylabel="Sensitivity", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    ax.legend(loc="lower right", fontsize=TEXT_PT - 1, frameon=True, framealpha=0.9, edgecolor="none", labelcolor=INK)
    return figure


def precision_recall(sets: Sequence[EvaluatedSet]) -> Figure:
    """Precision-recall curves in one figure, each with its operating point, average precision with interval, and chance level."""
    figure, (ax,) = new_figure()
    for index, one in enumerate(sets):
        at = metrics(one.statistics, one.threshold)
        label = _headline(one, "average_precision", "average precision")
        ax.plot(*precision_recall_curve(one.statistics), linewidth=1.8, label=label, **style_of(index))
        chance = at["n_positive"] / at["n"] if at["n"] else np.nan
        ax.axhline(chance, color=colour_of(index), linewidth=1, linestyle=":")
        at_threshold = f"threshold {one.threshold:.2f}: recall {_short(at['sensitivity'])}, precision {_short(at['precision'])}"
        _mark(ax, (at["sensitivity"], at["precision"]), index, f"{at_threshold}; chance (dotted): {_short(chance)}")
    ax.set(xlabel="Recall (sensitivity)", ylabel="Precision", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    legend_above(figure, 1)
    return figure


def reliability_diagram(sets: Sequence[EvaluatedSet]) -> Figure:
    """Share of pneumonia by predicted probability in 15 bins, with 95% Wilson intervals; below it the images in each bin."""
    figure, (top, bottom) = new_figure(2, (3.2, 1.0))
    top.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    for index, one in enumerate(sets):
        error = metrics(one.statistics, one.threshold)["ece"]
        _reliability(top, bottom, one, index, f"{one.name}, n = {one.statistics.n:,}: calibration error {_short(error)}")
    top.set(ylabel="Share of pneumonia", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    bottom.set(xlabel="Predicted probability of pneumonia", ylabel="Images", yscale="log", ylim=(0.5, None))
    bottom.yaxis.set_major_formatter("{x:,.0f}")
    bottom.minorticks_off()
    legend_above(figure, 2)
    return figure


def confusion_matrix(matrix: np.ndarray, class_names: Sequence[str], title: str = "") -> Figure:
    """Counts [C, C] by true class (row) and predicted class (column), shaded by share of the true class."""
    figure, (ax,) = new_figure()
    counts = np.asarray(matrix)
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    ax.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.25)
    for (row, column), share in np.ndenumerate(shares):
        text = f"{counts[row, column]:,}\n{share:.1%}" if totals[row, 0] else "0"
        colour = "white" if share > 0.6 else INK
        ax.text(column, row, text, ha="center", va="center", fontsize=TEXT_PT + 3, color=colour)
    names = [f"{name}\n(n = {total:,})" for name, total in zip(class_names, totals[:, 0], strict=True)]
    ax.set_xticks(range(len(names)), class_names)
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="Predicted", ylabel="True", title=title)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return figure


def called_matrix(statistics: Statistics, threshold: float) -> np.ndarray:
    """int64 [2, 2] for `confusion_matrix`: normal and pneumonia, true (row) and as called at `threshold` (column)."""
    at = metrics(statistics, threshold)
    return np.array([[at["tn"], at["fp"]], [at["fn"], at["tp"]]], dtype=np.int64)


def score_histograms(predictions: Predictions, class_names: Sequence[str], threshold: float) -> Figure:
    """Share of each true class's images by predicted probability of pneumonia, with the threshold; one row a class."""
    figure, axes = new_figure(predictions.classes)
    edges = np.linspace(0.0, 1.0, 41)
    for index, (ax, name) in enumerate(zip(axes, class_names, strict=True)):
        scores = predictions.scores[predictions.labels == index]
        shares = np.histogram(scores, edges)[0] / max(len(scores), 1)
        ax.stairs(shares, edges, fill=True, color=colour_of(index), alpha=0.85)
        ax.axvline(threshold, color=INK, linewidth=1.2)
        ax.set_title(f"{name} (n = {len(scores):,})", loc="left", fontsize=TEXT_PT + 1, color=INK)
        ax.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        ax.set(xlim=(0, 1), ylim=(0, None), ylabel="Images")
    label_line(axes[0], threshold, f"threshold {threshold:.2f}", at_top=True)
    axes[-1].set_xlabel("Predicted probability of pneumonia")
    return figure


def _headline(one: EvaluatedSet, metric: str, name: str) -> str:
    value = metrics(one.statistics, one.threshold)[metric]
    known = one.intervals.get(metric)
    interval = f" ({one.confidence:.0%} CI {_short(known['low'])}–{_short(known['high'])})" if known else ""
    return f"{one.name}, n = {one.statistics.n:,}: {name} {_short(value)}{interval}"


def _short(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "undefined"


def _mark(ax: Axes, point: tuple[float, float], index: int, label: str) -> None:
    x, y = point
    ax.plot(
        [x], [y], marker=marker_of(index), markersize=8, color=colour_of(index), markeredgecolor="white", linestyle="none",
        zorder=3, clip_on=False, label=label,
    )  # fmt: skip


def _reliability(top: Axes, bottom: Axes, one: EvaluatedSet, index: int, label: str) -> None:
    curve = reliability(one.statistics)
    known = curve.count > 0
    score, frequency, count = curve.score[known], curve.frequency[known], curve.count[known]
    low, high = wilson_interval(frequency, count)
    top.vlines(score, low, high, color=colour_of(index), linewidth=1, alpha=0.5)
    top.plot(score, frequency, linewidth=1.2, marker=marker_of(index), markersize=5, label=label, **style_of(index))
    edges = np.linspace(0.0, 1.0, len(curve.count) + 1)
    bottom.stairs(np.maximum(curve.count, 0.5), edges, baseline=0.5, linewidth=1.4, **style_of(index))


def wilson_interval(share: npt.NDArray[np.float64], n: npt.NDArray[np.int64]) -> tuple[npt.NDArray, npt.NDArray]:
    """95% score interval of a share of n trials, n > 0 (Wilson 1927, JASA 22:209)."""
    z = 1.959963984540054  # the 97.5% point of the normal distribution
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return middle - half, middle + half
