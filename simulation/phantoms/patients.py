"""The patients of a phantom set: each one of a split with anatomy, label and scanner, and each of their pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pneumofed.common.seeds import numpy_generator
from pneumofed.simulation.phantoms.anatomy import ADULT_RANGES, CHILD_RANGES, Anatomy, Map, draw_anatomy
from pneumofed.simulation.phantoms.image import PHANTOM_MANUFACTURER, burn_in, draw_phantom
from pneumofed.simulation.phantoms.scanners import MONOCHROME1_SHARE, VirtualScanner, apply, draw_scanner

LABEL_SHARES = {"normal": 0.40, "bacterial": 0.35, "viral": 0.25}
"""Share of the patients of each label."""
EXTERNAL_SPLIT = "external"
"""The split of adults; all others are children."""
EXTERNAL_LABEL_SHARES = {"normal": 0.50, "bacterial": 0.20, "viral": 0.30}
EXTERNAL_SCANNERS = 3
IMAGES_PER_PATIENT = {1: 0.6, 2: 0.3, 3: 0.1}
"""Share of the patients with so many images."""
_CHILD_AGES = (1, 6)
_ADULT_AGES = (18, 90)


@dataclass(frozen=True)
class Patient:
    """One patient of a split, and how all their images are taken.

    Attributes:
        number: from 1.
        label: `normal`, `bacterial` or `viral`.
        images: how many there are.
        anatomy: what all of them show.
        view: projection, `PA` or `AP`.
        sex: `M` or `F`.
        age_years: at the examinations.
        monochrome1: whether DICOM files of theirs hold bone as low values.
        scanner: the device, where it is not the one that all children share.
    """

    number: int
    label: str
    images: int
    anatomy: Anatomy
    view: str
    sex: str
    age_years: int
    monochrome1: bool
    scanner: VirtualScanner | None

    @property
    def manufacturer(self) -> str:
        return f"{PHANTOM_MANUFACTURER}, {self.scanner.name}" if self.scanner else PHANTOM_MANUFACTURER


def draw_patients(split: str, patients: int, seed: int) -> Iterator[Patient]:
    """Draws the patients of one split, their labels in the split's shares and in random order; pure in the arguments.

    Args:
        split: its name stands in the seed; `external` has adults, every other name children.
        patients: how many; at least 3, one of each label.
        seed: of the whole set.
    """
    labels = _deal_labels(patients, EXTERNAL_LABEL_SHARES if split == EXTERNAL_SPLIT else LABEL_SHARES)
    order = numpy_generator("phantom", seed, split).permutation(patients)
    for number, position in enumerate(order, start=1):
        yield _draw_patient(split, number, labels[position], seed)


def draw_picture(patient: Patient, k: int, split: str, seed: int, size_px: int) -> Map:
    """Draws one picture of a patient, with the mark of a phantom; pure in the arguments.

    Args:
        patient: from `draw_patients` of the same split and seed.
        k: number of the picture, from 1.
        split: its name stands in the seed.
        seed: of the whole set.
        size_px: the longer side.

    Returns:
        float32 [H, W] in [0, 1].
    """
    rng = numpy_generator("phantom", seed, split, patient.number, k)
    pixels = draw_phantom(patient.anatomy, patient.label, size_px, rng)
    return burn_in(apply(pixels, patient.scanner, rng) if patient.scanner else pixels)


def _draw_patient(split: str, number: int, label: str, seed: int) -> Patient:
    is_adult = split == EXTERNAL_SPLIT
    rng = numpy_generator("phantom", seed, split, number)
    images = int(rng.choice(list(IMAGES_PER_PATIENT), p=list(IMAGES_PER_PATIENT.values())))
    anatomy = draw_anatomy(ADULT_RANGES if is_adult else CHILD_RANGES, rng)
    rng = numpy_generator("phantom", seed, f"{split} traits", number)
    scanner = draw_scanner(int(rng.integers(EXTERNAL_SCANNERS)), seed) if is_adult else None
    view, sex = str(rng.choice(("PA", "AP"))), str(rng.choice(("F", "M")))
    age = int(rng.integers(*(_ADULT_AGES if is_adult else _CHILD_AGES)))
    monochrome1 = scanner.monochrome1 if scanner else bool(rng.random() < MONOCHROME1_SHARE)
    return Patient(number, label, images, anatomy, view, sex, age, monochrome1, scanner)


def _deal_labels(patients: int, shares: dict[str, float]) -> list[str]:
    """A label for each patient: one of each, the rest by largest remainder of the shares."""
    rest = patients - len(shares)
    counts = {label: 1 + int(rest * share) for label, share in shares.items()}
    by_remainder = sorted(shares, key=lambda label: rest * shares[label] % 1.0, reverse=True)
    for label in by_remainder[: patients - sum(counts.values())]:
        counts[label] += 1
    return [label for label, count in counts.items() for _ in range(count)]
