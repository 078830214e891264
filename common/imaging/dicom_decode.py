"""Decodes a DICOM radiograph to display values: stored value, modality LUT or rescale, VOI LUT or window, inversion (PS3.4, N.2).

`decode_dicom` is the entry; `encode_dataset` gives an image in memory the form of a file. The grey value formulas (PS3.3, C.11) are
`LookupTable`, `apply_window` and `stretch`. An image of up to 16 bits holds at most 65,536 distinct values, so each formula runs on those,
as float64 [N], and the image itself is mapped once through the table that results (`find_codes`, `map_codes`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any, Literal

import numpy as np
from pydicom.dataset import Dataset, FileDataset

from pneumofed.common.errors import ArgumentError, ImageError, SkipReason
from pneumofed.common.imaging.dicom_pixels import PixelLayout, parse, read_codes, read_layout
from pneumofed.common.imaging.dicom_tags import (
    age_group_in,
    age_years_of,
    code_of,
    number_of,
    numbers_of,
    square_shape,
    stretch_to,
    text_of,
    value_of,
)
from pneumofed.common.imaging.dicom_views import read_body_part, read_view
from pneumofed.common.imaging.types import LUNG_WINDOW, Image, ImageInfo, Window, check_size

CODE_COUNT = 2**16
"""Distinct values that 16 bits can hold."""
_BLOCK_PIXELS = 2**20
"""Pixels that are mapped at once."""
VoiFunction = Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"]


def decode_dicom(data: bytes, window: Window | None = None) -> Image:
    """Decodes the radiograph in a DICOM file.

    With no `window`, the file's first VOI LUT is used, else its first window, else `LUNG_WINDOW` for CT, else the whole range
    of values that occur. Pixels that the file calls padding become black and do not count for that range.
    Pixels that are not square are stretched (`square_pixels`).

    Args:
        data: the bytes of the file, with or without preamble.
        window: takes the place of the file's own window or VOI LUT; in Hounsfield units for CT.

    Returns:
        The image, `pixels` float32 [H, W] in [0, 1].

    Raises:
        ImageError: the file cannot be used. On damaged bytes pydicom and the decoders may raise any other exception, which
            `common.imaging.images.read_image` turns into an `ImageError`.
    """
    dataset = parse(data)
    layout = read_layout(dataset)
    shape = square_shape(dataset, layout.rows, layout.columns)
    check_size(*shape)
    codes = read_codes(dataset, layout)
    occurring = find_codes(codes)
    tissue = occurring[~is_padding(dataset, layout, layout.values_of(occurring))]
    grey, used = _grey_values(dataset, layout.values_of(tissue), window)
    inverted = _is_inverted(dataset, layout)
    table = np.zeros(CODE_COUNT, np.float32)
    table[tissue] = 1 - grey if inverted else grey
    pixels = stretch_to(map_codes(codes, table), shape)
    return Image(pixels, replace(_describe(dataset, layout, used, inverted), height_px=shape[0], width_px=shape[1]))


def encode_dataset(dataset: Dataset) -> bytes:
    """Encodes `dataset` as a DICOM file, so that an image in memory is read as a file is, with the same checks.

    Raises:
        ArgumentError: it does not say how its pixels are encoded.
    """
    syntax = getattr(dataset, "file_meta", {}).get("TransferSyntaxUID")
    if syntax is None and None in dataset.original_encoding:
        raise ArgumentError(
            "pydicom data set: expected a transfer syntax in file_meta, as `pydicom.dcmread` reads it, got none; "
            "set dataset.file_meta.TransferSyntaxUID to what its pixels are encoded in"
        )
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=False)
    return buffer.getvalue()


def is_padding(dataset: Dataset, layout: PixelLayout, values: np.ndarray) -> np.ndarray:
    """Says which stored values are Pixel Padding Value (0028,0120) or up to its Range Limit (0028,0121): PS3.3, C.7.5.1.1.2.

    Args:
        dataset: the file's tags.
        layout: of its pixels.
        values: float64 [N].

    Returns:
        bool [N].
    """
    padding = number_of(dataset, "PixelPaddingValue", math.nan)
    ends = [padding, number_of(dataset, "PixelPaddingRangeLimit", padding)]
    span = 2**layout.bits_allocated
    least = -span // 2 if layout.signed else 0
    ends = [(end - least) % span + least for end in ends]  # writers give a signed value in an unsigned tag and vice versa
    return (values >= min(ends)) & (values <= max(ends))


def read_windows(dataset: Dataset) -> list[Window]:
    """Reads the usable pairs of Window Center (0028,1050) and Window Width (0028,1051); the first one counts."""
    pairs = zip(numbers_of(dataset, "WindowCenter"), numbers_of(dataset, "WindowWidth"), strict=False)
    return [Window(center, width) for center, width in pairs if not math.isnan(center) and width > 0]


def read_lookup_table(dataset: Dataset, keyword: str, inputs: np.ndarray) -> LookupTable | None:
    """Reads the first item of a LUT sequence (PS3.3, C.11.1.1.1).

    Args:
        dataset: the file's tags.
        keyword: `ModalityLUTSequence` or `VOILUTSequence`.
        inputs: the values that it will be applied to, float64 [N]; they decide whether the first value is read as signed.

    Returns:
        The table; None where there is none or it is malformed.
    """
    items = value_of(dataset, keyword)
    descriptor = numbers_of(items[0], "LUTDescriptor") if items else []
    if len(descriptor) != 3 or any(map(math.isnan, descriptor)):
        return None
    count, first, bits = (int(number) for number in descriptor)
    count = count % CODE_COUNT or CODE_COUNT  # 0 stands for 65536
    word = "<u2" if dataset.original_encoding[1] else ">u2"
    entries = _lut_entries(value_of(items[0], "LUTData"), word, 2 * count if bits <= 8 else 0)[:count]
    if not entries.size or not np.isfinite(entries).all():
        return None
    return LookupTable(_first_input(first, len(entries), inputs), entries, min(max(bits, 8), 16))


@dataclass(frozen=True)
class LookupTable:
    """A Modality or VOI LUT (PS3.3, C.11.1.1 and C.11.2.1.1).

    Attributes:
        first: the input value that maps to the first entry; LUT Descriptor (0028,3002), second value.
        entries: LUT Data (0028,3006), float64 [at least 1].
        bits: bits of an entry; LUT Descriptor, third value.
    """

    first: int
    entries: np.ndarray
    bits: int

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Looks up the entry of each of `values`; the first or last entry for values outside of the table."""
        index = np.clip(np.rint(values - self.first), 0, len(self.entries) - 1)
        return self.entries[index.astype(np.int64)]

    @property
    def full_scale(self) -> float:
        """The entry that is shown white: 2^n - 1, with n the bits that the entries use.

        n is that of the LUT Descriptor, unless the entries need more, or so few that at least two bits would stay empty: then writers gave
        the size of the word (16) for entries of 8 to 14 bits, and the image would be nearly black. One bit less is a dark table.
        """
        used = max(int(self.entries.max()).bit_length(), 8)
        return 2.0 ** (self.bits if used <= self.bits < used + 2 else used) - 1


