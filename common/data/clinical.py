"""Clinical values beside the images: from the cells of a manifest or table to the numbers that a network takes, with checks on the way.

    read_values(rows, schema, place)         float32 [N, K], NaN where a value is not known; K is `ClinicalConfig.slots`
    with_clinical(dataset, schema, names)    a data set whose records have the manifest's columns
    count_known(records, schema, names)      of how many images each column is known

At prediction values come from a table beside the images, or by name (`inference.predict.clinical_table`), by the same rules.

A number stands in the unit of the schema. A header may state another, as `temperature [°F]`: what `CONVERSIONS` knows is converted, the
rest refused. A number outside the stated range is refused and not taken as missing, since nearly always the whole column is in another
unit. Errors name the column and the row, never what stands in the cell.

Values that are not known stay so: NaN, for which the network has an embedding of its own. Nothing is filled in from other patients.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pneumofed.common.config.experiment import ClinicalColumn, ClinicalConfig
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.data.manifest import ImageRecord
from pneumofed.common.data.tables import plain_text
from pneumofed.common.errors import DataError

Values = NDArray[np.float32]

MISSING_WORDS = frozenset(("", "na", "n/a", "nan", "none", "null", "nil", "-", "--", "?", ".", "unknown", "missing", "not known"))
YES_WORDS = frozenset(("1", "yes", "y", "true", "t", "positive", "pos", "+", "present", "ja", "oui", "si"))
NO_WORDS = frozenset(("0", "no", "n", "false", "f", "negative", "neg", "absent", "nein", "non"))
BETWEEN_CODES = re.compile(r"[;|,]")

CONVERSIONS: dict[tuple[str, str], tuple[float, float, str, str]] = {
    ("°f", "°c"): (5.0 / 9.0, -160.0 / 9.0, "°F", "Fahrenheit"),
    ("°c", "°f"): (9.0 / 5.0, 32.0, "°C", "Celsius"),
    ("k", "°c"): (1.0, -273.15, "K", "kelvin"),
    ("mg/dl", "mg/l"): (10.0, 0.0, "mg/dL", "milligrams a decilitre"),
    ("mg/l", "mg/dl"): (0.1, 0.0, "mg/L", "milligrams a litre"),
    ("g/l", "g/dl"): (0.1, 0.0, "g/L", "grams a litre"),
    ("g/dl", "g/l"): (10.0, 0.0, "g/dL", "grams a decilitre"),
    ("fraction", "%"): (100.0, 0.0, "fraction", "a fraction of 1"),
    ("%", "fraction"): (0.01, 0.0, "%", "per cent"),
    ("kpa", "mmhg"): (7.50062, 0.0, "kPa", "kilopascal"),
    ("mmhg", "kpa"): (0.133322, 0.0, "mmHg", "millimetres of mercury"),
    ("months", "years"): (1.0 / 12.0, 0.0, "months", "months"),
    ("days", "years"): (1.0 / 365.25, 0.0, "days", "days"),
    ("lb", "kg"): (0.45359237, 0.0, "lb", "pounds"),
    ("/s", "/min"): (60.0, 0.0, "/s", "per second"),
}
"""(unit that came, unit of the schema), in small letters -> factor, offset, its sign, its name; by definition of the units (BIPM, SI
brochure)."""

_SPELLINGS = {"c": "°c", "degc": "°c", "celsius": "°c", "f": "°f", "degf": "°f", "fahrenheit": "°f", "percent": "%"}
_SPELLINGS |= {
    "y": "years",
    "yr": "years",
    "year": "years",
    "mo": "months",
    "month": "months",
    "kelvin": "k",
    "bpm": "/min",
    "1/min": "/min",
}
_HEADER = re.compile(r"(.*?)\s*[\[(]\s*([^\])]*)[\])]\s*")
_BUILT_IN: dict[str, Callable[[ImageRecord], str]] = {
    "age": lambda record: "" if record.age_years is None else repr(record.age_years),
    "sex": lambda record: record.sex or "",
    "view": lambda record: record.view or "",
}
_NEAR = 0.7
"""Similarity of two names (`difflib`) from which one may be a misspelling of the other."""


@dataclass(frozen=True)
class SourceColumn:
    """Where a clinical column stands in a table: the name there, and how its numbers become those of the schema's unit."""

    name: str
    factor: float = 1.0
    offset: float = 0.0


