"""The pictures of the report, each with the words for those who cannot see it.

Hits and misses of a run are shown only of drawn images (`draw_examples`). A report is passed on, and no radiograph of a patient may be in
it, whoever holds it.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pneumofed.common.config.classes import in_words, positive_word
from pneumofed.common.config.experiment import ImageConfig
from pneumofed.common.data.cache import Pixels, decode_for_cache, image_digest
from pneumofed.common.errors import ImageError, counted, in_a_row
from pneumofed.common.evaluation import plots
from pneumofed.common.evaluation.bootstrap import ConfidenceInterval
from pneumofed.common.evaluation.plots import (
    DPI,
    FAINT,
    HEIGHT_INCH,
    INK,
    TEXT_PT,
    WIDTH_INCH,
    colour_of,
    legend_above,
    new_figure,
    render_figure,
)
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.evaluation.statistics import Statistics
from pneumofed.common.files import atomic_write
from pneumofed.common.model_bundle.image_statistics import as_pictures
from pneumofed.common.model_bundle.series import find_series
from pneumofed.server.report.many import MOST_SINGLE, plot_loss_bands, plot_sizes
from pneumofed.server.report.numbers import ReportedEstimate
from pneumofed.server.report.read_run import StoredRun
from pneumofed.server.report.wording import with_interval
from pneumofed.server.runs.records import RoundRecord, set_noun
from pneumofed.server.runs.summary_records import BaselineResult, BaselineTable, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OF_EACH_KIND = 2
PHANTOM_FOLDER, PHANTOM_MARK = "phantoms", "PHANTOM.txt"
"""Where a simulation draws its phantoms, and the file in it that says so (`simulation.phantoms.image`)."""


@dataclass(frozen=True)
class Picture:
    """One figure as PNG: `caption` stands below it, `text` in its place for those who cannot see it."""

    name: str
    png: bytes
    caption: str
    text: str

    @property
    def uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


def draw_results(run: StoredRun) -> list[Picture]:
    """Draws ROC, calibration, scores, confusion and precision-recall of the final model; empty without predictions."""
    found = {name: predictions for name, predictions in run.predictions.items() if len(predictions)}
    if not found:
        return []
    sets = [_evaluated(run, name, predictions) for name, predictions in found.items()]
    names = in_a_row(set_noun(name) for name in found)
    reliability = f"Calibration on the {names}: on the grey diagonal probabilities mean what they say."
    return [
        picture("roc", plots.roc(sets), f"ROC curves on the {names}; marks: the chosen threshold.", _areas(run, list(found))),
        picture("reliability", plots.reliability_diagram(sets, positive_word(run.classes)), reliability),
        *(_scores(run, name, predictions) for name, predictions in found.items()),
        *(_confusion(run, name, predictions) for name, predictions in found.items()),
        *(_most_probable(run, name, predictions) for name, predictions in found.items() if predictions.classes > 2),
        picture("precision_recall", plots.precision_recall(sets), f"Precision-recall curves on the {names}."),
    ]


def draw_course(run: StoredRun) -> list[Picture]:
    """Draws AUROC and loss over rounds, and each hospital's training loss; empty without rounds."""
    if not run.history:
        return []
    rounds = [line.round for line in run.history]
    measured = [line.measured for line in run.history]
    by_name = {  # the sets first: each has the colour that it has in the figures of the results
        name: [_number(found[name].auroc if name in found else None) for found in measured] for name in (*run.sets, "validation")
    }
    areas = {name: values for name, values in by_name.items() if np.isfinite(values).any()}
    losses = _site_losses(run)
    mean = {
        "training": [_number(line.mean_train_loss) for line in run.history],
        "validation": [_number(line.validation.log_loss if line.validation else None) for line in run.history],
    }
    shown = {name: values for name, values in mean.items() if np.isfinite(values).any()}
    figure = plots.training_curves(rounds, areas, shown, run.kept_round or None)
    caption = "AUROC and loss over rounds. Training loss: mean over hospitals, as weighted in training; validation: log loss."
    pictures = [picture("curves", figure, caption)]
    if losses:
        figure = (plot_site_losses if len(losses) <= MOST_SINGLE else plot_loss_bands)(rounds, losses, mean["training"])
        caption = f"Training loss in each of {counted(len(losses), 'hospital')} over rounds."
        pictures.append(picture("site_losses", figure, caption))
    return pictures


