"""The grey value formulas of DICOM (PS3.3, C.11) on float64 [N] arrays of distinct pixel values.

An image of up to 16 bits holds at most 65,536 distinct values, so each step runs on those in double precision, and the image
itself is mapped once through the table that results.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from common.image_types import Window

CODES = 2**16
_BLOCK_PIXELS = 2**20
VoiFunction = Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"]


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
        """The entry of each of `values`; the first or last entry for values outside of the table."""
        index = np.clip(np.rint(values - self.first), 0, len(self.entries) - 1)
        return self.entries[index.astype(np.int64)]

    @property
    def full_scale(self) -> float:
        """The entry that is shown white: 2^bits - 1, or the largest entry where a file declares too few bits."""
        return max(2.0**self.bits - 1, float(self.entries.max()))


def apply_window(values: np.ndarray, window: Window, function: VoiFunction = "LINEAR") -> np.ndarray:
    """`values` through a window, in [0, 1] with y_min = 0 and y_max = 1 (PS3.3, C.11.2.1.2.1 and C.11.2.1.3).

    LINEAR is defined for widths of at least 1; a narrower one is read as LINEAR_EXACT.
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
    """`values`, of which at least two differ, scaled so that the least is 0 and the greatest 1."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low)


def find_codes(codes: np.ndarray) -> np.ndarray:
    """The distinct values, ascending, int64 [N], in `codes` uint16 [H, W]."""
    counts = np.zeros(CODES, np.int64)
    for block in _blocks(codes):
        counts += np.bincount(codes[block].ravel(), minlength=CODES)
    return np.flatnonzero(counts)


def map_codes(codes: np.ndarray, table: np.ndarray) -> np.ndarray:
    """`table[codes]`, float32 [H, W], for `codes` uint16 [H, W] and `table` float32 [65536]."""
    mapped = np.empty(codes.shape, np.float32)
    for block in _blocks(codes):
        mapped[block] = table[codes[block]]
    return mapped


def _blocks(codes: np.ndarray) -> Iterator[slice]:
    """Row ranges of about a million pixels: NumPy copies every index as 64 bits, four times the image itself."""
    rows = max(1, _BLOCK_PIXELS // codes.shape[1])
    return (slice(start, start + rows) for start in range(0, codes.shape[0], rows))
