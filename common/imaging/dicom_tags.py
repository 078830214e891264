"""Reads what a DICOM file's tags say, as files have it: text where a number belongs, empty, or a list. Malformed values count as absent.

`quiet_warnings` silences libraries whose warnings quote what is in a file, and with it a patient's name. `square_shape` and `stretch_to`
follow the tags that say how high and wide a pixel is: an image whose pixels are not square is stretched until they are.
"""

from __future__ import annotations

import math
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from typing import Any

import numpy as np
import PIL.Image
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from pneumofed.common.errors import ImageError, SkipReason
from pneumofed.common.imaging.patient_groups import AgeGroup, age_group_between, age_group_of_string

MAX_TEXT = 64
"""Characters of a Long String, the longest text that is read (PS3.5, 6.2)."""
_YEARS_PER_UNIT = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}

_lock = threading.Lock()
_users = 0
_filters: warnings.catch_warnings[None] | None = None


def value_of(dataset: Dataset, keyword: str) -> Any:
    """Reads the value of a tag.

    Args:
        dataset: the file's tags, or an item of a sequence.
        keyword: the tag's keyword in the standard (PS3.6), e.g. `WindowCenter`.

    Returns:
        The value as pydicom converts it; None where the tag is absent or cannot be converted.
    """
    try:
        return dataset.get(keyword)
    except Exception:  # pydicom converts on access and raises whatever its parsers meet
        return None


def text_of(dataset: Dataset, keyword: str) -> str:
    """Reads the first value of a tag as text in one line.

    Args:
        dataset: the file's tags, or an item of a sequence.
        keyword: the tag's keyword.

    Returns:
        Printable characters, `MAX_TEXT` at most; an empty text where the tag is absent.
    """
    values = _values(dataset, keyword)
    return _as_text(values[0]) if values else ""


def all_texts_of(dataset: Dataset, keyword: str) -> list[str]:
    """Reads all values of a tag as texts.

    Args:
        dataset: the file's tags, or an item of a sequence.
        keyword: the tag's keyword.

    Returns:
        As `text_of`, of each value.
    """
    return [_as_text(value) for value in _values(dataset, keyword)]


def code_of(dataset: Dataset, keyword: str) -> str:
    """Reads the first value of a tag as a Code String (PS3.5, 6.2).

    Args:
        dataset: the file's tags, or an item of a sequence.
        keyword: the tag's keyword.

    Returns:
        The code in capitals; an empty text where the value does not have that form and so might be anything.
    """
    return next(iter(codes_of(dataset, keyword)), "")


def codes_of(dataset: Dataset, keyword: str) -> list[str]:
    """Reads all values of a tag as Code Strings.

    Args:
        dataset: the file's tags, or an item of a sequence.
        keyword: the tag's keyword.

    Returns:
        The codes in capitals, an empty text for each value that does not have that form; no values where the tag is absent.
    """
    texts = (_as_text(value).upper() for value in _values(dataset, keyword))
    return [text if re.fullmatch(r"[A-Z0-9_ ]{1,16}", text) else "" for text in texts]


def numbers_of(dataset: Dataset, keyword: str) -> list[float]:
    """Reads all values of a tag as numbers.

    Args:
        dataset: the file's tags, or an item of a sequence.
        keyword: the tag's keyword.

    Returns:
        The numbers, NaN for each value that is no finite number; no values where the tag is absent.
    """
    return [_as_number(value) for value in _values(dataset, keyword)]


def number_of(dataset: Dataset, keyword: str, default: float) -> float:
    """Reads the first value of a tag as a number.

    Args:
        dataset: the file's tags, or an item of a sequence.
        keyword: the tag's keyword.
        default: where the tag is absent or its value is no finite number.
    """
    numbers = numbers_of(dataset, keyword)
    return numbers[0] if numbers and not math.isnan(numbers[0]) else default


def integer_of(dataset: Dataset, keyword: str, default: int | None = None) -> int:
    """Reads the first value of a tag as an integer.

    Args:
        dataset: the file's tags, or an item of a sequence.
        keyword: the tag's keyword.
        default: where the tag is absent or its value is no finite number; None where the file must have it.

    Returns:
        The value, cut to an integer.

    Raises:
        ImageError: there is neither a value nor a default.
    """
    number = number_of(dataset, keyword, math.nan if default is None else default)
    if math.isnan(number):
        raise ImageError(SkipReason.CORRUPT, f"no usable {keyword}")
    return int(number)


