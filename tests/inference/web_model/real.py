"""A bundle of a real size for the page: a ResNet18 as exported and quantised for hospitals, with any images as its reference.

Its weights are drawn at random: the page is held against Python, not against patients.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from pneumofed.common.config.experiment import ModelConfig
from pneumofed.common.imaging.augment import GREY_MEAN, GREY_STD
from pneumofed.common.imaging.types import Image
from pneumofed.common.model_bundle.bundle import Bundle, load_bundle
from pneumofed.common.model_bundle.calibration import fit_calibration, pneumonia_score
from pneumofed.common.model_bundle.image_statistics import pixel_statistics
from pneumofed.common.model_bundle.manifest import (
    CARD,
    NETWORK,
    QUANTIZED,
    BundleManifest,
    CardFacts,
    OperatingPoint,
    Preprocessing,
)
from pneumofed.common.model_bundle.predictor import model_input, open_session
from pneumofed.common.model_bundle.sealing import seal_bundle
from pneumofed.common.model_bundle.suitability import fit_suitability
from pneumofed.common.models.build import build_model
from pneumofed.server.export.graph import export_onnx, quantize_onnx
from tests.model_bundles import judged_on, signing_key

MODEL = ModelConfig(name="resnet18")


def resnet_bundle(folder: Path, images: Sequence[Image], labels: np.ndarray, size_px: int) -> Bundle:
    """Writes and opens it; the first half of `images` gives the ranges of int8, all of them limits and calibration."""
    folder.mkdir(parents=True)
    preprocessing = Preprocessing(size_px=size_px, fit="pad", in_channels=1, mean=(GREY_MEAN,), std=(GREY_STD,))
    squares = np.stack([model_input(image.pixels, preprocessing) for image in images])[:, None]
    network = build_model(MODEL, "binary", seed=0)
    export_onnx(network, 1, size_px, folder / NETWORK)
    quantize_onnx(folder / NETWORK, folder / QUANTIZED, iter(np.array_split(squares[: len(squares) // 2], 4)))
    session = open_session((folder / QUANTIZED).read_bytes(), threads=1)
    parts = [session.run(["logits", "features"], {"image": part}) for part in np.array_split(squares, 8)]
    logits, features = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    scores = pneumonia_score(logits)
    calibration = fit_calibration(scores, 1.0 - labels, 1.0 * labels, "temperature_and_bias", fitted_on="its reference")
    (folder / CARD).write_text("# A model for tests\n")
    manifest = BundleManifest(
        name="resnet18-test",
        created=datetime(2026, 1, 1, tzinfo=UTC),
        task="binary",
        classes=("normal", "pneumonia"),
        preprocessing=preprocessing,
        model=MODEL,
        threshold=OperatingPoint(
            value=float(np.median(calibration.probability(scores))), policy="half", target=0.5, raw_value=0.5
        ),
        calibration=calibration,
        suitability=fit_suitability(squares[:, 0], features, pixel_statistics(squares[:, 0]), refusal_rate=0.1),
        population=judged_on(age="child", view="AP PA"),
        card=CardFacts(sites=3, training_images=5216, phantom=True, virtual=True),
    )
    seal_bundle(folder, manifest, signing_key())
    return load_bundle(folder, None)
