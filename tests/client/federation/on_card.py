"""Trains on the CPU and on a card that is not there, and prints what differs and what was sent, as JSON: `python -m ... CASE`.

A process of its own, since a device once registered stays for all of PyTorch.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch

import tests.fake_card as fake
from pneumofed.client.federation.training import RoundPlan, build_setup, train_locally
from pneumofed.client.privacy.dp_sgd import PrivateRound, build_private_setup
from pneumofed.client.privacy.plan import SitePlan, count_units
from pneumofed.common.models.build import build_model
from pneumofed.common.models.compute import Compute, HeldRows
from pneumofed.common.models.features import FeatureSet, compute_features, predict_probabilities
from pneumofed.common.wire.parameter_layout import ArraysLayout
from tests.client.federation.test_training import tiny_data
from tests.tiny import tiny_experiment

IMAGES = 20
VIEWS = {"rotation_deg": 9.0, "horizontal_flip_probability": 0.5, "erase_borders": 0.5, "style": 0.5, "noise_std": 0.05}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"augmentation": VIEWS},
    "proximal": {"strategy": {"name": "fedprox"}, "training": {"proximal_mu": 0.1, "optimizer": "sgd", "max_grad_norm": 1.0}},
    "private": {
        "model": {"norm": "group"},
        "loss": {"logit_adjustment": False},
        "privacy": {"mechanism": "dp_sgd", "delta": 1e-3, "expected_batch_size": 5, "noise_multiplier": 1e-5},
        "training": {"optimizer": "sgd"},
    },
    "features": {"model": {"freeze": "head_only"}},
}


def train(case: str, compute: Compute) -> dict[str, Any]:
    """Weights, metrics and probabilities after one round on the device."""
    experiment, data = tiny_experiment(rounds=4, **CASES[case]), tiny_data(IMAGES)
    model = build_model(experiment.model, experiment.task, seed=1)
    layout, plan = ArraysLayout.of(model), RoundPlan(experiment, 1, "site")
    if case == "private":
        site = SitePlan.of(experiment, count_units(data.patients, experiment.privacy.unit), IMAGES)
        private = PrivateRound.of(site, data, bytes(32), secure=False)
        plan = private.hide(plan)
        setup = build_private_setup(model, private, plan, compute)
    else:
        setup = build_setup(model, [IMAGES // 2, IMAGES // 2], plan, compute)
    examples: Any = data
    if case == "features":
        examples = FeatureSet(compute_features(setup.model, data, compute, 1), data.labels, data.patients)
    result = train_locally(setup, examples, plan)
    scores = predict_probabilities(setup.model, data, compute, 1, 7)
    parameters, statistics = layout.flatten(setup.model)
    return {"weights": parameters, "statistics": statistics, "scores": scores, "loss": np.array([result.loss, result.accuracy])}


def main(case: str) -> None:
    made = torch.Generator
    here = train(case, Compute(torch.device("cpu"), None))
    torch.Generator = lambda device="cpu": made()  # type: ignore[assignment,misc]  # a card that is not there draws nothing itself
    with fake.FakeCard() as card:
        compute = Compute(fake.DEVICE, None)
        there = train(case, compute)
        pixels = tiny_data(IMAGES).pixels
        holds = HeldRows(pixels, compute).lies_on_device
        model = compute.place(build_model(tiny_experiment().model, "binary", seed=1))
        conv = next(parameter for parameter in model.parameters() if parameter.dim() == 4)
        try:
            model(torch.zeros(2, 1, 32, 32))
            mixes = True
        except RuntimeError:
            mixes = False
    differ = {name: float(np.abs(here[name] - there[name]).max(initial=0.0)) for name in here}
    sys.stdout.write(json.dumps({
        "differ": differ,
        "sent": [(str(kind), size) for kind, size in card.sent],
        "read": card.read,
        "holds": holds,
        "mixes": mixes,
        "channels_last": conv.is_contiguous(memory_format=torch.channels_last),
        "pixels": int(pixels.nbytes),
    }) + "\n")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
