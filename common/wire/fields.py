"""Types of what stands in a message, checked at the door: nothing that the other side wrote goes further as the text it happened to be.

    run_token, round_number       what a site's state of a run is named by; the only values of a message that name a file
    rate_factor                   the factor on a round's learning rate
    site_name, metric_name        what reports, logs and terminals show
    foreign_sentence              text of the other side that people read: short, on one line, control characters as escapes
    site_report, json_object      JSON of bounded size and depth, with counts where counts are expected
    array_values                  an array whose bytes are as many as its header says

Each raises `MessageError`, which says what was expected; what came is quoted only where it is short and made printable.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from io import BytesIO
from typing import Any, NewType

import numpy as np
from flwr.app import Array

from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.errors import MessageError
from pneumofed.common.printable import printable_line

RunToken = NewType("RunToken", str)
"""16 hexadecimal digits, as `secrets.token_hex(8)` draws them; made by `run_token` only."""

MOST_ROUNDS = 10**6
MAX_TEXT_BYTES = 2**24
"""Of a step of a secure sum with the keys of 10,000 sites: a few MB."""
MAX_EXPERIMENT_BYTES = 2**16
MAX_REPORT_BYTES = 2**15
MAX_SENTENCE = 300
MOST_METRICS = 64
MOST_COUNT = 2**40
_COUNTS = ("found", "used", "patients", "train", "validation")


def run_token(value: object) -> RunToken:
    """Checks that `value` is a run's token.

    Raises:
        MessageError: it is none.
    """
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{16}", value):
        raise MessageError(f"run: expected a token of 16 hexadecimal digits, got {_quoted(value)}")
    return RunToken(value)


def round_number(value: object) -> int:
    """Checks that `value` is the number of a round; 0 stands for the enrolment before the first.

    Raises:
        MessageError: it is none.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST_ROUNDS:
        raise MessageError(f"round: expected a whole number from 0 to {MOST_ROUNDS}, got {_quoted(value)}")
    return value


def rate_factor(value: object, experiment: ExperimentConfig) -> float:
    """Checks that `value` is a factor on the learning rate that `experiment` may come to.

    Args:
        value: as it came.
        experiment: of the same message.

    Raises:
        MessageError: it is none, or the experiment's schedule has no such factor.
    """
    if experiment.training.schedule != "plateau":
        raise MessageError(f"rate factor: expected none under the schedule {experiment.training.schedule}, got {_quoted(value)}")
    if not isinstance(value, float) or not 0.0 < value <= 1.0:
        raise MessageError(f"rate factor: expected a number above 0 and up to 1, got {_quoted(value)}")
    return value


def site_name(value: object) -> str:
    """Checks that `value` is the name of a site, as `SiteConfig.name` has it.

    Raises:
        MessageError: it is none.
    """
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
        raise MessageError(f"site name: expected up to 64 of A-Z, a-z, 0-9, '.', '_' and '-', got {_quoted(value)}")
    return value


def layout_digest(value: object) -> str:
    """Checks that `value` is the digest of a layout, or empty as in the steps of a secure sum.

    Raises:
        MessageError: it is neither.
    """
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{0,64}", value):
        raise MessageError(f"layout: expected up to 64 hexadecimal digits, got {_quoted(value)}")
    return value


def bounded_text(value: object, name: str, most_bytes: int = MAX_TEXT_BYTES) -> str:
    """Checks that `value` is text of a bounded size, which its own parser reads next.

    Args:
        value: from a record.
        name: of the field, for the error.
        most_bytes: in UTF-8.

    Raises:
        MessageError: it is no text, or longer.
    """
    if not isinstance(value, str) or len(value) > most_bytes or len(value.encode("utf-8", "replace")) > most_bytes:
        raise MessageError(f"{name}: expected text of at most {most_bytes} bytes")
    return value


