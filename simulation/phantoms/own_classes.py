"""A phantom set for a task of own classes, such as normal, pneumonia and tuberculosis, in the layout of a hospital's table.

The Kaggle layout of `simulation.phantoms.phantom` has no place for a class that the set does not know. Here each split is a `labels.csv`
beside its images, whose labels are the task's classes. Only what can be drawn may be asked for (`DRAWN`).
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pneumofed.common.data.tables import TableWriter
from pneumofed.common.errors import ConfigError
from pneumofed.common.files import atomic_write
from pneumofed.simulation.phantoms.phantom import (
    EXTERNAL_SPLIT,
    MAX_SIZE_PX,
    MIN_SIZE_PX,
    Patient,
    claim_folder,
    draw_patients,
    draw_picture,
    save_picture,
)

DRAWN: dict[str, tuple[str, ...]] = {
    "normal": ("normal",),
    "pneumonia": ("bacterial", "viral"),
    "bacterial": ("bacterial",),
    "viral": ("viral",),
    "tuberculosis": ("tuberculosis",),
}
"""What each class shows; of several findings the patients have one each, in equal shares."""
NORMAL_SHARE = 0.4
"""Of the patients; the other classes have equal shares of the rest."""
_VERSION = 1
"""To be raised whenever the drawing changes, so that an older set is not taken for the new one."""
_HEADER = ("filename", "patient_id", "label", "view", "sex", "age", "manufacturer")


def write_class_phantoms(folder: Path, classes: Sequence[str], patients: int, seed: int, size_px: int = 144) -> None:
    """Draws a phantom set of the given classes into a folder: `labels.csv` with `train/*.png`, and `test/` and `external/` likewise.

    `test` and `external` each have a quarter as many patients as the training set; `external` shows adults, taken by other scanners.

    Guarantees:
        Pure in the arguments. Each class has a patient in each set. A set that is already there is not drawn again.
        A folder that holds anything but this very set is refused, so phantoms never mix with real images.

    Args:
        folder: made if need be.
        classes: the task's, `normal` first.
        patients: of the training set.
        seed: of all that is drawn.
        size_px: longer side of the images, 64 to 1024.

    Raises:
        ConfigError: a class cannot be drawn, an argument is out of its range, or the folder holds other files.
        OSError: the folder cannot be written.
    """
    shares, labels = _shares(classes), {finding: name for name in classes for finding in DRAWN[name]}
    if patients < len(shares):
        raise ConfigError(f"phantoms: expected at least {len(shares)} patients, one of each finding, got {patients}")
    if not MIN_SIZE_PX <= size_px <= MAX_SIZE_PX:
        raise ConfigError(f"size_px: expected {MIN_SIZE_PX} to {MAX_SIZE_PX} pixels, got {size_px}")
    folder = folder.absolute()
    details = f"classes {'/'.join(classes)}, patients {patients}, seed {seed}, size {size_px} px, version {_VERSION}\n"
    if claim_folder(folder, details, whole="labels.csv"):
        return
    held_out = max(len(shares), patients // 4)
    for split, number in (("test", held_out), (EXTERNAL_SPLIT, held_out), ("train", patients)):
        table = folder if split == "train" else folder / split
        _write_split(table, split, draw_patients(split, number, seed, shares), labels, (seed, size_px))


def _shares(classes: Sequence[str]) -> dict[str, float]:
    """Share of the patients of each finding."""
    unknown = [name for name in classes if name not in DRAWN]
    if unknown:
        raise ConfigError(f"phantoms can be drawn of {', '.join(DRAWN)}, not of '{unknown[0]}'; give a set of images with --data")
    each = (1.0 - NORMAL_SHARE) / (len(classes) - 1)
    return {
        finding: (NORMAL_SHARE if name == "normal" else each) / len(DRAWN[name]) for name in classes for finding in DRAWN[name]
    }


def _write_split(folder: Path, split: str, patients: Iterable[Patient], labels: Mapping[str, str], how: tuple[int, int]) -> None:
    """The table of one split and its images, of `how`: seed and size. The table comes last, so that it stands for a whole split."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = TableWriter(text)
    writer.write(_HEADER)
    for patient in patients:
        traits = (patient.view, patient.sex, patient.age_years, patient.manufacturer)
        for k in range(1, patient.images + 1):
            name = f"{split}/phantom-{patient.number}-{k}.png"
            save_picture(draw_picture(patient, k, split, *how), folder / name)
            writer.write((name, f"{split}-{patient.number}", labels[patient.label], *traits))
    with atomic_write(folder / "labels.csv") as file:
        file.write(text.getvalue().encode())