def draw_hospitals(counts: Mapping[str, Mapping[str, int]], classes: Sequence[str]) -> list[Picture]:
    """Draws the mix of classes in each hospital; no picture where nothing is known of it.

    Args:
        counts: images by hospital and class.
        classes: the classes in the order of the bars.
    """
    if not counts:
        return []
    plot = plot_class_mix if len(counts) <= MOST_SINGLE else plot_sizes
    return [picture("hospitals", plot(counts, classes), "Images of each class in each hospital.")]


def draw_baselines(run: StoredRun) -> list[Picture]:
    """Draws a dot for each hospital alone, lines for the federated and the pooled model; one picture a central set."""
    baselines, pictures = run.summary.baselines or BaselineTable(), []
    for name in run.sets:
        alone = {site: _area(result.central(name)) for site, result in baselines.alone.items()}
        known = {site: value for site, value in alone.items() if math.isfinite(value)}
        pooled = baselines.pooled or BaselineResult()
        lines = {"federated": _area(run.summary.central(name)), "pooled": _area(pooled.central(name))}
        lines = {label: value for label, value in lines.items() if math.isfinite(value)}
        if known and lines:
            figure = plots.sites(
                {_plain(site): value for site, value in known.items()}, {}, lines, f"AUROC on the {set_noun(name)}"
            )
            pictures.append(
                picture(
                    f"baselines_{name}", figure, f"Each hospital's own model against the shared ones, on the {set_noun(name)}."
                )
            )
    return pictures


def write_pictures(pictures: Sequence[Picture], path_of: Callable[[str], Path]) -> None:
    """Writes the pictures as PNG files, for slides and papers.

    Args:
        pictures: as the report shows them.
        path_of: gives the file of a picture's name; its folder is made.
    """
    for picture in pictures:
        path = path_of(picture.name)
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as file:  # two processes may write the report of one run
            file.write(picture.png)


def plot_site_losses(rounds: Sequence[int], losses: Mapping[str, Sequence[float]], mean: Sequence[float]) -> Figure:
    """Draws training loss over rounds: a thin line a hospital, gaps where it did not train, and their mean.

    Args:
        rounds: round numbers, one for each value of a line.
        losses: by hospital, NaN in rounds in which it did not train.
        mean: over hospitals, weighted by images; NaN where unknown.
    """
    figure, (ax,) = new_figure()
    for index, values in enumerate(losses.values()):
        ax.plot(
            rounds, values, color=FAINT, linewidth=0.9, marker=".", markersize=3, label="one hospital" if index == 0 else None
        )
    ax.plot(rounds, mean, color=colour_of(0), linewidth=2.0, label="mean, weighted by images")
    ax.set(xlabel="Round", ylabel="Training loss", ylim=(0, None))
    ax.locator_params(axis="x", integer=True)
    legend_above(figure, 2)
    return figure


def plot_class_mix(counts: Mapping[str, Mapping[str, int]], classes: Sequence[str]) -> Figure:
    """Draws one stacked bar a hospital, the first hospital on top.

    Args:
        counts: images by hospital and class.
        classes: the classes in the order of the bars, each with its colour.
    """
    figure, (ax,) = new_figure()
    rows, left = np.arange(len(counts))[::-1], np.zeros(len(counts))
    for index, label in enumerate(classes):
        widths = np.array([mix.get(label, 0) for mix in counts.values()], dtype=np.float64)
        ax.barh(rows, widths, left=left, height=0.75, color=colour_of(index), label=_plain(label))
        left += widths
    if len(counts) <= plots.MAX_NAMED_SITES:
        for row, total in zip(rows, left, strict=True):
            ax.annotate(
                f"{total:,.0f}", (total, row), (3, 0), textcoords="offset points", va="center", fontsize=TEXT_PT - 1, color=INK
            )
        ax.set_yticks(rows, [_plain(name) for name in counts])
    else:
        ax.set_yticks([])
        ax.set_ylabel(f"{len(counts)} hospitals")
    ax.set(xlabel="Images", ylim=(-0.7, len(counts) - 0.3))
    ax.margins(x=0.1)
    ax.grid(visible=False, axis="y")
    legend_above(figure, len(classes))
    return figure


def _areas(run: StoredRun, names: Sequence[str]) -> str:
    areas = {set_noun(name): with_interval(run.results(name)["auroc"], run.interval_name(name)) for name in names}
    return "; ".join(f"AUROC on the {noun}: {value}" for noun, value in areas.items()) + "."


