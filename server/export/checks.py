"""That the graph is the network, and what int8 costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import nn

from common.errors import BundleError
from common.evaluation.bootstrap import Bootstrap, bootstrap
from common.evaluation.predictions import Predictions
from common.model_bundle.calibration import Calibration, pneumonia_score
from common.model_bundle.manifest import GraphCheck, IntervalEstimate, Quantization
from common.model_bundle.predictor import open_session
from server.export.graph import run_torch
from server.export.pictures import Pictures

TOLERANCE = 1e-4
"""Largest difference from PyTorch with which a graph is given to anybody."""
CHECKED_IMAGES = 128
RANGE_IMAGES = 128
"""From which the ranges of int8 are taken; Krishnamoorthi 2018 (arXiv 1806.08342, section 3.1.4) finds about a hundred enough."""
JUDGED_IMAGES = 1000
BATCH = 16

Floats = npt.NDArray[np.float32]


def check_graph(network: nn.Module, in_channels: int, graph: Path, pictures: list[Pictures]) -> GraphCheck:
    """How far `graph` is from `network` on images of all sets.

    Raises:
        BundleError: P(pneumonia) differs by more than `TOLERANCE`, or another output, relative to its largest value.
    """
    session = open_session(graph.read_bytes())
    worst, images = np.zeros(3), 0
    for part in pictures:
        index = part.draw("graph", CHECKED_IMAGES)
        images += len(index)
        for rows in _batches(index):
            inputs = part.inputs(rows)
            worst = np.maximum(worst, _differences(session.run(None, {"image": inputs}), run_torch(network, in_channels, inputs)))
    found = GraphCheck(images=images, logits=float(worst[0]), probability=float(worst[1]), features=float(worst[2]))
    if not worst.max() <= TOLERANCE:  # NaN fails too
        raise BundleError(
            f"the ONNX graph differs from PyTorch by {worst.max():.2g} on {images} images, {TOLERANCE:g} is allowed: nothing was exported"
        )
    return found


def range_batches(part: Pictures) -> list[Floats]:
    """The images that int8 takes its ranges from, float32 [n, 1, S, S] each."""
    return [part.inputs(rows) for rows in _batches(part.draw("int8 ranges", RANGE_IMAGES))]


def measure_quantization(part: Pictures, graphs: tuple[Path, Path], calibration: Calibration, threshold: float) -> Quantization:
    """What the int8 graph (the second) costs against float32 on images of `part` that its ranges were not taken from, where there
    are others."""
    order = part.draw("int8 ranges")
    index = order[RANGE_IMAGES:][:JUDGED_IMAGES] if len(order) > RANGE_IMAGES else order
    exact, coarse = (run_logits(graph, part, index) for graph in graphs)
    first, second = (calibration.probability(pneumonia_score(logits)) for logits in (exact, coarse))
    return Quantization(
        name=part.name,
        images=len(index),
        calibration_images=min(len(order), RANGE_IMAGES),
        auroc_float32=_auroc(exact, part, index),
        auroc_int8=_auroc(coarse, part, index),
        mean_difference=float(np.abs(first - second).mean()),
        max_difference=float(np.abs(first - second).max()),
        changed_decisions=int(((first >= threshold) != (second >= threshold)).sum()),
    )


def run_logits(graph: Path, part: Pictures, index: npt.NDArray[np.int64]) -> Floats:
    """float32 [n, C] of the images at `index`."""
    session = open_session(graph.read_bytes())
    return np.concatenate([session.run(["logits"], {"image": part.inputs(rows)})[0] for rows in _batches(index)])


def run_features(graph: Path, part: Pictures, index: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
    """(logits [n, C], features [n, D]) of the images at `index`."""
    session = open_session(graph.read_bytes())
    found = [session.run(["logits", "features"], {"image": part.inputs(rows)}) for rows in _batches(index)]
    return np.concatenate([logits for logits, _ in found]), np.concatenate([features for _, features in found])


def _batches(index: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    return [index[start : start + BATCH] for start in range(0, len(index), BATCH)]


def _differences(graph: list[Floats], torch: tuple[Floats, ...]) -> npt.NDArray[np.float64]:
    """(of a logit, of P(pneumonia), of anything else), all but the second relative to the largest value where that is above 1."""
    logits = float(np.abs(graph[0] - torch[0]).max()) / max(1.0, float(np.abs(torch[0]).max()))
    first, second = (Calibration().probability(pneumonia_score(values[0])) for values in (graph, torch))
    others = [
        float(np.abs(mine - yours).max()) / max(1.0, float(np.abs(yours).max()))
        for mine, yours in zip(graph[1:], torch[1:], strict=True)
    ]
    return np.array([logits, float(np.abs(first - second).max()), max(others)])


def _auroc(logits: Floats, part: Pictures, index: npt.NDArray[np.int64]) -> IntervalEstimate:
    """With its bootstrap interval by patient; undefined where nobody labelled the images."""
    if part.labels is None:
        return IntervalEstimate(value=None)
    patients = tuple(part.patients[row] for row in index) if part.patients else tuple(map(str, index))
    predictions = Predictions.from_logits(logits, part.labels[index], patients)
    found = bootstrap(predictions, 0.5, Bootstrap())["auroc"]
    known = {name: float(found[name]) if np.isfinite(found[name]) else None for name in ("value", "low", "high")}
    return IntervalEstimate(**known)
