"""What `pneumofed explain` does: files in, pictures and one JSON file out.

`explain_files` writes the pictures, `explain_image` makes the maps of one image, `check_methods` runs the sanity check. `caption_map`
words the lines below a map: what it is, whether to believe it, and where its weight lies.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from pneumofed.common.config.classes import positive_word
from pneumofed.common.data.clinical import Values
from pneumofed.common.errors import EmptySiteError, ImageError, counted
from pneumofed.common.evaluation.metrics import without_nan
from pneumofed.common.evaluation.plots import write
from pneumofed.common.files import atomic_write
from pneumofed.common.imaging.types import Image
from pneumofed.common.model_bundle.bundle import Bundle
from pneumofed.common.model_bundle.manifest import BundleManifest
from pneumofed.common.model_bundle.population import PopulationStatus
from pneumofed.common.model_bundle.predictor import Predictor, model_input
from pneumofed.common.model_bundle.suitability import Judgement
from pneumofed.common.models.fusion import ClinicalNetwork
from pneumofed.common.ops.progress import NO_PROGRESS, Progress
from pneumofed.inference.explain.attribution import compute_attribution, empty
from pneumofed.inference.explain.cam import LogOdds, larger_side
from pneumofed.inference.explain.clinical import JointEvidence, explain_jointly
from pneumofed.inference.explain.faithfulness import Sanity, curves, random_curves, sanity_check
from pneumofed.inference.explain.focus import Focus, Misplaced, find_lungs, find_markers, judge_focus
from pneumofed.inference.explain.methods import DETAIL_NOTES, FACTS, Attribution, Detail, Method, Target
from pneumofed.inference.explain.pictures import Panel, montage, overlay, place_on_image
from pneumofed.inference.predict.clinical_table import ClinicalTable
from pneumofed.inference.predict.predict import find_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHECKED_IMAGES = 6
"""The check asks of the method and the network, not of one image; with more its interval is narrower and it takes longer."""
CHECK, EXPLAINED = "check whether the maps can be believed", "images explained"
RESULT_FILE = "explanations.json"

Tell = Callable[[str], None]


class CaptionedMap(Protocol):
    """A map with lines for the reader, of whatever kind of image."""

    def after(self, lines: tuple[str, ...]) -> Self: ...


Explained = TypeVar("Explained", bound=CaptionedMap)

MAP_LIMITS_NOTE = (
    "The map is about the network and not about the patient: it outlines no disease. Colours are relative to the largest value in this "
    "picture and do not compare between pictures."
)
PHANTOM_NOTE = "The model was trained on drawn images. Nothing here is about patients."


@dataclass(frozen=True)
class ExplanationRequest:
    """What is asked for.

    Attributes:
        methods: each gives a picture of each image; with several there is a montage too.
        target: what the evidence is for.
        seed: of what is drawn.
        checked: whether to find out if the maps can be believed; takes several times as long.
        detail: of class activation maps.
        run_code: consent to run the bundle's own code, where its network is a study's own.
        clinical: values beside the images, for a model that takes some.
    """

    methods: tuple[Method, ...]
    target: Target = "pneumonia"
    seed: int = 0
    checked: bool = True
    detail: Detail = "last-layer"
    run_code: bool = False
    clinical: ClinicalTable | None = None


@dataclass
class ExplanationReport:
    """What was done, as it stands in the JSON file, which names the files and so stays where they are."""

    bundle: str
    images: list[dict[str, Any]] = field(default_factory=list)
    sanity: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    skipped_files: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class ExplanationSetup:
    """What all images of one bundle are explained with.

    Attributes:
        predictor: of the bundle; judges the image and prepares it for the network.
        network: the bundle's, in PyTorch.
        request: what is asked for.
        sanity: what the check of each method found; empty where it was not asked for.
    """

    predictor: Predictor
    network: nn.Module
    request: ExplanationRequest
    sanity: Mapping[Method, Sanity]


@dataclass(frozen=True)
class ExplainedMap:
    """One map of one image, with what is said of it.

    Attributes:
        panel: the map over the image, and the lines for the reader.
        focus: where its weight lies, and the warnings about that.
        deletion: areas under the deletion curve, as far as one can be drawn.
    """

    panel: Panel
    focus: Focus
    deletion: dict[str, float]

    def draw(self, title: str) -> Figure:
        """Draws the map over the image; `title` stands after the method's name."""
        return overlay(self.panel, title)

    def after(self, lines: tuple[str, ...]) -> ExplainedMap:
        """Returns the same with `lines` before its own."""
        return replace(self, panel=replace(self.panel, lines=(*lines, *self.panel.lines)))