def _scores(run: StoredRun, name: str, predictions: Predictions) -> Picture:
    figure = plots.score_histograms(predictions, run.classes, _number(run.threshold_value), positive_word(run.classes))
    return picture(f"scores_{name}", figure, f"Predicted probability by true class, {set_noun(name)}.")


def _confusion(run: StoredRun, name: str, predictions: Predictions) -> Picture:
    counts = plots.called_matrix(Statistics.of(predictions), _number(run.threshold_value))
    (cleared, _), (_, found) = counts
    normal, pneumonia = counts.sum(axis=1)
    noun = in_words("pneumonia", run.classes)
    text = f"{found} of {pneumonia} images with {noun} are found, {cleared} of {normal} without it are called normal."
    caption = f"Truth against what the model calls at the threshold, {set_noun(name)}."
    return picture(f"confusion_{name}", plots.confusion_matrix(counts, ("normal", positive_word(run.classes))), caption, text)


def _most_probable(run: StoredRun, name: str, predictions: Predictions) -> Picture:
    figure = plots.confusion_matrix(Statistics.of(predictions).confusion, run.classes)
    return picture(f"classes_{name}", figure, f"Truth against the most probable class, {set_noun(name)}.")


def _evaluated(run: StoredRun, name: str, found: Predictions) -> plots.EvaluatedSet:
    """The set with the intervals that the summary holds; those without limits are left out."""
    intervals = {
        metric: ConfidenceInterval(value=_number(one.value), low=one.low, high=_number(one.high), resamples=one.resamples or 0)
        for metric, one in run.summary.central(name).items()
        if one.low is not None
    }
    confidence = run.experiment.evaluation.confidence if run.experiment else 0.95
    return plots.EvaluatedSet(name.capitalize(), Statistics.of(found), _number(run.threshold_value), intervals, confidence)


def picture(name: str, figure: Figure, caption: str, text: str = "") -> Picture:
    """Renders a figure.

    Args:
        name: of its PNG file.
        figure: what is shown.
        caption: below it.
        text: what it shows, for those who cannot see it, after the caption.
    """
    return Picture(name, render_figure(figure), caption, f"{caption} {text}".strip())


def _plain(name: str) -> str:
    """`name` without meaning to matplotlib, which reads text between dollar signs as a formula and fails on a broken one."""
    return name.replace("$", r"\$")


def _number(value: float | None) -> float:
    """For a plot, which leaves a gap where there is NaN."""
    return math.nan if value is None else value


def _area(results: Results) -> float:
    return _number(ReportedEstimate.of(results.get("auroc")).value)


def _site_losses(run: StoredRun) -> dict[str, list[float]]:
    """Training loss by hospital over rounds; NaN where it did not train. Hospitals that never trained are left out."""
    names = sorted({site for line in run.history for site in line.sites})
    losses = {name: [_number(_train_loss(line, name)) for line in run.history] for name in names}
    return {name: values for name, values in losses.items() if np.isfinite(values).any()}


def _train_loss(line: RoundRecord, name: str) -> float | None:
    site = line.sites.get(name)
    return site.train.train_loss if site and site.train else None


@dataclass(frozen=True)
class Example:
    """One image: what it is, what the model made of it, and uint8 [S, S]; a volume seen from the front, [slices, S]."""

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
    image = run.experiment.image
    return [
        picture(
            f"examples_{name}",
            _plot(examples),
            f"Drawn images of the {set_noun(name)} of which the model is surest{', seen from the front' * bool(image.slices)}.",
        )
        for name, found in run.predictions.items()
        if (examples := _examples(found, run.threshold_value, folder / name, image, positive_word(run.classes)))
    ]


def _examples(found: Predictions, threshold: float, folder: Path, image: ImageConfig, word: str) -> list[Example]:
    paths = find_series([folder]) if image.slices else sorted(path for path in folder.rglob("*") if path.is_file())
    files = {image_digest(path)[:16]: path for path in paths if path.name != "labels.csv"}
    scores, positive = 1.0 - found.probabilities[:, 0], found.labels != 0
    called = scores >= threshold
    kinds = {
        f"{word}, found": (positive & called, -scores),
        f"{word}, missed": (positive & ~called, scores),
        f"normal, called {word}": (~positive & called, -scores),
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
        pixels = None if path is None else decode_for_cache(path, image)
    except ImageError:
        return None
    if pixels is None or not image.slices:
        return pixels
    return np.rint(255.0 * as_pictures(pixels[None])[0]).astype(np.uint8)


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
