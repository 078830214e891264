"""The project's own data: drawn radiographs in the layouts of the real sets, so that the very same readers read them.

No real radiograph can be shipped. A phantom shows that the software works; it says nothing about medicine, and every one is
marked (see `simulation.phantom_mark`).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from common.data.atomic import atomic_write
from common.data.manifest import ImageRecord, Manifest, read_manifest, write_manifest
from common.errors import ConfigError
from common.seeds import numpy_generator
from simulation.anatomy import ADULT, CHILD, Anatomy, draw_anatomy
from simulation.fields import Map
from simulation.phantom_image import draw_phantom
from simulation.phantom_mark import MANUFACTURER, burn_in, is_phantom, mark_folder, read_details
from simulation.scanners import apply, draw_scanner

SHARES = {"normal": 0.40, "bacterial": 0.35, "viral": 0.25}
"""Of the patients of each label."""
EXTERNAL_SHARES = {"normal": 0.50, "bacterial": 0.20, "viral": 0.30}
EXTERNAL_SCANNERS = 3
IMAGES_PER_PATIENT = {1: 0.6, 2: 0.3, 3: 0.1}
"""Share of the patients with so many images."""
MIN_SIZE_PX, MAX_SIZE_PX = 64, 1024

_VERSION = 1
"""To be raised whenever the drawing changes, so that an older set is not taken for the new one."""

_CAUSES = {"bacterial": "bacteria", "viral": "virus"}
_FINDINGS = {"normal": "No Finding", "bacterial": "Lobar consolidation (drawn)", "viral": "Interstitial opacities (drawn)"}


@dataclass(frozen=True)
class _Patient:
    number: int
    label: str
    images: int
    anatomy: Anatomy


def write_phantoms(folder: Path, patients: int, seed: int, size_px: int = 144) -> Manifest:
    """The training images of a phantom set that is drawn into `folder`.

    Written are `{train,test}/{NORMAL,PNEUMONIA}/*.jpeg` in the layout and with the file names of the Kaggle pediatric set
    (Kermany et al. 2018), one to three images a patient; and `external/labels.csv` with `external/images/*.png`, which shows
    adults, in another mix of causes, taken by other scanners: an external set that is shifted. `test` and `external` each have a
    quarter as many patients as `train`. `manifest.csv` lists the training images, with the patients that `read_kaggle` finds.

    Guarantees:
        Pure in the arguments: the same files, byte for byte, from the same versions of numpy and Pillow.
        Each class has a patient in each set. A set that is already there is not drawn again.
        A folder that holds anything but this very set is refused, so phantoms never mix with real images.

    Args:
        folder: made if need be.
        patients: of the training set; at least 3.
        seed: of all that is drawn.
        size_px: longer side of the images, 64 to 1024.

    Raises:
        ConfigError: an argument is out of its range, or the folder holds other files.
        OSError: the folder cannot be written.
    """
    folder = folder.absolute()
    _check(patients, size_px)
    if _claim(folder, f"patients {patients}, seed {seed}, size {size_px} px, version {_VERSION}\n"):
        return read_manifest(folder / "manifest.csv")
    train = _write_kaggle(folder / "train", patients, seed, size_px)
    _write_kaggle(folder / "test", max(3, patients // 4), seed, size_px)
    _write_external(folder / "external", max(3, patients // 4), seed, size_px)
    write_manifest(train, folder / "manifest.csv")
    return train


def _check(patients: int, size_px: int) -> None:
    if patients < len(SHARES):
        raise ConfigError(f"patients: expected at least {len(SHARES)}, one of each class, got {patients}")
    if not MIN_SIZE_PX <= size_px <= MAX_SIZE_PX:
        raise ConfigError(f"size_px: expected {MIN_SIZE_PX} to {MAX_SIZE_PX} pixels, got {size_px}")


def _claim(folder: Path, details: str) -> bool:
    """Marks `folder` for the set of `details`; True if that set is already there as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        mark_folder(folder, details)
    if not is_phantom(folder):
        raise ConfigError(f"{folder} holds files that are no phantoms; give an empty or new folder, so that the two never mix")
    found = read_details(folder)
    if found != details:
        came = found.strip() if found else "a part of a larger set"
        raise ConfigError(
            f"{folder} holds other phantoms ({came}) than asked for ({details.strip()}); give an empty or new folder"
        )
    return (folder / "manifest.csv").is_file()