def explain_files(
    paths: Sequence[Path],
    bundle: Bundle,
    out: Path,
    request: ExplanationRequest,
    tell: Tell,
    progress: Progress = NO_PROGRESS,
) -> ExplanationReport:
    """Writes `NUMBER-METHOD.png`, with several methods `NUMBER.png`, and `explanations.json` into `out`; no name of a file is in theirs.

    Args:
        paths: files, and folders that are searched with all below them (see `find_files`). What cannot be read is counted, with its reason.
        bundle: opened, hence checked.
        out: made if missing.
        request: what is asked for.
        tell: takes a sentence after each image.
        progress: shows how many images are explained.

    Raises:
        EmptySiteError: no file could be read; the JSON file says why.
    """
    out.mkdir(parents=True, exist_ok=True)
    report, predictor = ExplanationReport(bundle.digest), Predictor(bundle, threads=1)
    network, readable = bundle.load_network(run_code=request.run_code), list(read_usable(find_files(paths), predictor, report))
    images = list(islice(_judgeable(readable, predictor), CHECKED_IMAGES)) if request.checked else []
    if images:
        progress.show(CHECK, note=f"{counted(len(images), 'image')}, {counted(len(request.methods), 'method')}")
    verdicts = check_methods(network, images, predictor, request)
    progress.finish(CHECK)
    report.sanity = {method: found.as_json() for method, found in verdicts.items()}
    setup = ExplanationSetup(predictor, network, request, verdicts)
    explain_each(readable, partial(_explain_file, setup), report, out, tell, progress)
    return report


def explain_each(
    readable: Sequence[Path],
    explain: Callable[[Path, Path], dict[str, Any]],
    report: ExplanationReport,
    out: Path,
    tell: Tell,
    progress: Progress,
    noun: str = "image",
) -> None:
    """Explains one after the other and writes `explanations.json`.

    Args:
        readable: of `read_usable`.
        explain: writes the maps of one into files whose names begin with its second argument, and says what the JSON file says of it.
        report: gets each one's entry; already says what could not be read.
        out: an existing folder.
        tell: takes a sentence after each.
        progress: shows how many are explained.
        noun: of one, for people.

    Raises:
        EmptySiteError: there is none; the JSON file says why.
    """
    for number, path in enumerate(readable, start=1):
        progress.show(EXPLAINED, number - 1, len(readable))
        report.images.append({"path": str(path), **explain(path, out / f"{number:04d}")})
        done = ", ".join(report.images[-1]["maps"]) or "cannot be judged, so there is no map"
        tell(f"{number} of {len(readable)}: {done}")
    progress.finish(EXPLAINED)
    with atomic_write(out / RESULT_FILE) as file:
        file.write(json.dumps(without_nan(vars(report)), indent=1).encode())
    if not readable:
        counts = ", ".join(f"{reason} ({count})" for reason, count in sorted(report.skipped.items()))
        raise EmptySiteError(f"no {noun} could be read: {counts or 'there is none'}; each is named in {out / RESULT_FILE}")


def read_usable(paths: Iterable[Path], predictor: Predictor, report: ExplanationReport) -> Iterator[Path]:
    """Yields what can be read of `paths`; the rest is noted in `report` with its reason.

    Args:
        paths: images, or series.
        predictor: of the bundle.
        report: gets counts and entries of what cannot be read.
    """
    for path in paths:
        try:
            predictor.read(path)
        except ImageError as error:
            report.skipped[error.reason.value] += 1
            report.skipped_files.append({"path": str(path), "reason": error.reason.value})
        else:
            yield path


def _judgeable(paths: Iterable[Path], predictor: Predictor) -> Iterator[Image]:
    for path in paths:
        image = predictor.read(path).image
        if predictor.judge([image])[0].prediction is not None:
            yield image


def check_methods(
    network: nn.Module, images: Sequence[Image], predictor: Predictor, request: ExplanationRequest
) -> dict[Method, Sanity]:
    """Checks whether the maps of each method depend on what the network has learnt; nothing without images.

    Args:
        network: the bundle's.
        images: to make the maps of; a few are enough.
        predictor: of the bundle; says how they are prepared.
        request: the methods, the target, the seed and the detail.
    """
    inputs = [network_input(predictor, image) for image in images]
    if not inputs:
        return {}
    larger = [_larger_input(predictor, image, request.detail) for image in images]
    how: dict[str, Any] = {"seed": request.seed, "detail": request.detail, "larger": larger}
    return {method: sanity_check(network, inputs, method, request.target, **how) for method in request.methods}


