"""A judged file as the room keeps it: what the viewer needs, in a folder of files.

quarantine/RANDOM/original         the file as it came; the only one that is there before. Of a CT series the folder of its files; a NIfTI
                                   file is original.nii or original.nii.gz
quarantine/RANDOM/pixels.gz        uint16 little endian [H, W], gzip; 0 to 65535 spans the values that occur
quarantine/RANDOM/slices.bin       in the place of pixels.gz of a CT series: uint16 little endian [slices, H, W], from feet to head, as
                                   `series.SERIES_VALUES` says; without compression, so that each slice is read by itself
quarantine/RANDOM/map.npy          float32 [h, w] in [0, 1], of a series [d, h, w], where the model has a map
quarantine/RANDOM/facts.json       units of the grey values, size of a pixel, technical attributes: `image_facts`
quarantine/RANDOM/measures.npz     features float32 [D], pixel_statistics float32 [K], for `pneumofed monitor`
"""

from __future__ import annotations

import gzip
import io
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pneumofed.common.errors import ImageError, SkipReason
from pneumofed.common.files import atomic_write
from pneumofed.common.imaging.images import read_image
from pneumofed.common.imaging.types import Image, ImageInfo, Window
from pneumofed.common.imaging.volumes import NIFTI_ENDINGS
from pneumofed.common.model_bundle.suitability import Judgement
from pneumofed.inference.reading_room.image_facts import FACTS_FILE, read_facts, write_facts

if TYPE_CHECKING:
    from pneumofed.common.model_bundle.predictor import Radiograph


ORIGINAL_FILE, PIXELS_FILE, MAP_FILE, FEATURES_FILE = "original", "pixels.gz", "map.npy", "measures.npz"


FULL_SCALE = 65_535
_WIDE_WINDOW = Window(center=0.0, width=2.0**17)
"""Holds every value of 16 bits, signed or not, at steps that float32 distinguishes (its mantissa has 24 bits)."""


def evidence(activation_map: np.ndarray) -> np.ndarray:
    """Scales the evidence for pneumonia by the strongest evidence of the image, for or against, float32 [h, w] in [0, 1].

    So the map of an image in which nothing speaks for pneumonia stays dark, instead of showing its least doubt in the brightest colour.
    """
    strongest = float(np.abs(activation_map).max())
    if not strongest > 0:
        return np.zeros_like(activation_map, dtype=np.float32)
    return np.clip(activation_map / strongest, 0, 1).astype(np.float32)


@dataclass(frozen=True)
class Header:
    """Whose image it is. Empty or None where the file does not say."""

    patient: str = ""
    accession: str = ""
    study_date: date | None = None


@dataclass(frozen=True)
class Viewing:
    """What a model and an image give to look at: `map` float32 [h, w] in [0, 1], of a series [d, h, w], or None, spread over `area` of
    the image (left, top, width, height in parts of it); `warnings` of `inference.explain.focus.Misplaced`, by name, if they were asked
    for."""

    map: np.ndarray | None
    area: tuple[float, float, float, float]
    warnings: tuple[str, ...] = ()
    span: tuple[float, float] | None = None
    """Of a series: start and length of what the map covers, in parts of the stack of slices."""


@dataclass(frozen=True)
class JudgedFile:
    """All that is known of one file, or of one CT series."""

    header: Header
    info: ImageInfo
    window: Window
    """The one to show `pixels.gz` with first, in parts of its full range."""
    judgement: Judgement
    viewing: Viewing
    patient_name: str = field(default="", repr=False)
    """For the page that sent the file; it is not kept."""
    values: np.ndarray | None = field(default=None, repr=False)
    """float32 [K], the clinical values that it was judged with; None where none is known."""
    evidence: dict[str, Any] | None = field(default=None, repr=False)
    """What the answer rests on, as `clinical.EvidenceView`; None unless it was asked for and can be said."""
    sha256: str = ""
    """Digest of what an archive held, in the place of the archive's own; empty otherwise."""


def header_of(read: Radiograph) -> Header:
    """Reads whose image it is, as the worklist shows it."""
    found = read.header
    return Header(found.patient, found.accession, found.study_date) if found else Header()


def original_of(folder: Path) -> Path:
    """Returns where a case's file lies as it came, or the folder with the files of its series."""
    names = (ORIGINAL_FILE, *(ORIGINAL_FILE + ending for ending in NIFTI_ENDINGS))
    return next((folder / name for name in names if (folder / name).exists()), folder / ORIGINAL_FILE)


