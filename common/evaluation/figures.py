"""The canvas of all figures: one size, one look, one palette; and their way to bytes or a file.

Figures are made through matplotlib's object interface: no pyplot, no global state, no display. matplotlib is imported late.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCH, HEIGHT_INCH, DPI = 6.0, 4.5, 200

# Okabe and Ito 2008, "Color Universal Design"; distinguishable with every common colour vision deficiency
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, FAINT = "#222222", "#B8B8B8"
TEXT_PT = 9.0


def new_figure(rows: int = 1, height_ratios: tuple[float, ...] | None = None) -> tuple[Figure, list[Axes]]:
    """An empty figure with `rows` plain axes above one another that share their x axis."""
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
    return {"color": colour_of(index), "linestyle": LINES[index % len(LINES)]}


def legend_above(figure: Figure, columns: int) -> None:
    """A legend above the axes, where it cannot hide data."""
    figure.legend(loc="outside upper center", ncols=columns, fontsize=TEXT_PT - 0.5, frameon=False, labelcolor=INK)


def label_line(ax: Axes, x: float, text: str, at_top: bool) -> None:
    """Writes `text` beside the vertical line at `x`, on the side where there is more room."""
    low, high = ax.get_xlim()
    to_left = x - low > 0.7 * (high - low)
    ax.annotate(
        text, (x, float(at_top)), (-4 if to_left else 4, -3 if at_top else 3), xycoords=("data", "axes fraction"),
        textcoords="offset points", ha="right" if to_left else "left", va="top" if at_top else "bottom",
        fontsize=TEXT_PT, color=INK,
    )  # fmt: skip


def render(figure: Figure, kind: Literal["png", "svg"] = "png") -> bytes:
    """The figure as a PNG (1200 x 900 pixels) or SVG; the same figure gives the same bytes."""
    import matplotlib

    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "pneumofed"}):
        figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


def write(figure: Figure, path: str | Path) -> None:
    """Writes the figure to `path`, a PNG or, where the name ends in `.svg`, an SVG."""
    Path(path).write_bytes(render(figure, "svg" if Path(path).suffix == ".svg" else "png"))


def _plain(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(INK)
    ax.tick_params(labelsize=TEXT_PT, color=INK, labelcolor=INK)
    ax.grid(color="#E6E6E6", linewidth=0.6)
    ax.set_axisbelow(True)
    for label in (ax.xaxis.label, ax.yaxis.label, ax.title):
        label.set(fontsize=TEXT_PT + 1, color=INK)
