"""An audit from outside: what a canary tells of the real private round, against the epsilon that the site's ledger has on disk for it.

An adversary who chooses the weights, knows every other image and sees the update of one round guesses whether one more unit, the canary,
was trained on. Its score is the update along the direction in which the canary moves it without noise. From the shares of right and
wrong guesses over many rounds comes a lower bound of epsilon (Jagielski et al. 2020, section 4; Nasr et al. 2021, section 4), with Clopper
and Pearson's limits at 99.5 %. It must not exceed what the ledger says.

Each round is `train_privately` at a site of its own, in a new folder: with its own secret, and a ledger that holds this round only.
"""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import dataclass, field, replace
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from pneumofed.client.federation.site_data import SiteData
from pneumofed.client.privacy import dp_sgd, per_sample_gradients
from pneumofed.client.privacy.dp_sgd import train_privately
from pneumofed.client.privacy.ledger import open_ledger
from pneumofed.client.privacy.plan import count_units
from pneumofed.common.config.parties import SiteConfig, SitePolicy
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.models.build import build_model
from pneumofed.common.models.compute import build_compute
from pneumofed.common.privacy.randomness import RandomStream
from pneumofed.common.wire.instructions import Instruction
from pneumofed.common.wire.messages import ModelArrays
from pneumofed.common.wire.parameter_layout import ArraysLayout
from tests.adversary.test_a_unit_adds_no_more_than_the_bound import ATTACKS
from tests.client.federation.test_training import tiny_data
from tests.tiny import tiny_experiment

SGD = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "learning_rate": 1.0}
STILL = dict.fromkeys(("rotation_deg", "shift_fraction", "scale_fraction", "brightness", "contrast", "noise_std"), 0.0)
DELTA, CONFIDENCE = 1e-3, 0.995
POLICY = SitePolicy(min_patients_private=2)
"""Six patients are fewer than a hospital's default allows; of so few the hospital's delta is `DELTA` too."""


@dataclass(frozen=True)
class Setting:
    """What the coordinator chooses. `others` units, and the canary, which is the last one and has `images` images."""

    attack: str = "honest"
    privacy: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    others: int = 5
    images: int = 1

    def experiment(self, **privacy: Any) -> Any:
        base = {"mechanism": "dp_sgd", "delta": DELTA, "noise_multiplier": 2.0, "expected_batch_size": 100}
        return tiny_experiment(
            model={"norm": "group", **self.model},
            loss={"logit_adjustment": False},
            training={**SGD, **self.training},
            augmentation=STILL,
            privacy={**base, **self.privacy, **privacy},
        )

    def data(self) -> Dataset:
        data = tiny_data(self.others + self.images)
        owners = (*(str(number) for number in range(self.others)), *["canary"] * self.images)
        return replace(data, patients=owners)


class Rounds:
    """Rounds of one setting, with the canary or without it, from the same first weights."""

    def __init__(self, setting: Setting, patch: pytest.MonkeyPatch) -> None:
        self.setting, self.whole, self.patch = setting, setting.data(), patch
        self.without = self.whole.subset(range(setting.others))
        experiment = setting.experiment()
        self.compute = build_compute("cpu", setting.precision, threads=1)  # type: ignore[arg-type]
        self.model = build_model(experiment.model, experiment.task, seed=1)
        with torch.no_grad():
            ATTACKS[setting.attack](self.model)
        self.layout = ArraysLayout.of(self.model)
        self.before = ModelArrays(*self.layout.flatten(self.model))
        public = count_units(self.whole.patients, experiment.privacy.unit)
        # how many units there are counts as public, so it is the same in both
        patch.setattr(dp_sgd, "count_units", lambda patients, unit: public)

    def ask(self, experiment: Any, data: Dataset) -> tuple[np.ndarray, float]:
        """How one round of a new site with `data` moves the weights, and the epsilon in its ledger."""
        model = copy.deepcopy(self.model)
        with TemporaryDirectory() as folder:
            config = SiteConfig(name="site", manifest="none.csv", work_dir=folder, threads=1)
            instruction = Instruction(experiment, "0123456789abcdef", 1, self.before)
            train_privately(model, SiteData(config, data, data.subset([]), {}), instruction, self.compute, POLICY)
            (lineage,) = open_ledger(config).lineages()
            assert len(lineage.entries) == 1
            epsilon = lineage.entries[0].epsilon
        moved = self.layout.flatten(model)[0] - self.before.parameters.astype(np.float64)
        return moved, math.inf if epsilon is None else epsilon

    def direction(self) -> np.ndarray:
        """Where the canary moves the weights in a round in which all units are drawn, on the adversary's own machine and without noise."""
        with self.patch.context() as patch:
            patch.setattr(RandomStream, "normal", lambda _, count: torch.zeros(count, dtype=torch.float64))
            experiment = self.setting.experiment(expected_batch_size=100)
            with_canary, without = (self.ask(experiment, data)[0] for data in (self.whole, self.without))
        difference = with_canary - without
        return difference / max(float(np.linalg.norm(difference)), 1e-30)

    def bounds(self, trials: int) -> tuple[float, float]:
        """What the canary shows, and the least that a ledger says.

        Of `trials` rounds with it and as many without, half choose the guess and half judge it.
        """
        experiment, direction = self.setting.experiment(), self.direction()
        sides: list[np.ndarray] = []
        charged = math.inf
        for data in (self.whole, self.without):
            scores = np.empty(trials)
            for trial in range(trials):
                moved, epsilon = self.ask(experiment, data)
                scores[trial], charged = moved @ direction, min(charged, epsilon)
            sides.append(scores)
        half = trials // 2
        lower = max(
            audit(present[half:], absent[half:], best_threshold(present[:half], absent[:half]))
            for present, absent in (sides, [-each for each in reversed(sides)])
        )
        return lower, charged


