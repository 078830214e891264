"""Maps as pictures: placed on the radiograph, with a colour bar, a legend and text.

`place_on_image` goes from the network's square back to the picture that the radiologist sees; `overlay` draws one map, `montage` several.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from pneumofed.common.evaluation.plots import FAINT, INK, TEXT_PT
from pneumofed.inference.explain.methods import FACTS, Attribution

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


POSITIVE_COLOURS, SIGNED_COLOURS = "inferno", "PuOr_r"
"""Perceptually uniform (van der Walt & Smith 2015), and diverging, the same to colour-blind eyes (Brewer's PuOr): orange speaks for the
finding, purple against it."""
MAX_OPACITY = 0.65
"""Opacity of the largest value; that of the others is in proportion, so that the radiograph shows where there is no evidence."""
LUNGS_COLOUR, MARKS_COLOUR = "#56B4E9", "#009E73"
_PIXEL_BLUR = 1 / 64
"""Deviation as a share of the side, for maps of single pixels, which are speckles to the eye. Only for the picture."""


@dataclass(frozen=True)
class Panel:
    """One map over one radiograph; all arrays are float32 or bool [H, W] of the same picture.

    Attributes:
        pixels: the radiograph in [0, 1].
        values: the map, placed on it.
        attribution: where it comes from.
        lungs: the estimate, or None where the lungs were not found.
        marks: markers and text.
        lines: the text below the picture.
    """

    pixels: np.ndarray
    values: np.ndarray
    attribution: Attribution
    lungs: NDArray[np.bool_] | None
    marks: NDArray[np.bool_]
    lines: tuple[str, ...]


def overlay(panel: Panel, title: str) -> Figure:
    """Draws one map, large, with its colour bar, legend and text.

    Args:
        panel: the map and its radiograph.
        title: stands after the method's name.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 7.2), dpi=150, layout="constrained", facecolor="white")
    axes, below = figure.subplots(2, 1, gridspec_kw={"height_ratios": (5.0, 2.0)})
    draw_panel(axes, panel)
    _scale(figure, axes, panel.attribution)
    axes.set_title(f"{FACTS[panel.attribution.method].title}: {title}", fontsize=TEXT_PT + 2, color=INK)
    below.axis("off")
    text = "\n".join(textwrap.fill(line, 92) for line in panel.lines)
    below.text(0.0, 1.0, text, fontsize=TEXT_PT, color=INK, va="top", transform=below.transAxes)
    _legend(figure, [panel])
    return figure


def montage(panels: Sequence[Panel], title: str) -> Figure:
    """Draws the radiograph and maps of it by several methods, side by side.

    Args:
        panels: maps of one radiograph, at least one.
        title: stands above all of them.
    """
    from matplotlib.figure import Figure

    columns = min(4, len(panels) + 1)
    rows = -(-(len(panels) + 1) // columns)
    figure = Figure(figsize=(3.0 * columns, 3.4 * rows + 0.6), dpi=130, layout="constrained", facecolor="white")
    plain, *others = figure.subplots(rows, columns, squeeze=False).ravel()
    plain.imshow(panels[0].pixels, cmap="gray", vmin=0.0, vmax=1.0)
    plain.set_title("radiograph", fontsize=TEXT_PT, color=INK)
    for axes in (plain, *others):
        axes.axis("off")
    for axes, panel in zip(others, panels, strict=False):
        draw_panel(axes, panel)
        _scale(figure, axes, panel.attribution)
        axes.set_title(FACTS[panel.attribution.method].title, fontsize=TEXT_PT, color=INK)
    figure.suptitle(title, fontsize=TEXT_PT + 2, color=INK)
    _legend(figure, panels)
    return figure


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Draws `panel` into `axes`; colours are relative to the largest value of the picture.

    Args:
        axes: of matplotlib; its ticks and frame are taken off.
        panel: the map and its radiograph; outlines of lungs and marks are drawn where there are any.
    """
    cmap, lowest = _colours(panel.attribution)
    relative = relative_values(panel)
    axes.imshow(panel.pixels, cmap="gray", vmin=0.0, vmax=1.0)
    axes.imshow(relative, cmap=cmap, vmin=lowest, vmax=1.0, alpha=MAX_OPACITY * np.abs(relative))
    for place, colour in ((panel.lungs, LUNGS_COLOUR), (panel.marks, MARKS_COLOUR)):
        if place is not None and place.any():
            axes.contour(place.astype(np.float32), levels=[0.5], colors=[colour], linewidths=1.0, linestyles="--")
    axes.axis("off")


def relative_values(panel: Panel) -> np.ndarray:
    """Divides the map by its largest absolute value, float32 [H, W] in [-1, 1] or [0, 1]; 0 everywhere for an empty map."""
    values = panel.values
    if panel.attribution.cell_px <= 1.0:
        values = gaussian_filter(values, _PIXEL_BLUR * max(values.shape))
    if not FACTS[panel.attribution.method].signed:
        values = np.maximum(values, 0.0)
    largest = float(np.abs(values).max())
    return values / largest if largest > 0 else np.zeros_like(values)


def _colours(attribution: Attribution) -> tuple[str, float]:
    """(colour map, lowest relative value)."""
    return (SIGNED_COLOURS, -1.0) if FACTS[attribution.method].signed else (POSITIVE_COLOURS, 0.0)


def _scale(figure: Figure, axes: Axes, attribution: Attribution) -> None:
    """A colour bar at the picture's own edge, which for a picture that is not as wide as its place is not that of the place."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    cmap, lowest = _colours(attribution)
    place = axes.inset_axes((1.03, 0.0, 0.05, 1.0))
    bar = figure.colorbar(
        ScalarMappable(Normalize(lowest, 1.0), cmap), cax=place, ticks=[-1.0, 0.0, 1.0] if lowest else [0.0, 1.0]
    )
    bar.ax.set_yticklabels(["against", "none", "for"] if lowest else ["none", "most"], fontsize=TEXT_PT - 2)
    bar.outline.set_edgecolor(FAINT)


def _legend(figure: Figure, panels: Sequence[Panel]) -> None:
    """Of the outlines that are there."""
    from matplotlib.lines import Line2D

    drawn = {
        "lungs (estimate)": (LUNGS_COLOUR, any(panel.lungs is not None for panel in panels)),
        "marker or text": (MARKS_COLOUR, any(panel.marks.any() for panel in panels)),
    }
    lines = [Line2D([], [], color=colour, linestyle="--", label=name) for name, (colour, shown) in drawn.items() if shown]
    if lines:
        figure.legend(handles=lines, loc="outside lower left", ncols=2, frameon=False, fontsize=TEXT_PT - 1)


def place_on_image(values: np.ndarray, shape: tuple[int, int], fit: Literal["pad", "crop"]) -> np.ndarray:
    """Places a map over the square of `fit_square` on the image that the square was made of, float32 [H, W].

    Bilinear, so within the range of `values`. What `pad` added is cut off; what `crop` cut off is 0: the network has not seen it.

    Args:
        values: float32 [S, S].
        shape: (H, W) of the image.
        fit: how the square was made.
    """
    height, width = shape
    if fit == "crop":
        side = min(shape)
        top, left = (height - side) // 2, (width - side) // 2
        placed = np.zeros(shape, np.float32)
        placed[top : top + side, left : left + side] = _resize(values, side, side)
        return placed
    size = values.shape[0]
    inner = [max(1, round(length * size / max(shape))) for length in shape]
    top, left = ((size - length) // 2 for length in inner)
    return _resize(values[top : top + inner[0], left : left + inner[1]], height, width)


def _resize(values: np.ndarray, height: int, width: int) -> np.ndarray:
    image = PIL.Image.fromarray(np.ascontiguousarray(values, np.float32))
    return np.asarray(image.resize((width, height), PIL.Image.Resampling.BILINEAR))
