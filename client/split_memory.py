"""Which patients a site keeps for validation, remembered, so that images which join later move nobody to the other side.

A model that starts from an earlier one has seen that one's training patients: were one of them judged on now, or one of those that the
earlier was judged on trained on, the comparison of the two would flatter the new one. So `work_dir/split.json` holds, for each
split that a run asked for (its seed and its fraction), the side of every patient who was ever dealt. It names patients as the manifest
does and stays at the site; who withdraws is taken out of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.data.atomic import StateFile
from common.data.dataset import Dataset
from common.data.splits import split_by_patient
from common.errors import DataError

FILE = "split.json"
Sides = dict[str, bool]
"""Whether each patient is in validation."""


def split_site(dataset: Dataset, fraction: float, seed: int, work_dir: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the training and of the validation images, as `split_by_patient`; who was dealt before stays where he was.

    Raises:
        DataError: the memory is damaged, or cannot be written.
    """
    name = f"{seed} {fraction!r}"
    try:
        file = _file(work_dir)
        with file.locked() as memory:
            known = memory.get(name, {})
            train, validation = split_by_patient(dataset.patients, dataset.labels.tolist(), fraction, seed, known)
            dealt = {dataset.patients[row]: False for row in train} | {dataset.patients[row]: True for row in validation}
            if dealt.keys() - known.keys():
                file.write({**memory, name: {**known, **dealt}})
    except OSError as error:
        raise DataError(f"{work_dir / FILE} cannot be written: {error.strerror}; without it no split can be kept") from None
    return train, validation


def forget(work_dir: Path, gone: Callable[[str], bool]) -> None:
    """Takes the patients of whom `gone` is true out of the memory.

    Raises:
        DataError: the memory is damaged.
        OSError: it cannot be written.
    """
    file = _file(work_dir)
    if not file.path.exists():
        return
    with file.locked() as memory:
        file.write({name: {who: side for who, side in sides.items() if not gone(who)} for name, sides in memory.items()})


def _file(work_dir: Path) -> StateFile[dict[str, Sides]]:
    return StateFile(
        work_dir / FILE,
        kind="the list of patients kept for validation",
        parse=_parse,
        missing={},
        remedy="restore it from a backup; if there is none, remove it, and do not compare new models with those that were trained before",
        refuse=DataError,
    )


def _parse(content: bytes) -> dict[str, Sides]:
    return {
        str(name): {str(patient): bool(side) for patient, side in sides.items()} for name, sides in json.loads(content).items()
    }
