"""Draws figures: how a model does on sets of images, metrics over rounds, and hospitals beside one another.

- `roc`, `precision_recall`, `reliability_diagram`, `confusion_matrix`, `score_histograms`: of evaluated sets.
- `training_curves`, `sites`: of a federated run.
- `new_figure`, `style_of`, `legend_above`, `label_line`: the canvas of all figures, with one size, one look and one palette.
- `render_figure`, `write`: to bytes or a file.

Figures are made through matplotlib's object interface: no pyplot, no global state, no display. matplotlib is imported late.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from pneumofed.common.evaluation.bootstrap import ConfidenceInterval
from pneumofed.common.evaluation.metrics import metrics, precision_recall_curve, reliability, roc_curve
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.evaluation.statistics import Statistics

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
    intervals: Mapping[str, ConfidenceInterval] = field(default_factory=dict)
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


def reliability_diagram(sets: Sequence[EvaluatedSet], positive: str = "pneumonia") -> Figure:
    """Share of pneumonia by predicted probability in 15 bins, with 95% Wilson intervals; below it the images in each bin.

    Args:
        sets: each drawn in one colour.
        positive: what all but normal is called.
    """
    figure, (top, bottom) = new_figure(2, (3.2, 1.0))
    top.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    for index, one in enumerate(sets):
        error = metrics(one.statistics, one.threshold)["ece"]
        _reliability(top, bottom, one, index, f"{one.name}, n = {one.statistics.n:,}: calibration error {_short(error)}")
    top.set(ylabel=f"Share of {positive}", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    bottom.set(xlabel=f"Predicted probability of {positive}", ylabel="Images", yscale="log", ylim=(0.5, None))
    bottom.yaxis.set_major_formatter("{x:,.0f}")
    bottom.minorticks_off()
    legend_above(figure, 2)
    return figure


def confusion_matrix(matrix: np.ndarray, class_names: Sequence[str], title: str = "") -> Figure:
    """Draws counts by true class (row) and predicted class (column), shaded by share of the true class.

    Args:
        matrix: int64 [C, C]; rows without images stay white.
        class_names: C names, in the order of the rows.
        title: above the matrix; empty for none.
    """
    figure, (ax,) = new_figure()
    counts = np.asarray(matrix)
    totals = counts.sum(axis=1, keepdims=True)
    size = TEXT_PT + 3 if len(counts) <= 3 else max(3.5, 36.0 / len(counts))  # so that the numbers fit their cells
    shares = counts / np.maximum(totals, 1)
    ax.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.25)
    for (row, column), share in np.ndenumerate(shares):
        text = f"{counts[row, column]:,}\n{share:.1%}" if totals[row, 0] else "0"
        colour = "white" if share > 0.6 else INK
        ax.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
    names = [f"{name}\n(n = {total:,})" for name, total in zip(class_names, totals[:, 0], strict=True)]
    ax.set_xticks(range(len(names)), class_names)
    if len(names) > 4:
        ax.tick_params(axis="x", labelrotation=45)
    ax.set_yticks(range(len(names)), names if len(names) <= 8 else class_names)
    ax.set(xlabel="Predicted", ylabel="True", title=title)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return figure


def called_matrix(statistics: Statistics, threshold: float) -> np.ndarray:
    """Computes the int64 [2, 2] matrix for `confusion_matrix`: normal and pneumonia, true (row) and as called (column).

    Args:
        statistics: of one set of images.
        threshold: an image is called pneumonia if its score >= threshold.
    """
    at = metrics(statistics, threshold)
    return np.array([[at["tn"], at["fp"]], [at["fn"], at["tp"]]], dtype=np.int64)


def score_histograms(
    predictions: Predictions, class_names: Sequence[str], threshold: float, positive: str = "pneumonia"
) -> Figure:
    """Draws the share of each true class's images by predicted probability of pneumonia; one row a class.

    Args:
        predictions: of one set of images, C classes.
        class_names: C names, in the order of the labels.
        threshold: marked by a vertical line, in [0, 1].
        positive: what all but normal is called.
    """
    figure, axes = new_figure(predictions.classes)
    if predictions.classes > 5:
        figure.set_size_inches(WIDTH_INCH, HEIGHT_INCH * predictions.classes / 5)
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
    axes[-1].set_xlabel(f"Predicted probability of {positive}")
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


def wilson_interval(
    share: npt.NDArray[np.float64], n: npt.NDArray[np.int64] | npt.NDArray[np.float64]
) -> tuple[npt.NDArray, npt.NDArray]:
    """Computes the 95% score interval of shares (Wilson 1927, JASA 22:209).

    Args:
        share: float64 [B], in [0, 1].
        n: int64 or float64 [B], trials of each share, above 0; need not be whole.

    Returns:
        (low, high), each float64 [B].
    """
    z = 1.959963984540054  # the 97.5% point of the normal distribution
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return middle - half, middle + half


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
        label_line(bottom, best_round, f"kept: round {best_round}", at_top=True)  # losses fall: there is room above them
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


WIDTH_INCH, HEIGHT_INCH, DPI = 6.0, 4.5, 200

# Okabe and Ito 2008, "Color Universal Design"; distinguishable with every common colour vision deficiency
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, FAINT = "#222222", "#B8B8B8"
TEXT_PT = 9.0


def new_figure(rows: int = 1, height_ratios: tuple[float, ...] | None = None) -> tuple[Figure, list[Axes]]:
    """Makes an empty figure with plain axes above one another that share their x axis.

    Args:
        rows: number of axes.
        height_ratios: relative heights of the rows, from the top; None for equal ones.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCH, HEIGHT_INCH), dpi=DPI, layout="constrained", facecolor="white")
    grid = figure.subplots(rows, 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": height_ratios or (1.0,) * rows})
    axes = [row[0] for row in grid]
    for ax in axes:
        _plain(ax)
    return figure, axes


def colour_of(index: int) -> str:
    """Colour of the series `index`."""
    return COLOURS[index % len(COLOURS)]


def marker_of(index: int) -> str:
    """Marker of the series `index`."""
    return MARKERS[index % len(MARKERS)]


def style_of(index: int) -> dict[str, Any]:
    """Colour and line style of the series `index`: series differ in both, for print in grey."""
    return {"color": colour_of(index), "linestyle": LINE_STYLES[index % len(LINE_STYLES)]}


def legend_above(figure: Figure, columns: int) -> None:
    """Draws a legend above the axes, where it cannot hide data.

    Args:
        figure: whose labelled lines are listed.
        columns: of the legend, fewer where their words would leave the figure.
    """
    for number in range(columns, 0, -1):
        legend = figure.legend(loc="outside upper center", ncols=number, fontsize=TEXT_PT - 0.5, frameon=False, labelcolor=INK)
        if number == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def label_line(ax: Axes, x: float, text: str, at_top: bool) -> None:
    """Writes a label beside a vertical line, on the side where there is more room.

    Args:
        ax: with its x limits set, since the side depends on them.
        x: place of the line, in data coordinates.
        text: of the label.
        at_top: at the upper end of the line, else at the lower one.
    """
    low, high = ax.get_xlim()
    to_left = x - low > 0.7 * (high - low)
    ax.annotate(
        text, (x, float(at_top)), (-4 if to_left else 4, -3 if at_top else 3), xycoords=("data", "axes fraction"),
        textcoords="offset points", ha="right" if to_left else "left", va="top" if at_top else "bottom",
        fontsize=TEXT_PT, color=INK,
    )  # fmt: skip


def render_figure(figure: Figure, kind: Literal["png", "svg"] = "png") -> bytes:
    """Renders the figure as a PNG (1200 x 900 pixels) or SVG; the same figure gives the same bytes.

    Args:
        figure: from `new_figure`, else the size may differ.
        kind: format of the bytes.
    """
    buffer = io.BytesIO()
    _draw(figure, kind, buffer)
    return buffer.getvalue()


def _draw(figure: Figure, kind: Literal["png", "svg"], buffer: io.BytesIO) -> None:
    import matplotlib

    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "pneumofed"}):
        figure.savefig(buffer, format=kind, metadata=metadata)


def write(figure: Figure, path: str | Path) -> None:
    """Writes the figure to a file.

    Args:
        figure: from `new_figure`.
        path: a name that ends in `.svg` gives an SVG, any other a PNG; a file that is there is replaced.
    """
    Path(path).write_bytes(render_figure(figure, "svg" if Path(path).suffix == ".svg" else "png"))


def _plain(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(INK)
    ax.tick_params(labelsize=TEXT_PT, color=INK, labelcolor=INK)
    ax.grid(color="#E6E6E6", linewidth=0.6)
    ax.set_axisbelow(True)
    for label in (ax.xaxis.label, ax.yaxis.label, ax.title):
        label.set(fontsize=TEXT_PT + 1, color=INK)
