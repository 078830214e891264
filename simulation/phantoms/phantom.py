"""Phantom sets: drawn radiographs in the layouts of the real sets, so that the very same readers read them.

No real radiograph can be shipped. A phantom shows that the software works; it says nothing about medicine, and every one is
marked (see `simulation.phantoms.image`). A set is written as image files (`write_phantoms`) or as a hospital would hand it over
(`write_archive`): a folder of DICOM files, and a table with the label of each.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from pneumofed.common.data.manifest import ImageRecord, Manifest, read_manifest, write_manifest
from pneumofed.common.data.tables import TableWriter
from pneumofed.common.errors import ConfigError
from pneumofed.common.files import atomic_write
from pneumofed.simulation.phantoms.anatomy import Map
from pneumofed.simulation.phantoms.dicom import Examination, encode_dicom, make_patient_id
from pneumofed.simulation.phantoms.image import PHANTOM_MANUFACTURER, is_phantom, mark_folder, read_details
from pneumofed.simulation.phantoms.patients import EXTERNAL_SPLIT, LABEL_SHARES, Patient, draw_patients, draw_picture
from pneumofed.simulation.plan import PhantomFormat

MIN_SIZE_PX, MAX_SIZE_PX = 64, 1024

_VERSION = 1
"""To be raised whenever the drawing changes, so that an older set is not taken for the new one."""

_CAUSES = {"bacterial": "bacteria", "viral": "virus"}
_FINDINGS = {"normal": "No Finding", "bacterial": "Lobar consolidation (drawn)", "viral": "Interstitial opacities (drawn)"}


def write_phantoms(folder: Path, patients: int, seed: int, size_px: int = 144, kind: PhantomFormat = "jpeg") -> Manifest:
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

    Raises:
        ConfigError: an argument is out of its range, or the folder holds other files.
        OSError: the folder cannot be written.
    """
    folder = folder.absolute()
    _check(patients, size_px)
    details = f"patients {patients}, seed {seed}, size {size_px} px, version {_VERSION}"
    if _claim(folder, f"{details}{', format dicom' if kind == 'dicom' else ''}\n"):
        return read_manifest(folder / "manifest.csv")
    held_out = max(3, patients // 4)
    if kind == "dicom":
        train = write_archive(folder, {"train": patients, "test": held_out, EXTERNAL_SPLIT: held_out}, seed, size_px)["train"]
    else:
        train = _write_kaggle(folder / "train", patients, seed, size_px)
        _write_kaggle(folder / "test", held_out, seed, size_px)
        _write_external(folder / EXTERNAL_SPLIT, held_out, seed, size_px)
    write_manifest(train, folder / "manifest.csv")
    return train


def write_archive(folder: Path, splits: Mapping[str, int], seed: int, size_px: int) -> dict[str, Manifest]:
    """Draws the images of several splits as DICOM files.

    Written are `dicom/SPLIT/*.dcm`, named by their SOP Instance UID, which is a hash, and `labels.csv` with the label of each.

    Args:
        folder: of the set, made if need be.
        splits: number of patients of each split by its name; at least 3 each.
        seed: of all that is drawn.
        size_px: longer side of the images, 64 to 1024.

    Returns:
        The images of each split by its name.

    Raises:
        OSError: the folder cannot be written.
    """
    manifests: dict[str, Manifest] = {}
    table = ["SOPInstanceUID,label"]
    for split, patients in splits.items():
        (folder / "dicom" / split).mkdir(parents=True, exist_ok=True)
        rows = list(_write_split(folder / "dicom" / split, patients, seed, size_px))
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


def _write_kaggle(folder: Path, patients: int, seed: int, size_px: int) -> Manifest:
    """The images of one split; its name is the folder's."""
    for name in ("NORMAL", "PNEUMONIA"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    records: list[ImageRecord] = []
    for patient in draw_patients(folder.name, patients, seed):
        for k in range(1, patient.images + 1):
            person, path = _kaggle_names(patient, k, serial=len(records) + 1)
            _save(draw_picture(patient, k, folder.name, seed, size_px), folder / path)
            record = ImageRecord(folder / path, f"{folder.name}/{person}", patient.label, manufacturer=PHANTOM_MANUFACTURER)
            records.append(record)
    return Manifest(tuple(records))


def _kaggle_names(patient: Patient, k: int, serial: int) -> tuple[str, str]:
    """The patient's name in the Kaggle set, and the path of image `k` of theirs, which is number `serial` of the split."""
    if patient.label == "normal":
        person = f"IM-{patient.number:04d}"
        return person, f"NORMAL/{person}-0001{f'-{k:04d}' if k > 1 else ''}.jpeg"
    person = f"person{patient.number}"
    return person, f"PNEUMONIA/{person}_{_CAUSES[patient.label]}_{serial}.jpeg"


def _write_external(folder: Path, patients: int, seed: int, size_px: int) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    table = io.StringIO(newline="")
    writer = TableWriter(table)
    writer.write(("filename", "patient_id", "label", "finding", "view", "sex", "age", "manufacturer"))
    for patient in draw_patients(EXTERNAL_SPLIT, patients, seed):
        traits = (_FINDINGS[patient.label], patient.view, patient.sex, patient.age_years, patient.manufacturer)
        label = "NORMAL" if patient.label == "normal" else "PNEUMONIA"
        for k in range(1, patient.images + 1):
            name = f"images/phantom-{patient.number}-{k}.png"
            _save(draw_picture(patient, k, EXTERNAL_SPLIT, seed, size_px), folder / name)
            writer.write((name, f"phantom-{patient.number}", label, *traits))
    with atomic_write(folder / "labels.csv") as file:
        file.write(table.getvalue().encode())


def _save(pixels: Map, path: Path) -> None:
    """Writes `pixels`, float32 [H, W] in [0, 1], with 8 bits; JPEG with 4:4:4 quality 92, which leaves no visible blocks."""
    Image.fromarray(np.round(pixels * 255.0).astype(np.uint8)).save(path, quality=92)


def _write_split(folder: Path, patients: int, seed: int, size_px: int) -> Iterator[tuple[str, ImageRecord]]:
    """(SOP Instance UID, record) of each image of one split; its name is the folder's."""
    split = folder.name
    for patient in draw_patients(split, patients, seed):
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
