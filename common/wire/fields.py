"""What stands in a message, checked at the door, and the numbers of an update: nothing of the other side goes further as it happened to be.

    run_token, round_number       what a site's state of a run is named by; the only values of a message that name a file
    rate_factor                   the factor on a round's learning rate
    site_name, metric_name        what reports, logs and terminals show
    foreign_sentence              text of the other side that people read: short, on one line, control characters as escapes
    site_report, json_object      JSON of bounded size and depth, with counts where counts are expected
    array_values                  an array whose bytes are as many as its header says
    decode_parameters             the arrays of an update, as `encode_parameters` wrote them

Each raises `MessageError`, which says what was expected; what came is quoted only where it is short and made printable.

An update travels as float32 weights, or as the difference from the round's global weights in 16 or 8 bits. The difference, since it is
small and centred: 16 bits of a weight of size 1 step by 5e-4, more than many a round moves it, while 16 bits of the difference step by a
thousandth of it. Normalisation statistics stay float32: they are a thousandth of the bytes, and a running variance may be of any size.

    float32   {parameters float32 [P]}                               44.7 MB for ResNet18
    float16   {difference float16 [P]}                               22.3 MB; values beyond +-65504 are refused
    int8      {difference int8 [P], scales float32 [ceil(P / 1024)]}  11.2 MB

The 8-bit code divides each block of 1,024 values by its scale (largest magnitude / 127) and rounds stochastically, so that its
expectation is the value itself and rounding errors of many sites cancel instead of adding up (Alistarh et al. 2017, QSGD, section 3.1).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from io import BytesIO
from typing import Any, NewType

import numpy as np
from flwr.app import Array, ArrayRecord

from pneumofed.common.config.choices import UpdatePrecision
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.errors import MessageError, printable_line

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
MOST_HEADER_BYTES = 2**14
"""Of an array; NumPy reads none longer than 10,000 bytes."""
NUMPY_FILE = "numpy.ndarray"
"""Flower's name for an array whose bytes are a NumPy file."""
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


def pack_values(values: np.ndarray) -> Array:
    """Makes what `Array(values)` of Flower makes, byte for byte, with one copy of the values in place of three.

    Args:
        values: numbers, of any shape.
    """
    plain, head = np.asarray(values, order="C"), BytesIO()
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(plain))
    return Array(str(plain.dtype), plain.shape, NUMPY_FILE, b"".join((head.getvalue(), plain.reshape(-1).view(np.uint8).data)))


def shared_record(arrays: Mapping[str, Array]) -> ArrayRecord:
    """Makes a record of these very arrays; the constructor makes others, and refuses those whose bytes are mapped."""
    record = ArrayRecord()
    for name, array in arrays.items():
        record[name] = array
    return record


def array_values(array: Array, name: str) -> np.ndarray:
    """Reads an array, once its bytes are known to be as many as its header says: a header by itself must not cost memory.

    Args:
        array: as it travelled, not trusted.
        name: of it, for the error.

    Returns:
        The values where they lie in the message, not copied; they cannot be written to.

    Raises:
        MessageError: it is no array of plain numbers, or not whole.
    """
    try:
        values = _values_in(array.data) if array.stype == NUMPY_FILE else None
    except Exception:  # NumPy's parsers raise what they like on bytes that are no array
        values = None
    if values is None:
        raise MessageError(f"array {name}: expected plain numbers, as many as its header says")
    return values


def _values_in(data: bytes) -> np.ndarray | None:
    """The values of a NumPy file (format 1.0 or 2.0) of numbers; None where it is longer or shorter than its header says."""
    file = BytesIO(memoryview(data)[:MOST_HEADER_BYTES])
    major, _ = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, by_columns, kind = read(file)
    positive = kind.kind in "biuf" and all(side >= 0 for side in shape)
    if not positive or file.tell() + math.prod(shape) * kind.itemsize != len(data):
        return None
    return np.frombuffer(data, kind, math.prod(shape), file.tell()).reshape(shape, order="F" if by_columns else "C")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MOST_COUNT


