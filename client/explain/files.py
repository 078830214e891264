"""What `pneumofed explain` does: files in, pictures and one JSON file out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from client.explain.deletion import curves, random_curves
from client.explain.explain import explain
from client.explain.focus import judge_focus
from client.explain.lungs import find_lungs
from client.explain.markers import find_markers
from client.explain.methods import Attribution, Method, Target
from client.explain.pictures import Panel, montage, overlay
from client.explain.placing import place_on_image
from client.explain.sanity import Sanity, sanity_check
from client.explain.score import LogOdds, empty
from client.explain.words import caption_map, headline
from client.predict.files import find_files
from common.data.atomic import atomic_write
from common.errors import EmptySiteError, ImageError
from common.evaluation.figures import write
from common.evaluation.metrics import without_nan
from common.images import Image
from common.model_bundle.bundle import Bundle
from common.model_bundle.judgement import Judgement
from common.model_bundle.predictor import Predictor

CHECKED_IMAGES = 6
"""The check asks of the method and the network, not of one image; with more its interval is narrower and it takes longer."""
RESULT = "explanations.json"

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        methods: each gives a picture of each image; with several there is a montage too.
        target: what the evidence is for.
        seed: of what is drawn.
        checked: whether to find out if the maps can be believed; takes several times as long.
    """

    methods: tuple[Method, ...]
    target: Target = "pneumonia"
    seed: int = 0
    checked: bool = True


@dataclass
class ExplanationReport:
    """What was done, as it stands in the JSON file, which names the files and so stays where they are."""

    bundle: str
    images: list[dict[str, Any]] = field(default_factory=list)
    sanity: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    skipped_files: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class _Setup:
    """What all images are explained with."""

    predictor: Predictor
    network: nn.Module
    request: Request
    sanity: Mapping[Method, Sanity]


def explain_files(paths: Sequence[Path], bundle: Bundle, out: Path, request: Request, tell: Tell) -> ExplanationReport:
    """Writes `NUMBER-METHOD.png`, with several methods `NUMBER.png`, and `explanations.json` into `out`; no name of a file is in theirs.

    Args:
        paths: files, and folders that are searched with all below them (see `find_files`). What cannot be read is counted, with its reason.
        bundle: opened, hence checked.
        out: made if missing.
        request: what is asked for.
        tell: takes a sentence after each image.

    Raises:
        EmptySiteError: no file could be read; the JSON file says why.
    """
    out.mkdir(parents=True, exist_ok=True)
    report, predictor = ExplanationReport(bundle.digest), Predictor(bundle, threads=1)
    network, readable = bundle.load_network(), list(_read(find_files(paths), predictor, report))
    verdicts = _check(network, readable, predictor, request) if request.checked else {}
    report.sanity = {method: found.as_json() for method, found in verdicts.items()}
    setup = _Setup(predictor, network, request, verdicts)
    for number, path in enumerate(readable, start=1):
        report.images.append({"path": str(path), **_explain_image(setup, path, out / f"{number:04d}")})
        tell(f"{number} of {len(readable)}: {', '.join(request.methods)}")
    with atomic_write(out / RESULT) as file:
        file.write(json.dumps(without_nan(vars(report)), indent=1).encode())
    if not readable:
        counts = ", ".join(f"{reason} ({count})" for reason, count in sorted(report.skipped.items()))
        raise EmptySiteError(f"no image could be read: {counts or 'there is no file'}; each is named in {out / RESULT}")
    return report


def _read(files: Iterable[Path], predictor: Predictor, report: ExplanationReport) -> Iterator[Path]:
    for path in files:
        try:
            predictor.read(path)
        except ImageError as error:
            report.skipped[error.reason.value] += 1
            report.skipped_files.append({"path": str(path), "reason": error.reason.value})
        else:
            yield path


def _check(network: nn.Module, files: Sequence[Path], predictor: Predictor, request: Request) -> dict[Method, Sanity]:
    images = [_network_input(predictor, predictor.read(path).image) for path in files[:CHECKED_IMAGES]]
    if not images:
        return {}
    return {method: sanity_check(network, images, method, request.target, seed=request.seed) for method in request.methods}


def _explain_image(setup: _Setup, path: Path, stem: Path) -> dict[str, Any]:
    """Draws all maps of one image; what the JSON file says of it."""
    predictor, request, image = setup.predictor, setup.request, setup.predictor.read(path).image
    (judgement,) = predictor.judge([image], [str(path)])
    inputs, title = _network_input(predictor, image), headline(judgement)
    lungs, marks = find_lungs(image.pixels), find_markers(image.pixels)
    scale = max(image.pixels.shape) / inputs.shape[-1]
    panels, maps = [], {}
    for method in request.methods:
        attribution = explain(setup.network, inputs, method, request.target, seed=request.seed)
        values = place_on_image(attribution.values, image.pixels.shape, predictor.manifest.preprocessing.fit)
        focus = judge_focus(values, lungs, marks, scale * attribution.cell_px / 2)
        faith = _faithfulness(setup, inputs, attribution)
        lines = caption_map(attribution, predictor.manifest, setup.sanity.get(method), focus, faith)
        panels.append(Panel(image.pixels, values, attribution, lungs.lungs if lungs.found else None, marks, lines))
        maps[method] = {"score": attribution.score, "focus": vars(focus), "deletion": faith, "text": lines}
        write(overlay(panels[-1], title), stem.with_name(f"{stem.name}-{method}.png"))
    if len(panels) > 1:
        write(montage(panels, title), stem.with_suffix(".png"))
    return json_entry(stem.name, judgement, maps)


def json_entry(number: str, judgement: Judgement, maps: Mapping[Method, Any]) -> dict[str, Any]:
    """What the JSON file says of one image.

    Args:
        number: of the image, which its pictures' names begin with.
        judgement: of the image; `probability` is null where it cannot be judged.
        maps: what is said of each map, by method.
    """
    found = judgement.prediction
    return {"number": number, "probability": found.probability if found else None, "verdict": judgement.verdict, "maps": maps}


def _faithfulness(setup: _Setup, inputs: Tensor, attribution: Attribution) -> dict[str, float]:
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


def _network_input(predictor: Predictor, image: Image) -> Tensor:
    return torch.from_numpy(predictor.prepare(image))[None, None]
