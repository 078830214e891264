"""Judging images with a bundle, by ONNX Runtime: no torch is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnxruntime

from common.images import Image, Window, fit_square
from common.model_bundle import suitability
from common.model_bundle.bundle import Bundle
from common.model_bundle.calibration import pneumonia_score
from common.model_bundle.judgement import Judgement, Verdict
from common.model_bundle.manifest import NETWORK, QUANTIZED, BundleManifest, Preprocessing
from common.model_bundle.pixel_statistics import pixel_statistics

Floats = npt.NDArray[np.float32]

BATCH = 16


class Predictor:
    """A bundle's model, ready to judge. May be used by several threads at once."""

    def __init__(self, bundle: Bundle, precision: Literal["float32", "int8"] = "float32", threads: int = 0) -> None:
        """
        Args:
            bundle: opened, hence checked.
            precision: which of the bundle's two graphs.
            threads: of the CPU; 0 leaves the choice to ONNX Runtime.

        Raises:
            BundleError: the bundle has no such graph, or it was changed after the bundle was opened.
        """
        self.bundle = bundle
        self._session = open_session(bundle.read(NETWORK if precision == "float32" else QUANTIZED), threads)

    @property
    def manifest(self) -> BundleManifest:
        return self.bundle.manifest

    @property
    def window(self) -> Window | None:
        """What to give `read_image` as its window."""
        window = self.manifest.preprocessing.window
        return Window(window.center, window.width) if window else None

    def judge(self, images: Sequence[Image]) -> list[Judgement]:
        """One judgement for each image, in order; the same whatever else is judged with it, up to float32's last digits."""
        found: list[Judgement] = []
        for start in range(0, len(images), BATCH):
            found += self._judge_batch(images[start : start + BATCH])
        return found

    def run(self, inputs: Floats) -> dict[str, Floats]:
        """The graph's outputs by name (`logits` [N, C], `features` [N, D], ...) for float32 [N, 1, S, S] in [0, 1]."""
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, {"image": inputs}), strict=True))

    def _judge_batch(self, images: Sequence[Image]) -> list[Judgement]:
        squares = np.stack([prepare(image.pixels, self.manifest.preprocessing) for image in images])
        outputs = self.run(squares[:, None])
        statistics = pixel_statistics(squares)
        inputs = suitability.Inputs(squares, outputs["features"], statistics, [image.info for image in images])
        findings = self._check(inputs)
        calibration = self.manifest.calibration
        scores, classes = pneumonia_score(outputs["logits"]), calibration.class_probabilities(outputs["logits"])
        low, high = calibration.interval(scores)
        probabilities = calibration.probability(scores)
        maps = outputs.get("cam")
        return [
            Judgement(
                probability=float(probabilities[row]),
                low=float(low[row]),
                high=float(high[row]),
                classes=dict(zip(self.manifest.classes, classes[row].tolist(), strict=True)),
                verdict=self._decide(float(probabilities[row]), finding),
                reasons=finding.reasons,
                suitability_scores=finding.scores,
                score=float(scores[row]),
                features=outputs["features"][row],
                pixel_statistics=statistics[row],
                activation_map=None if maps is None else maps[row],
            )
            for row, finding in enumerate(findings)
        ]

    def _check(self, inputs: suitability.Inputs) -> list[suitability.Finding]:
        return suitability.check(self.manifest.suitability, inputs)

    def _decide(self, probability: float, finding: suitability.Finding) -> Verdict:
        if finding.reasons:
            return "cannot judge"
        return "pneumonia" if probability >= self.manifest.threshold.value else "normal"


def prepare(pixels: Floats, preprocessing: Preprocessing) -> Floats:
    """float32 [S, S] in [0, 1] of `pixels` [H, W] in [0, 1], with the 256 grey levels that the training cache keeps."""
    square = fit_square(pixels, preprocessing.size_px, preprocessing.fit)
    return (np.rint(square * 255.0) / 255.0).astype(np.float32)


def open_session(network: bytes, threads: int = 0) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session of the graph `network` on the CPU; it writes no log but errors."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
