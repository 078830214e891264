"""Maps as pictures: placed on the radiograph, with a colour bar, a legend and text.

`place_on_image` goes from the network's square back to the picture that the radiologist sees; `overlay` draws one map, `montage` several.
Of a CT volume `place_on_slices` goes from the network's grid to the volume's own slices, `choose_slices` finds those with most of a map's
weight, and `draw_slices` draws them.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from pneumofed.common.evaluation.plots import FAINT, INK, TEXT_PT
from pneumofed.common.imaging.types import LUNG_WINDOW
from pneumofed.common.imaging.volumes import FIELD_OF_VIEW_MM, Volume, apply_ct_window, place_view
from pneumofed.inference.explain.methods import FACTS, Attribution, Method

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
SHOWN_SLICES = 9


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
    _scale(figure, axes, panel.attribution.method)
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
        _scale(figure, axes, panel.attribution.method)
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
    cmap, lowest = _colours(panel.attribution.method)
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


def _colours(method: Method) -> tuple[str, float]:
    """(colour map, lowest relative value)."""
    return (SIGNED_COLOURS, -1.0) if FACTS[method].signed else (POSITIVE_COLOURS, 0.0)


def _scale(figure: Figure, axes: Axes, method: Method) -> None:
    """A colour bar at the picture's own edge, which for a picture that is not as wide as its place is not that of the place."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    cmap, lowest = _colours(method)
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


def place_on_slices(values: NDArray[np.float32], volume: Volume, places: Sequence[int]) -> NDArray[np.float32]:
    """Places a map over the cube of `fit_volume` on slices of the volume that the cube was made of, float32 [places, rows, columns].

    Linear along each axis between the middles of the map's cells, so within the range of `values`. What lies outside of the cube is 0: the
    network has not seen it.

    Args:
        values: float32 [d, h, w], cells that share the cube evenly.
        volume: in the coordinates of `read_volume`.
        places: of the slices, from 0.
    """
    shape, spacing, middles = volume.hounsfield.shape, volume.spacing_mm, place_view(volume)
    along, down, across = (_spread(values.shape[axis], shape[axis], spacing[axis], middles[axis]) for axis in range(3))
    return np.stack([down @ np.tensordot(along[place], values, 1) @ across.T for place in places])


def _spread(cells: int, length: int, spacing_mm: float, middle_mm: float) -> NDArray[np.float32]:
    """Weights float32 [length, cells] of linear interpolation at the voxels of one axis; the outermost cells reach to the cube's faces."""
    share = ((np.arange(length) + 0.5) * spacing_mm - middle_mm) / FIELD_OF_VIEW_MM + 0.5
    at = np.clip(share * cells - 0.5, 0, cells - 1)
    weights = np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(cells)))
    return (weights * ((share >= 0) & (share <= 1))[:, None]).astype(np.float32)


def strongest_slices(
    values: NDArray[np.float32], slices: int, count: int = SHOWN_SLICES, among: NDArray[np.bool_] | None = None
) -> list[int]:
    """Finds the slices of the network's grid with most of a map's weight for the target, in their order; fewer where the others have none.

    Args:
        values: float32 [d, h, w], cells that share the grid's slices evenly.
        slices: of the grid.
        count: how many at most; of equal ones those nearest to the middle.
        among: bool [slices], the slices to choose from; None for all.
    """
    of_cells = np.maximum(values, 0.0).sum(axis=(1, 2), dtype=np.float64)
    weight = np.interp((np.arange(slices) + 0.5) * len(values) / slices - 0.5, np.arange(len(values)), of_cells)
    weight = weight if among is None else np.where(among, weight, 0.0)
    order = np.lexsort((np.abs(np.arange(slices) - (slices - 1) / 2), -weight))[:count]
    return sorted(int(place) for place in order if weight[place] > 0)


def choose_slices(values: NDArray[np.float32], slices: int, volume: Volume, count: int = SHOWN_SLICES) -> list[int]:
    """Finds the volume's own slices to show with a map: those in the middle of its `strongest_slices` that lie in the volume, so that they
    are not closer than the network told them apart; evenly spaced ones where the map has no weight.

    Args:
        values: float32 [d, h, w], the map.
        slices: of the network's grid.
        volume: that the grid was made of.
        count: how many at most.
    """
    length, step = volume.hounsfield.shape[0], volume.spacing_mm[0]
    middles = place_view(volume)[0] + ((np.arange(slices) + 0.5) / slices - 0.5) * FIELD_OF_VIEW_MM
    places = np.floor(middles / step).astype(int)
    inside = (places >= 0) & (places < length)  # the cube may be longer than the volume
    chosen = strongest_slices(values, slices, count, inside)
    if not chosen:
        whole = np.flatnonzero(inside)
        chosen = whole[np.linspace(0, len(whole) - 1, count).round().astype(int)].tolist() if len(whole) else []
    return sorted({int(places[one]) for one in chosen}) or [length // 2]


def name_slice(place: int, count: int, numbers: Sequence[int]) -> str:
    """Words which slice it is: from the feet, and by its number in the archive where it has one.

    Args:
        place: from 0.
        count: slices of the volume.
        numbers: Instance Number (0020,0013) of each slice; empty where there are none.
    """
    return f"slice {place + 1} of {count}" + (f", image {numbers[place]}" if numbers else "")


def draw_slices(
    volume: Volume, values: NDArray[np.float32], method: Method, title: str, lines: Sequence[str], numbers: Sequence[int] = ()
) -> Figure:
    """Draws the volume's own slices with most of the map's weight, in the lung window, with the map over them.

    Args:
        volume: as it was read.
        values: the map over the network's grid, float32 [slices, S, S]; colours are relative to its largest value, the same in all slices.
        method: that made it; stands above, before the title.
        title: the judgement.
        lines: stand below.
        numbers: of the slices, for `name_slice`.
    """
    from matplotlib.figure import Figure

    shown = choose_slices(values, len(values), volume)
    rows = math.ceil(len(shown) / 3)
    heights = 2.35 * rows, 2.15  # inches; the second of the text
    figure = Figure(figsize=(7.2, sum(heights)), dpi=150, layout="constrained", facecolor="white")
    parts: Any = figure.subfigures(2, 1, height_ratios=heights)
    above, below = parts
    placed = place_on_slices(values, volume, shown) / max(float(values.max()), 1e-30)
    tiles, aspect = above.subplots(rows, 3, squeeze=False).ravel(), volume.spacing_mm[1] / volume.spacing_mm[2]
    for axes in tiles:
        axes.axis("off")
    for axes, place, heat in zip(tiles, shown, placed, strict=False):
        grey = apply_ct_window(volume.hounsfield[place], LUNG_WINDOW)
        axes.imshow(grey, cmap="gray", vmin=0, vmax=255, aspect=aspect)
        axes.imshow(heat, cmap=_colours(method)[0], vmin=0.0, vmax=1.0, alpha=MAX_OPACITY * heat, aspect=aspect)
        axes.set_title(name_slice(place, len(volume.hounsfield), numbers), fontsize=TEXT_PT - 1, color=INK)
    _scale(above, tiles[min(2, len(shown) - 1)], method)
    above.suptitle(f"{FACTS[method].title}: {title}", fontsize=TEXT_PT + 2, color=INK)
    text = "\n".join(textwrap.fill(line, 100) for line in lines)
    below.text(0.02, 0.98, text, fontsize=TEXT_PT, color=INK, va="top")
    return figure