def _quoted(value: object) -> str:
    return repr(foreign_sentence(value, 40)) if isinstance(value, str) else type(value).__name__


PARAMETERS, DIFFERENCE, SCALES = "parameters", "difference", "scales"
BLOCK = 1024
"""Values that share a scale: 0.4 % more bytes, and one outlier spoils no more than these."""
LEVELS = 127


def encode_parameters(
    parameters: np.ndarray, base: np.ndarray, precision: UpdatePrecision, generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """Encodes parameters for a receiver that has `base`.

    Args:
        parameters: float32 [P].
        base: float32 [P], the round's global parameters.
        precision: number type on the wire.
        generator: of the stochastic rounding of `int8`; is moved on there only.

    Returns:
        The arrays that travel, by name, as the table above has them.

    Raises:
        MessageError: a difference is not finite, or too large for float16.
    """
    if precision == "float32":
        return {PARAMETERS: parameters}
    difference = parameters - base
    if not np.isfinite(difference).all():
        raise MessageError("the update holds values that are not finite")
    if precision == "float16":
        return {DIFFERENCE: _to_float16(difference)}
    codes, scales = _quantise(difference, generator)
    return {DIFFERENCE: codes, SCALES: scales}


def decode_parameters(arrays: dict[str, np.ndarray], base: np.ndarray, precision: UpdatePrecision) -> np.ndarray:
    """Decodes what `encode_parameters` made, up to rounding.

    Args:
        arrays: as they travelled, by name.
        base: float32 [P], the round's global parameters.
        precision: number type on the wire.

    Returns:
        float32 [P].

    Raises:
        MessageError: other names, number types or sizes than the precision has.
    """
    expected = _expected_form(len(base), precision)
    found = {name: (str(values.dtype), values.shape) for name, values in arrays.items()}
    if found != expected:
        raise MessageError(f"expected arrays {_describe_form(expected)}, got {_describe_form(found)}")
    if precision == "float32":
        return arrays[PARAMETERS]
    if precision == "float16":
        return base + arrays[DIFFERENCE].astype(np.float32)
    return base + _dequantise(arrays[DIFFERENCE], arrays[SCALES])


def _expected_form(count: int, precision: UpdatePrecision) -> dict[str, tuple[str, tuple[int, ...]]]:
    if precision == "float32":
        return {PARAMETERS: ("float32", (count,))}
    if precision == "float16":
        return {DIFFERENCE: ("float16", (count,))}
    return {DIFFERENCE: ("int8", (count,)), SCALES: ("float32", (-(-count // BLOCK),))}


def _describe_form(form: dict[str, tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {kind} {list(shape)}" for name, (kind, shape) in sorted(form.items())[:4])


def _to_float16(difference: np.ndarray) -> np.ndarray:
    largest = np.finfo(np.float16).max
    if np.abs(difference).max(initial=0.0) > largest:
        raise MessageError(f"the update moves a weight by more than {largest:g}, which float16 cannot hold")
    return difference.astype(np.float16)


def _quantise(difference: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    blocks = _in_blocks(difference)
    scales = (np.abs(blocks).max(axis=1) / LEVELS).astype(np.float32)
    steps = np.divide(blocks, scales[:, None], out=np.zeros_like(blocks), where=scales[:, None] > 0)
    noise = generator.random(blocks.shape, dtype=np.float32)
    codes = np.clip(np.floor(steps + noise), -LEVELS, LEVELS).astype(np.int8)
    return codes.reshape(-1)[: len(difference)], scales


def _dequantise(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    values = _in_blocks(codes).astype(np.float32) * scales[:, None]
    return values.reshape(-1)[: len(codes)]


def _in_blocks(values: np.ndarray) -> np.ndarray:
    """[ceil(N / BLOCK), BLOCK]; the last block is filled up with zeros."""
    padded = np.zeros(-(-len(values) // BLOCK) * BLOCK, values.dtype)
    padded[: len(values)] = values
    return padded.reshape(-1, BLOCK)
