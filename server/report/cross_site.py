"""Every model on every hospital's patients (`evaluation.cross_site`): a row a model, a column a hospital, AUROC in the cells.

matrix_table           the rows with intervals, and why a model or a column is missing
draw_matrix            the same as a picture, shaded by AUROC
cross_site_sentences   whose model carries over to the others' patients, and who loses at home to a model from elsewhere
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pneumofed.common.errors import counted
from pneumofed.common.evaluation.plots import FAINT, INK, TEXT_PT, new_figure
from pneumofed.server.report.figures import Picture, picture
from pneumofed.server.report.numbers import DASH, ReportedEstimate, approximate, difference, number
from pneumofed.server.report.read_run import StoredRun
from pneumofed.server.report.wording import with_interval
from pneumofed.server.runs.records import Metrics
from pneumofed.server.runs.summary_records import CrossSiteMatrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GLOBAL = "global model"
"""Name of its row; no site has a space in its name."""
SHADES = 5
"""Of the table's cells: AUROC 0.5 and below has none, each tenth above it is one darker."""
MOST_NAMES = 5
"""So many hospitals that lose at home are named in the sentence; of more, only the number is said."""
MOST_NUMBERS = 12
"""With more hospitals the picture's cells are too small for numbers, which the table has."""


@dataclass(frozen=True)
class MatrixCell:
    """One model on one hospital's patients. `about` is the whole of it in words; `shade` is 0 to `SHADES`."""

    area: ReportedEstimate
    about: str
    home: bool
    shade: int


@dataclass(frozen=True)
class MatrixRow:
    """One model: `away` is its mean AUROC over the other hospitals' patients, `beside` the global model's over the same ones."""

    name: str
    cells: list[MatrixCell | None]
    away: str
    beside: str


@dataclass(frozen=True)
class MatrixTable:
    """The matrix, and by hospital why its model or a part of its column is missing."""

    columns: list[tuple[str, str]]
    """Each hospital and its validation images, normal + pneumonia."""
    rows: list[MatrixRow]
    not_given: Mapping[str, str]
    not_judged: Mapping[str, str]


@dataclass(frozen=True)
class Carried:
    """How one hospital's model does on the others' patients: mean AUROC, and that of the global model on the very same ones."""

    owner: str
    hospitals: int
    own: float
    shared: float


def matrix_table(run: StoredRun) -> MatrixTable | None:
    """Builds the table; None where no hospital was asked, or none told anything."""
    matrix = run.summary.cross_site
    if matrix is None or not matrix.hospitals:
        return None
    columns = [(judge, _images(matrix, judge)) for judge in matrix.hospitals]
    rows = [_row(matrix, None), *(_row(matrix, owner) for owner in sorted(matrix.own))]
    return MatrixTable(columns, rows, matrix.not_given, matrix.not_judged)


def _row(matrix: CrossSiteMatrix, owner: str | None) -> MatrixRow:
    found = matrix.shared if owner is None else matrix.own[owner]
    cells = [_cell(owner, judge, found[judge]) if judge in found else None for judge in matrix.hospitals]
    carried = _carried(matrix, owner) if owner else None
    away, beside = (number(carried.own), number(carried.shared)) if carried else (DASH, DASH)
    return MatrixRow(owner or GLOBAL, cells, away, beside)


def _cell(owner: str | None, judge: str, found: Metrics) -> MatrixCell:
    estimates = approximate(found)
    area, (sensitivity, specificity) = estimates["auroc"], (estimates[name].number for name in ("sensitivity", "specificity"))
    whose = "Global model" if owner is None else f"Model of {owner}"
    parts = [
        f"AUROC {with_interval(area, '95% CI')}",
        f"sensitivity {sensitivity}, specificity {specificity} at threshold {number(found.threshold)}",
        f"{_counted(found)} images, normal + pneumonia",
    ]
    shade = 0 if area.value is None else min(SHADES, max(0, round(10 * (area.value - 0.5))))
    return MatrixCell(area, f"{whose} on the patients of {judge}: {'; '.join(parts)}", owner == judge, shade)


def _counted(found: Metrics) -> str:
    return f"{(found.n or 0) - (found.n_positive or 0)} + {found.n_positive or 0}"


def _images(matrix: CrossSiteMatrix, judge: str) -> str:
    """Of most models the same; patients who joined or withdrew between two answers change it."""
    rows = [matrix.shared, *matrix.own.values()]
    return " or ".join(dict.fromkeys(_counted(row[judge]) for row in rows if judge in row))


def draw_matrix(run: StoredRun) -> list[Picture]:
    """Draws the matrix as a picture; none where there is nothing to draw."""
    matrix = run.summary.cross_site
    if matrix is None or not matrix.hospitals:
        return []
    names, owners = matrix.hospitals, sorted(matrix.own)
    rows = [matrix.shared, *(matrix.own[owner] for owner in owners)]
    values = np.array([[_area(row.get(judge)) for judge in names] for row in rows])
    homes = [(names.index(owner), place) for place, owner in enumerate(owners, 1) if owner in names]
    caption = (
        "AUROC of each model (row) on each hospital's validation patients (column); outlined: at home. Hatched: not told, or "
        "undefined."
    )
    return [
        picture("cross_site", plot_matrix(values, [GLOBAL, *owners], names, homes), caption, " ".join(cross_site_sentences(run)))
    ]


