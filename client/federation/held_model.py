"""The model that a site was last asked to judge, kept on its disk until the next round trains on from it: so it travels once a round.

keep_models(config, run, round, *models)     the hashes to report, or none where the disk is full
restore_model(config, instruction)           the instruction with its weights, where it refers to kept ones

Where a moving average is judged (`strategy.ema_decay`), the next round trains on from other weights than the judged ones. Then these travel
with the evaluation, the site brings the average that it keeps up to date with them, by the coordinator's own arithmetic, and keeps both.

What is kept is of one run, and of the last evaluation. Virtual hospitals share one folder (`model_dir`): there what the round before left
stays too, since another hospital may not have made its average of it yet, and the first that has made one spares the others the work.
What was lost or damaged, or gives another average than the coordinator's, is refused with a `HeldModelError`, and the coordinator sends it
whole.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pneumofed.common.audit.log import hash_arrays
from pneumofed.common.config.parties import SiteConfig
from pneumofed.common.errors import HeldModelError
from pneumofed.common.files import atomic_write, pass_if_disk_full
from pneumofed.common.models.kept_model import moving_average
from pneumofed.common.wire.instructions import Instruction
from pneumofed.common.wire.messages import ModelArrays

PREFIX = "held-model-"


def keep_models(config: SiteConfig, run: str, number: int, *models: ModelArrays) -> list[str]:
    """Keeps weights in place of those that were kept before.

    Args:
        config: of the site.
        run: token of the run, which alone may refer to them.
        number: the round, from 1.
        models: float32 [P] and [B] each; two at most.

    Returns:
        The SHA-256 of each, to be reported to the coordinator; none where the disk is full, and nothing is kept.

    Raises:
        OSError: the folder cannot be written for another reason than a full disk.
    """
    hashes = [hash_arrays(arrays) for arrays in models]
    folder, of_run = _folder(config), PREFIX + _short_hash(run)
    paths = [folder / f"{of_run}-{number}-{_short_hash(digest)}.npy" for digest in hashes]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        for path, arrays in zip(paths, models, strict=True):
            if not path.exists():
                with atomic_write(path) as file:
                    np.save(file, arrays.parameters, allow_pickle=False)
                    np.save(file, arrays.statistics, allow_pickle=False)
    except OSError as error:
        pass_if_disk_full(error, folder)
        return []
    spared = {f"{of_run}-{earlier}" for earlier in (number - 1, number)} if config.model_dir else set()
    for other in folder.glob(f"{PREFIX}*"):
        if other not in paths and other.name.rpartition("-")[0] not in spared:
            other.unlink(missing_ok=True)
    return hashes


def restore_model(config: SiteConfig, instruction: Instruction) -> Instruction:
    """Gives the instruction with the weights that it refers to; one that brings its own, or needs none, as it is.

    Args:
        config: of the site.
        instruction: as it was unpacked.

    Raises:
        HeldModelError: the weights are not kept here, are damaged, or give another average than the coordinator has.
    """
    if instruction.held is not None:
        return replace(instruction, arrays=_read(config, instruction.run, instruction.held))
    if instruction.averaged is None:
        return instruction
    former, result = instruction.averaged
    latest = instruction.weights
    with suppress(HeldModelError):
        return replace(instruction, arrays=_read(config, instruction.run, result), latest=latest)
    before = _read(config, instruction.run, former)
    if [part.shape for part in (before.parameters, before.statistics)] != [
        part.shape for part in (latest.parameters, latest.statistics)
    ]:
        raise HeldModelError("the average that the message refers to is of another network")
    average = moving_average(before, latest, instruction.experiment.strategy.ema_decay)
    if hash_arrays(average) != result:
        raise HeldModelError("the moving average is another one here than at the coordinator")
    return replace(instruction, arrays=average, latest=latest)


def _read(config: SiteConfig, run: str, digest: str) -> ModelArrays:
    try:
        path = next(_folder(config).glob(f"{PREFIX}{_short_hash(run)}-*-{_short_hash(digest)}.npy"))
        with path.open("rb") as file:
            arrays = ModelArrays(_map_next(file), _map_next(file))
    except (StopIteration, OSError, ValueError, EOFError):
        raise HeldModelError("the weights that the message refers to are not kept here") from None
    if hash_arrays(arrays) != digest:
        raise HeldModelError("the weights that the message refers to are damaged here")
    return arrays


def _map_next(file: BinaryIO) -> np.ndarray:
    """The next array of a file of several, read where it is used; what is mapped stays also when the file goes.

    Raises:
        ValueError: it is no float32 [N], or not whole; nothing of a damaged header may decide what is mapped.
    """
    np.lib.format.read_magic(file)
    shape, _, kind = np.lib.format.read_array_header_1_0(file)
    start = file.tell()
    if kind != np.float32 or len(shape) != 1 or not 0 <= 4 * shape[0] <= os.fstat(file.fileno()).st_size - start:
        raise ValueError("expected float32 [N]")
    values = np.memmap(file, kind, "r", start, shape) if shape[0] else np.empty(0, kind)
    file.seek(start + values.nbytes)
    return np.asarray(values)


def _folder(config: SiteConfig) -> Path:
    return Path(config.model_dir or config.work_dir)


def _short_hash(word: str) -> str:
    """Files are named by hashes of ours: nothing of a message names one."""
    return hashlib.sha256(word.encode()).hexdigest()[:32]
