"""Sets of drawn CT volumes in the layouts of real ones, and the radiograph of every patient of them.

`write_ct_phantoms` is the entry. A volume is a DICOM series (CT Image Storage, PS3.3, A.3), a folder with a file a slice, or a NIfTI file;
both hold whole Hounsfield units with the noise of a scanner, and the word PHANTOM in every slice.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage
from pydicom.valuerep import DSfloat

from pneumofed.common.data.manifest import ImageRecord, Manifest, read_manifest, write_manifest
from pneumofed.common.data.tables import TableWriter
from pneumofed.common.errors import ConfigError
from pneumofed.common.files import OnProgress, atomic_write, tell_nobody
from pneumofed.common.seeds import numpy_generator
from pneumofed.simulation.phantoms.anatomy import Map
from pneumofed.simulation.phantoms.image import BURNT_IN_WORD, PHANTOM_MANUFACTURER, burn_in, draw_text
from pneumofed.simulation.phantoms.phantom import (
    EXTERNAL_SPLIT,
    LABEL_SHARES,
    Patient,
    claim_folder,
    draw_patients,
    kaggle_names,
    save_picture,
)
from pneumofed.simulation.phantoms.scanners import Examination, encode_examination, make_patient_id, make_uid, set_patient
from pneumofed.simulation.phantoms.thorax import VoxelGrid, develop, draw_thorax, project
from pneumofed.simulation.plan import VolumeFormat

SIZES_PX = (32, 512)
SLICES = (8, 512)
RADIOGRAPH_PX = 144
"""Longer side of the radiographs, as of the other phantoms."""
LEAST_HU, MOST_HU = -1024, 3071
"""What 12 bits hold with the intercept -1024."""
_MARK_HU = 1000
_NOISE_HU = {"train": 20.0, EXTERNAL_SPLIT: 35.0}
"""Standard deviation of a voxel: about that of a standard, and of a low dose at a soft kernel."""
_QUANTA = 20_000.0
_ADULT_AGES = (18, 90)
_VERSION = 1
"""To be raised whenever the drawing changes, so that an older set is not taken for the new one."""


@dataclass(frozen=True)
class _Set:
    """What is written: where, of which seed, on which grid, as which files."""

    folder: Path
    seed: int
    grid: VoxelGrid
    kind: VolumeFormat


def write_ct_phantoms(
    folder: Path,
    patients: int,
    seed: int,
    size_px: int = 64,
    slices: int = 32,
    kind: VolumeFormat = "dicom",
    on_progress: OnProgress = tell_nobody,
) -> Manifest:
    """Draws a set of CT volumes into a folder, a volume a patient, and returns its training volumes.

    `{train,test}/{NORMAL,PNEUMONIA}/NAME` has the layout and the names of the Kaggle set (`read_kaggle`), where NAME is the folder of a
    series or `NAME.nii.gz`. `external/labels.csv` names those of an external set, which another scanner took: half as many slices, more
    noise. `radiographs/` holds the radiograph of each patient under the same name, the projection of the same thorax, in the same layout,
    so that it is a set of its own. `test` and `external` each have a quarter as many patients as `train`; all are adults. `manifest.csv`
    lists the training volumes.

    Guarantees:
        Pure in the arguments: the same files from the same versions of numpy, Pillow, pydicom and nibabel.
        Each class has a patient in each set. A set that is already there is not drawn again.
        A folder that holds anything but this very set is refused, so phantoms never mix with real images.

    Args:
        folder: made if need be.
        patients: of the training set; at least 3.
        seed: of all that is drawn.
        size_px: rows and columns of a slice, 32 to 512.
        slices: of a volume, 8 to 512.
        kind: of the files.
        on_progress: told of each patient.

    Raises:
        ConfigError: an argument is out of its range, the folder holds other files, or nibabel is not installed for `nifti`.
        OSError: the folder cannot be written.
    """
    _check(patients, size_px, slices, kind)
    folder = folder.absolute()
    details = f"CT, patients {patients}, seed {seed}, {slices} slices of {size_px} px, {kind}, version {_VERSION}\n"
    if claim_folder(folder, details):
        return read_manifest(folder / "manifest.csv")
    made = _Set(folder, seed, VoxelGrid(slices, size_px, size_px), kind)
    held_out = max(len(LABEL_SHARES), patients // 4)
    train = [_write_patient(made, "train", patient) for patient in _adults("train", patients, seed, on_progress)]
    for patient in _adults("test", held_out, seed, on_progress):
        _write_patient(made, "test", patient)
    coarse = replace(made, grid=VoxelGrid(max(SLICES[0], slices // 2), size_px, size_px))
    _write_external(coarse, _adults(EXTERNAL_SPLIT, held_out, seed, on_progress))
    write_manifest(Manifest(tuple(train)), folder / "manifest.csv")
    return Manifest(tuple(train))


def draw_ct(patient: Patient, split: str, seed: int, grid: VoxelGrid) -> NDArray[np.int16]:
    """Draws the CT volume of a patient, with a scanner's noise and the mark of a phantom; pure in the arguments.

    Args:
        patient: of `draw_patients` of the same split and seed.
        split: its name stands in the seed.
        seed: of the whole set.
        grid: of the volume.

    Returns:
        Hounsfield units, int16 [slices, rows, columns], from feet to head, front to back, the patient's right to left.
    """
    thorax = draw_thorax(patient.label, grid, _generator(patient, split, seed))
    noise = numpy_generator("CT noise", seed, split, patient.number).standard_normal(grid.shape, dtype=np.float32)
    units = thorax.hounsfield + noise * np.float32(_NOISE_HU.get(split, _NOISE_HU["train"]))
    volume = np.clip(np.rint(units), LEAST_HU, MOST_HU).astype(np.int16)
    word = draw_text(BURNT_IN_WORD, max(8, round(grid.rows / 14)))[: grid.rows, : grid.columns] > 0.5
    volume[:, grid.rows - word.shape[0] :, : word.shape[1]][:, word] = _MARK_HU
    return volume


def draw_projection(patient: Patient, split: str, seed: int, size_px: int = RADIOGRAPH_PX) -> Map:
    """Draws the radiograph of the patient that `draw_ct` draws from the same arguments, with the mark of a phantom.

    Args:
        patient: of `draw_patients` of the same split and seed.
        split: its name stands in the seed.
        seed: of the whole set.
        size_px: its columns.

    Returns:
        float32 [H, size_px] in [0, 1], with square pixels.
    """
    height, width = (VoxelGrid(1, 1, 1).spacing_mm[axis] for axis in (0, 2))
    grid = VoxelGrid(round(size_px * height / width), max(32, size_px // 3), size_px)
    thorax = draw_thorax(patient.label, grid, _generator(patient, split, seed))
    return burn_in(develop(project(thorax), _QUANTA, numpy_generator("radiograph noise", seed, split, patient.number)))


def encode_series(volume: NDArray[np.int16], grid: VoxelGrid, examination: Examination) -> Iterator[bytes]:
    """Encodes a CT volume as the DICOM files of one series, one a slice, from the head downward as scanners number them.

    Args:
        volume: of `draw_ct`.
        grid: that it lies on.
        examination: what the headers say; its `image` makes the series unique.
    """
    z, y, x = grid.axes()
    for number, place in enumerate(reversed(range(grid.slices)), start=1):
        dataset = Dataset()
        set_patient(dataset, examination)
        _set_series(dataset, examination, number)
        corner = [float(x[0, 0, 0]), float(y[0, 0, 0]), float(z[place, 0, 0])]
        _set_plane(dataset, corner, grid)
        _set_pixels(dataset, volume[place])
        yield encode_examination(dataset)


def write_nifti(volume: NDArray[np.int16], grid: VoxelGrid, path: Path) -> None:
    """Writes a CT volume as a NIfTI-1 file in millimetres, whose axes grow to the right, the front and the head.

    Args:
        volume: of `draw_ct`.
        grid: that it lies on.
        path: ends with `.nii` or `.nii.gz`.
    """
    import nibabel

    z, y, x = (float(axis.ravel()[0]) for axis in grid.axes())
    dz, dy, dx = grid.spacing_mm
    affine = np.array(
        [[-dx, 0, 0, -x], [0, -dy, 0, -y], [0, 0, dz, z], [0, 0, 0, 1]]
    )  # x and y of NIfTI are those of DICOM turned round
    image = nibabel.Nifti1Image(np.ascontiguousarray(volume.transpose(2, 1, 0)), affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def _check(patients: int, size_px: int, slices: int, kind: VolumeFormat) -> None:
    if patients < len(LABEL_SHARES):
        raise ConfigError(f"patients: expected at least {len(LABEL_SHARES)}, one of each class, got {patients}")
    for name, value, (least, most) in (("size_px", size_px, SIZES_PX), ("slices", slices, SLICES)):
        if not least <= value <= most:
            raise ConfigError(f"{name}: expected {least} to {most} of a CT volume, got {value}")
    if kind == "nifti":
        try:
            import nibabel  # noqa: F401
        except ImportError:
            raise ConfigError(
                "NIfTI cannot be written here, since nibabel is not installed; run: pip install 'pneumofed[ct]'"
            ) from None


def _adults(split: str, patients: int, seed: int, on_progress: OnProgress) -> Iterator[Patient]:
    for patient in draw_patients(split, patients, seed, None, on_progress):
        age = int(numpy_generator("CT age", seed, split, patient.number).integers(*_ADULT_AGES))
        yield replace(patient, age_years=age, images=1)


def _generator(patient: Patient, split: str, seed: int) -> np.random.Generator:
    return numpy_generator("CT phantom", seed, split, patient.number)


def _write_patient(made: _Set, split: str, patient: Patient) -> ImageRecord:
    """One patient in the Kaggle layout: volume and radiograph."""
    person, name = kaggle_names(patient, 1, serial=patient.number)
    stem = Path(name).with_suffix("")
    path = _write_volume(made, split, patient, made.folder / split / stem)
    picture = made.folder / "radiographs" / split / stem.with_suffix(".png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    save_picture(draw_projection(patient, split, made.seed), picture)
    return ImageRecord(
        path, f"{split}/{person}", patient.label, sex=patient.sex, age_years=patient.age_years, manufacturer=PHANTOM_MANUFACTURER
    )


def _write_external(made: _Set, patients: Iterator[Patient]) -> None:
    """The external set: a table beside its volumes; and its radiographs, likewise."""
    folders = {name: made.folder / name / EXTERNAL_SPLIT for name in ("", "radiographs")}
    (folders["radiographs"] / "images").mkdir(parents=True)
    tables = {name: io.StringIO(newline="") for name in folders}
    writers = {name: TableWriter(table) for name, table in tables.items()}
    for writer in writers.values():
        writer.write(("filename", "patient_id", "label", "sex", "age", "manufacturer"))
    for patient in patients:
        person = f"phantom-{patient.number}"
        label = "NORMAL" if patient.label == "normal" else "PNEUMONIA"
        traits = (person, label, patient.sex, patient.age_years, patient.manufacturer)
        path = _write_volume(made, EXTERNAL_SPLIT, patient, folders[""] / "series" / person)
        writers[""].write((path.relative_to(folders[""]).as_posix(), *traits))
        save_picture(draw_projection(patient, EXTERNAL_SPLIT, made.seed), folders["radiographs"] / "images" / f"{person}.png")
        writers["radiographs"].write((f"images/{person}.png", *traits))
    for name, place in folders.items():
        with atomic_write(place / "labels.csv") as file:
            file.write(tables[name].getvalue().encode())


def _write_volume(made: _Set, split: str, patient: Patient, place: Path) -> Path:
    """Writes the volume at `place`, to which NIfTI adds its ending, and returns where it is."""
    volume = draw_ct(patient, split, made.seed, made.grid)
    if made.kind == "nifti":
        place.parent.mkdir(parents=True, exist_ok=True)
        write_nifti(volume, made.grid, place.with_name(f"{place.name}.nii.gz"))
        return place.with_name(f"{place.name}.nii.gz")
    place.mkdir(parents=True, exist_ok=True)
    person = f"CT, seed {made.seed}, {split}, number {patient.number}"
    examination = Examination(
        image=f"{person}, {made.grid.shape}",
        manufacturer=patient.manufacturer,
        is_drawn=True,
        patient=make_patient_id(person),
        sex=patient.sex,
        age_years=patient.age_years,
    )
    for number, data in enumerate(encode_series(volume, made.grid, examination), start=1):
        (place / f"{number:04d}.dcm").write_bytes(data)
    return place


def _set_series(dataset: Dataset, examination: Examination, number: int) -> None:
    """General Series, Frame of Reference and General Equipment (PS3.3, C.7.3.1, C.7.4.1, C.7.5.1), General and CT Image (C.8.2.1)."""
    dataset.SOPClassUID = CTImageStorage  # (0008,0016)
    dataset.SOPInstanceUID = make_uid("slice", examination.image, str(number))  # (0008,0018)
    dataset.Modality = "CT"  # (0008,0060)
    dataset.SeriesInstanceUID = make_uid("series", examination.image)  # (0020,000E)
    dataset.FrameOfReferenceUID = make_uid("frame", examination.image)  # (0020,0052)
    dataset.PositionReferenceIndicator = None  # (0020,1040)
    dataset.PatientPosition = "HFS"  # (0018,5100): on the back, head first
    dataset.BodyPartExamined = "CHEST"  # (0018,0015)
    dataset.SeriesNumber, dataset.AcquisitionNumber, dataset.InstanceNumber = 1, 1, number
    dataset.Manufacturer = examination.manufacturer  # (0008,0070)
    dataset.ImageType = ["DERIVED", "PRIMARY", "AXIAL"]  # (0008,0008): no device took it
    dataset.DerivationDescription = "drawn by a program"  # (0008,2111)
    dataset.BurnedInAnnotation = "NO"  # (0028,0301): of a patient
    dataset.KVP = None  # (0018,0060)


def _set_plane(dataset: Dataset, corner: list[float], grid: VoxelGrid) -> None:
    """Image Plane (PS3.3, C.7.6.2)."""
    thickness, down, across = grid.spacing_mm
    dataset.ImagePositionPatient = [DSfloat(value, auto_format=True) for value in corner]  # (0020,0032)
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]  # (0020,0037)
    dataset.PixelSpacing = [DSfloat(value, auto_format=True) for value in (down, across)]  # (0028,0030)
    dataset.SliceThickness = DSfloat(thickness, auto_format=True)  # (0018,0050)
    dataset.GantryDetectorTilt = 0  # (0018,1120)


def _set_pixels(dataset: Dataset, hounsfield: NDArray[np.int16]) -> None:
    """Image Pixel (PS3.3, C.7.6.3) and the rescale of CT Image (C.8.2.1.1.2)."""
    dataset.Rows, dataset.Columns = hounsfield.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = LEAST_HU, 1, "HU"
    dataset.WindowCenter, dataset.WindowWidth = -600, 1500
    dataset.PixelData = (hounsfield.astype(np.int32) - LEAST_HU).astype("<u2").tobytes()  # (7FE0,0010)
    dataset["PixelData"].VR = "OW"
