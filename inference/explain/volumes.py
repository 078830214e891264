"""Where in a CT volume a model finds its evidence: Grad-CAM in three dimensions, as an array and as pictures of slices.

`volume_map` makes the map of one volume, `explain_volumes` what `pneumofed explain` writes for a model that judges CT. Method, checks and
words are those of radiographs (`inference.explain.files`); of a volume there are class activation maps only, and nothing is said of lungs
and markers, which are found in radiographs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pneumofed.common.config.classes import positive_word
from pneumofed.common.errors import ConfigError, counted
from pneumofed.common.evaluation.plots import INK, TEXT_PT, write
from pneumofed.common.evaluation.ssim import ssim
from pneumofed.common.files import atomic_write
from pneumofed.common.imaging.types import Image
from pneumofed.common.model_bundle.bundle import Bundle
from pneumofed.common.model_bundle.predictor import Predictor
from pneumofed.common.model_bundle.series import find_series
from pneumofed.common.ops.progress import NO_PROGRESS, Progress
from pneumofed.inference.explain.cam import LogOdds, finer_layer, target_layer
from pneumofed.inference.explain.faithfulness import LEAST_PAIRS, Likeness, Sanity, conclude, randomised, spearman
from pneumofed.inference.explain.files import (
    CHECK,
    MAP_LIMITS_NOTE,
    PHANTOM_NOTE,
    ExplanationReport,
    ExplanationRequest,
    ExplanationSetup,
    explain_each,
    headline,
    json_entry,
    read_usable,
)
from pneumofed.inference.explain.methods import ACTIVATION_METHODS, FACTS, Detail, Method, Target
from pneumofed.inference.explain.pictures import MAX_OPACITY, POSITIVE_COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_SLICES = 9
CHECKED_VOLUMES = 2
"""With three random networks each they are `LEAST_PAIRS` pairs of maps."""
_LAYERS: dict[Detail, Callable[[nn.Module], nn.Module]] = {"last-layer": target_layer, "finer-layer": finer_layer}


@dataclass(frozen=True)
class VolumeMap:
    """A map of evidence over one volume.

    Attributes:
        values: float32 [slices, S, S], zero or more, in the coordinates of the model's input: from foot to head, front to back, the
            patient's right to left.
        score: log-odds of the target by the network, not calibrated.
        cells: places of the maps that it was made of, along slices, rows and columns.
    """

    values: NDArray[np.float32]
    score: float
    cells: tuple[int, int, int]

    def strongest(self, count: int = SHOWN_SLICES) -> list[int]:
        """Finds the slices with most of the map's weight, in the order of the volume; fewer where the others have none.

        Args:
            count: how many at most.
        """
        weight = self.values.sum(axis=(1, 2), dtype=np.float64)
        order = np.argsort(-weight, kind="stable")[:count]
        return sorted(int(place) for place in order if weight[place] > 0)

    def peak(self) -> tuple[int, int, int]:
        """Returns slice, row and column of the largest value."""
        place = np.unravel_index(int(self.values.argmax()), self.values.shape)
        return int(place[0]), int(place[1]), int(place[2])


def volume_map(
    network: nn.Module, volume: Tensor, target: Target = "pneumonia", method: Method = "grad-cam", detail: Detail = "last-layer"
) -> VolumeMap:
    """Computes Grad-CAM or Grad-CAM++ over a volume: ReLU of the maps weighted over all places of the volume.

    With A_k the maps and S the log-odds, Grad-CAM weighs each by the mean of dS/dA_k over slices, rows and columns (Selvaraju et al. 2017,
    eq. 1 and 2), and Grad-CAM++ as `inference.explain.cam.grad_cam_plus_plus` says (Chattopadhay et al. 2018, eq. 14 to 19). The map is
    brought to the volume by linear interpolation along each axis.

    Args:
        network: of `build_model`, one of `VOLUME_NETWORKS`; left in evaluation mode.
        volume: float32 [1, 1, slices, S, S] in [0, 1].
        target: a class, or `pneumonia` for all but normal.
        method: `grad-cam` or `grad-cam++`.
        detail: `last-layer` or `finer-layer`.

    Raises:
        ValueError: `volume` is not one volume.
        ConfigError: another method or detail.
    """
    refuse_others((method,), detail)
    if volume.ndim != 5 or volume.shape[:2] != (1, 1):
        raise ValueError(f"volume: expected [1, 1, slices, S, S], got {tuple(volume.shape)}")
    score = LogOdds(network, target)
    maps, gradient, found = _maps_and_gradient(score, volume, _LAYERS[detail](network))
    places = tuple(range(1, maps.ndim))
    if method == "grad-cam":
        weights = gradient.mean(dim=places)
    else:
        positive = gradient.clamp_min(0.0)
        total = maps.sum(dim=places, keepdim=True).clamp_min(0.0)
        weights = (torch.where(positive > 0, 1.0 / (2.0 + total * positive), 0.0) * positive).sum(dim=places)
    coarse = functional.relu(torch.einsum("k,kzyx->zyx", weights, maps))
    fine = functional.interpolate(coarse[None, None], tuple(volume.shape[2:]), mode="trilinear", align_corners=False)[0, 0]
    depth, height, width = coarse.shape
    return VolumeMap(np.nan_to_num(fine.numpy()), found, (depth, height, width))


def refuse_others(methods: Sequence[Method], detail: Detail) -> None:
    """Refuses what is not made of volumes.

    Raises:
        ConfigError: another method than a class activation map, or another detail than of a layer.
    """
    if others := [method for method in methods if method not in ACTIVATION_METHODS]:
        raise ConfigError(f"method {others[0]}: of a CT volume there are {' and '.join(ACTIVATION_METHODS)}")
    if detail not in _LAYERS:
        raise ConfigError(f"detail {detail}: of a CT volume there are {' and '.join(_LAYERS)}")


def _maps_and_gradient(score: LogOdds, volume: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor, float]:
    """The maps [K, d, h, w] of `layer`, the gradient of the score by them, and the score; a layer of slices has them one by one."""
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, __, output: kept.append(output))
    try:
        with torch.enable_grad():
            found = score(volume.clone().requires_grad_())
            (gradient,) = torch.autograd.grad(found.sum(), kept[0])
    finally:
        handle.remove()
    maps, gradient = (one.detach().float() for one in (kept[0], gradient))
    if maps.ndim == 4:  # [slices, K, h, w]
        return maps.transpose(0, 1), gradient.transpose(0, 1), float(found.detach())
    return maps[0], gradient[0], float(found.detach())


def check_volume_maps(
    network: nn.Module, volumes: Sequence[Tensor], method: Method, target: Target, seed: int, detail: Detail
) -> Sanity:
    """Checks whether maps depend on the weights, as `inference.explain.faithfulness.sanity_check` does for radiographs.

    Args:
        network: the bundle's.
        volumes: float32 [1, 1, slices, S, S] each.
        method: that makes the maps.
        target: what they are evidence for.
        seed: of the random weights.
        detail: of the maps.
    """
    networks = [randomised(network, 1.0, seed + number) for number in range(math.ceil(LEAST_PAIRS / max(1, len(volumes))))]
    found: list[Likeness] = []
    for volume in volumes:
        own, *others = (volume_map(one, volume, target, method, detail).values for one in (network, *networks))
        found += [_likeness(own, other) for other in others]
    return conclude(method, found)


def _likeness(first: NDArray[np.float32], second: NDArray[np.float32]) -> Likeness:
    """Neither map is below zero; their structure is compared slice by slice."""
    rank = spearman(first, second)
    scaled = [values.astype(np.float64) / max(float(values.max()), 1e-30) for values in (first, second)]
    structure = math.nan if math.isnan(rank) else float(np.mean([ssim(*pair) for pair in zip(*scaled, strict=True)]))
    return Likeness(rank, rank, structure)


def explain_volumes(
    paths: Sequence[Path],
    bundle: Bundle,
    out: Path,
    request: ExplanationRequest,
    tell: Callable[[str], None],
    progress: Progress = NO_PROGRESS,
) -> ExplanationReport:
    """Writes for each series `NUMBER-METHOD.npy`, the map, `NUMBER-METHOD.png`, its strongest slices, and `explanations.json` into `out`.

    Args:
        paths: series, NIfTI files, and folders that are searched with all below them. What cannot be read is counted, with its reason.
        bundle: of a model that judges CT volumes.
        out: made if missing.
        request: what is asked for.
        tell: takes a sentence after each series.
        progress: shows how many series are explained.

    Raises:
        ConfigError: a method or detail that is not made of volumes.
        EmptySiteError: no series could be read; the JSON file says why.
    """
    refuse_others(request.methods, request.detail)
    out.mkdir(parents=True, exist_ok=True)
    report, predictor = ExplanationReport(bundle.digest), Predictor(bundle, threads=1)
    network, readable = bundle.load_network(run_code=request.run_code), list(read_usable(find_series(paths), predictor, report))
    verdicts = _check(network, readable, predictor, request, progress)
    report.sanity = {method: found.as_json() for method, found in verdicts.items()}
    setup = ExplanationSetup(predictor, network, request, verdicts)
    explain_each(readable, partial(_explain, setup), report, out, tell, progress, "series")
    return report


def _check(
    network: nn.Module, paths: Sequence[Path], predictor: Predictor, request: ExplanationRequest, progress: Progress
) -> dict[Method, Sanity]:
    if not request.checked:
        return {}
    images = (predictor.read(path).image for path in paths)
    judged = islice((image for image in images if predictor.judge([image])[0].prediction), CHECKED_VOLUMES)
    volumes = [_input(predictor, image) for image in judged]
    if not volumes:
        return {}
    progress.show(CHECK, note=f"{counted(len(volumes), 'volume')}, {counted(len(request.methods), 'method')}")
    found = {
        method: check_volume_maps(network, volumes, method, request.target, request.seed, request.detail)
        for method in request.methods
    }
    progress.finish(CHECK)
    return found


def _input(predictor: Predictor, image: Image) -> Tensor:
    return torch.from_numpy(predictor.prepare(image))[None, None]


def _explain(setup: ExplanationSetup, path: Path, stem: Path) -> dict[str, Any]:
    """Writes all maps of one series; what the JSON file says of it."""
    predictor, request = setup.predictor, setup.request
    image = predictor.read(path).image
    (judgement,) = predictor.judge([image], [str(path)])
    maps: dict[Method, Any] = {}
    for method in request.methods if judgement.prediction else ():
        found = volume_map(setup.network, _input(predictor, image), request.target, method, request.detail)
        lines = describe_map(found, method, request, predictor, setup.sanity.get(method))
        with atomic_write(stem.with_name(f"{stem.name}-{method}.npy")) as file:
            np.save(file, found.values)
        title = f"{FACTS[method].title}: {headline(judgement)}"
        write(draw_slices(image.pixels, found, title, lines), stem.with_name(f"{stem.name}-{method}.png"))
        maps[method] = {
            "score": found.score, "detail": request.detail, "cells": found.cells, "peak": found.peak(),
            "slices": found.strongest(), "text": lines,
        }  # fmt: skip
    return json_entry(stem.name, judgement, maps)


def describe_map(
    found: VolumeMap, method: Method, request: ExplanationRequest, predictor: Predictor, sanity: Sanity | None
) -> tuple[str, ...]:
    """Words the lines below the pictures of one map.

    Args:
        found: the map.
        method: that made it.
        request: what was asked for.
        predictor: of the bundle.
        sanity: of the method; None where it was not checked.
    """
    facts, manifest, target = FACTS[method], predictor.manifest, request.target
    word = positive_word(manifest.classes) if isinstance(target, str) else manifest.classes[target]
    depth, height, width = found.cells
    return (
        f"{facts.title} ({facts.source}) in three dimensions shows {facts.shows}. Evidence for: {word}.",
        f"It is made of {depth} x {height} x {width} cells (slices, rows, columns): what is smaller than one cannot be told apart.",
        sanity.sentence() if sanity else "Whether the map can be believed was not checked.",
        "Slices are numbered from the feet, and shown from below: the patient's right is on the left.",
        MAP_LIMITS_NOTE,
        *([PHANTOM_NOTE] if manifest.card.phantom else []),
    )


def draw_slices(pixels: NDArray[np.float32], found: VolumeMap, title: str, lines: Sequence[str]) -> Figure:
    """Draws the slices with most of the map's weight, with the map over them.

    Args:
        pixels: the volume, float32 [slices, S, S] in [0, 1].
        found: its map; colours are relative to its largest value in the volume, the same in all slices.
        title: stands above.
        lines: stand below.
    """
    import textwrap

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 9.2), dpi=120, layout="constrained", facecolor="white")
    parts: Any = figure.subfigures(2, 1, height_ratios=(5.2, 1.6))
    above, below = parts
    shown = found.strongest() or [len(pixels) // 2]
    largest = float(found.values.max())
    relative = found.values / largest if largest > 0 else found.values
    for axes, place in zip(
        above.subplots(3, 3, squeeze=False).ravel(), [*shown, *[None] * (SHOWN_SLICES - len(shown))], strict=True
    ):
        axes.axis("off")
        if place is None:
            continue
        axes.imshow(pixels[place], cmap="gray", vmin=0.0, vmax=1.0)
        axes.imshow(relative[place], cmap=POSITIVE_COLOURS, vmin=0.0, vmax=1.0, alpha=MAX_OPACITY * relative[place])
        axes.set_title(f"slice {place + 1} of {len(pixels)}", fontsize=TEXT_PT, color=INK)
    above.suptitle(title, fontsize=TEXT_PT + 2, color=INK)
    text = "\n".join(textwrap.fill(line, 100) for line in lines)
    below.text(0.02, 0.98, text, fontsize=TEXT_PT, color=INK, va="top")
    return figure
