"""A CT series in the room: how it comes, how it is kept slice by slice, and what is read of it.

It comes as several files, as one with all slices (multi-frame DICOM, NIfTI), or as a zip of either, and is recognised by its content
(`kind_of`). A worker unpacks a zip (`unpack_zip`) and writes the slices (`write_series`); the server reads one slice at a time
(`read_slice`), and the map of evidence at that slice (`map_at`).
"""

from __future__ import annotations

import gzip
import zipfile
import zlib
from pathlib import Path
from typing import Literal

import numpy as np

from pneumofed.common.errors import ImageError, SkipReason
from pneumofed.common.imaging.types import LUNG_WINDOW, Image, Window
from pneumofed.common.imaging.volumes import Volume, field_of_view
from pneumofed.common.model_bundle.suitability import Judgement
from pneumofed.inference.reading_room.image_facts import FACTS_FILE, GreyValues, SeriesFacts, series_facts, write_facts
from pneumofed.inference.reading_room.viewing import (
    FEATURES_FILE,
    FULL_SCALE,
    MAP_FILE,
    ORIGINAL_FILE,
    Viewing,
    original_of,
    write_map,
)

SLICES_FILE = "slices.bin"
_LEAST_HU, _GREATEST_HU, _STEPS = -1024, 3071, 16
SERIES_VALUES = GreyValues(low=_LEAST_HU, high=_LEAST_HU + FULL_SCALE / _STEPS, unit="HU")
"""What the ends of the range of `slices.bin` stand for: the 12 bits of a CT, in steps that a window of a few Hounsfield units still has.
Metal above them says no more than that it is there."""


ARCHIVE_STARTS = (
    b"PK\x03\x04",
    b"PK\x05\x06",
    b"\x1f\x8b",
    b"7z\xbc\xaf\x27\x1c",
    b"Rar!\x1a\x07",
    b"\xfd7zXZ\x00",
    b"BZh",
    b"(\xb5/\xfd",
)
"""First bytes of zip, gzip, 7-Zip, RAR, xz, bzip2 and Zstandard: see docs/reading-room.md on which are unpacked."""
FileKind = Literal["file", "series", "nifti", "nifti.gz", "zip", "archive"]
"""What an upload is by its content: one file, the files of a series, a NIfTI volume, a zip, another archive."""
_NIFTI_HEADER = 352


def kind_of(path: Path) -> FileKind:
    """Finds out by its content whether the file is an archive of files or a NIfTI volume; anything else is `file`."""
    with path.open("rb") as file:
        start = file.read(_NIFTI_HEADER)
    if _is_nifti(start):
        return "nifti"
    if start.startswith(b"\x1f\x8b") and _is_nifti(_unpacked_start(path)):
        return "nifti.gz"
    if start.startswith(ARCHIVE_STARTS[:2]):
        return "zip"
    return "archive" if start.startswith(ARCHIVE_STARTS) or start[257:262] == b"ustar" else "file"


def _is_nifti(start: bytes) -> bool:
    """Whether a header of NIfTI-1 or -2 in one file begins so: its own size, in either byte order, and its magic (nifti1.h, nifti2.h)."""
    size = start[:4] if start[:1] != b"\0" else start[3::-1]
    first = size == (348).to_bytes(4, "little") and start[344:348] == b"n+1\0"
    return first or (size == (540).to_bytes(4, "little") and start[4:8] == b"n+2\0")


def _unpacked_start(path: Path) -> bytes:
    try:
        with gzip.open(path, "rb") as file:
            return file.read(_NIFTI_HEADER)
    except (OSError, EOFError, ValueError, zlib.error):
        return b""


def name_nifti(folder: Path, kind: FileKind) -> None:
    """Gives the file of a NIfTI volume the name by which it is read.

    Args:
        folder: of the case; its file is `ORIGINAL_FILE`.
        kind: of the file; nothing happens where it is no NIfTI.
    """
    if kind in ("nifti", "nifti.gz"):
        ending = ".nii" if kind == "nifti" else ".nii.gz"
        (folder / ORIGINAL_FILE).rename(folder / (ORIGINAL_FILE + ending))


def unpack_zip(folder: Path, most_files: int, most_bytes: int) -> None:
    """Unpacks a zip in the place of itself, as the folder of a series, or as its one file.

    Nothing in the archive decides where something is written: files are numbered, and written into the case's own folder. What it claims
    of its sizes is checked first, and what comes out is counted while it comes. Hidden files, and those that macOS adds, are left out.

    Args:
        folder: of the case; the zip is its `ORIGINAL_FILE`.
        most_files: that it may hold.
        most_bytes: that they may have together, unpacked.

    Raises:
        ImageError: it is damaged, empty, encrypted, or holds more.
    """
    archive, inside = folder / ORIGINAL_FILE, folder / "unpacked"
    inside.mkdir(mode=0o700)
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [one for one in opened.infolist() if not one.is_dir() and _is_wanted(one.filename)]
            if not members:
                raise ImageError(SkipReason.NO_SLICES, "the archive holds no file")
            if len(members) > most_files or sum(one.file_size for one in members) > most_bytes:
                text = f"the archive holds more than {most_files} files or {most_bytes // 2**20} MiB; send one series only"
                raise ImageError(SkipReason.TOO_LARGE, text)
            left = most_bytes
            for number, member in enumerate(members, start=1):
                left -= _unpack(opened, member, inside / f"{number:05d}", left)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, ValueError, zlib.error) as error:
        raise ImageError(SkipReason.CORRUPT, f"an archive that cannot be unpacked ({type(error).__name__})") from None
    archive.unlink()
    files = sorted(inside.iterdir())
    if len(files) > 1:
        inside.rename(archive)
        return
    files[0].rename(archive)
    inside.rmdir()
    if kind_of(archive) in ("zip", "archive"):
        raise ImageError(SkipReason.CORRUPT, "an archive within an archive")
    name_nifti(folder, kind_of(archive))