def explain_with_values(
    setup: ExplanationSetup, image: Image, judgement: Judgement, values: Values | None
) -> tuple[list[ExplainedMap], JointEvidence | None]:
    """Makes the maps of `explain_image` beside the image's clinical values, and what the answer rests on.

    Args:
        setup: the bundle, what was asked for, and what the check found.
        image: as it was judged.
        judgement: of the image with `values`.
        values: float32 [K]; None where none is known, or the model takes none.

    Returns:
        The maps, and what image and values add, None without values.
    """
    return explain_beside(explain_image, setup, image, judgement, values)


def explain_beside(
    explain: Callable[[ExplanationSetup, Image, Judgement], Iterable[Explained]],
    setup: ExplanationSetup,
    image: Image,
    judgement: Judgement,
    values: Values | None,
) -> tuple[list[Explained], JointEvidence | None]:
    """Does what `explain_with_values` does, of images of any kind.

    Args:
        explain: makes the maps of one image, whatever is given beside it.
        setup, image, judgement, values: as there.
    """
    network, schema = setup.network, setup.predictor.clinical
    if values is None or schema is None or not isinstance(network, ClinicalNetwork):
        return list(explain(setup, image, judgement)), None
    if judgement.prediction is None:
        return [], None
    found = explain_jointly(
        network, network_input(setup.predictor, image), values, schema, setup.request.target, judgement.prediction
    )
    with network.giving(torch.from_numpy(values)[None]):
        maps = list(explain(setup, image, judgement))
    return [one.after(found.lines()) for one in maps], found


def explain_image(setup: ExplanationSetup, image: Image, judgement: Judgement) -> Iterator[ExplainedMap]:
    """Makes one map for each of the methods that were asked for, in their order; none of an image that cannot be judged.

    A map's values add up to a score, and the lines below it quote probabilities: what must not be judged gets neither.

    Args:
        setup: the bundle, what was asked for, and what the check found.
        image: as it was judged.
        judgement: of the image.
    """
    if judgement.prediction is None:
        return
    request, manifest = setup.request, setup.predictor.manifest
    inputs, larger = network_input(setup.predictor, image), _larger_input(setup.predictor, image, request.detail)
    lungs, marks = find_lungs(image.pixels), find_markers(image.pixels)
    fit = manifest.preprocessing.fit
    side = max(image.pixels.shape) if fit == "pad" else min(image.pixels.shape)  # of the network's square, in pixels of the image
    for method in request.methods:
        attribution = compute_attribution(
            setup.network, inputs, method, request.target, seed=request.seed, detail=request.detail, larger=larger
        )
        values = place_on_image(attribution.values, image.pixels.shape, fit)
        cells = inputs.shape[-1] / attribution.cell_px
        focus = judge_focus(values, lungs, marks, side / cells / 2, cells=cells)
        deletion = _faithfulness(setup, inputs, attribution)
        lines = (*population_line(judgement), *caption_map(attribution, manifest, setup.sanity.get(method), focus, deletion))
        panel = Panel(image.pixels, values, attribution, lungs.lungs if lungs.found else None, marks, lines)
        yield ExplainedMap(panel, focus, deletion)


def population_line(judgement: Judgement) -> tuple[str, ...]:
    """What stands first below a map: whether the model was judged for such a patient, a caution where it was not."""
    found = judgement.population
    warns = found.status in (PopulationStatus.NOT_JUDGED, PopulationStatus.AGE_UNKNOWN)
    return (f"{'Caution: ' * warns}{found.sentence}.",)


def _explain_file(setup: ExplanationSetup, path: Path, stem: Path) -> dict[str, Any]:
    """Draws all maps of one image; what the JSON file says of it."""
    read, table = setup.predictor.read(path), setup.request.clinical
    image, values = read.image, table.find(path, read.header) if table else None
    (judgement,) = setup.predictor.judge([image], [str(path)], [values])
    title, panels, maps = headline(judgement), [], {}
    explained, evidence = explain_with_values(setup, image, judgement, values)
    for found in explained:
        attribution = found.panel.attribution
        panels.append(found.panel)
        maps[attribution.method] = {
            "score": attribution.score, "detail": attribution.detail,
            "focus": vars(found.focus), "deletion": found.deletion, "text": found.panel.lines,
        }  # fmt: skip
        write(found.draw(title), stem.with_name(f"{stem.name}-{attribution.method}.png"))
    if len(panels) > 1:
        write(montage(panels, title), stem.with_suffix(".png"))
    return json_entry(stem.name, judgement, maps) | ({"clinical": evidence.to_json()} if evidence else {})


def json_entry(number: str, judgement: Judgement, maps: Mapping[Method, Any]) -> dict[str, Any]:
    """Builds the entry of one image in the JSON file.

    Args:
        number: of the image, which its pictures' names begin with.
        judgement: of the image; `probability` is null where it cannot be judged.
        maps: what is said of each map, by method; empty where the image cannot be judged.
    """
    found, reasons = judgement.prediction, [reason.value for reason in judgement.reasons]
    known = {"probability": found.probability if found else None, "verdict": judgement.verdict, "reasons": reasons}
    return {"number": number, **known, "population": judgement.population.to_json(), "maps": maps}


