"""Small signed bundles without a graph, and comparisons made of counts."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pneumofed.common.config.experiment import ModelConfig
from pneumofed.common.evaluation.comparison import ModelComparison, compare_predictions
from pneumofed.common.model_bundle.bundle import Bundle, load_bundle
from pneumofed.common.model_bundle.calibration import Calibration
from pneumofed.common.model_bundle.manifest import WEIGHTS, BundleManifest, CardFacts, OperatingPoint, Provenance
from pneumofed.common.model_bundle.sealing import seal_bundle
from pneumofed.common.models.build import build_model
from tests.common.evaluation.draws import of_scores
from tests.model_bundles import PREPROCESSING, signing_key

NOW = datetime(2026, 3, 1, tzinfo=UTC)


def network(seed: int = 0) -> nn.Module:
    return build_model(ModelConfig(name="small_cnn"), "binary", seed=seed).eval()


def seal_network(
    folder: Path, model: nn.Module, *, sites: int = 0, split_seed: int | None = 0, fraction: float = 0.25, threshold: float = 0.5
) -> Bundle:
    """The opened bundle of `model`, named after its folder, of a run with so many sites and that draw of validation patients."""
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / WEIGHTS)
    origin = Provenance(
        pneumofed="0", run="r", round=1, checkpoint="0" * 64, config="0" * 64, split_seed=split_seed, validation_fraction=fraction
    )
    manifest = BundleManifest(
        name=folder.name,
        created=NOW,
        task="binary",
        classes=("normal", "pneumonia"),
        preprocessing=PREPROCESSING,
        model=ModelConfig(name="small_cnn"),
        threshold=OperatingPoint(value=threshold, policy="half", target=0.5, raw_value=threshold),
        calibration=Calibration(),
        card=CardFacts(sites=sites, training_images=0, training_patients=0, phantom=True, provenance=origin),
    )
    seal_bundle(folder, manifest, signing_key())
    return load_bundle(folder, [signing_key().public_key()])


def comparison(each: int = 600, *, worse: float = 0.0, seed: int = 0) -> ModelComparison:
    """Two good models on `each` patients of each class; the new one's classes overlap more by `worse` standard deviations."""
    generator = np.random.default_rng(seed)
    labels = np.repeat([0, 1], each)
    shared = generator.normal(size=2 * each)
    scores = [
        1 / (1 + np.exp(-2 * (shared + 0.1 * generator.normal(size=2 * each) + gap * (labels - 0.5))))
        for gap in (4.5, 4.5 - worse)
    ]
    old, new = (of_scores(values.tolist(), labels.tolist()) for values in scores)
    return compare_predictions(old, new, (0.5, 0.5))