def foreign_sentence(value: object, most: int = MAX_SENTENCE) -> str:
    """Returns text of the other side as people may read it: on one line, without control characters, cut off behind `most` characters.

    Args:
        value: anything; what is no text becomes empty.
        most: characters.
    """
    text = printable_line(value[:most]) if isinstance(value, str) else ""
    return text[:most] + ("…" if isinstance(value, str) and len(value) > most else "")


def class_name(value: object) -> str:
    """Returns the name of an error's class, or `MessageError` where `value` is none."""
    return value if isinstance(value, str) and re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,63}", value) else MessageError.__name__


def json_object(value: object, name: str, most_bytes: int = MAX_REPORT_BYTES) -> dict[str, Any]:
    """Parses text as a JSON object.

    Args:
        value: from a record.
        name: of the field, for the error.
        most_bytes: longest text that is parsed.

    Raises:
        MessageError: it is too long, no JSON, or no object.
    """
    try:
        found = json.loads(bounded_text(value, name, most_bytes))
    except (ValueError, RecursionError):
        raise MessageError(f"{name}: expected JSON") from None
    if not isinstance(found, dict):
        raise MessageError(f"{name}: expected a JSON object")
    return found


def site_report(value: object) -> dict[str, Any]:
    """Parses a site's report on its data: numbers, names of what is withheld, and numbers by name.

    Raises:
        MessageError: it is too long or of another form, or a count is no count.
    """
    report = json_object(value, "data report")
    for key, entry in report.items():
        numbers = entry.values() if isinstance(entry, dict) else () if isinstance(entry, list) else (entry,)
        names = [key, *(entry if isinstance(entry, dict | list) else ())]
        if not all(isinstance(name, str) and name == foreign_sentence(name) for name in names):
            raise MessageError("data report: expected printable names of at most 300 characters")
        if not all(_is_number(number) for number in numbers):
            raise MessageError("data report: expected numbers from 0 to 2^40")
    if not all(isinstance(report.get(key, 0), int) for key in _COUNTS):
        raise MessageError(f"data report: expected whole numbers for {', '.join(_COUNTS)}")
    return report


def metric_values(record: Mapping[str, Any]) -> dict[str, float]:
    """Checks a site's metrics; what is not finite becomes NaN.

    Raises:
        MessageError: too many, a name that is none, or a value that is no number.
    """
    if len(record) > MOST_METRICS:
        raise MessageError(f"expected at most {MOST_METRICS} metrics, got {len(record)}")
    found = {}
    for name, value in record.items():
        if not re.fullmatch("[A-Za-z][A-Za-z0-9_-]{0,63}", name):
            raise MessageError(f"metric: expected a name of letters, digits, '_' and '-', got {_quoted(name)}")
        if not isinstance(value, int | float):
            raise MessageError(f"metric {name}: expected a number")
        found[name] = float(value) if abs(value) < 2**1023 else math.nan
    return found


def array_values(array: Array, name: str) -> np.ndarray:
    """Reads an array, once its bytes are known to be as many as its header says: a header by itself must not cost memory.

    Args:
        array: as it travelled, not trusted.
        name: of it, for the error.

    Raises:
        MessageError: it is no array of plain numbers, or not whole.
    """
    try:
        values = array.numpy() if _is_whole(array.data) else None
    except Exception:  # NumPy's and Flower's parsers raise what they like on bytes that are no array
        values = None
    if values is None:
        raise MessageError(f"array {name}: expected plain numbers, as many as its header says")
    return values


def _is_whole(data: bytes) -> bool:
    """Whether `data` is a NumPy file (format 1.0 or 2.0) of numbers, no longer and no shorter than its header says."""
    file = BytesIO(data)
    major, _ = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, _, kind = read(file)
    positive = kind.kind in "biuf" and all(side >= 0 for side in shape)
    return positive and file.tell() + math.prod(shape) * kind.itemsize == len(data)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MOST_COUNT


def _quoted(value: object) -> str:
    return repr(foreign_sentence(value, 40)) if isinstance(value, str) else type(value).__name__
