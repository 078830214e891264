"""Phantom sets: the patients of drawn radiographs, and their pictures in the layouts of the real sets, so that the very same readers read
them.

No real radiograph can be shipped. A phantom shows that the software works; it says nothing about medicine, and every one is
marked (see `simulation.phantoms.image`). Each patient of a split has an anatomy, a label and a scanner (`draw_patients`). A set is written
as image files (`write_phantoms`) or as a hospital would hand it over (`write_archive`): a folder of DICOM files, and a table with the label
of each.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pneumofed.common.data.manifest import ImageRecord, Manifest, read_manifest, write_manifest
from pneumofed.common.data.tables import TableWriter
from pneumofed.common.errors import ConfigError
from pneumofed.common.files import OnProgress, atomic_write, count_off, tell_nobody
from pneumofed.common.seeds import numpy_generator
from pneumofed.simulation.phantoms.anatomy import ADULT_RANGES, CHILD_RANGES, Anatomy, Map, draw_anatomy
from pneumofed.simulation.phantoms.image import PHANTOM_MANUFACTURER, burn_in, draw_phantom, is_phantom, mark_folder, read_details
from pneumofed.simulation.phantoms.scanners import (
    MONOCHROME1_SHARE,
    Examination,
    VirtualScanner,
    apply,
    draw_scanner,
    encode_dicom,
    make_patient_id,
)
from pneumofed.simulation.plan import PhantomFormat

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

MIN_SIZE_PX, MAX_SIZE_PX = 64, 1024

_VERSION = 1
"""To be raised whenever the drawing changes, so that an older set is not taken for the new one."""

_CAUSES = {"bacterial": "bacteria", "viral": "virus"}
_FINDINGS = {"normal": "No Finding", "bacterial": "Lobar consolidation (drawn)", "viral": "Interstitial opacities (drawn)"}


@dataclass(frozen=True)
class Patient:
    """One patient of a split, and how all their images are taken.

    Attributes:
        number: from 1.
        label: `normal`, `bacterial`, `viral` or `tuberculosis`.
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


def draw_patients(
    split: str, patients: int, seed: int, shares: Mapping[str, float] | None = None, on_progress: OnProgress = tell_nobody
) -> Iterator[Patient]:
    """Draws the patients of one split, their labels in the split's shares and in random order; pure in the arguments.

    Args:
        split: its name stands in the seed; `external` has adults, every other name children.
        patients: how many; at least one of each label.
        seed: of the whole set.
        shares: of the patients of each label; None for `LABEL_SHARES`, of adults `EXTERNAL_LABEL_SHARES`.
        on_progress: told of each patient when the next one is asked for.
    """
    labels = _deal_labels(patients, shares or (EXTERNAL_LABEL_SHARES if split == EXTERNAL_SPLIT else LABEL_SHARES))
    order = numpy_generator("phantom", seed, split).permutation(patients)
    drawn = (_draw_patient(split, number, labels[position], seed) for number, position in enumerate(order, start=1))
    yield from count_off(drawn, f"patients of '{split}' drawn", patients, on_progress)


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


def _deal_labels(patients: int, shares: Mapping[str, float]) -> list[str]:
    """A label for each patient: one of each, the rest by largest remainder of the shares."""
    rest = patients - len(shares)
    counts = {label: 1 + int(rest * share) for label, share in shares.items()}
    by_remainder = sorted(shares, key=lambda label: rest * shares[label] % 1.0, reverse=True)
    for label in by_remainder[: patients - sum(counts.values())]:
        counts[label] += 1
    return [label for label, count in counts.items() for _ in range(count)]