def apply_window(values: np.ndarray, window: Window, function: VoiFunction = "LINEAR") -> np.ndarray:
    """Maps values through a window to [0, 1], with y_min = 0 and y_max = 1 (PS3.3, C.11.2.1.2.1 and C.11.2.1.3).

    LINEAR is defined for widths of at least 1; a narrower one is read as LINEAR_EXACT.

    Args:
        values: float64 [N], in the window's units.
        window: center and width.
        function: VOI LUT Function (0028,1056).

    Returns:
        float64 [N] in [0, 1].
    """
    offset = values - window.center
    if function == "SIGMOID":
        # The exponent is cut where the result rounds to 0 or 1, so that exp cannot overflow.
        return 1 / (1 + np.exp(np.clip(-4 * offset / window.width, -700, 700)))
    if function == "LINEAR" and window.width >= 1:
        if window.width == 1:
            return (offset > -0.5).astype(np.float64)
        return np.clip((offset + 0.5) / (window.width - 1) + 0.5, 0, 1)
    return np.clip(offset / window.width + 0.5, 0, 1)


def stretch(values: np.ndarray) -> np.ndarray:
    """Scales `values`, of which at least two differ, so that the least is 0 and the greatest 1."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low)


def find_codes(codes: np.ndarray) -> np.ndarray:
    """Finds the distinct values in `codes` uint16 [H, W]: int64 [N], ascending."""
    counts = np.zeros(CODE_COUNT, np.int64)
    for block in _blocks(codes):
        counts += np.bincount(codes[block].ravel(), minlength=CODE_COUNT)
    return np.flatnonzero(counts)


def map_codes(codes: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Maps each pixel through a table.

    Args:
        codes: uint16 [H, W].
        table: float32 [65536], by code.

    Returns:
        float32 [H, W].
    """
    mapped = np.empty(codes.shape, np.float32)
    for block in _blocks(codes):
        mapped[block] = table[codes[block]]
    return mapped


def _is_inverted(dataset: Dataset, layout: PixelLayout) -> bool:
    """Whether the least value is meant to be white.

    MONOCHROME1 says so (PS3.3, C.7.6.3.1.2). It comes with the Presentation LUT Shape INVERSE (C.8.11.3), which says the same
    once more and does not turn the image back.
    """
    return layout.photometric == "MONOCHROME1" or code_of(dataset, "PresentationLUTShape") == "INVERSE"


