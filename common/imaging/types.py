"""The types of an image in memory: `Image`, what its file says of it, and the sizes that are refused before any memory is taken."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pneumofed.common.errors import ConfigError, ImageError, SkipReason
from pneumofed.common.imaging.patient_groups import AgeGroup, PatientGroups, view_group_of

MIN_SIDE_PX = 16
MAX_SIDE_PX = 16_384
MAX_PIXELS = 100_000_000
"""About five times the largest detector of today (43 x 43 cm at 0.1 mm: 18 million pixels)."""
MAX_FILE_BYTES = 512 * 2**20
"""More than twice `MAX_PIXELS` of 16 bits."""
MAX_VOLUME_BYTES = 2**30
"""Memory of one CT volume, 2 bytes a voxel: 2048 slices of 512 x 512, that is a whole body in slices of 1 mm. A chest has some 600."""

RasterFormat = Literal["jpeg", "png", "tiff", "bmp", "webp"]
Format = Literal["dicom", "nifti", RasterFormat]


@dataclass(frozen=True)
class Window:
    """A range of grey values: `width` around `center`, in the units after the modality LUT (Hounsfield units in CT)."""

    center: float
    width: float

    def __post_init__(self) -> None:
        """Refuses a window that cannot be applied.

        Raises:
            ConfigError: a value is not finite or the width is not positive.
        """
        if not (math.isfinite(self.center) and math.isfinite(self.width) and self.width > 0):
            raise ConfigError(f"window: expected a finite center and a width above 0, got {self.center} and {self.width}")


LUNG_WINDOW = Window(center=-600.0, width=1500.0)
"""The usual lung window in Hounsfield units (Radiopaedia, "Windowing (CT)": W 1500, L -600)."""


@dataclass(frozen=True)
class ImageInfo:
    """What the file says about an image; nothing in it identifies a patient.

    Attributes:
        format: by content, whatever the file's name.
        height_px: rows of the pixels as they were read, EXIF orientation applied, stretched to square pixels.
        width_px: columns likewise.
        bits: bits that carry the grey value: Bits Stored of DICOM, 8 or 16 otherwise.
        modality: DICOM Modality, e.g. `DX`, `CR`, `CT`.
        view: DICOM View Position, e.g. `PA`, `AP`, `LL`.
        body_part: DICOM Body Part Examined, e.g. `CHEST`.
        sex: DICOM Patient's Sex where it is M or F.
        age_years: DICOM Patient's Age.
        age_group: of Patient's Age, else of the dates of birth and study, which are not kept.
        manufacturer: DICOM Manufacturer and Manufacturer's Model Name.
        photometric: DICOM Photometric Interpretation.
        window: the window that was applied, if one was.
        inverted: whether the stored values were shown white to black and have been turned round.
        for_processing: DICOM Presentation Intent Type FOR PROCESSING: values of the detector, not the picture that is read.
        colour: of files other than DICOM: mean distance of the largest to the smallest of red, green and blue, in [0, 1]; 0 is grey.
    """

    format: Format
    height_px: int
    width_px: int
    bits: int
    modality: str | None = None
    view: str | None = None
    body_part: str | None = None
    sex: Literal["M", "F"] | None = None
    age_years: float | None = None
    manufacturer: str | None = None
    photometric: str | None = None
    window: Window | None = None
    inverted: bool = False
    colour: float = 0.0
    for_processing: bool = False
    age_group: AgeGroup | None = None

    @property
    def groups(self) -> PatientGroups:
        """The groups of patients that the image belongs to."""
        return PatientGroups(self.age_group, self.sex, view_group_of(self.view))


@dataclass(frozen=True)
class Image:
    """One radiograph: `pixels` float32 [H, W] in [0, 1], C-contiguous, 0 is black (air); `info` is what its file says of it.

    Of a CT volume `pixels` are float32 [slices, S, S] in [0, 1], as `fit_volume` makes them.
    """

    pixels: np.ndarray
    info: ImageInfo


def check_size(height_px: int, width_px: int) -> None:
    """Refuses an image by its declared size, to be called before memory is taken for it.

    Args:
        height_px: rows.
        width_px: columns.

    Raises:
        ImageError: TOO_SMALL below `MIN_SIDE_PX`, TOO_LARGE above `MAX_SIDE_PX` or `MAX_PIXELS`.
    """
    if min(height_px, width_px) < MIN_SIDE_PX:
        raise ImageError(SkipReason.TOO_SMALL, f"{height_px} x {width_px}")
    if max(height_px, width_px) > MAX_SIDE_PX or height_px * width_px > MAX_PIXELS:
        raise ImageError(SkipReason.TOO_LARGE, f"{height_px} x {width_px}")


def check_volume_size(slices: int, rows: int, columns: int, max_bytes: int = MAX_VOLUME_BYTES) -> None:
    """Refuses a volume by its declared size, to be called before memory is taken for it.

    Args:
        slices, rows, columns: of the volume.
        max_bytes: what its voxels may take, 2 bytes each.

    Raises:
        ImageError: TOO_LARGE above `max_bytes`; as `check_size` for rows and columns.
    """
    check_size(rows, columns)
    if 2 * slices * rows * columns > max_bytes:
        size, limit = (round(count / 2**20) for count in (2 * slices * rows * columns, max_bytes))
        raise ImageError(SkipReason.TOO_LARGE, f"{slices} x {rows} x {columns} voxels take {size} MiB, and the limit is {limit}")