def write_phantoms(
    folder: Path,
    patients: int,
    seed: int,
    size_px: int = 144,
    kind: PhantomFormat = "jpeg",
    on_progress: OnProgress = tell_nobody,
) -> Manifest:
    """Draws a phantom set into a folder, and returns its training images.

    As `jpeg` it is written as `{train,test}/{NORMAL,PNEUMONIA}/*.jpeg` in the layout and with the file names of the Kaggle pediatric set
    (Kermany et al. 2018), one to three images a patient; and `external/labels.csv` with `external/images/*.png`, which shows
    adults, in another mix of causes, taken by other scanners: an external set that is shifted. `test` and `external` each have a
    quarter as many patients as `train`. `manifest.csv` lists the training images, with the patients that `read_kaggle` finds.

    As `dicom` the same drawings are the archive of a hospital: `dicom/{train,test,external}/*.dcm`, whose names disclose nothing, a
    third of the patients in MONOCHROME1, and `labels.csv` with the label of each SOP Instance UID, for `read_dicom_folder`.
    `manifest.csv` lists the training images.

    Guarantees:
        Pure in the arguments: the same files, byte for byte, from the same versions of numpy, Pillow and pydicom.
        Each class has a patient in each set. A set that is already there is not drawn again.
        A folder that holds anything but this very set is refused, so phantoms never mix with real images.

    Args:
        folder: made if need be.
        patients: of the training set; at least 3.
        seed: of all that is drawn.
        size_px: longer side of the images, 64 to 1024.
        kind: of the files.
        on_progress: told of each patient.

    Raises:
        ConfigError: an argument is out of its range, or the folder holds other files.
        OSError: the folder cannot be written.
    """
    folder = folder.absolute()
    _check(patients, size_px)
    details = f"patients {patients}, seed {seed}, size {size_px} px, version {_VERSION}"
    if claim_folder(folder, f"{details}{', format dicom' if kind == 'dicom' else ''}\n"):
        return read_manifest(folder / "manifest.csv")
    held_out = max(3, patients // 4)
    if kind == "dicom":
        splits = {"train": patients, "test": held_out, EXTERNAL_SPLIT: held_out}
        train = write_archive(folder, splits, seed, size_px, on_progress)["train"]
    else:
        train = _write_kaggle(folder / "train", patients, seed, size_px, on_progress)
        _write_kaggle(folder / "test", held_out, seed, size_px, on_progress)
        _write_external(folder / EXTERNAL_SPLIT, held_out, seed, size_px, on_progress)
    write_manifest(train, folder / "manifest.csv")
    return train


def write_archive(
    folder: Path, splits: Mapping[str, int], seed: int, size_px: int, on_progress: OnProgress = tell_nobody
) -> dict[str, Manifest]:
    """Draws the images of several splits as DICOM files.

    Written are `dicom/SPLIT/*.dcm`, named by their SOP Instance UID, which is a hash, and `labels.csv` with the label of each.

    Args:
        folder: of the set, made if need be.
        splits: number of patients of each split by its name; at least 3 each.
        seed: of all that is drawn.
        size_px: longer side of the images, 64 to 1024.
        on_progress: told of each patient.

    Returns:
        The images of each split by its name.

    Raises:
        OSError: the folder cannot be written.
    """
    manifests: dict[str, Manifest] = {}
    table = ["SOPInstanceUID,label"]
    for split, patients in splits.items():
        (folder / "dicom" / split).mkdir(parents=True, exist_ok=True)
        rows = list(_write_split(folder / "dicom" / split, patients, seed, size_px, on_progress))
        manifests[split] = Manifest(tuple(record for _, record in rows))
        table += [f"{sop_uid},{record.label}" for sop_uid, record in rows]
    with atomic_write(folder / "labels.csv") as file:
        file.write("".join(f"{row}\n" for row in table).encode())
    return manifests


def _check(patients: int, size_px: int) -> None:
    if patients < len(LABEL_SHARES):
        raise ConfigError(f"patients: expected at least {len(LABEL_SHARES)}, one of each class, got {patients}")
    if not MIN_SIZE_PX <= size_px <= MAX_SIZE_PX:
        raise ConfigError(f"size_px: expected {MIN_SIZE_PX} to {MAX_SIZE_PX} pixels, got {size_px}")


def claim_folder(folder: Path, details: str, whole: str = "manifest.csv") -> bool:
    """Marks `folder` for a set of phantoms, and returns whether that very set is already there as a whole.

    Args:
        folder: made if need be.
        details: what the set is; stands in its mark.
        whole: name of the file that is written last.

    Raises:
        ConfigError: the folder holds other files, or other phantoms.
    """
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
    return (folder / whole).is_file()


def _write_kaggle(folder: Path, patients: int, seed: int, size_px: int, on_progress: OnProgress) -> Manifest:
    """The images of one split; its name is the folder's."""
    for name in ("NORMAL", "PNEUMONIA"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    records: list[ImageRecord] = []
    for patient in draw_patients(folder.name, patients, seed, None, on_progress):
        for k in range(1, patient.images + 1):
            person, path = kaggle_names(patient, k, serial=len(records) + 1)
            save_picture(draw_picture(patient, k, folder.name, seed, size_px), folder / path)
            record = ImageRecord(folder / path, f"{folder.name}/{person}", patient.label, manufacturer=PHANTOM_MANUFACTURER)
            records.append(record)
    return Manifest(tuple(records))


def kaggle_names(patient: Patient, k: int, serial: int) -> tuple[str, str]:
    """Names a patient as in the Kaggle set, and gives the path of an image of theirs.

    Args:
        patient: the patient.
        k: number of the image among theirs, from 1.
        serial: number of the image in the split, from 1.
    """
    if patient.label == "normal":
        person = f"IM-{patient.number:04d}"
        return person, f"NORMAL/{person}-0001{f'-{k:04d}' if k > 1 else ''}.jpeg"
    person = f"person{patient.number}"
    return person, f"PNEUMONIA/{person}_{_CAUSES[patient.label]}_{serial}.jpeg"


def _write_external(folder: Path, patients: int, seed: int, size_px: int, on_progress: OnProgress) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    table = io.StringIO(newline="")
    writer = TableWriter(table)
    writer.write(("filename", "patient_id", "label", "finding", "view", "sex", "age", "manufacturer"))
    for patient in draw_patients(EXTERNAL_SPLIT, patients, seed, None, on_progress):
        traits = (_FINDINGS[patient.label], patient.view, patient.sex, patient.age_years, patient.manufacturer)
        label = "NORMAL" if patient.label == "normal" else "PNEUMONIA"
        for k in range(1, patient.images + 1):
            name = f"images/phantom-{patient.number}-{k}.png"
            save_picture(draw_picture(patient, k, EXTERNAL_SPLIT, seed, size_px), folder / name)
            writer.write((name, f"phantom-{patient.number}", label, *traits))
    with atomic_write(folder / "labels.csv") as file:
        file.write(table.getvalue().encode())


def save_picture(pixels: Map, path: Path) -> None:
    """Writes `pixels` to the file `path` with 8 bits; JPEG with 4:4:4 quality 92, which leaves no visible blocks.

    Args:
        pixels: float32 [H, W] in [0, 1].
        path: its ending decides the format.
    """
    Image.fromarray(np.round(pixels * 255.0).astype(np.uint8)).save(path, quality=92)


def _write_split(
    folder: Path, patients: int, seed: int, size_px: int, on_progress: OnProgress
) -> Iterator[tuple[str, ImageRecord]]:
    """(SOP Instance UID, record) of each image of one split; its name is the folder's."""
    split = folder.name
    for patient in draw_patients(split, patients, seed, None, on_progress):
        person = f"seed {seed}, {patients} patients of {split}, number {patient.number}"
        for k in range(1, patient.images + 1):
            examination = _examine(patient, person, f"{person}, image {k}, {size_px} px")
            path = folder / f"{examination.sop_uid}.dcm"
            with atomic_write(path) as file:
                file.write(encode_dicom(draw_picture(patient, k, split, seed, size_px), examination))
            yield examination.sop_uid, _describe(examination, path, _label(patient, split))


def _label(patient: Patient, split: str) -> str:
    """As in the JPEG set, where the cause of an adult's pneumonia is not known."""
    return "pneumonia" if split == EXTERNAL_SPLIT and patient.label != "normal" else patient.label


def _examine(patient: Patient, person: str, image: str) -> Examination:
    return Examination(
        image=image,
        manufacturer=patient.manufacturer,
        is_drawn=True,
        monochrome1=patient.monochrome1,
        patient=make_patient_id(person),
        view=patient.view,
        sex=patient.sex,
        age_years=patient.age_years,
    )


def _describe(examination: Examination, path: Path, label: str) -> ImageRecord:
    """The record that `common.data.sources.dicom.read_dicom_folder` finds in the file."""
    return ImageRecord(
        path=path,
        patient=examination.patient,
        label=label,
        view=examination.view,
        sex=examination.sex,
        age_years=examination.age_years,
        manufacturer=examination.manufacturer,
    )