def _is_wanted(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    return not parts[-1].startswith(".") and "__MACOSX" not in parts and parts[-1].upper() != "DICOMDIR"


def _unpack(opened: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path, most: int) -> int:
    """Writes a member as `path`, mode 0600, and returns its size."""
    size = 0
    with opened.open(member) as source, path.open("xb") as target:
        path.chmod(0o600)
        while piece := source.read(2**20):
            size += len(piece)
            if size > most:
                raise ImageError(SkipReason.TOO_LARGE, "the archive holds more than it says")
            target.write(piece)
    return size


def write_series(folder: Path, volume: Volume, image: Image, judgement: Judgement, viewing: Viewing) -> tuple[Window, str]:
    """Writes what the viewer needs of a CT series into `folder`, as `write_viewing` does of a radiograph.

    Args:
        folder: of the case.
        volume: the series as it was read.
        image: what the model saw of it.
        judgement: of the series.
        viewing: its map is kept, if it has one.
    """
    count = volume.hounsfield.shape[0]
    span = viewing.span or field_of_view(volume)[0]
    series = SeriesFacts(
        slices=count,
        spacing_mm=volume.spacing_mm[0],
        first_mm=volume.first_mm,
        map_span=span,
        strongest=strongest_slice(viewing.map, span, count),
        notes=list(volume.notes),
    )
    facts, patient_name = series_facts(original_of(folder), image, volume.spacing_mm[1:], SERIES_VALUES, series)
    write_facts(folder, facts)
    with (folder / SLICES_FILE).open("wb") as file:
        for plane in volume.hounsfield:
            steps = np.clip(plane, _LEAST_HU, _GREATEST_HU).astype(np.int32) - _LEAST_HU
            file.write((steps * _STEPS).astype("<u2").tobytes())
    write_map(folder, viewing)
    np.savez(folder / FEATURES_FILE, features=judgement.features, pixel_statistics=judgement.pixel_statistics)
    for path in (folder / name for name in (SLICES_FILE, MAP_FILE, FACTS_FILE, FEATURES_FILE)):
        if path.exists():
            path.chmod(0o600)
    return series_window(LUNG_WINDOW), patient_name


def series_window(window: Window) -> Window:
    """Returns a window of Hounsfield units in parts of the range of `slices.bin`."""
    span = SERIES_VALUES.high - SERIES_VALUES.low
    return Window((window.center - SERIES_VALUES.low) / span, window.width / span)


def read_slice(folder: Path, place: int, height: int, width: int) -> np.ndarray:
    """Reads one slice of a series, uint16 [height, width], and nothing of the others.

    Args:
        folder: of the case in the store.
        place: of the slice, from 0 at the feet.
        height: of a slice, as the database has it.
        width: likewise.

    Raises:
        OSError: its files are damaged or gone.
    """
    size = 2 * height * width
    with (folder / SLICES_FILE).open("rb") as file:
        file.seek(place * size)
        data = file.read(size)
    if len(data) != size:
        raise OSError("the slices of a case are damaged")
    return np.frombuffer(data, "<u2").reshape(height, width)


def map_at(values: np.ndarray, span: tuple[float, float], place: int, slices: int) -> np.ndarray:
    """Cuts a map of evidence at one slice of its series, linear between its own planes, float32 [h, w] in [0, 1].

    Args:
        values: float32 [d, h, w].
        span: start and length of what the map covers, in parts of the stack of slices; beyond it there is no evidence.
        place: of the slice, from 0.
        slices: of the series.
    """
    along = ((place + 0.5) / slices - span[0]) / span[1]
    if not 0 <= along <= 1:
        return np.zeros(values.shape[1:], np.float32)
    plane = min(max(along * len(values) - 0.5, 0.0), len(values) - 1.0)
    below = int(plane)
    part = plane - below
    above = min(below + 1, len(values) - 1)
    return (values[below] * (1 - part) + values[above] * part).astype(np.float32)


def strongest_slice(values: np.ndarray | None, span: tuple[float, float], slices: int) -> int | None:
    """Finds the slice with most of the map's weight, from 1 at the feet; None where there is no map or nothing in it.

    Args:
        values: as in `map_at`; None where the model has no map.
        span: likewise.
        slices: likewise.
    """
    if values is None or not values.any():
        return None
    weights = [float(map_at(values, span, place, slices).sum()) for place in range(slices)]
    best = int(np.argmax(weights))
    return best + 1 if weights[best] > 0 else None
