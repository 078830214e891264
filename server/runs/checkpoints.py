"""A run's memory: weights, the strategy's own state, and the position in the run.

Sites are drawn by a generator that is pure in (seed, round), so the round number is the seed's position. Plain
`torch.load(path, weights_only=True)["model"]` is a state_dict of `common.models.build.build_model`.

A file ends with the SHA-256 of all that stands before it, as the comment of the ZIP archive that `torch.save` writes, so that every
ZIP reader still opens it. It is compared before anything is unpacked. The checkpoint before the last one stays beside it.
"""

from __future__ import annotations

import hashlib
import io
import logging
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.reader import differing_keys, experiment_from_json
from pneumofed.common.errors import CheckpointError, ConfigError
from pneumofed.common.files import keep_as, keep_previous, previous_of, write_file
from pneumofed.common.models.build import build_empty
from pneumofed.common.wire.messages import ModelArrays
from pneumofed.common.wire.parameter_layout import ArraysLayout

logger = logging.getLogger(__name__)

CHECKPOINT_FORMAT = 2
"""1 had no checksum."""
_CHECKSUM = b"sha256:"
_CHECKSUM_BYTES = len(_CHECKSUM) + 64
"""Length of the archive's comment."""


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


def write_checkpoint(path: Path, checkpoint: Checkpoint, model: nn.Module, also: Sequence[Path] = ()) -> None:
    """Writes the whole file or leaves the old one, which stays as the previous one beside the new; on the disk when this returns.

    Args:
        path: `last.pt` or `best.pt` of a run folder.
        checkpoint: what is written.
        model: a scratch network of the experiment; its weights are overwritten.
        also: further files that get the same content, one after the other.
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
    archive = io.BytesIO()
    torch.save(content, archive)
    _add_checksum(archive)
    for place in (path, *also):
        keep_previous(place)
        write_file(place, archive.getbuffer())


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads the checkpoint in `path`.

    Raises:
        CheckpointError: the file is missing, damaged, or of another format.
    """
    try:
        content = _load(path.read_bytes())
        experiment = experiment_from_json(content["experiment"])
        model = build_empty(experiment.model, experiment.task)
        model.load_state_dict(content["model"])
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: no round was completed; start without --resume") from None
    except Exception as error:  # whatever torch's readers raise over a damaged file of the former format
        why = str(error) if isinstance(error, CheckpointError | ConfigError) else type(error).__name__
        raise CheckpointError(f"{path} cannot be read ({why}); restore it from a backup or start a new run") from error
    arrays = ModelArrays(*ArraysLayout.of(model).flatten(model))
    strategy = {name: values.numpy() for name, values in content["strategy"].items()}
    own = {name: values.numpy() for name, values in content.get("training", {}).items()}
    return Checkpoint(experiment, content["run"], content["round"], arrays, strategy, ModelArrays(**own) if own else None)


def read_last(path: Path) -> Checkpoint:
    """Reads the checkpoint to go on from: `path`, or the one before it where `path` is damaged, which the log then says.

    Args:
        path: `last.pt` of a run folder.

    Raises:
        CheckpointError: neither can be read; says why the newer one cannot.
    """
    try:
        return read_checkpoint(path)
    except CheckpointError as damage:
        if not path.exists() or not previous_of(path).exists():
            raise
        try:
            earlier = read_checkpoint(previous_of(path))
        except CheckpointError:
            raise damage from None
        logger.warning("%s is damaged: going on from the one before it, after round %d", path, earlier.round)
        return earlier


def set_damaged_aside(path: Path) -> None:
    """Puts the checkpoint before `path` in its place where `path` is damaged, so that the next one does not push out the good one.

    Args:
        path: `last.pt` of a run folder, of which `read_last` has given a checkpoint; a damaged one stays beside it as `last.damaged.pt`.
    """
    try:
        read_checkpoint(path)
    except CheckpointError:
        keep_as(path, path.with_name(f"{path.stem}.damaged{path.suffix}"))  # by a second name: a run without `path` never began
        previous_of(path).replace(path)


def read_of_round(paths: Sequence[Path], number: int) -> Checkpoint:
    """Reads the checkpoint of one round from the first of the files, or of those before them, that holds it undamaged.

    Args:
        paths: of checkpoints; the first is where the round is looked for.
        number: of the round.

    Raises:
        CheckpointError: none holds it; says what is wrong with the first file.
    """
    problem = CheckpointError(f"{paths[0]} is not of round {number}; restore it from a backup or start a new run")
    for path in [name for each in paths for name in (each, previous_of(each))]:
        try:
            checkpoint = read_checkpoint(path)
        except CheckpointError as error:
            problem = error if path == paths[0] else problem
            continue
        if checkpoint.round == number:
            if path != paths[0]:
                logger.warning("%s: the model of round %d is taken from %s", problem, number, path)
            return checkpoint
    raise problem


def check_same_experiment(checkpoint: Checkpoint, experiment: ExperimentConfig) -> None:
    """Checks that a run is resumed with the experiment that it was started with: it would not go on as an unbroken run with
    another.

    Args:
        checkpoint: of the run to resume.
        experiment: what is asked for now.

    Raises:
        CheckpointError: names each key that differs.
    """
    different = differing_keys(checkpoint.experiment.model_dump(), experiment.model_dump())
    if different:
        raise CheckpointError(
            f"the run to resume was started with other settings: {'; '.join(different)}. "
            "Resume with the same settings, or start a new run in another folder"
        )


def _add_checksum(archive: io.BytesIO) -> None:
    """Gives the ZIP archive its comment: the last two bytes of one without a comment are the comment's length, zero."""
    with archive.getbuffer() as content:
        content[-2:] = struct.pack("<H", _CHECKSUM_BYTES)
        checksum = hashlib.sha256(content).hexdigest().encode()
    archive.seek(0, io.SEEK_END)
    archive.write(_CHECKSUM + checksum)


def _load(file: bytes) -> dict[str, Any]:
    """Unpacks a checkpoint, after the comparison with its checksum; only the former format has none.

    Raises:
        CheckpointError: the checksum is missing or another one, or the format is newer.
    """
    checked, comment = file[:-_CHECKSUM_BYTES], file[-_CHECKSUM_BYTES:]
    has_checksum = comment.startswith(_CHECKSUM)
    if has_checksum and comment != _CHECKSUM + hashlib.sha256(checked).hexdigest().encode():
        raise CheckpointError("its checksum is another one: it was damaged or changed")
    content: dict[str, Any] = torch.load(io.BytesIO(file), map_location="cpu", weights_only=True)
    number = content["format"]
    if number not in (1, CHECKPOINT_FORMAT):
        raise CheckpointError(f"it is of format {number}, this version knows 1 to {CHECKPOINT_FORMAT}")
    if number != 1 and not has_checksum:
        raise CheckpointError("its checksum is missing: it was damaged or changed")
    return content