def write_viewing(folder: Path, image: Image, judgement: Judgement, viewing: Viewing) -> tuple[Window, str]:
    """Writes what the viewer needs into `folder` and returns the window to begin with, and the patient's name, which is not written.

    Args:
        folder: of the file.
        image: in the file.
        judgement: of the image; its features and pixel statistics are kept.
        viewing: its map is kept, if it has one.
    """
    pixels, window, ends = whole_range(folder / ORIGINAL_FILE, image)
    facts, patient_name = read_facts(folder / ORIGINAL_FILE, image, ends)
    write_facts(folder, facts)
    with gzip.GzipFile(folder / PIXELS_FILE, "wb", compresslevel=1, mtime=0) as file:
        file.write(pixels.astype("<u2", copy=False).tobytes())
    write_map(folder, viewing)
    np.savez(folder / FEATURES_FILE, features=judgement.features, pixel_statistics=judgement.pixel_statistics)
    for name in (ORIGINAL_FILE, PIXELS_FILE, MAP_FILE, FACTS_FILE, FEATURES_FILE):
        if (folder / name).exists():
            (folder / name).chmod(0o600)
    return window, patient_name


def write_map(folder: Path, viewing: Viewing) -> None:
    """Writes the heat map into `folder`, whole or not at all; nothing where there is none.

    Args:
        folder: of the file.
        viewing: its map is written.
    """
    if viewing.map is not None:
        array = io.BytesIO()  # numpy's own writing of a file does not say that a disk is full
        np.save(array, viewing.map.astype(np.float32))
        with atomic_write(folder / MAP_FILE) as file:
            file.write(array.getvalue())


def whole_range(path: Path, image: Image) -> tuple[np.ndarray, Window, tuple[float, float] | None]:
    """Spreads the pixels over all values that occur in the file, so that a reader can see beyond the file's own window.

    A DICOM window cuts off what is darker and brighter, which a reader may want to see: such a file is decoded again without it.
    Where the file has a lookup table or no window, its display values are all there is, and the window is the whole range.

    Args:
        path: of the file; decoded again where its DICOM window cuts values off, or to find what its display values stand for.
        image: read from `path`, through its own window.

    Returns:
        uint16 [H, W], the file's window in parts of that range, and the values that its ends stand for in the units of Window Center
        (after the modality LUT), None of files other than DICOM and of values beyond 16 bits.
    """
    window = image.info.window
    display = np.rint(image.pixels * FULL_SCALE).astype(np.uint16)
    if image.info.format != "dicom" or (window and not abs(window.center) + window.width < _WIDE_WINDOW.width / 2):
        return display, Window(0.5, 1.0), None
    try:
        stretched, placed, ends = _stretched(read_image(path, window=_WIDE_WINDOW).pixels, window, image.info.inverted)
    except ImageError as error:  # one grey in the wide window: values beyond it
        if error.reason != SkipReason.CONSTANT:
            raise
        return display, Window(0.5, 1.0), None
    return (stretched, placed, ends) if window else (display, Window(0.5, 1.0), ends)


def map_area(height: int, width: int, fit: Literal["pad", "crop"]) -> tuple[float, float, float, float]:
    """Computes what the model's square covers of the image: see `common.imaging.images.fit_square`.

    Args:
        height: of the image, in pixels.
        width: likewise.
        fit: how the square was made; `pad` reaches beyond the image, `crop` covers a part of it.

    Returns:
        Left, top, width and height in parts of the image.
    """
    side = max(height, width) if fit == "pad" else min(height, width)
    return ((width - side) / 2 / width, (height - side) / 2 / height, side / width, side / height)


def _stretched(wide: np.ndarray, window: Window | None, inverted: bool) -> tuple[np.ndarray, Window, tuple[float, float]]:
    """`wide` [H, W], the display values through `_WIDE_WINDOW`, over the whole range, `window` (in the file's units) in parts of it, and
    what its ends stand for in the file's units, so that the middle of `window` stands for its center.

    Padding is 0 in `wide` and stays 0; values are near 0.5 there.
    """
    tissue = wide[wide > 0]
    least, greatest = float(tissue.min()), float(tissue.max())
    if not greatest > least:
        raise ImageError(SkipReason.CONSTANT)
    pixels = np.rint(np.clip((wide - least) / (greatest - least), 0, 1) * FULL_SCALE).astype(np.uint16)
    span, scale = greatest - least, _WIDE_WINDOW.width - 1
    # LINEAR of PS3.3, C.11.2.1.2.1: g = (value - (center - 0.5)) / (width - 1) + 0.5, with a center of 0 solved for value + 0.5, since
    # the middle of a window lies half a value below its center.
    low, high = (((1 - grey if inverted else grey) - 0.5) * scale for grey in (least, greatest))
    if window is None:
        return pixels, Window(0.5, 1.0), (low, high)
    return pixels, Window((window.center - low) / (high - low), max(window.width, 1.0) / scale / span), (low, high)
