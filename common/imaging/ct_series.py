"""Reads one CT series in DICOM: a folder with a file a slice, or one multi-frame object (Enhanced CT, PS3.3, A.38).

`read_ct_series` is the entry. Headers are read and judged first; pixels are decoded only of a series that is whole: one orientation, one
grid, even steps along the normal of the slices (PS3.3, C.7.6.2.1.1). What is refused says how many and near which slice, never a name, a
path or the text of a tag.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import UID, CTImageStorage, EnhancedCTImageStorage

from pneumofed.common.errors import ImageError, SkipReason, in_a_row
from pneumofed.common.imaging.dicom_decode import CODE_COUNT, find_codes, is_padding
from pneumofed.common.imaging.dicom_pixels import check_inflated_size, parse, read_codes, read_layout
from pneumofed.common.imaging.dicom_tags import code_of, codes_of, integer_of, number_of, numbers_of, text_of, value_of
from pneumofed.common.imaging.images import read_bytes
from pneumofed.common.imaging.types import check_volume_size

AIR_HU = -1024
"""What stands where nothing was measured: the least value of a CT of 12 bits with the usual intercept."""
MIN_SLICES = 3
"""Fewer have no second step to compare the first with."""
MAX_UNEVEN = 0.1
"""By how much of the median step a step may differ: positions are rounded, to 0.1 mm by some writers."""
MAX_TILT_DEG = 1.0
"""Slices of a tilted gantry are not stacked along their normal; below this a chest of 30 cm is sheared by less than a slice of 5 mm."""
_SAME_PLACE_MM = 0.01
_SAME_COSINE = 1e-3
_SAME_SPACING_MM = 1e-3
_CT_IMAGES = (CTImageStorage, EnhancedCTImageStorage)

_TAGS = [
    *("SOPInstanceUID", "SeriesInstanceUID", "Modality", "ImageType", "InstanceNumber", "NumberOfFrames", "Rows", "Columns"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "GantryDetectorTilt"),
    *("RescaleIntercept", "RescaleSlope", "RescaleType"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]


@dataclass(frozen=True)
class CtSlice:
    """One plane: `frame` of the `frames` in the file `path`, as its header describes it.

    Attributes:
        number: Instance Number (0020,0013), or that of the frame.
        position: of the first voxel's centre in mm, float64 [3] (Image Position (Patient), (0020,0032)); empty where unknown.
        orientation: float64 [6] (Image Orientation (Patient), (0020,0037)); empty where unknown.
        spacing: between rows and between columns in mm (Pixel Spacing, (0028,0030)); empty where unknown.
        slope, intercept: to Hounsfield units, NaN where unknown; `units` is Rescale Type (0028,1054).
    """

    path: Path
    frame: int
    frames: int
    series: str
    uid: str
    modality: str
    is_localizer: bool
    number: float
    shape: tuple[int, int]
    position: NDArray[np.float64]
    orientation: NDArray[np.float64]
    spacing: NDArray[np.float64]
    tilt_deg: float
    slope: float
    intercept: float
    units: str

    @property
    def normal(self) -> NDArray[np.float64]:
        """Unit vector; the position along it grows from slice to slice."""
        return np.cross(self.orientation[:3], self.orientation[3:])

    @property
    def directions(self) -> NDArray[np.float64]:
        """Of slices, rows and columns, unit vectors [3, 3]."""
        return np.array([self.normal, self.orientation[3:], self.orientation[:3]])


def read_ct_series(
    path: Path, max_bytes: int
) -> tuple[NDArray[np.int16], NDArray[np.float64], tuple[float, float, float], NDArray[np.float64], tuple[str, ...]]:
    """Reads the one CT series at `path`.

    Args:
        path: a folder whose files are the slices, or a file with many frames. Folders in the folder are not looked into.
        max_bytes: what the voxels may take in memory, 2 bytes each.

    Returns:
        Hounsfield units, int16 [slices, rows, columns]; the direction of each of the three axes, unit vectors float64 [3, 3] whose x grows
        to the patient's left, y to the back and z to the head (PS3.3, C.7.6.2.1.1); the spacing along each in mm; the first voxel's place;
        what was set aside.

    Raises:
        ImageError: the series cannot be used. Damaged pixels may raise other exceptions, which `read_volume` turns into one.
    """
    ordered, step, notes = order_ct_slices(path)
    first = ordered[0]
    check_volume_size(len(ordered), *first.shape, max_bytes)
    volume = np.empty((len(ordered), *first.shape), np.int16)
    dataset, path = Dataset(), Path()
    for place, one in enumerate(ordered):
        if one.path != path:
            dataset, path = parse(read_bytes(one.path)), one.path
        volume[place] = _decode(dataset, one)
    return volume, first.directions, (step, float(first.spacing[0]), float(first.spacing[1])), first.position, notes


def order_ct_slices(path: Path) -> tuple[list[CtSlice], float, tuple[str, ...]]:
    """Returns the slices that `read_ct_series` stacks, in its order, the step between them in mm, and what was set aside; by headers only,
    and with its ImageError where the series cannot be used."""
    found, notes = _find_slices(path)
    _check_series(found)
    ordered, dropped = _sort_slices(found)
    notes += [f"slices at a position that another one has: {dropped} set aside"] * bool(dropped)
    return ordered, _check_steps(ordered), tuple(notes)


def _find_slices(path: Path) -> tuple[list[CtSlice], list[str]]:
    """(CT slices at `path`, what was set aside), by headers only; an ImageError where there are none."""
    files = (
        sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")) if path.is_dir() else [path]
    )
    slices: list[CtSlice] = []
    others = localizers = 0
    for file in files:
        planes = _read_planes(file)
        kept = [plane for plane in planes if not plane.is_localizer]
        others += not planes
        localizers += len(planes) - len(kept)
        slices += kept
    if not slices:
        raise ImageError(SkipReason.NO_SLICES, f"none among {len(files)} files; {localizers} are localizer images")
    notes = [f"localizer images: {localizers} set aside"] * bool(localizers)
    return slices, notes + [f"files without an image: {others} set aside"] * bool(others)


def _read_planes(file: Path) -> list[CtSlice]:
    """The planes in a file; none where it is no DICOM image, such as a DICOMDIR, a report or a text."""
    with file.open("rb") as stream:
        is_certain = stream.read(132)[128:] == b"DICM"  # PS3.10, 7.1
        if not is_certain and file.suffix.lower() not in (".dcm", ".ima", ""):
            return []
        stream.seek(0)
        if is_certain:
            check_inflated_size(stream)
            stream.seek(0)
        dataset = dcmread(stream, stop_before_pixels=True, force=True, specific_tags=list(_TAGS))
    if value_of(dataset, "Rows") is None or not code_of(dataset, "Modality"):
        if dataset.file_meta.get("MediaStorageSOPClassUID") in _CT_IMAGES:
            raise ImageError(SkipReason.CORRUPT, "a CT slice ends within its header")
        return []
    whole = _describe(dataset, file)
    if whole.frames == 1:
        return [whole]
    shared = _first_item(dataset, "SharedFunctionalGroupsSequence")
    groups = list(value_of(dataset, "PerFrameFunctionalGroupsSequence") or [])
    if len(groups) != whole.frames:
        raise ImageError(SkipReason.NO_GEOMETRY, f"{whole.frames} frames, and {len(groups)} of them described")
    return [_describe_frame(whole, frame, group, shared) for frame, group in enumerate(groups)]


def _describe(dataset: Dataset, file: Path) -> CtSlice:
    kinds = codes_of(dataset, "ImageType")
    return CtSlice(
        path=file,
        frame=0,
        frames=integer_of(dataset, "NumberOfFrames", 1),
        series=text_of(dataset, "SeriesInstanceUID"),
        uid=text_of(dataset, "SOPInstanceUID"),
        modality=code_of(dataset, "Modality"),
        is_localizer="LOCALIZER" in kinds,
        number=number_of(dataset, "InstanceNumber", 0.0),
        shape=(integer_of(dataset, "Rows"), integer_of(dataset, "Columns")),
        position=_vector(dataset, "ImagePositionPatient", 3),
        orientation=_vector(dataset, "ImageOrientationPatient", 6),
        spacing=_vector(dataset, "PixelSpacing", 2),
        tilt_deg=number_of(dataset, "GantryDetectorTilt", 0.0),
        slope=number_of(dataset, "RescaleSlope", math.nan),
        intercept=number_of(dataset, "RescaleIntercept", math.nan),
        units=code_of(dataset, "RescaleType"),
    )


def _describe_frame(whole: CtSlice, frame: int, group: Dataset, shared: Dataset) -> CtSlice:
    """`frame` of a multi-frame object; what its own functional groups do not say, the shared ones do (PS3.3, C.7.6.16)."""

    def of(sequence: str) -> Dataset:
        return _first_item(group, sequence) if value_of(group, sequence) else _first_item(shared, sequence)

    rescale = of("PixelValueTransformationSequence")
    return replace(
        whole,
        frame=frame,
        uid=f"{whole.uid} {frame}",
        number=float(frame),
        position=_vector(of("PlanePositionSequence"), "ImagePositionPatient", 3),
        orientation=_vector(of("PlaneOrientationSequence"), "ImageOrientationPatient", 6),
        spacing=_vector(of("PixelMeasuresSequence"), "PixelSpacing", 2),
        tilt_deg=number_of(of("CTAcquisitionDetailsSequence"), "GantryDetectorTilt", 0.0),
        slope=number_of(rescale, "RescaleSlope", math.nan),
        intercept=number_of(rescale, "RescaleIntercept", math.nan),
        units=code_of(rescale, "RescaleType"),
    )


def _first_item(dataset: Dataset, sequence: str) -> Dataset:
    items = value_of(dataset, sequence)
    return items[0] if items else Dataset()


def _vector(dataset: Dataset, keyword: str, length: int) -> NDArray[np.float64]:
    numbers = np.asarray(numbers_of(dataset, keyword))
    return numbers if len(numbers) == length and np.isfinite(numbers).all() else np.empty(0)


def _check_series(slices: list[CtSlice]) -> None:
    """Does nothing where `slices` are one CT series on one grid, in Hounsfield units.

    Raises:
        ImageError: they are not.
    """
    modalities = {one.modality for one in slices}
    if "CT" not in modalities:
        raise ImageError(SkipReason.NOT_CT, f"modality {in_a_row(sorted(modalities))}")
    series = len({one.series for one in slices})
    if series > 1 or len(modalities) > 1:
        advice = "give each series a folder of its own"
        raise ImageError(SkipReason.MIXED_SERIES, f"{series} series with {len(slices)} images in one folder; {advice}")
    if len(slices) < MIN_SLICES:
        raise ImageError(SkipReason.NO_SLICES, f"{len(slices)} found; give the folder that holds the whole series")
    for what, lacks in (
        ("position", [one for one in slices if not one.position.size]),
        ("orientation", [one for one in slices if not one.orientation.size or abs(np.linalg.norm(one.normal) - 1) > 0.01]),
        ("pixel spacing", [one for one in slices if not one.spacing.size or one.spacing.min() <= 0]),
    ):
        if lacks:
            raise ImageError(SkipReason.NO_GEOMETRY, f"{len(lacks)} of {len(slices)} slices state no usable {what}")
    if unscaled := [one for one in slices if not math.isfinite(one.slope * one.intercept) or one.units not in ("", "HU", "US")]:
        raise ImageError(
            SkipReason.NOT_HOUNSFIELD, f"{len(unscaled)} of {len(slices)} slices state no rescale to Hounsfield units"
        )
    first = slices[0]
    for what, differ in (
        ("size", [one for one in slices if one.shape != first.shape]),
        ("pixel spacing", [one for one in slices if not np.allclose(one.spacing, first.spacing, atol=_SAME_SPACING_MM)]),
        ("orientation", [one for one in slices if not np.allclose(one.orientation, first.orientation, atol=_SAME_COSINE)]),
    ):
        if differ:
            raise ImageError(SkipReason.MIXED_SERIES, f"{len(differ)} of {len(slices)} slices have another {what} than the first")


def _sort_slices(slices: list[CtSlice]) -> tuple[list[CtSlice], int]:
    """(`slices` along their normal, one at a position, and how many were dropped for that); an ImageError where most positions have more
    than one image: volumes that follow one another in time."""
    unique = list({one.uid or str(one.path): one for one in sorted(slices, key=lambda one: -one.number)}.values())
    ordered = sorted(unique, key=lambda one: (one.position @ slices[0].normal, one.number))
    kept: list[CtSlice] = []
    places: Counter[int] = Counter()
    for one in ordered:
        if not kept or (one.position - kept[-1].position) @ slices[0].normal > _SAME_PLACE_MM:
            kept.append(one)
        places[len(kept)] += 1
    repeated = sum(count > 1 for count in places.values())
    if 2 * repeated >= len(kept):
        raise ImageError(
            SkipReason.TIME_SERIES, f"{len(ordered)} images at {len(kept)} positions; give each volume a folder of its own"
        )
    if len(kept) < MIN_SLICES:
        raise ImageError(SkipReason.NO_SLICES, f"{len(kept)} positions")
    return kept, len(slices) - len(kept)


def _check_steps(slices: list[CtSlice]) -> float:
    """Returns the spacing in mm of sorted `slices`.

    Raises:
        ImageError: they are not stacked along their normal, positions are missing between them, or their steps are uneven.
    """
    normal = slices[0].normal
    places = np.array([one.position for one in slices]) - slices[0].position
    along = places @ normal
    aside = places - np.outer(along, normal)
    angle = max(math.degrees(math.atan2(np.linalg.norm(aside[-1]), along[-1])), *(abs(one.tilt_deg) for one in slices))
    if angle > MAX_TILT_DEG:
        raise ImageError(
            SkipReason.GANTRY_TILT, f"{angle:.1f} degrees; have it resampled to slices at right angles to their axis"
        )
    if np.linalg.norm(aside - np.outer(along / along[-1], aside[-1]), axis=1).max() > slices[0].spacing.max():
        raise ImageError(SkipReason.MIXED_SERIES, "slices are shifted against one another within their plane")
    steps = np.diff(along)
    usual = float(np.sort(steps)[(len(steps) - 1) // 2])  # the lower median: of two steps the longer is the gap
    wrong = np.flatnonzero(abs(steps - usual) > MAX_UNEVEN * usual)
    if wrong.size:
        place = f"between slices {wrong[0] + 1} and {wrong[0] + 2} of {len(slices)}, counted along their normal"
        counts = steps[wrong] / usual
        if (abs(counts - np.rint(counts)) <= MAX_UNEVEN * np.rint(counts)).all() and counts.min() > 1.5:
            missing = int((np.rint(counts) - 1).sum())
            raise ImageError(SkipReason.MISSING_SLICES, f"{missing} positions without an image, the first {place}")
        raise ImageError(
            SkipReason.MISSING_SLICES,
            f"{wrong.size} uneven steps of {steps[wrong[0]]:.2f}, not {usual:.2f} mm, the first {place}",
        )
    return float(along[-1]) / (len(slices) - 1)


def _decode(dataset: Dataset, one: CtSlice) -> NDArray[np.int16]:
    """Hounsfield units of one slice, int16 [rows, columns]: stored values times slope plus intercept (PS3.3, C.11.1.1), padding as air."""
    if one.frames > 1:
        dataset = _take_frame(dataset, one)
    layout = read_layout(dataset)
    if (layout.rows, layout.columns) != one.shape:
        raise ImageError(SkipReason.CORRUPT, "another size than the header's")
    codes = read_codes(dataset, layout)
    occurring = find_codes(codes)
    values = layout.values_of(occurring)
    units = np.where(is_padding(dataset, layout, values), AIR_HU, values * one.slope + one.intercept)
    table = np.zeros(CODE_COUNT, np.int16)
    table[occurring] = np.clip(np.rint(units), AIR_HU, np.iinfo(np.int16).max)
    return table[codes]


def _take_frame(dataset: Dataset, one: CtSlice) -> Dataset:
    """`dataset` with only the pixels of one of its frames, as a file of one frame has them."""
    tags = dataset.keys()  # of a copy they would be those of `dataset` itself
    single = Dataset({tag: dataset[tag] for tag in tags})
    single.file_meta, single.NumberOfFrames = dataset.file_meta, 1
    implicit, little_endian = dataset.original_encoding
    single.set_original_encoding(implicit, little_endian, dataset.original_character_set)
    stored = dataset["PixelData"]
    if UID(dataset.file_meta.get("TransferSyntaxUID", "")).is_encapsulated:
        single["PixelData"] = DataElement(
            stored.tag, "OB", encapsulate([get_frame(stored.value, one.frame, number_of_frames=one.frames)])
        )
        return single
    size = one.shape[0] * one.shape[1] * integer_of(dataset, "BitsAllocated") // 8
    single["PixelData"] = DataElement(stored.tag, stored.VR, stored.value[one.frame * size : (one.frame + 1) * size])
    return single
