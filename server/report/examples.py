"""Hits and misses of a run on phantoms, as pictures: what the model is sure of, rightly and wrongly.

Only of drawn images. A report is passed on, and no radiograph of a patient may be in it, whoever holds it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pneumofed.common.config.experiment import ImageConfig
from pneumofed.common.data.cache import Pixels, decode_for_cache
from pneumofed.common.errors import ImageError
from pneumofed.common.evaluation.plots import DPI, HEIGHT_INCH, WIDTH_INCH
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.server.report.figures import Picture, picture
from pneumofed.server.report.read_run import StoredRun
from pneumofed.server.runs.records import set_noun

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OF_EACH_KIND = 2
PHANTOM_FOLDER, PHANTOM_MARK = "phantoms", "PHANTOM.txt"
"""Where a simulation draws its phantoms, and the file in it that says so (`simulation.phantoms.image`)."""


@dataclass(frozen=True)
class Example:
    """One image: what it is, what the model made of it, and uint8 [S, S]."""

    kind: str
    probability: float
    pixels: Pixels


def draw_examples(run: StoredRun) -> list[Picture]:
    """Draws the surest hits, misses, false alarms and right all-clears of each set; empty for anything but phantoms.

    Args:
        run: its phantoms must still lie in the run folder.
    """
    folder = run.folder.path / PHANTOM_FOLDER
    if not run.summary.phantom or not (folder / PHANTOM_MARK).is_file() or run.experiment is None or run.threshold_value is None:
        return []
    return [
        picture(f"examples_{name}", _plot(examples), f"Drawn images of the {set_noun(name)} of which the model is surest.")
        for name, found in run.predictions.items()
        if (examples := _examples(found, run.threshold_value, folder / name, run.experiment.image))
    ]


def _examples(found: Predictions, threshold: float, folder: Path, image: ImageConfig) -> list[Example]:
    files = {
        hashlib.sha256(path.read_bytes()).hexdigest()[:16]: path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "labels.csv"
    }
    scores, positive = 1.0 - found.probabilities[:, 0], found.labels != 0
    called = scores >= threshold
    kinds = {
        "pneumonia, found": (positive & called, -scores),
        "pneumonia, missed": (positive & ~called, scores),
        "normal, called pneumonia": (~positive & called, -scores),
        "normal, called normal": (~positive & ~called, scores),
    }
    return [
        Example(kind, float(scores[row]), pixels)
        for kind, (among, order) in kinds.items()
        for row in [row for row in np.argsort(order, kind="stable") if among[row]][:OF_EACH_KIND]
        if (pixels := _pixels(files.get(found.images[row]), image)) is not None
    ]


def _pixels(path: Path | None, image: ImageConfig) -> Pixels | None:
    """None where the file is gone, or is none that the run could have used."""
    try:
        return None if path is None else decode_for_cache(path, image)
    except ImageError:
        return None


def _plot(examples: Sequence[Example]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCH, HEIGHT_INCH), dpi=DPI, layout="constrained", facecolor="white")
    columns = (len(examples) + 1) // 2 if len(examples) > 1 else 1
    for ax in figure.subplots(2, columns, squeeze=False).T.flat:
        ax.set_axis_off()
    for ax, example in zip(np.array(figure.axes).reshape(2, columns).T.flat, examples, strict=False):
        ax.imshow(example.pixels, cmap="gray", vmin=0, vmax=255)
        ax.set_title(f"{example.kind}\n{example.probability:.1%}", fontsize="small")
    return figure