def with_clinical(
    dataset: Dataset, schema: ClinicalConfig | None, names: Mapping[str, str | None] | None = None, place: str = "the manifest"
) -> Dataset:
    """Adds the clinical values of each image to a data set; without a schema it comes back as it is.

    Args:
        dataset: with the manifest's rows.
        schema: which columns, and what may stand in them; a column that the manifest lacks is not known of anybody.
        names: the site's own spelling of columns, `SiteConfig.clinical_columns`.
        place: names the table in errors.

    Raises:
        DataError: a unit, a number or a code does not fit, or a column seems to be spelt otherwise.
    """
    if schema is None:
        return dataset
    return replace(dataset, clinical=_of_records(dataset.records, schema, names or {}, place))


def count_known(
    records: Sequence[ImageRecord], schema: ClinicalConfig, names: Mapping[str, str | None], place: str
) -> dict[str, int]:
    """Counts of how many images each column is known; the checks are those of `with_clinical`.

    Args:
        records: of a manifest.
        schema: of a run.
        names: the site's own spelling of columns.
        place: names the table in errors.

    Raises:
        DataError: as `with_clinical`.
    """
    values = _of_records(records, schema, names, place)
    starts = np.cumsum([0, *(column.slots for column in schema.columns)])
    counts = np.isfinite(values[:, starts[:-1]]).sum(axis=0).tolist()
    return {column.name: int(count) for column, count in zip(schema.columns, counts, strict=True)}


def find_sources(
    schema: ClinicalConfig, present: Sequence[str], names: Mapping[str, str | None], place: str
) -> dict[str, SourceColumn]:
    """Finds the table's column for each column of the schema.

    Args:
        schema: whose columns.
        present: the table's columns, in small letters.
        names: the user's spelling for some of them; None says that there is none.
        place: names the table in errors.

    Returns:
        By the schema's name; a column that is not there is left out.

    Raises:
        DataError: a column is there twice or in a unit that does not fit, one that `names` gives is not there, or one is nearly there.
    """
    found: dict[str, SourceColumn] = {}
    taken = {plain_text(name).lower() for name in names.values() if name}
    for column in schema.columns:
        if column.name in names and names[column.name] is None:
            continue
        wanted = plain_text(names.get(column.name) or column.name).lower()
        same = [name for name in present if name == wanted] or [name for name in present if _split(name)[0] == wanted]
        if len(same) > 1:
            raise DataError(f"{place}: column '{column.name}' is there as '{same[0]}' and as '{same[1]}'; keep one")
        if same:
            found[column.name] = _source(same[0], column, place)
        elif column.name in names:
            raise DataError(
                f"{place}: '{names[column.name]}', which is to be '{column.name}', is no column; there are: {', '.join(present)}"
            )
        else:
            _refuse_near(column, [name for name in present if name not in taken], schema, place)
    return found


def read_values(
    rows: Iterable[tuple[int, Mapping[str, str]]], schema: ClinicalConfig, sources: Mapping[str, SourceColumn], place: str
) -> Values:
    """Reads the values of each row.

    Args:
        rows: (number in the table, 0 for none, cell by column in small letters).
        schema: which columns, in which order.
        sources: where each stands, of `find_sources`; one that is not there is not known.
        place: names the table in errors.

    Returns:
        float32 [N, K] in the schema's units, NaN where not known; of codes 1 where one is there, else 0.

    Raises:
        DataError: text where a number is expected, an unknown code, or a number outside its range.
    """
    given = list(rows)
    parts = [np.empty((len(given), 0), dtype=np.float32)]
    for column in schema.columns:
        source = sources.get(column.name)
        values = np.full((len(given), column.slots), np.nan)
        if source is not None:
            for number, (row, cells) in enumerate(given):
                values[number] = _read_cell(cells.get(source.name, ""), column, _at(place, row))
            values = values * source.factor + source.offset
            check_range(values[:, 0], column, [row for row, _ in given], place)
        parts.append(values.astype(np.float32))
    return np.concatenate(parts, axis=1)


