"""CT series for a model bundle: where they lie (`find_series`), and one of them as the model takes it (`read_series`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from pneumofed.common.config.experiment import ImageConfig
from pneumofed.common.errors import ImageError
from pneumofed.common.imaging.patient_groups import groups_of
from pneumofed.common.imaging.types import Image, ImageInfo
from pneumofed.common.imaging.volumes import Volume, fit_volume, is_nifti, read_volume

if TYPE_CHECKING:
    from pneumofed.common.imaging.dicom_header import DicomHeader

MAX_DEPTH = 32
"""Folders below a named one; an archive's export has four (patient, study, series, image)."""
_DICOMDIR = "DICOMDIR"  # PS3.10, 8.6: the index of a medium, no image
HOUNSFIELD_BITS = 12


def find_series(paths: Iterable[Path]) -> Iterator[Path]:
    """Yields absolute paths of what may be a CT series, in a fixed order: folders that hold files, and NIfTI files.

    A folder is one series, whatever lies in it, and what does not belong together is refused when it is read. Folders below are series of
    their own. Hidden files and DICOMDIR are left out. A file that was named is given back as it is.

    Args:
        paths: files, and folders that are searched with all folders below, each once.
    """
    return search_folders(paths, _series_in)


def _series_in(folder: Path, inside: Sequence[Path]) -> Iterator[tuple[Path, bool]]:
    files = [path for path in inside if not path.is_dir()]
    yield from ((path, False) for path in files if is_nifti(path))
    if any(not is_nifti(path) for path in files):
        yield folder, False
    yield from ((path, True) for path in inside if path.is_dir())


def search_folders(
    paths: Iterable[Path], choose: Callable[[Path, Sequence[Path]], Iterable[tuple[Path, bool]]]
) -> Iterator[Path]:
    """Yields absolute paths of what `choose` finds in folders, with all folders below; what is no folder is given back as it is.

    Only what lies in the folders on the way is held. Hidden files and DICOMDIR are left out. A folder is entered once even where links lead
    back to it, and not below `MAX_DEPTH`. One that cannot be listed is given back itself, so that reading it says why.

    Args:
        paths: files and folders.
        choose: gets a folder and what lies in it, by name; gives paths in order, each with whether it is a folder to search.
    """
    for path in paths:
        absolute = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would replace the user's link by its target
        if absolute.is_dir():
            yield from _walk(absolute, choose, MAX_DEPTH, set())
        else:
            yield absolute


def _walk(
    folder: Path, choose: Callable[[Path, Sequence[Path]], Iterable[tuple[Path, bool]]], depth: int, seen: set[str]
) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    try:
        inside = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.name != _DICOMDIR)
    except OSError:
        yield folder
        return
    for path, is_searched in choose(folder, inside):
        if not is_searched:
            yield path
        elif depth > 0:
            yield from _walk(path, choose, depth - 1, seen)


def read_series(path: Path, image: ImageConfig) -> tuple[Image, DicomHeader | None]:
    """Reads a CT volume as a model takes it.

    Args:
        path: the folder of a DICOM series, a multi-frame DICOM file, or a NIfTI file.
        image: size and slices of the model's input.

    Returns:
        The volume, `pixels` float32 [slices, S, S] in [0, 1] with 256 grey levels of the lung window; and the tags of the first DICOM
        file, None of NIfTI.

    Raises:
        ImageError: it cannot be used, or is no CT.
    """
    volume = read_volume(path)
    header = None if is_nifti(path) else read_series_header(path)
    return as_input(volume, image, header), header


def as_input(volume: Volume, image: ImageConfig, header: DicomHeader | None = None) -> Image:
    """Makes a model's input of a volume.

    Args:
        volume: of `read_volume`.
        image: size and slices of the model's input.
        header: of the series, for what is known of the patient.
    """
    pixels = fit_volume(volume, image.size_px, image.slices).astype(np.float32) / np.float32(255.0)
    _, rows, columns = volume.hounsfield.shape
    kind: Literal["dicom", "nifti"] = "nifti" if header is None else "dicom"
    info = ImageInfo(kind, rows, columns, HOUNSFIELD_BITS, modality="CT")
    if header is not None:
        groups = groups_of(header.age_years, header.sex, None)
        info = replace(
            info,
            body_part=header.body_part or None,
            sex="M" if groups.sex == "M" else "F" if groups.sex == "F" else None,
            age_years=header.age_years,
            age_group=groups.age,
            manufacturer=header.manufacturer or None,
        )
    return Image(pixels, info)


def read_series_header(path: Path) -> DicomHeader | None:
    """Reads the identifying tags of a DICOM series, of its first file that is one; None where none is."""
    from pneumofed.common.imaging.dicom_header import read_header  # pydicom takes a third of a second to import

    files = sorted(file for file in path.iterdir() if not file.name.startswith(".")) if path.is_dir() else [path]
    for file in files:
        try:
            return read_header(file)
        except ImageError:
            continue
    return None
