"""Values of DICOM tags as files have them: text where a number belongs, empty, or a list. What is malformed counts as absent.

Silence for libraries whose warnings quote what is in a file, and with it a patient's name.
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

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from pneumofed.common.errors import ImageError, SkipReason

MAX_TEXT = 64
"""Characters of a Long String, the longest text that is read (PS3.5, 6.2)."""
_YEARS_PER_UNIT = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}


def value_of(dataset: Dataset, keyword: str) -> Any:
    """The value of a tag; None where it is absent or cannot be converted."""
    try:
        return dataset.get(keyword)
    except Exception:  # pydicom converts on access and raises whatever its parsers meet
        return None


def text_of(dataset: Dataset, keyword: str) -> str:
    """The first value as text in one line, or an empty text."""
    values = _values(dataset, keyword)
    return _as_text(values[0]) if values else ""


def code_of(dataset: Dataset, keyword: str) -> str:
    """A Code String (PS3.5, 6.2) in capitals, or an empty text where the value has not that form and so might be anything."""
    return next(iter(codes_of(dataset, keyword)), "")


def codes_of(dataset: Dataset, keyword: str) -> list[str]:
    """All values as Code Strings; an empty text for each that has not that form."""
    texts = (_as_text(value).upper() for value in _values(dataset, keyword))
    return [text if re.fullmatch(r"[A-Z0-9_ ]{1,16}", text) else "" for text in texts]


def numbers_of(dataset: Dataset, keyword: str) -> list[float]:
    """All values; NaN for each that is no finite number."""
    return [_as_number(value) for value in _values(dataset, keyword)]


def number_of(dataset: Dataset, keyword: str, default: float) -> float:
    """The first value, or `default`."""
    numbers = numbers_of(dataset, keyword)
    return numbers[0] if numbers and not math.isnan(numbers[0]) else default


def integer_of(dataset: Dataset, keyword: str, default: int | None = None) -> int:
    """The first value, or `default`.

    Raises:
        ImageError: there is neither.
    """
    number = number_of(dataset, keyword, math.nan if default is None else default)
    if math.isnan(number):
        raise ImageError(SkipReason.CORRUPT, f"no usable {keyword}")
    return int(number)


def age_years_of(dataset: Dataset) -> float | None:
    """Patient's Age (0010,1010), an Age String such as 010Y, 006M, 010W or 012D (PS3.5, 6.2)."""
    match = re.fullmatch(r"(\d{1,3})([DWMY])", text_of(dataset, "PatientAge").upper())
    return int(match[1]) * _YEARS_PER_UNIT[match[2]] if match else None


def date_of(dataset: Dataset, keyword: str) -> date | None:
    """A Date such as 20240131 (PS3.5, 6.2, DA), or None."""
    text = text_of(dataset, keyword)
    try:
        return date(int(text[:4]), int(text[4:6]), int(text[6:])) if re.fullmatch(r"[0-9]{8}", text) else None
    except ValueError:
        return None


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


_lock = threading.Lock()
_users = 0
_filters: warnings.catch_warnings[None] | None = None


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """Silences all warnings of this process while any thread is within such a block.

    Counted under a lock, because `warnings.catch_warnings` alone leaves the wrong filters behind when two threads leave it in
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
