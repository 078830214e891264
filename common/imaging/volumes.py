"""CT volumes in Hounsfield units: `read_volume` for a DICOM series or a NIfTI file, `fit_volume` for the model's grid.

Whatever is at a path, `read_volume` gives a `Volume` or raises an `ImageError`, so that one bad series costs a site one series. The text
of that error holds kinds, numbers and sizes, never a path or the value of another tag.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pneumofed.common.errors import ConfigError, ImageError, SkipReason
from pneumofed.common.imaging.images import only_image_errors
from pneumofed.common.imaging.types import LUNG_WINDOW, MAX_VOLUME_BYTES, Window, check_volume_size

if TYPE_CHECKING:
    from pneumofed.common.imaging.dicom_header import Acquisition

FIELD_OF_VIEW_MM = 400.0
"""Side of the cube that `fit_volume` shows: the usual reconstruction of a chest is 350 to 400 mm wide, and lungs are some 300 mm high."""
NIFTI_ENDINGS = (".nii", ".nii.gz")
SPACING_MM = (0.05, 100.0)
"""Between these a spacing can be that of a CT, or of a phantom of few slices; beyond, the unit is another one than stated."""
LEAST_AIR_HU = -200.0
"""A CT has air around or inside the body, near -1000; a volume without a value below this is in another unit."""
MAX_OBLIQUE_DEG = 30.0
"""Between an axis of the slices and the nearest one of the body."""

_AIR = -1024
_HIGHEST = 3071.0
"""Of 12 bits with the intercept -1024: what lies above, as metal does, says no more than that it is there."""
_LUNG_HU = (-950, -500)
"""Aerated lung; the air around the body lies below."""
_UNIT_MM = {"mm": 1.0, "unknown": 1.0, "meter": 1000.0, "micron": 0.001}


@dataclass(frozen=True)
class Volume:
    """One CT volume.

    Attributes:
        hounsfield: int16 [slices, rows, columns], C-contiguous, at least -1024: from feet to head, from front to back, and from the
            patient's right to the left, as a stack of axial slices is displayed.
        spacing_mm: between slices, rows and columns.
        notes: what was set aside when it was read, in words; nothing of a patient.
        affine: float64 [4, 4], from (slice, row, column, 1) to the place of that voxel's centre in mm, whose x grows to the patient's left,
            y to the back and z to the head (PS3.3, C.7.6.2.1.1); None where nobody knows it.
    """

    hounsfield: NDArray[np.int16]
    spacing_mm: tuple[float, float, float]
    notes: tuple[str, ...]
    affine: NDArray[np.float64] | None = None

    @property
    def first_mm(self) -> float | None:
        """Where the first slice lies along the axis from feet to head, in the scanner's coordinates; None where nobody knows."""
        affine = self.affine
        return None if affine is None else float(affine[:3, 3] @ affine[:3, 0] / np.linalg.norm(affine[:3, 0]))


def read_volume(path: str | PathLike[str], *, max_bytes: int = MAX_VOLUME_BYTES) -> Volume:
    """Reads the CT volume at `path`.

    Args:
        path: a folder with the files of one DICOM series, a multi-frame DICOM file, or a `.nii` or `.nii.gz` file.
        max_bytes: what its voxels may take in memory, 2 bytes each; checked before they are read.

    Raises:
        ImageError: it is missing, damaged, too large, no CT, or no single volume with even slices; its `reason` says which, its `detail`
            how many and where.
    """
    path = Path(path)
    with only_image_errors():
        try:
            if is_nifti(path):
                return _read_nifti(path, max_bytes)
            # Imported here, since pydicom takes a third of a second to import: only those who have DICOM pay.
            from pneumofed.common.imaging.ct_series import read_ct_series

            if not (path.is_dir() or path.is_file()):  # a named pipe would block for ever
                raise ImageError(SkipReason.UNREADABLE if path.exists() else SkipReason.MISSING)
            stack, directions, spacing, origin, notes = read_ct_series(path, max_bytes)
            _check_spacing(spacing)
            turned, turned_spacing, turn = _turn_to_body(stack, directions, spacing)
            volume = Volume(turned, turned_spacing, notes, make_affine(directions, spacing, origin) @ turn)
        except OSError as error:
            raise ImageError(SkipReason.UNREADABLE, type(error).__name__) from None
        return _with_contrast(volume)