def check_range(values: NDArray[np.float64], column: ClinicalColumn, rows: Sequence[int], place: str) -> None:
    """Refuses numbers outside the column's range, with the unit in which they would fit where one is known.

    Args:
        values: float64 [N], NaN where not known.
        column: of the schema; nothing is asked of what is no number.
        rows: number of each in the table.
        place: names the table.

    Raises:
        DataError: says in how many rows, and which is the first.
    """
    if column.low is None or column.high is None:
        return
    outside = np.flatnonzero((values < column.low) | (values > column.high))
    if not len(outside):
        return
    known = int(np.isfinite(values).sum())
    typical, hint = float(np.median(values[outside])), "check the unit, and the range in the run's schema"
    for (_, own), (factor, offset, other, name) in CONVERSIONS.items():
        if own == _unit(column.unit or "") and column.low <= typical * factor + offset <= column.high:
            hint = f"is it {name}? Then name the column '{column.name} [{other}]', and it is converted"
            break
    raise DataError(
        f"{_at(place, rows[outside[0]])}: '{column.name}' lies outside {column.low:g} to {column.high:g}{column.unit_words}"
        f"{f' (so do {len(outside)} of {known} values)' if len(values) > 1 else ''}; {hint}"
    )


def _of_records(records: Sequence[ImageRecord], schema: ClinicalConfig, names: Mapping[str, str | None], place: str) -> Values:
    present = list(dict.fromkeys(name for record in records for name, _ in record.others))
    stated = [name for name, read in _BUILT_IN.items() if any(read(record) for record in records)]
    found = find_sources(schema, [*present, *stated], names, place)
    return read_values([(record.row, _cells(record)) for record in records], schema, found, place)


def _cells(record: ImageRecord) -> dict[str, str]:
    return {name: read(record) for name, read in _BUILT_IN.items()} | dict(record.others)


def _at(place: str, row: int) -> str:
    """The place with the row, where there is one."""
    return f"{place}, row {row}" if row else place


def _split(header: str) -> tuple[str, str]:
    """A header's name and the unit in brackets behind it, or an empty text."""
    found = _HEADER.fullmatch(header)
    return (found[1].strip(), found[2]) if found else (header, "")


def _unit(text: str) -> str:
    word = plain_text(text).lower().replace("º", "°").replace("˚", "°").replace(" ", "").replace("μ", "µ")
    return _SPELLINGS.get(word, word)


def _source(name: str, column: ClinicalColumn, place: str) -> SourceColumn:
    came, own = _unit(_split(name)[1]), _unit(column.unit or "")
    if column.kind != "number" or not came or came == own:
        return SourceColumn(name)
    if (came, own) in CONVERSIONS:
        factor, offset, *_ = CONVERSIONS[came, own]
        return SourceColumn(name, factor, offset)
    unit = f"the run takes {column.unit}" if column.unit else "the run takes a number without unit"
    raise DataError(
        f"{place}: column '{column.name}' is in {_split(name)[1]}, {unit}, and no conversion is known; convert it in the table"
    )


def _refuse_near(column: ClinicalColumn, present: Sequence[str], schema: ClinicalConfig, place: str) -> None:
    own = {other.name for other in schema.columns}
    plain = {_split(name)[0]: name for name in present if _split(name)[0] not in own}
    near = difflib.get_close_matches(column.name, plain, n=1, cutoff=_NEAR)
    near = near or [name for name in plain if len(name) > 3 and (column.name in name.split() or column.name.startswith(name))]
    if near:
        raise DataError(
            f"{place}: there is no column '{column.name}'; is it '{plain[near[0]]}'? Name it so in the header; a site may also say it in "
            f"site.yaml, clinical_columns: {{{column.name}: '{plain[near[0]]}'}}, or null there where it has no such value"
        )


def _read_cell(cell: str, column: ClinicalColumn, where: str) -> float | list[float]:
    """One cell in the table's own unit; a list for codes."""
    text = plain_text(cell)
    word = text.casefold()
    if word in MISSING_WORDS:
        return math.nan
    if column.kind == "codes":
        return _read_codes(word, column, where)
    if column.kind == "binary":
        if word in YES_WORDS or word in NO_WORDS:
            return float(word in YES_WORDS)
        raise DataError(f"{where}: '{column.name}' is yes or no, and the cell holds something else")
    try:
        value = float(text.replace(",", ".") if text.count(",") == 1 and "." not in text else text)
    except ValueError:
        value = math.inf
    if not math.isfinite(value):
        raise DataError(
            f"{where}: '{column.name}' is a number, and the cell holds text; write the number only, or leave it empty"
        )
    return value


def _read_codes(word: str, column: ClinicalColumn, where: str) -> list[float]:
    given = {part.strip() for part in BETWEEN_CODES.split(word) if part.strip()}
    if given - {code.casefold() for code in column.codes}:
        raise DataError(f"{where}: '{column.name}' holds a code that the run does not list; it takes {', '.join(column.codes)}")
    return [float(code.casefold() in given) for code in column.codes]
