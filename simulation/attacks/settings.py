"""The settings of the attack bench, and the experiment that it attacks unless another is given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from pneumofed.common.config.experiment import Count, ExperimentConfig, Section
from pneumofed.common.config.reader import build_config, load_experiment, merge
from pneumofed.common.errors import ConfigError

AttackName = Literal["membership", "inversion", "canaries"]

ATTACKED_DEFAULTS: dict[str, Any] = {
    "name": "attack",
    "rounds": 8,
    "image": {"size_px": 32},
    "augmentation": {
        "rotation_deg": 0.0,
        "shift_fraction": 0.0,
        "scale_fraction": 0.0,
        "brightness": 0.0,
        "contrast": 0.0,
        "noise_std": 0.0,
    },
    "model": {"name": "small_cnn", "norm": "group"},
    "loss": {"label_smoothing": 0.0, "logit_adjustment": False},
    "training": {"batch_size": 16, "learning_rate": 3.0e-3, "weight_decay": 0.0, "local_epochs": 4, "precision": "fp32"},
    "privacy": {"expected_batch_size": 32, "physical_batch_size": 64},
}
"""An experiment that is easy to attack: few patients, many passes, nothing that hides what was memorised."""


class AttackConfig(Section):
    """How large each attack is. The defaults finish in minutes on two cores."""

    data: str | None = None
    """Folder in the Kaggle layout; unset, phantoms are drawn into the output folder."""
    patients: Annotated[int, Field(ge=20)] = 160
    """Patients of the attacked site, drawn from the data; each model of the membership attack is trained on half of them."""
    hospitals: Count = 1
    """Hospitals of the federation whose released model the membership attack and the canaries attack. The attacked one has `patients`; each
    other one has as many of its own, who are in all models. With 1 the attack is on the model of a hospital by itself, which is also what
    a coordinator without secure aggregation sees of it."""
    models: Annotated[int, Field(ge=3)] = 16
    """Models of the membership attack for each epsilon: each one is attacked with the others as its shadow models."""
    canaries: Annotated[int, Field(ge=10)] = 100
    """Number of canaries; each is a further patient of the data."""
    canary_kind: Literal["mislabelled", "pattern"] = "mislabelled"
    images: Annotated[int, Field(ge=2)] = 6
    """Images that the inversion attack tries to reconstruct, each of another patient."""
    iterations: Count = 800
    """Steps of each restart of the inversion."""
    restarts: Count = 1
    """Restarts of the inversion, each from another random image."""
    total_variation: Annotated[float, Field(ge=0.0)] = 0.03
    """Weight of the inversion's prior that neighbouring pixels are alike."""
    fixed_norms: bool = True
    """Inverts the experiment's model with BatchNorm layers of fixed statistics, in the place of its own normalisation: the setting
    in which the attack is known to work. GroupNorm takes the contrast out of every image and hinders it, without promising anything."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that train and attack; 0 is one a CPU."""
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def all_patients(self) -> int:
        """Patients that the data must hold: of all hospitals, and the canaries."""
        return self.patients * self.hospitals + self.canaries


def attacked_experiment(config: Path | None, values: Mapping[str, Any]) -> ExperimentConfig:
    """Reads the experiment to attack.

    Args:
        config: YAML file of an experiment; None: `ATTACKED_DEFAULTS`.
        values: nested keys of the experiment that win over it.

    Raises:
        ConfigError: a key or value is wrong.
    """
    return (
        load_experiment(config, values)
        if config
        else build_config(ExperimentConfig, merge(ATTACKED_DEFAULTS, values), "the attack")
    )


def at_epsilon(experiment: ExperimentConfig, epsilon: float) -> ExperimentConfig:
    """Returns `experiment` under DP-SGD with a target; any noise multiplier that it names is dropped.

    Args:
        experiment: its other privacy settings (delta, unit, clipping) stay.
        epsilon: the target over all rounds; infinity switches privacy off.
    """
    if math.isinf(epsilon):
        changes: dict[str, Any] = {"mechanism": "none"}
    else:
        changes = {"mechanism": "dp_sgd", "target_epsilon": epsilon, "noise_multiplier": None}
    return experiment.model_copy(update={"privacy": experiment.privacy.model_copy(update=changes)})


def read_epsilons(text: str) -> tuple[float, ...]:
    """Reads positive numbers, or `inf` for no privacy, with commas or spaces between.

    Returns:
        From large to small, each once.

    Raises:
        ConfigError: one is no such number.
    """
    try:
        values = {float(word) for word in _words(text)}
    except ValueError:
        values = set()
    if not values or any(not value > 0.0 for value in values):
        raise ConfigError(f"--epsilons: expected positive numbers or inf with commas between, got '{text}'")
    return tuple(sorted(values, reverse=True))


def read_attacks(text: str) -> tuple[AttackName, ...]:
    """Reads names of attacks, with commas or spaces between.

    Returns:
        In the order in which they run, each once.

    Raises:
        ConfigError: one is no attack.
    """
    known: tuple[AttackName, ...] = get_args(AttackName)
    words = _words(text)
    if not words or not set(words) <= set(known):
        raise ConfigError(f"--attack: expected some of {', '.join(known)} with commas between, got '{text}'")
    return tuple(name for name in known if name in words)


def _words(text: str) -> list[str]:
    return text.replace(",", " ").split()