def read_volume_acquisition(path: Path) -> Acquisition | None:
    """Reads how large a CT volume is in its axial plane, its slices, their step, and the year of the first file of a DICOM series; None
    where it cannot be read."""
    from pneumofed.common.imaging.dicom_header import Acquisition, read_acquisition  # pydicom: see read_volume

    try:
        volume = read_volume(path)
        dated = read_acquisition(min(file for file in path.iterdir() if file.is_file()) if path.is_dir() else path)
    except (ImageError, OSError):
        return None
    slices, rows, columns = volume.hounsfield.shape
    return Acquisition(rows, columns, dated.year if dated else None, slices, round(volume.spacing_mm[0], 2))


def is_nifti(path: Path) -> bool:
    """Says whether the name of `path` is that of a NIfTI file."""
    return path.name.lower().endswith(NIFTI_ENDINGS)


def fit_volume(volume: Volume, size_px: int, slices: int) -> NDArray[np.uint8]:
    """Resamples a volume to the grid of a model, in the lung window.

    The grid covers a cube of `FIELD_OF_VIEW_MM` around the volume's middle, whatever its spacing: what lies outside is cut, what is not
    there is air, and a millimetre is as long in each volume. A volume that is higher than the cube, such as chest and abdomen, is cut
    where the most aerated lung stays inside. Each axis is resampled with a triangle as wide as the coarser of both spacings: linear
    between slices that are further apart than the grid's, and a weighted mean, without aliasing, where the grid is coarser (the filter of
    `fit_square`). Hounsfield units are averaged first and windowed then, as a scanner with thicker slices would have measured them.

    Args:
        volume: of `read_volume`.
        size_px: rows and columns of the grid.
        slices: of the grid.

    Returns:
        uint8 [slices, size_px, size_px]: -1350 HU or less is 0, 150 HU or more is 255. The same volume gives the same grid.

    Raises:
        ConfigError: a size is below 1.
    """
    if size_px < 1 or slices < 1:
        raise ConfigError(f"fit_volume: expected a size and a number of slices of at least 1, got {size_px} and {slices}")
    shape, spacing, middles = volume.hounsfield.shape, volume.spacing_mm, place_view(volume)
    across, down, along = (
        _weigh(shape[axis], spacing[axis], count, middles[axis]) for axis, count in ((2, size_px), (1, size_px), (0, slices))
    )
    grid = np.zeros((slices, size_px, size_px), np.float32)
    for place in np.flatnonzero(along.any(axis=0)):
        # Above air, so that what lies outside of the volume adds nothing.
        plane = np.clip(volume.hounsfield[place].astype(np.float32), _AIR, _HIGHEST) - _AIR
        shown = down @ plane @ across.T
        for row in np.flatnonzero(along[:, place]):
            grid[row] += along[row, place] * shown
    return apply_ct_window(grid + _AIR, LUNG_WINDOW)


def apply_ct_window(hounsfield: NDArray[Any], window: Window) -> NDArray[np.uint8]:
    """Shows Hounsfield units in `window`, by LINEAR_EXACT (PS3.3, C.11.2.1.3.2).

    Args:
        hounsfield: of any shape.
        window: its center is middle grey.

    Returns:
        uint8 of the same shape, 0 at and below the window's lower end, 255 at and above the upper.
    """
    share = (np.asarray(hounsfield, np.float32) - window.center) / window.width + 0.5
    return np.rint(255.0 * np.clip(share, 0.0, 1.0)).astype(np.uint8)


def mean_hounsfield(grid: NDArray[np.uint8]) -> float:
    """Computes the mean of a grid of `fit_volume` in Hounsfield units, of which those beyond the lung window count as its ends."""
    return LUNG_WINDOW.center + (float(np.mean(grid)) / 255.0 - 0.5) * LUNG_WINDOW.width


def field_of_view(volume: Volume) -> tuple[tuple[float, float], tuple[float, float], tuple[float, float]]:
    """Says where the cube that `fit_volume` shows lies: (start, length) along slices, rows and columns, in parts of the volume's own
    length from its first slice, row and column; it may begin before the volume and end after it."""
    along = zip(place_view(volume), volume.hounsfield.shape, volume.spacing_mm, strict=True)
    parts = [
        ((middle - FIELD_OF_VIEW_MM / 2) / (count * step), FIELD_OF_VIEW_MM / (count * step)) for middle, count, step in along
    ]
    return parts[0], parts[1], parts[2]


def place_view(volume: Volume) -> tuple[float, float, float]:
    """Finds the middle of the cube that `fit_volume` shows, in mm from the volume's first edge along slices, rows and columns."""
    (_, rows, columns), (_, down, across) = volume.hounsfield.shape, volume.spacing_mm
    return _place_slices(volume), rows * down / 2, columns * across / 2