def plot_matrix(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], homes: Sequence[tuple[int, int]] = ()) -> Figure:
    """Draws AUROC by model and hospital, darker from 0.5 to 1.

    Args:
        values: float64 [rows, columns] in [0, 1]; NaN is hatched.
        rows: names of the models.
        columns: names of the hospitals.
        homes: (column, row) of the cells that are outlined.
    """
    from matplotlib.patches import Rectangle

    figure, (ax,) = new_figure()
    image = ax.imshow(values, cmap="Blues", vmin=0.5, vmax=1.0, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, hatch="///", edgecolor=FAINT, linewidth=0))
        elif len(columns) <= MOST_NUMBERS:
            style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": TEXT_PT}
            ax.text(column, row, number(value, 2), color="white" if value > 0.8 else INK, **style)
    for column, row in homes:
        ax.add_patch(Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, fill=False, edgecolor="#D55E00", linewidth=1.8))
    small = TEXT_PT if len(columns) <= MOST_NUMBERS else TEXT_PT * MOST_NUMBERS / len(columns)
    turned: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(range(len(columns)), [_plain(name) for name in columns], fontsize=small, **turned)
    ax.set_yticks(range(len(rows)), [_plain(name) for name in rows], fontsize=small)
    ax.set(xlabel="On the patients of", ylabel="Model of")
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    bar = figure.colorbar(image, ax=ax, label="AUROC", extend="min" if (values < 0.5).any() else "neither")
    bar.ax.tick_params(labelsize=TEXT_PT, length=0)
    bar.outline.set_visible(False)
    return figure


def cross_site_sentences(run: StoredRun) -> list[str]:
    """Says whose model carries over to the patients of other hospitals, and which hospitals lose at home to another model.

    Args:
        run: of one without `evaluation.cross_site` there is nothing to say; where no hospital gave its model, that.
    """
    if run.experiment is None or not run.experiment.evaluation.cross_site or not run.completed:
        return []
    matrix = run.summary.cross_site
    if matrix is None or not matrix.own:
        asked = "Hospitals were asked to give the models that they trained alone to be judged by the others; none did"
        return (
            [f"{asked} (its policy's `share_own_model`, or what keeps its statistics back)."] if run.status == "succeeded" else []
        )
    texts = [_who_carries(matrix), _who_loses(matrix)]
    return [" ".join(text for text in texts if text)] if any(texts) else []


def _carried(matrix: CrossSiteMatrix, owner: str) -> Carried | None:
    """Over the hospitals that judged both models and have both classes; each hospital counts the same."""
    pairs = [
        (found.auroc, matrix.shared[judge].auroc)
        for judge, found in matrix.own[owner].items()
        if judge != owner and judge in matrix.shared
    ]
    known = [(own, shared) for own, shared in pairs if own is not None and shared is not None]
    if not known:
        return None
    own, shared = (float(np.mean(column)) for column in zip(*known, strict=True))
    return Carried(owner, len(known), own, shared)


def _who_carries(matrix: CrossSiteMatrix) -> str:
    """By the mean distance to the global model on the same patients, since some hospitals' patients are harder to judge than others'."""
    found = [carried for owner in sorted(matrix.own) if (carried := _carried(matrix, owner)) is not None]
    ranked = sorted(found, key=lambda one: one.shared - one.own)
    if not ranked:
        return ""
    best, last = ranked[0], ranked[-1]
    if len(ranked) == 1:
        return f"On the patients of other hospitals, the model of {best.owner} has {_beside(best)}."
    return (
        f"Of {len(ranked)} hospitals' own models that of {best.owner} carries over best: on the patients of other hospitals it has "
        f"{_beside(best)}; that of {last.owner} carries over least, with {_beside(last)}."
    )


def _beside(one: Carried) -> str:
    over = f" over {counted(one.hospitals, 'hospital')}" if one.hospitals > 1 else ""
    return f"{'mean ' if one.hospitals > 1 else ''}AUROC {number(one.own)}{over}, where the global model has {number(one.shared)}"


def _who_loses(matrix: CrossSiteMatrix) -> str:
    """Each own model at home beside the best of all others there, by value, and by intervals of the difference that leave out 0."""
    lost, clear, homes = [], 0, 0
    for owner in sorted(matrix.own):
        areas = {name: approximate(found)["auroc"] for name, found in _column(matrix, owner).items()}
        known = {name: area.value for name, area in areas.items() if area.value is not None}
        own = known.pop(owner, None)
        if own is None or not known:
            continue
        homes += 1
        best = max(known, key=lambda name: known[name])
        if known[best] > own:
            clear += difference(areas[best], areas[owner]).clear
            winner = "the global one" if best == GLOBAL else f"that of {best}"
            lost.append(f"{owner} ({number(own)}) to {winner} ({number(known[best])})")
    if not homes:
        return ""
    if not lost:
        return f"At home no hospital's own model loses to another one, of {homes}."
    named = f": {', '.join(lost)}" if len(lost) <= MOST_NAMES else ""
    lose = "loses" if len(lost) == 1 else "lose"
    which = f"{len(lost)} of {counted(homes, 'own model')}"
    return f"At home {which} {lose} to the best other there{named}; beyond what chance explains {clear}."


def _column(matrix: CrossSiteMatrix, judge: str) -> dict[str, Metrics]:
    """All models on the patients of `judge`, the global one as `GLOBAL`."""
    return {owner: row[judge] for owner, row in {GLOBAL: matrix.shared, **matrix.own}.items() if judge in row}


def _area(found: Metrics | None) -> float:
    return float("nan") if found is None or found.auroc is None else found.auroc


def _plain(name: str) -> str:
    """Without meaning to matplotlib, which reads text between dollar signs as a formula."""
    return name.replace("$", r"\$")
