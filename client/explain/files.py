"""What `pneumofed explain` does: files in, pictures and one JSON file out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from client.explain.deletion import curves, random_curves
from client.explain.explain import explain
from client.explain.focus import Focus, judge_focus
from client.explain.lungs import find_lungs
from client.explain.markers import find_markers
from client.explain.methods import Attribution, Method, Target
from client.explain.pictures import Panel, montage, overlay
from client.explain.placing import place_on_image
from client.explain.sanity import Sanity, check
from client.explain.score import LogOdds, empty
from client.explain.words import Case, describe
from client.predict.files import find_files
from common.data.atomic import atomic_write
from common.errors import EmptySiteError, ImageError
from common.evaluation.figures import write
from common.evaluation.metrics import without_nan
from common.images import Image, read_image
from common.model_bundle.bundle import Bundle
from common.model_bundle.predictor import Predictor, prepare

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
class Outcome:
    """What was done, as it stands in the JSON file, which names the files and so stays where they are."""

    bundle: str
    images: list[dict[str, Any]] = field(default_factory=list)
    sanity: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    skipped_files: list[dict[str, str]] = field(default_factory=list)


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


def explain_files(paths: Sequence[Path], bundle: Bundle, out: Path, request: Request, tell: Tell) -> Outcome:
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
    outcome, predictor = Outcome(bundle.digest), Predictor(bundle, threads=1)
    network, readable = bundle.load_network(), list(_read(find_files(paths), predictor, outcome))
    verdicts = {}
    if request.checked:
        images = [read_image(path, window=predictor.window) for path in readable[:CHECKED_IMAGES]]
        verdicts = check_methods(network, images, bundle, request)
    outcome.sanity = {method: found.as_json() for method, found in verdicts.items()}
    for number, path in enumerate(readable, start=1):
        image = read_image(path, window=predictor.window)
        case = Case(predictor.manifest, predictor.judge([image])[0], request, verdicts)
        outcome.images.append({"path": str(path), **_explain_image(network, image, case, out / f"{number:04d}")})
        tell(f"{number} of {len(readable)}: {', '.join(request.methods)}")
    with atomic_write(out / RESULT) as file:
        file.write(json.dumps(without_nan(vars(outcome)), indent=1).encode())
    if not readable:
        counts = ", ".join(f"{reason} ({count})" for reason, count in sorted(outcome.skipped.items()))
        raise EmptySiteError(f"no image could be read: {counts or 'there is no file'}; each is named in {out / RESULT}")
    return outcome


def _read(files: Iterable[Path], predictor: Predictor, outcome: Outcome) -> Iterator[Path]:
    for path in files:
        try:
            read_image(path, window=predictor.window)
        except ImageError as error:
            outcome.skipped[error.reason.value] += 1
            outcome.skipped_files.append({"path": str(path), "reason": error.reason.value})
        else:
            yield path


def explain_image(network: nn.Module, image: Image, case: Case) -> Iterator[ExplainedMap]:
    """One map for each of the methods that were asked for, in their order.

    Args:
        network: the bundle's.
        image: as it was judged.
        case: its judgement, what was asked for, and what the check found.
    """
    inputs = torch.from_numpy(prepare(image.pixels, case.manifest.preprocessing))[None, None]
    lungs, marks = find_lungs(image.pixels), find_markers(image.pixels)
    scale = max(image.pixels.shape) / inputs.shape[-1]
    for method in case.request.methods:
        attribution = explain(network, inputs, method, case.request.target, seed=case.request.seed)
        values = place_on_image(attribution.values, image.pixels.shape, case.manifest.preprocessing.fit)
        focus = judge_focus(values, lungs, marks, scale * attribution.cell_px / 2)
        deletion = _faithfulness(network, inputs, attribution, case)
        lines = describe(case, attribution, focus, deletion)
        panel = Panel(image.pixels, values, attribution, lungs.lungs if lungs.found else None, marks, lines)
        yield ExplainedMap(panel, focus, deletion)


def check_methods(network: nn.Module, images: Sequence[Image], bundle: Bundle, request: Request) -> dict[Method, Sanity]:
    """Whether the maps of each method depend on what the network has learnt; nothing without images.

    Args:
        network: the bundle's.
        images: to make the maps of; a few are enough.
        bundle: says how they are prepared.
        request: the methods, the target and the seed.
    """
    inputs = [_to_input(image, bundle) for image in images]
    if not inputs:
        return {}
    return {method: check(network, inputs, method, request.target, seed=request.seed) for method in request.methods}


def _explain_image(network: nn.Module, image: Image, case: Case, stem: Path) -> dict[str, Any]:
    """Draws all maps of one image; what the JSON file says of it."""
    panels, maps = [], {}
    for found in explain_image(network, image, case):
        attribution = found.panel.attribution
        panels.append(found.panel)
        maps[attribution.method] = {
            "score": attribution.score,
            "focus": vars(found.focus),
            "deletion": found.deletion,
            "text": found.panel.lines,
        }
        write(overlay(found.panel, case.headline), stem.with_name(f"{stem.name}-{attribution.method}.png"))
    if len(panels) > 1:
        write(montage(panels, case.headline), stem.with_suffix(".png"))
    return {"number": stem.name, "probability": case.judgement.probability, "verdict": case.judgement.verdict, "maps": maps}


def _faithfulness(network: nn.Module, inputs: Tensor, attribution: Attribution, case: Case) -> dict[str, float]:
    """Areas under the deletion curve, and the probability of the empty image; areas only where that is on the other side of one half."""
    if not case.request.checked:
        return {}
    score, blank = LogOdds(network, attribution.target), empty(inputs)
    with torch.inference_mode():
        of_blank = float(torch.sigmoid(score(blank)))
    found = {"empty": of_blank}
    if attribution.score > 0.0 and of_blank < 0.5:
        found["area"] = curves(score, inputs, attribution.values, blank).deletion_area
        found["random_area"] = random_curves(score, inputs, blank, case.request.seed).deletion_area
    return found


def _to_input(image: Image, bundle: Bundle) -> Tensor:
    return torch.from_numpy(prepare(image.pixels, bundle.manifest.preprocessing))[None, None]