def make_affine(
    directions: NDArray[np.float64], spacing_mm: Sequence[float], origin_mm: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Makes the matrix float64 [4, 4] from places on three axes to millimetres.

    Args:
        directions: of the axes, unit vectors [3, 3].
        spacing_mm: along each.
        origin_mm: the first voxel's centre.
    """
    affine = np.eye(4)
    affine[:3, :3] = (directions * np.asarray(spacing_mm)[:, None]).T
    affine[:3, 3] = origin_mm
    return affine


def turn_back(values: NDArray[Any], affine: NDArray[np.float64], original: NDArray[np.float64]) -> NDArray[Any]:
    """Turns an array on the axes of a `Volume` to those of the file that it was read from: the same voxels in another order.

    Args:
        values: [slices, rows, columns] of the volume.
        affine: of the volume.
        original: likewise of the file's own axes, whatever their order and direction.
    """
    steps = np.rint(np.linalg.inv(original[:3, :3]) @ affine[:3, :3]).astype(int)
    order = np.abs(steps).argmax(axis=1)
    return values.transpose(order)[tuple(slice(None, None, int(steps[axis, order[axis]])) for axis in range(3))]


def _weigh(length: int, spacing_mm: float, count: int, middle_mm: float) -> NDArray[np.float32]:
    """Weights float32 [count, length] that resample an axis to `count` samples of the field of view around `middle_mm`.

    Each row is normalised over an endless axis, so the part of it that lies outside of the volume is the share of air.
    """
    step = FIELD_OF_VIEW_MM / count
    reach = max(step, spacing_mm)
    centres = middle_mm - FIELD_OF_VIEW_MM / 2 + (np.arange(count) + 0.5) * step
    beyond = math.ceil((abs(middle_mm) + FIELD_OF_VIEW_MM + reach) / spacing_mm)
    samples = (np.arange(-beyond, length + beyond) + 0.5) * spacing_mm
    triangle = np.maximum(0.0, 1.0 - abs(centres[:, None] - samples[None, :]) / reach)
    weights = triangle / triangle.sum(axis=1, keepdims=True)
    return weights[:, beyond : beyond + length].astype(np.float32)


def _place_slices(volume: Volume) -> float:
    """The middle of the field of view along the slices, in mm from the feet's end."""
    count, spacing = volume.hounsfield.shape[0], volume.spacing_mm[0]
    held = math.floor(FIELD_OF_VIEW_MM / spacing)
    if held >= count:
        return count * spacing / 2
    some = volume.hounsfield[:, ::4, ::4]
    lung = np.count_nonzero((some > _LUNG_HU[0]) & (some < _LUNG_HU[1]), axis=(1, 2))
    total = np.concatenate([[0], np.cumsum(lung)])
    inside = total[held:] - total[:-held]
    return float(np.flatnonzero(inside == inside.max()).mean() + held / 2) * spacing


def _turn_to_body(
    stack: NDArray[np.int16], directions: NDArray[np.float64], spacing: tuple[float, float, float]
) -> tuple[NDArray[np.int16], tuple[float, float, float], NDArray[np.float64]]:
    """(`stack` with its axes turned to those of the body, its spacing, the matrix [4, 4] from its places to those of `stack`).

    Raises:
        ImageError: the axes are too far from the body's.
    """
    nearest = [int(np.argmax(abs(one))) for one in directions]
    if sorted(nearest) != [0, 1, 2] or abs(directions[range(3), nearest]).min() < math.cos(math.radians(MAX_OBLIQUE_DEG)):
        raise ImageError(SkipReason.NO_GEOMETRY, f"slices more than {MAX_OBLIQUE_DEG:.0f} degrees from every axis of the body")
    order = [nearest.index(axis) for axis in (2, 1, 0)]
    signs = [int(np.sign(directions[axis, nearest[axis]])) for axis in order]
    turned = stack.transpose(order)[tuple(slice(None, None, sign) for sign in signs)]
    turn = np.diag([0.0, 0.0, 0.0, 1.0])
    turn[order, range(3)] = signs
    turn[order, 3] = [0 if sign > 0 else stack.shape[axis] - 1 for axis, sign in zip(order, signs, strict=True)]
    return np.ascontiguousarray(turned), (spacing[order[0]], spacing[order[1]], spacing[order[2]]), turn


def _read_nifti(path: Path, max_bytes: int) -> Volume:
    """Reads a NIfTI-1 or -2 file. Its axes grow to the right, the front and the head (NIfTI-1, section "3D image orientation")."""
    try:
        import nibabel
    except ImportError:
        raise ImageError(SkipReason.NO_NIBABEL, "run: pip install 'pneumofed[ct]'") from None
    if not path.is_file():
        raise ImageError(SkipReason.UNREADABLE if path.exists() else SkipReason.MISSING)
    image: Any = nibabel.load(path)
    header = image.header
    shape = tuple(int(length) for length in header.get_data_shape())
    if math.prod(shape[3:]) != 1:
        raise ImageError(SkipReason.TIME_SERIES, f"NIfTI with {math.prod(shape[3:])} volumes; give each a file of its own")
    if len(shape) < 3 or shape[2] < 3:
        raise ImageError(SkipReason.NO_SLICES, "NIfTI of one picture")
    if header.get_data_dtype().kind not in "iuf":
        raise ImageError(SkipReason.NOT_HOUNSFIELD, "NIfTI of colours or complex numbers")
    check_volume_size(shape[2], shape[1], shape[0], max_bytes)
    notes = _check_affine(header, image.affine)
    turn = nibabel.orientations.io_orientation(image.affine)
    stored = image.dataobj  # whose scaling the header forgets once it is loaded
    values = _to_hounsfield(np.reshape(stored.get_unscaled(), shape[:3]), stored.slope, stored.inter)
    turned = nibabel.orientations.apply_orientation(values, turn).transpose(2, 1, 0)[:, ::-1, ::-1]
    sides = np.linalg.norm(nifti_affine(image)[:3, :3], axis=0)
    spacing = [float(sides[np.flatnonzero(turn[:, 0] == axis)[0]]) for axis in (2, 1, 0)]
    to_canonical = np.array([[0, 0, -1, turned.shape[2] - 1], [0, -1, 0, turned.shape[1] - 1], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    affine = nifti_affine(image) @ nibabel.orientations.inv_ornt_aff(turn, shape[:3]) @ to_canonical
    return _with_contrast(Volume(np.ascontiguousarray(turned), (spacing[0], spacing[1], spacing[2]), notes, affine))


def nifti_affine(image: Any) -> NDArray[np.float64]:
    """Computes the matrix float64 [4, 4] from places on the axes of a NIfTI image of nibabel to millimetres, as `Volume.affine` counts
    them: x and y of NIfTI grow to the right and the front."""
    scale = _UNIT_MM[image.header.get_xyzt_units()[0]]
    return np.diag([-scale, -scale, scale, 1.0]) @ image.affine


def _check_spacing(spacing_mm: Sequence[float] | NDArray[np.float64]) -> None:
    """Refuses a spacing that no CT has, and that would ask for endless memory when it is resampled."""
    low, high = SPACING_MM
    if not all(low <= step <= high for step in spacing_mm):  # not a number is refused too
        raise ImageError(SkipReason.NO_GEOMETRY, f"a spacing that is not within {low} to {high} mm")


def _check_affine(header: Any, affine: NDArray[np.float64]) -> tuple[str, ...]:
    """What is to be noted of the orientation.

    Raises:
        ImageError: it is not stated, sheared, or of a size that no CT has.
    """
    if not (int(header["qform_code"]) or int(header["sform_code"])):
        raise ImageError(SkipReason.NO_GEOMETRY, "NIfTI without orientation: the codes of qform and sform are 0")
    unit = header.get_xyzt_units()[0]
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    _check_spacing(sides * _UNIT_MM[unit])
    directions = affine[:3, :3] / sides
    angle = math.degrees(math.asin(min(1.0, float(abs(directions.T @ directions - np.eye(3)).max()))))
    if angle > 1.0:
        raise ImageError(SkipReason.GANTRY_TILT, f"NIfTI whose axes are {angle:.1f} degrees from right angles")
    return ("NIfTI without a unit of length: read as millimetres",) if unit == "unknown" else ()


def _to_hounsfield(stored: NDArray[Any], slope: float, intercept: float) -> NDArray[np.int16]:
    """Scaled values as int16 [columns, rows, slices], a slice at a time, since floating point takes four times the memory.

    Raises:
        ImageError: they cannot be Hounsfield units.
    """
    result = np.empty(stored.shape, np.int16)
    least, most = math.inf, -math.inf
    for place in range(stored.shape[2]):
        values = np.nan_to_num(stored[:, :, place] * np.float64(slope) + intercept, nan=_AIR)
        least, most = min(least, float(values.min())), max(most, float(values.max()))
        result[:, :, place] = np.rint(np.clip(values, _AIR, np.iinfo(np.int16).max))
    if least > LEAST_AIR_HU:
        text = f"values from {least:.6g} to {most:.6g}, and air is near -1000; write the file with Hounsfield units"
        raise ImageError(SkipReason.NOT_HOUNSFIELD, text)
    return result


def _with_contrast(volume: Volume) -> Volume:
    if volume.hounsfield.min() == volume.hounsfield.max():
        raise ImageError(SkipReason.CONSTANT)
    return volume