def _faithfulness(setup: ExplanationSetup, inputs: Tensor, attribution: Attribution) -> dict[str, float]:
    """Areas under the deletion curve, and the probability of the empty image; areas only where that is on the other side of one half."""
    if not setup.request.checked:
        return {}
    score, blank = LogOdds(setup.network, attribution.target), empty(inputs)
    with torch.inference_mode():
        of_blank = float(torch.sigmoid(score(blank)))
    found = {"empty": of_blank}
    if attribution.score > 0.0 and of_blank < 0.5:
        found["area"] = curves(score, inputs, attribution.values, blank).deletion_area
        found["random_area"] = random_curves(score, inputs, blank, setup.request.seed).deletion_area
    return found


def network_input(predictor: Predictor, image: Image) -> Tensor:
    """Prepares an image as the network takes it, float32 [1, 1, S, S] in [0, 1], a volume [1, 1, slices, S, S].

    Args:
        predictor: of the bundle.
        image: as it was read.
    """
    return torch.from_numpy(predictor.prepare(image))[None, None]


def _larger_input(predictor: Predictor, image: Image, detail: Detail) -> Tensor | None:
    """The image as `network_input` makes it, at the largest side that `detail` asks for; None where it asks for no larger one."""
    if detail in ("last-layer", "finer-layer"):
        return None
    given = predictor.manifest.preprocessing
    enlarged = given.model_copy(update={"size_px": larger_side(given.size_px)})
    return torch.from_numpy(model_input(image.pixels, enlarged))[None, None]


def headline(judgement: Judgement) -> str:
    """Words the judgement as the title of its pictures."""
    found = judgement.prediction
    if found is None:
        return f"cannot judge ({', '.join(judgement.reasons)})"
    return f"{found.decision}, P = {found.probability:.2f} ({found.low:.2f} to {found.high:.2f})"


def caption_map(
    attribution: Attribution, manifest: BundleManifest, sanity: Sanity | None, focus: Focus, faith: Mapping[str, float]
) -> tuple[str, ...]:
    """Words the lines below one map; warnings first.

    Args:
        attribution: the map.
        manifest: of the bundle whose network it explains.
        sanity: of the method; None where it was not checked.
        focus: where the map's weight lies.
        faith: areas under its deletion curve, empty where they were not measured.
    """
    facts = FACTS[attribution.method]
    lines = [f"Caution: {warning.value}" for warning in focus.warnings]
    lines.append(f"{facts.title} ({facts.source}) shows {facts.shows}. Evidence for: {_target(attribution, manifest)}.")
    if note := DETAIL_NOTES[attribution.detail or "last-layer"]:
        lines.append(note)
    lines.append(sanity.sentence() if sanity else "Whether the map can be believed was not checked.")
    lines += _about_focus(focus) + _about_deletion(attribution, faith)
    return (*lines, MAP_LIMITS_NOTE, *([PHANTOM_NOTE] if manifest.card.phantom else []))


def _target(attribution: Attribution, manifest: BundleManifest) -> str:
    return positive_word(manifest.classes) if isinstance(attribution.target, str) else manifest.classes[attribution.target]


def _about_focus(focus: Focus) -> list[str]:
    if focus.beyond_lungs != focus.beyond_lungs:
        return []
    own, area = f"{focus.beyond_lungs:.0%}", f"{focus.beyond_lungs_area:.0%}"
    shares = f"{own} of its weight lies outside the lungs; of a map without preference, {area} would"
    if Misplaced.TOO_COARSE in focus.warnings:
        return [f"{shares}. Its cells are as wide as half a lung: what lies at the border falls on either side by chance."]
    return [
        f"{shares}. With a margin of half a cell, which the check allows, it is {focus.outside:.0%} and {focus.outside_area:.0%}."
    ]


def _about_deletion(attribution: Attribution, faith: Mapping[str, float]) -> list[str]:
    """One sentence from the deletion curve, or why there is none."""
    if "area" in faith:
        better = "faster than" if faith["area"] < faith["random_area"] else "no faster than"
        areas = f"area under the curve {faith['area']:.2f} against {faith['random_area']:.2f}"
        return [f"When what it marks is blurred first, the probability falls {better} in random order ({areas})."]
    if faith.get("empty", 0.0) >= 0.5:
        meaning = "; this map shows only what says more than that" if FACTS[attribution.method].empty else ""
        return [
            f"The network gives even a blurred picture P = {faith['empty']:.2f} (not calibrated): no deletion curve can be drawn{meaning}."
        ]
    return []
