"""A run's memory: weights, the strategy's own state, and the position in the run.

Sites are drawn by a generator that is pure in (seed, round), so the round number is the seed's position. Plain
`torch.load(path, weights_only=True)["model"]` is a state_dict of `common.models.build.build_model`.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.reader import experiment_from_json
from pneumofed.common.errors import CheckpointError, ConfigError
from pneumofed.common.files import atomic_write
from pneumofed.common.models.build import build_model
from pneumofed.common.wire.messages import ModelArrays
from pneumofed.common.wire.parameter_layout import ArraysLayout

CHECKPOINT_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """The state after `round` rounds.

    Attributes:
        arrays: what was evaluated in that round.
        training: what sites train on from, where that is not `arrays` (`strategy.ema_decay`).
    """

    experiment: ExperimentConfig
    run: str
    round: int
    arrays: ModelArrays
    strategy_state: dict[str, np.ndarray]
    training: ModelArrays | None = None


def write_checkpoint(path: Path, checkpoint: Checkpoint, model: nn.Module) -> None:
    """Writes the whole file or leaves the old one.

    Args:
        path: `last.pt` or `best.pt` of a run folder.
        checkpoint: what is written.
        model: a scratch network of the experiment; its weights are overwritten.
    """
    layout = ArraysLayout.of(model)
    layout.load(model, checkpoint.arrays.parameters, checkpoint.arrays.statistics)
    content = {
        "format": CHECKPOINT_FORMAT,
        "experiment": checkpoint.experiment.model_dump_json(),
        "run": checkpoint.run,
        "round": checkpoint.round,
        "layout": layout.digest,
        "model": model.state_dict(),
        "strategy": {name: torch.from_numpy(values) for name, values in checkpoint.strategy_state.items()},
    }
    if checkpoint.training is not None:
        content["training"] = {name: torch.from_numpy(values) for name, values in vars(checkpoint.training).items()}
    with atomic_write(path) as file:
        torch.save(content, file)


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads the checkpoint in `path`.

    Raises:
        CheckpointError: the file is missing, damaged, or of another format.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        experiment = experiment_from_json(content["experiment"])
        model = build_model(experiment.model.without_weights(), experiment.task, seed=0)
        model.load_state_dict(content["model"])
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: no round was completed; start without --resume") from None
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError, ConfigError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}); restore it from a backup or start a new run"
        ) from error
    arrays = ModelArrays(*ArraysLayout.of(model).flatten(model))
    strategy = {name: values.numpy() for name, values in content["strategy"].items()}
    own = {name: values.numpy() for name, values in content.get("training", {}).items()}
    return Checkpoint(experiment, content["run"], content["round"], arrays, strategy, ModelArrays(**own) if own else None)


def check_same_experiment(checkpoint: Checkpoint, experiment: ExperimentConfig) -> None:
    """Checks that a run is resumed with the experiment that it was started with: it would not go on as an unbroken run with
    another.

    Args:
        checkpoint: of the run to resume.
        experiment: what is asked for now.

    Raises:
        CheckpointError: names each key that differs.
    """
    old, new = checkpoint.experiment.model_dump(), experiment.model_dump()
    different = sorted(_different(old, new))
    if different:
        raise CheckpointError(
            f"the run to resume was started with other settings: {'; '.join(different)}. "
            "Resume with the same settings, or start a new run in another folder"
        )


def _different(old: dict[str, object], new: dict[str, object], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in old.items():
        other = new.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            found += _different(value, other, f"{prefix}{key}.")
        elif value != other:
            found.append(f"{prefix}{key} was {value!r}, now {other!r}")
    return found
