"""Figures: each is a picture of the agreed size for any data, without global state."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from matplotlib.transforms import BboxBase
from PIL import Image

from pneumofed.common.evaluation import plots
from pneumofed.common.evaluation.bootstrap import Bootstrap, bootstrap
from pneumofed.common.evaluation.plots import render_figure, write
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.evaluation.statistics import FEDERATED_GRID, Statistics
from tests.common.evaluation.draws import of_scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure


NAN = float("nan")


def sets() -> list[plots.EvaluatedSet]:
    """Ordinary sets, one of one class, and an empty one."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 200)
    test = of_scores((0.6 * draw.random(200) + 0.4 * labels).tolist(), labels.tolist())
    return [
        plots.EvaluatedSet("Test", Statistics.of(test), 0.5, bootstrap(test, 0.5, Bootstrap(20))),
        plots.EvaluatedSet("External", Statistics.of(test, FEDERATED_GRID), 0.9),
        plots.EvaluatedSet("One class", Statistics.of(of_scores([0.2, 1.0], [1, 1])), 0.5),
        plots.EvaluatedSet("Empty", Statistics.zero(2), 0.5),
    ]


def histograms() -> Figure:
    predictions = Predictions(np.array([[1.0, 0, 0], [0.2, 0.3, 0.5]]), np.array([0, 2]), ("a", "b"))
    return plots.score_histograms(predictions, ("normal", "bacterial", "viral"), 0.5)


def curves() -> Figure:
    series = {"validation": [0.7, 0.8, 0.9], "test": [NAN, 0.8, NAN], "external": [NAN, NAN, NAN]}
    return plots.training_curves([1, 2, 3], series, {"training": [1.0, 0.5, 0.4]}, best_round=2)


def named(name: str, count: int) -> list[plots.EvaluatedSet]:
    """Sets that differ in their names only."""
    first = sets()[0]
    return [replace(first, name=f"{name} {number}") for number in range(count)]


def curves_of_many() -> Figure:
    series = {f"adults-of-two-hospitals-{number}": [0.7, 0.8] for number in range(6)}
    return plots.training_curves([1, 2], series, series, best_round=2)


def many_sites() -> Figure:
    alone = {f"site-{k}": 0.5 + k / 500 for k in range(100)}
    return plots.sites(alone, dict.fromkeys(alone, 0.9), {"federated": 0.9, "pooled": 0.95})


FIGURES: dict[str, Callable[[], Figure]] = {
    "roc": lambda: plots.roc(sets()),
    "precision_recall": lambda: plots.precision_recall(sets()),
    "reliability": lambda: plots.reliability_diagram(sets()),
    "confusion": lambda: plots.confusion_matrix(plots.called_matrix(sets()[0].statistics, 0.5), ("normal", "pneumonia")),
    "confusion_empty": lambda: plots.confusion_matrix(np.zeros((3, 3), int), ("normal", "bacterial", "viral"), "Test"),
    "histograms": histograms,
    "curves": curves,
    "curves_one_round": lambda: plots.training_curves([1], {"test": [0.5]}, {}),
    "sites": lambda: plots.sites({"a": 0.7, "b": NAN}, {"a": 0.8, "b": 0.9}, {}),
    "sites_alone": lambda: plots.sites({"a": 0.7}, {}, {"federated": 0.8}),
    "many_sites": many_sites,
    "sites_with_long_names": lambda: plots.sites(
        {f"hospital-of-the-northern-region-{number}": 0.7 for number in range(9)}, {}, {}
    ),
    "curves_of_many": curves_of_many,
    **{
        f"{plot.__name__}_of_{count}": partial(lambda plot, count: plot(named("Adults of two hospitals", count)), plot, count)
        for plot in (plots.roc, plots.precision_recall, plots.reliability_diagram)
        for count in (3, 6)
    },
}


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.filterwarnings("error")
def test_a_figure_is_a_picture_with_something_on_it(name: str) -> None:
    picture = Image.open(io.BytesIO(render_figure(FIGURES[name]())))
    assert picture.size == (1200, 900)
    assert np.asarray(picture.convert("L")).min() < 128


@pytest.mark.parametrize("name", FIGURES)
def test_no_word_leaves_a_figure(name: str) -> None:
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    legends = [*figure.legends, *(legend for ax in figure.axes if (legend := ax.get_legend()))]
    words = [text for ax in figure.axes for text in (*ax.texts, ax.title, ax.xaxis.label, ax.yaxis.label)]
    shown = [*(text for legend in legends for text in legend.get_texts()), *(text for text in words if text.get_text())]
    assert shown
    assert [text.get_text() for text in shown if not _inside(text.get_window_extent(), figure.bbox)] == []


def _inside(box: BboxBase, frame: BboxBase) -> bool:
    return box.x0 >= frame.x0 - 1 and box.x1 <= frame.x1 + 1 and box.y0 >= frame.y0 - 1 and box.y1 <= frame.y1 + 1


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_same_figure_gives_the_same_bytes(tmp_path: Path, kind: str) -> None:
    for name in ("first", "second"):
        write(FIGURES["sites_alone"](), tmp_path / f"{name}.{kind}")
    first, second = ((tmp_path / f"{name}.{kind}").read_bytes() for name in ("first", "second"))
    assert first == second
    assert first.startswith(b"\x89PNG" if kind == "png" else b"<?xml")


def test_roc_says_auroc_with_interval_and_what_is_undefined() -> None:
    legend = plots.roc(sets()).axes[0].get_legend()
    assert legend is not None
    texts = [text.get_text() for text in legend.get_texts()]
    known = sets()[0].intervals["auroc"]
    assert f"AUROC {known['value']:.3f} (95% CI {known['low']:.3f}–{known['high']:.3f})" in texts[0]
    assert "undefined" in texts[4]


def test_labels_of_near_lines_do_not_overlap() -> None:
    figure = plots.training_curves([1, 2], {name: [0.5, 0.9] for name in "abcd"}, {})
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 4
    assert not any(one.overlaps(other) for k, one in enumerate(boxes) for other in boxes[:k])


def test_wilson_interval_is_the_score_interval() -> None:
    low, high = plots.wilson_interval(np.array([0.0, 0.5, 1.0]), np.array([10, 100, 10]))
    # Newcombe 1998, Statistics in Medicine 17:857, by the same formula
    np.testing.assert_allclose(low, [0.0, 0.4038, 0.7225], atol=5e-5)
    np.testing.assert_allclose(high, [0.2775, 0.5962, 1.0], atol=5e-5)


def test_neither_import_nor_plotting_touches_pyplot() -> None:
    code = (
        "import sys; from pneumofed.common.evaluation import plots as f;"
        "late = 'matplotlib' not in sys.modules; f.render_figure(f.sites({'a': 0.5}, {}, {}));"
        "sys.exit(0 if late and 'matplotlib.pyplot' not in sys.modules else 1)"
    )
    root = Path(__file__).resolve().parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