def _draw_patients(split: str, patients: int, seed: int) -> Iterator[_Patient]:
    """`patients` of one set, numbered from 1, their labels in the set's shares and in random order."""
    external = split == "external"
    labels = _deal_labels(patients, EXTERNAL_SHARES if external else SHARES)
    order = numpy_generator("phantom", seed, split).permutation(patients)
    for number, position in enumerate(order, start=1):
        rng = numpy_generator("phantom", seed, split, number)
        images = int(rng.choice(list(IMAGES_PER_PATIENT), p=list(IMAGES_PER_PATIENT.values())))
        yield _Patient(number, labels[position], images, draw_anatomy(ADULT if external else CHILD, rng))


def _deal_labels(patients: int, shares: dict[str, float]) -> list[str]:
    """A label for each patient: one of each, the rest by largest remainder of the shares."""
    rest = patients - len(shares)
    counts = {label: 1 + int(rest * share) for label, share in shares.items()}
    by_remainder = sorted(shares, key=lambda label: rest * shares[label] % 1.0, reverse=True)
    for label in by_remainder[: patients - sum(counts.values())]:
        counts[label] += 1
    return [label for label, count in counts.items() for _ in range(count)]


def _write_kaggle(folder: Path, patients: int, seed: int, size_px: int) -> Manifest:
    """The images of one split; its name is the folder's."""
    for name in ("NORMAL", "PNEUMONIA"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    records: list[ImageRecord] = []
    for patient in _draw_patients(folder.name, patients, seed):
        for k in range(1, patient.images + 1):
            person, path = _kaggle_names(patient, k, serial=len(records) + 1)
            rng = numpy_generator("phantom", seed, folder.name, patient.number, k)
            _save(burn_in(draw_phantom(patient.anatomy, patient.label, size_px, rng)), folder / path)
            record = ImageRecord(folder / path, f"{folder.name}/{person}", patient.label, manufacturer=MANUFACTURER)
            records.append(record)
    return Manifest(tuple(records))


def _kaggle_names(patient: _Patient, k: int, serial: int) -> tuple[str, str]:
    """The patient's name in the Kaggle set, and the path of image `k` of theirs, which is number `serial` of the split."""
    if patient.label == "normal":
        person = f"IM-{patient.number:04d}"
        return person, f"NORMAL/{person}-0001{f'-{k:04d}' if k > 1 else ''}.jpeg"
    person = f"person{patient.number}"
    return person, f"PNEUMONIA/{person}_{_CAUSES[patient.label]}_{serial}.jpeg"


def _write_external(folder: Path, patients: int, seed: int, size_px: int) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(("filename", "patient_id", "label", "finding", "view", "sex", "age", "manufacturer"))
    for patient in _draw_patients("external", patients, seed):
        rng = numpy_generator("phantom", seed, "external traits", patient.number)
        scanner = draw_scanner(int(rng.integers(EXTERNAL_SCANNERS)), seed)
        traits = (rng.choice(("PA", "AP")), rng.choice(("F", "M")), int(rng.integers(18, 90)), f"{MANUFACTURER}, {scanner.name}")
        label = "NORMAL" if patient.label == "normal" else "PNEUMONIA"
        for k in range(1, patient.images + 1):
            name = f"images/phantom-{patient.number}-{k}.png"
            rng = numpy_generator("phantom", seed, "external", patient.number, k)
            pixels = apply(draw_phantom(patient.anatomy, patient.label, size_px, rng), scanner, rng)
            _save(burn_in(pixels), folder / name)
            writer.writerow((name, f"phantom-{patient.number}", label, _FINDINGS[patient.label], *traits))
    with atomic_write(folder / "labels.csv") as file:
        file.write(table.getvalue().encode())


def _save(pixels: Map, path: Path) -> None:
    """Writes `pixels`, float32 [H, W] in [0, 1], with 8 bits; JPEG with 4:4:4 quality 92, which leaves no visible blocks."""
    Image.fromarray(np.round(pixels * 255.0).astype(np.uint8)).save(path, quality=92)
