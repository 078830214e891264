"""A signed bundle of a network of CT volumes, exported as a run's is, and drawn series for it."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pneumofed.common.config.experiment import ClinicalConfig, ImageConfig, ModelConfig
from pneumofed.common.imaging.augment import GREY_MEAN, GREY_STD
from pneumofed.common.imaging.volumes import Volume, fit_volume
from pneumofed.common.model_bundle.calibration import Calibration
from pneumofed.common.model_bundle.image_statistics import PIXEL_STATISTICS, as_pictures, pixel_statistics
from pneumofed.common.model_bundle.manifest import (
    CARD,
    NETWORK,
    QUANTIZED,
    REFERENCE,
    WEIGHTS,
    BundleManifest,
    CardFacts,
    OperatingPoint,
    Preprocessing,
    ReferenceSet,
)
from pneumofed.common.model_bundle.predictor import graph_inputs, open_session
from pneumofed.common.model_bundle.sealing import seal_bundle
from pneumofed.common.model_bundle.suitability import fit_suitability
from pneumofed.common.models.build import build_model
from pneumofed.server.export.graph import export_onnx
from pneumofed.simulation.phantoms.ct_sets import draw_ct, encode_series
from pneumofed.simulation.phantoms.phantom import Patient, draw_patients
from pneumofed.simulation.phantoms.scanners import Examination
from pneumofed.simulation.phantoms.thorax import VoxelGrid
from tests.model_bundles import signing_key

IMAGE = ImageConfig(size_px=32, slices=8)
GRID = VoxelGrid(16, 32, 32)
MODEL = ModelConfig(name="resnet18_slices", norm="group")
CLINICAL = ClinicalConfig.model_validate(
    {
        "columns": [{"name": "temperature", "unit": "°C", "low": 34, "high": 43}, {"name": "cough", "kind": "binary"}],
        "fusion": "film",
    }
)


@lru_cache
def patients(count: int, split: str = "test") -> tuple[Patient, ...]:
    return tuple(draw_patients(split, count, 0))


@lru_cache
def drawn_volume(patient: Patient, split: str = "test") -> Volume:
    return Volume(draw_ct(patient, split, 0, GRID), GRID.spacing_mm, ())


@lru_cache
def drawn_inputs(count: int) -> np.ndarray:
    """uint8 [count, 8, 32, 32]."""
    return np.stack([fit_volume(drawn_volume(one), IMAGE.size_px, IMAGE.slices) for one in patients(count)])


def write_series(folder: Path, patient: Patient, split: str = "test") -> Path:
    """Writes the DICOM series of `drawn_volume` as files of the folder."""
    folder.mkdir(parents=True)
    person = f"{split} {patient.number}"
    examination = Examination(
        image=person, manufacturer="Phantom", is_drawn=True, patient=f"P{patient.number}", sex=patient.sex, age_years=40
    )
    for number, data in enumerate(encode_series(draw_ct(patient, split, 0, GRID), GRID, examination)):
        (folder / f"{number:03d}.dcm").write_bytes(data)
    return folder


def model_of(clinical: bool) -> ModelConfig:
    return MODEL.model_copy(update={"clinical": CLINICAL}) if clinical else MODEL


@lru_cache
def volume_network(clinical: bool = False) -> nn.Module:
    """A random network whose attention is drawn too, and how clinical values enter."""
    network = build_model(model_of(clinical), "binary", 7).eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.5)
    return network


def make_volume_bundle(folder: Path, clinical: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    network, pixels = volume_network(clinical), drawn_inputs(80)
    torch.save(network.state_dict(), folder / WEIGHTS)
    export_onnx(network, 1, IMAGE.shape, folder / NETWORK)
    (folder / QUANTIZED).write_bytes((folder / NETWORK).read_bytes())
    (folder / CARD).write_text("# A model for tests\n\nRandom weights: it says nothing about patients.\n")
    inputs = (pixels.astype(np.float32) / np.float32(255.0))[:, None]
    session = open_session((folder / NETWORK).read_bytes(), threads=1)
    logits, features = session.run(["logits", "features"], graph_inputs(session, inputs))
    pictures = as_pictures(pixels)
    statistics = pixel_statistics(pictures)
    probabilities = Calibration().probability(logits[:, 1] - logits[:, 0]).astype(np.float32)
    np.savez(folder / REFERENCE, features=features, probabilities=probabilities, pixel_statistics=statistics)
    manifest = BundleManifest(
        name="ct-test",
        created=datetime(2026, 1, 1, tzinfo=UTC),
        task="binary",
        classes=("normal", "pneumonia"),
        preprocessing=Preprocessing(
            size_px=IMAGE.size_px, fit="pad", in_channels=1, mean=(GREY_MEAN,), std=(GREY_STD,), slices=IMAGE.slices
        ),
        model=model_of(clinical),
        threshold=OperatingPoint(value=0.5, policy="half", target=0.5, raw_value=0.5),
        calibration=Calibration(),
        suitability=fit_suitability(pictures, features, statistics, refusal_rate=0.1),
        reference=ReferenceSet(sets=("phantoms",), images=len(pixels), statistics=PIXEL_STATISTICS),
        card=CardFacts(sites=2, training_images=64, training_patients=64, phantom=True),
    )
    seal_bundle(folder, manifest, signing_key())
    return folder
