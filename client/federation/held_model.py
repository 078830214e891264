"""The model that a site was last asked to judge, kept on its disk until the next round trains on from it: so it travels once a round.

keep_model(config, run, arrays)      the hash to report, or None where the disk is full
restore_model(config, instruction)   the instruction with its weights, where it refers to kept ones

A site keeps one model, of one run. What was lost or damaged is refused with a `HeldModelError`, and the coordinator sends it whole.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from pneumofed.common.audit.log import hash_arrays
from pneumofed.common.config.parties import SiteConfig
from pneumofed.common.errors import HeldModelError
from pneumofed.common.files import atomic_write, pass_if_disk_full
from pneumofed.common.wire.instructions import Instruction
from pneumofed.common.wire.messages import ModelArrays

PREFIX = "held-model-"


def keep_model(config: SiteConfig, run: str, arrays: ModelArrays) -> str | None:
    """Keeps weights in place of those that were kept before.

    Args:
        config: of the site.
        run: token of the run, which alone may refer to them.
        arrays: float32 [P] and [B].

    Returns:
        Their SHA-256, to be reported to the coordinator; None where the disk is full, and nothing is kept.

    Raises:
        OSError: the folder cannot be written for another reason than a full disk.
    """
    digest = hash_arrays(arrays)
    path = _path(config, run, digest)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        if not path.exists():
            with atomic_write(path) as file:
                np.save(file, arrays.parameters, allow_pickle=False)
                np.save(file, arrays.statistics, allow_pickle=False)
    except OSError as error:
        pass_if_disk_full(error, path.parent)
        return None
    for other in path.parent.glob(f"{PREFIX}*"):
        if other != path:
            other.unlink(missing_ok=True)
    return digest


def restore_model(config: SiteConfig, instruction: Instruction) -> Instruction:
    """Gives the instruction with the weights that it refers to; one that brings its own, or needs none, as it is.

    Args:
        config: of the site.
        instruction: as it was unpacked.

    Raises:
        HeldModelError: the weights are not kept here, or are damaged.
    """
    if instruction.held is None:
        return instruction
    try:
        with _path(config, instruction.run, instruction.held).open("rb") as file:
            arrays = ModelArrays(np.load(file, allow_pickle=False), np.load(file, allow_pickle=False))
    except (OSError, ValueError, EOFError):
        raise HeldModelError("the weights that the message refers to are not kept here") from None
    if hash_arrays(arrays) != instruction.held:
        raise HeldModelError("the weights that the message refers to are damaged here")
    return replace(instruction, arrays=arrays)


def _path(config: SiteConfig, run: str, digest: str) -> Path:
    """Named by a hash of ours: nothing of a message names a file."""
    name = hashlib.sha256(f"{run} {digest}".encode()).hexdigest()[:32]
    return Path(config.model_dir or config.work_dir) / f"{PREFIX}{name}.npy"