def best_threshold(present: np.ndarray, absent: np.ndarray) -> float:
    return max(np.concatenate([present, absent]).tolist(), key=lambda threshold: audit(present, absent, threshold))


def audit(present: np.ndarray, absent: np.ndarray, threshold: float) -> float:
    """log((P(guess | present) - delta) / P(guess | absent)), the first from below, the second from above; 0 where it is no bound."""
    right = lower_limit(int((present >= threshold).sum()), len(present))
    wrong = 1.0 - lower_limit(int((absent < threshold).sum()), len(absent))
    return max(0.0, math.log((right - DELTA) / wrong)) if right > DELTA else 0.0


def lower_limit(successes: int, trials: int) -> float:
    return float(scipy.stats.beta.ppf(1.0 - CONFIDENCE, successes, trials - successes + 1)) if successes else 0.0


STANDARDIZED = {"weight_standardization": True}
HOSTILE = Setting("norm bias 1e4", {"noise_multiplier": 3.0}, STANDARDIZED)
SETTINGS = {
    "honest": Setting(),
    "honest, standardised, little noise": Setting(privacy={"noise_multiplier": 1.0}, model=STANDARDIZED),
    "honest, three steps": Setting(training={"local_epochs": 3}),
    "honest, half of the units a step": Setting(privacy={"expected_batch_size": 3, "noise_multiplier": 1.0}),
    "honest, moving average of two steps": Setting(privacy={"ema_decay": 0.5}, training={"local_epochs": 2}),
    "norm bias 1e4, standardised": HOSTILE,
    "norm bias 1e4, standardised, bfloat16, a patient of four images": replace(
        HOSTILE, precision="bf16", images=4, privacy={"unit": "patient"}
    ),
    "constant filters after a large bias, two views": Setting(
        "constant filters after a large bias", {"augmentation_multiplicity": 2}, STANDARDIZED
    ),
    "head 1e15, lots of two": Setting("head 1e15", {"physical_batch_size": 2}),
    "huge, then tiny; bound 1e-6": Setting("huge, then tiny", {"max_grad_norm": 1e-6}),
}


def assert_upper_bound(name: str, setting: Setting, trials: int, patch: pytest.MonkeyPatch) -> None:
    lower, upper = Rounds(setting, patch).bounds(trials)
    sys.stdout.write(f"{name}: {lower:.2f} shown, {upper:.2f} charged\n")
    assert lower <= upper


@pytest.mark.slow
def test_a_canary_shows_no_more_than_the_ledger_charges(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_upper_bound("norm bias 1e4, standardised", HOSTILE, 60, monkeypatch)


@pytest.mark.slow
def test_the_audit_sees_a_unit_that_is_not_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests here could not fail."""
    monkeypatch.setattr(per_sample_gradients, "clip_factors", lambda bounds, _: torch.ones(len(bounds[0].length)))
    lower, upper = Rounds(HOSTILE, monkeypatch).bounds(60)
    assert lower > upper


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_no_canary_shows_more_than_the_ledger_charges(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_upper_bound(name, SETTINGS[name], 400, monkeypatch)