def age_years_of(dataset: Dataset) -> float | None:
    """Reads Patient's Age (0010,1010), an Age String such as 010Y, 006M, 010W or 012D (PS3.5, 6.2), in years; None where it is absent."""
    match = re.fullmatch(r"(\d{1,3})([DWMY])", text_of(dataset, "PatientAge").upper())
    return int(match[1]) * _YEARS_PER_UNIT[match[2]] if match else None


def age_group_in(dataset: Dataset) -> AgeGroup | None:
    """Reads the age group of Patient's Age (0010,1010), else of Patient's Birth Date (0010,0030) and Study Date (0008,0020)."""
    stated = age_group_of_string(text_of(dataset, "PatientAge"))
    return stated or age_group_between(date_of(dataset, "PatientBirthDate"), date_of(dataset, "StudyDate"))


def date_of(dataset: Dataset, keyword: str) -> date | None:
    """Reads a Date such as 20240131 (PS3.5, 6.2, DA).

    Args:
        dataset: the file's tags, or an item of a sequence.
        keyword: the tag's keyword.

    Returns:
        The date; None where the tag is absent or names no day.
    """
    text = text_of(dataset, keyword)
    try:
        return date(int(text[:4]), int(text[4:6]), int(text[6:])) if re.fullmatch(r"[0-9]{8}", text) else None
    except ValueError:
        return None


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """Silences all warnings of this process while any thread is within such a block.

    Counted under a lock, because `warnings.catch_warnings` by itself leaves the wrong filters behind when two threads leave it in
    the order in which they came: warnings would stay silenced for ever, or speak while another thread still reads a patient's file.
    """
    global _users, _filters
    with _lock:
        if _users == 0:
            _filters = warnings.catch_warnings()
            _filters.__enter__()
            warnings.simplefilter("ignore")
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and _filters is not None:
                _filters.__exit__(None, None, None)


def _as_text(value: Any) -> str:
    return "".join(filter(str.isprintable, str(value))).strip()[:MAX_TEXT]


def _as_number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def _values(dataset: Dataset, keyword: str) -> list[Any]:
    value = value_of(dataset, keyword)
    if value is None:
        return []
    return list(value) if isinstance(value, (MultiValue, list, tuple)) else [value]


ASPECT_TAGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio")
"""(0028,0030), (0018,1164), (0018,2010) and (0028,0034): the height and the width of a pixel (PS3.3, C.7.6.3 and 10.7.1.3). The ratio is
meant for files that have none of the three before it."""
MIN_DIFFERENCE = 0.01
"""Below 1 % the shape of a chest stays what it is, and each pixel keeps its value."""
MAX_RATIO = 4.0
"""Beyond this no detector goes: the values are wrong, and are not used."""


def square_shape(dataset: Dataset, rows: int, columns: int) -> tuple[int, int]:
    """Computes the (rows, columns) that an image has with square pixels; the longer side of a pixel is divided, so nothing is lost.

    Args:
        dataset: the file's tags.
        rows, columns: of the stored image.
    """
    ratio = _height_to_width(dataset)
    if abs(ratio - 1) < MIN_DIFFERENCE or not 1 / MAX_RATIO <= ratio <= MAX_RATIO:
        return rows, columns
    return (round(rows * ratio), columns) if ratio > 1 else (rows, round(columns / ratio))


def stretch_to(pixels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Stretches `pixels`, float32 [H, W] in [0, 1], to `shape` (rows, columns), bilinear; the same array where it has that shape."""
    if pixels.shape == shape:
        return pixels
    resized = PIL.Image.fromarray(pixels).resize(shape[::-1], PIL.Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.clip(np.asarray(resized), 0, 1), np.float32)


def _height_to_width(dataset: Dataset) -> float:
    for keyword in ASPECT_TAGS:
        values = numbers_of(dataset, keyword)
        if len(values) == 2 and not any(map(math.isnan, values)) and min(values) > 0:
            return values[0] / values[1]
    return 1.0
