"""A phantom set as a hospital would hand it over: a folder of DICOM files, and a table that says what each shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from common.data.atomic import atomic_write
from common.data.manifest import ImageRecord, Manifest
from simulation.phantom_dicom import Examination, encode_dicom, make_patient_id
from simulation.phantom_patients import EXTERNAL, Patient, draw_patients, draw_picture


def write_archive(folder: Path, splits: Mapping[str, int], seed: int, size_px: int) -> dict[str, Manifest]:
    """The images of each of `splits`, whose number of patients it gives, all drawn into `folder`.

    Written are `dicom/SPLIT/*.dcm`, named by their SOP Instance UID, which is a hash, and `labels.csv` with the label of each.

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
    return "pneumonia" if split == EXTERNAL and patient.label != "normal" else patient.label


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