def _grey_values(dataset: FileDataset, stored: np.ndarray, window: Window | None) -> tuple[np.ndarray, Window | None]:
    """(grey in [0, 1] of each of the distinct `stored` values, the window that was applied).

    Raises:
        ImageError: they all have one grey.
    """
    values = _apply_modality(dataset, stored)
    if not values.size or not np.ptp(values) > 0:
        raise ImageError(SkipReason.CONSTANT)
    grey, used = _apply_voi(dataset, values, window)
    if not np.ptp(grey) > 0:
        raise ImageError(SkipReason.CONSTANT)
    return grey, used


def _apply_modality(dataset: FileDataset, stored: np.ndarray) -> np.ndarray:
    """Stored values through the Modality LUT Sequence (0028,3000), else rescaled: PS3.3, C.11.1.1."""
    table = read_lookup_table(dataset, "ModalityLUTSequence", stored)
    if table:
        return table.apply(stored)
    slope = number_of(dataset, "RescaleSlope", 1.0) or 1.0
    return stored * slope + number_of(dataset, "RescaleIntercept", 0.0)


def _apply_voi(dataset: FileDataset, values: np.ndarray, window: Window | None) -> tuple[np.ndarray, Window | None]:
    """(grey in [0, 1], window that was applied): `window`, else what the file says first (PS3.3, C.11.2.1)."""
    if window:
        return apply_window(values, window), window
    table = read_lookup_table(dataset, "VOILUTSequence", values)
    if table:
        return np.clip(table.apply(values) / table.full_scale, 0, 1), None
    window = next(iter(read_windows(dataset)), None)
    if window:
        return apply_window(values, window, _voi_function(dataset)), window
    if code_of(dataset, "Modality") == "CT":
        return apply_window(values, LUNG_WINDOW), LUNG_WINDOW
    return stretch(values), None


def _voi_function(dataset: Dataset) -> VoiFunction:
    """VOI LUT Function (0028,1056); LINEAR where it is absent (PS3.3, C.11.2.1.3) or unknown."""
    functions: dict[str, VoiFunction] = {"LINEAR_EXACT": "LINEAR_EXACT", "SIGMOID": "SIGMOID"}
    return functions.get(code_of(dataset, "VOILUTFunction"), "LINEAR")


def _first_input(first: int, count: int, inputs: np.ndarray) -> int:
    """The first value of a LUT, which is signed if its inputs may be (PS3.3, C.11.1.1.1 and C.11.2.1.1), whatever the type of its tag.

    Of the two readings of the 16 bits the one counts whose table holds more of the inputs; where that leaves it open, that of the tag.
    """
    other = first - CODE_COUNT if first >= CODE_COUNT // 2 else first + CODE_COUNT if first < 0 else first
    held = [np.count_nonzero((inputs >= start) & (inputs < start + count)) for start in (first, other)]
    return other if held[1] > held[0] else first


def _lut_entries(data: Any, word: str, min_bytes: int) -> np.ndarray:
    """LUT Data (0028,3006) as float64: numbers (VR US), or bytes (VR OW) with an entry in each `word`.

    Fewer than `min_bytes` bytes are entries of 8 bits, one in each byte (PS3.3, C.11.1.1.1).
    """
    if data is None:
        return np.empty(0)
    if isinstance(data, bytes):
        is_wide = len(data) >= min_bytes
        data = np.frombuffer(data[: len(data) // 2 * 2], word) if is_wide else np.frombuffer(data, np.uint8)
    return np.atleast_1d(np.asarray(data, np.float64))


def _describe(dataset: Dataset, layout: PixelLayout, window: Window | None, inverted: bool) -> ImageInfo:
    maker = (text_of(dataset, keyword) for keyword in ("Manufacturer", "ManufacturerModelName"))
    sexes: dict[str, Literal["M", "F"]] = {"M": "M", "F": "F"}
    return ImageInfo(
        format="dicom",
        height_px=layout.rows,
        width_px=layout.columns,
        bits=layout.bits_stored,
        modality=code_of(dataset, "Modality") or None,
        view=read_view(dataset).word or None,
        body_part=read_body_part(dataset) or None,
        sex=sexes.get(code_of(dataset, "PatientSex")),
        age_years=age_years_of(dataset),
        age_group=age_group_in(dataset),
        manufacturer=" ".join(filter(None, maker)) or None,
        photometric=layout.photometric,
        window=window,
        inverted=inverted,
        for_processing=code_of(dataset, "PresentationIntentType") == "FOR PROCESSING",
    )


def _blocks(codes: np.ndarray) -> Iterator[slice]:
    """Row ranges of about a million pixels: NumPy copies every index as 64 bits, four times the image itself."""
    rows = max(1, _BLOCK_PIXELS // codes.shape[1])
    return (slice(start, start + rows) for start in range(0, codes.shape[0], rows))
