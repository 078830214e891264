"""Clinical values in the room: the forms in which they come and go, how they are read, and what is kept of them.

    read_given(given, schema)          values as a reader, a table or a program gives them, by the rules of `pneumofed predict`
    named_values(values, schema)       the known ones by name, as the interface and the database have them
    describe_sources(...)              where each came from: given, of an upload's table, or stated by the image file

A value that does not fit is refused with the sentence of `pneumofed predict`, a fixed word for the page to translate, and the column's
name, which is the model's own. What was given stands in none of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from pneumofed.common.config.experiment import ClinicalColumn, ClinicalConfig
from pneumofed.common.data.clinical import find_sources
from pneumofed.common.data.tables import plain_text
from pneumofed.common.errors import DataError
from pneumofed.inference.predict.clinical_table import values_of

if TYPE_CHECKING:
    from pneumofed.inference.explain.clinical import JointEvidence


Values = npt.NDArray[np.float32]

ValueProblem = Literal["value_column", "value_unit", "value_range", "value_number", "value_yes_no", "value_code"]
"""Why values are refused: no column of the model, a unit that cannot be converted, outside the range, no number, neither yes nor no, a code
that is not listed."""
ValueSource = Literal["given", "table", "file"]
"""Who said a value: a reader or a program, the table of an upload, the image file itself."""
GivenValue = (
    bool
    | float
    | Annotated[str, Field(max_length=200)]
    | Annotated[list[Annotated[str, Field(max_length=40)]], Field(max_length=64)]
)
KnownValue = bool | float | list[str]

MOST_VALUE_BYTES = 16_384
"""Of the values of one file in a form."""
_DIGITS = 6
"""float32 has seven; so 38.6 is shown as 38.6."""
_BEFORE_UNIT = re.compile(r"\s*[\[(]")


class ClinicalValueError(DataError):
    """Values were given that the model cannot take.

    Attributes:
        problem: fixed word.
        column: of the model's schema; None where a name is none of its columns.
    """

    def __init__(self, problem: ValueProblem, column: str | None, text: str) -> None:
        super().__init__(text)
        self.problem, self.column = problem, column


class ClinicalColumnView(BaseModel):
    """A clinical value that the model takes, for the form of the page."""

    name: str
    kind: Literal["number", "binary", "codes"]
    unit: str | None
    low: float | None = Field(description="Of a number: below it a value is refused.")
    high: float | None
    codes: list[str] = Field(description="Of kind `codes`: the words that may be given.")


class GivenValues(BaseModel):
    """All values of a case; what is not named, null or an empty text is not known."""

    model_config = ConfigDict(extra="forbid")

    values: dict[Annotated[str, Field(max_length=80)], GivenValue | None] = Field(
        max_length=64,
        description="By column: a number or its text, under `temperature [°F]` in a unit that is converted; true or false; a list of "
        "codes, or `;` for none of them.",
    )


class ClinicalValueView(BaseModel):
    """A known value, in the unit of the model."""

    name: str
    value: KnownValue
    source: ValueSource


class ClinicalAnswer(BaseModel):
    """What an answer was given with."""

    values: list[ClinicalValueView]
    image_only: float | None = Field(
        ge=0,
        le=1,
        description="Probability of the image without any value; null if the image cannot be judged, or no value is known.",
    )


class ClinicalView(ClinicalAnswer):
    """The values of a case. The latest that were given count, all are kept."""

    given_by: str
    given_at: datetime


class EvidenceView(BaseModel):
    """What the answer rests on, in log-odds: integrated gradients (Sundararajan et al. 2017, eq. 1) over image and values together, from
    the empty image of which no value is known. `image` and all `values` add up to `score - empty`, but for `error`."""

    image: float
    values: dict[str, float]
    score: float
    empty: float
    error: float


def view_columns(schema: ClinicalConfig | None) -> list[ClinicalColumnView]:
    """Lists what a model takes beside an image; nothing where it takes the image only."""
    return [
        ClinicalColumnView(name=one.name, kind=one.kind, unit=one.unit, low=one.low, high=one.high, codes=list(one.codes))
        for one in (schema.columns if schema else ())
    ]


def schema_of(columns: list[ClinicalColumnView]) -> ClinicalConfig | None:
    """Builds the schema that `view_columns` listed, without what the network standardises by; None of an empty list."""
    found = tuple(ClinicalColumn(**{**one.model_dump(), "codes": tuple(one.codes)}) for one in columns)
    return ClinicalConfig(columns=found) if found else None


def read_given(given: Mapping[str, GivenValue | None], schema: ClinicalConfig | None) -> Values:
    """Reads values by name, as `pneumofed predict` does.

    Args:
        given: by column; what is not named is not known.
        schema: of the model; None where it takes no values.

    Returns:
        float32 [K], NaN where not known.

    Raises:
        ClinicalValueError: a name is no column, or a value does not fit.
    """
    columns = {one.name: one for one in schema.columns} if schema else {}
    if schema is None or any(_column_name(name) not in columns for name in given):
        takes = f"it takes {', '.join(columns)}" if columns else "it takes the image only"
        raise ClinicalValueError("value_column", None, f"clinical values: a name is no column of this model; {takes}")
    names = [_column_name(name) for name in given]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ClinicalValueError("value_column", twice, f"clinical values: column '{twice}' is there twice; keep one")
    for name, value in given.items():
        column = columns[_column_name(name)]
        try:
            values_of({name: value}, _schema_of_one(schema, column))
        except DataError as error:
            raise ClinicalValueError(_problem(name, value, column, schema), column.name, str(error)) from None
    return values_of(given, schema)


def named_values(values: Values | None, schema: ClinicalConfig | None) -> dict[str, KnownValue]:
    """Names the known values: numbers in the unit of the schema, yes and no as booleans, codes as the list of those that are there.

    Args:
        values: float32 [K], NaN where not known; None where none is.
        schema: of the model.
    """
    found: dict[str, KnownValue] = {}
    slot = 0
    for column in schema.columns if schema and values is not None else ():
        assert values is not None
        given = values[slot : slot + column.slots]
        slot += column.slots
        if np.isnan(given).any():
            continue
        if column.kind == "codes":
            found[column.name] = [code for code, there in zip(column.codes, given, strict=True) if there]
        else:
            found[column.name] = bool(given[0]) if column.kind == "binary" else float(f"{given[0]:.{_DIGITS}g}")
    return found


def describe_sources(
    values: Mapping[str, KnownValue],
    given: Mapping[str, KnownValue],
    source: ValueSource,
    before: list[dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Lists known values with where each came from, as `ClinicalValueView` and the database have them.

    Args:
        values: of the case now.
        given: those of them that somebody gave; the others are the file's.
        source: who gave them.
        before: the case's values before; one that stays what it was keeps its source.
    """
    kept = {one["name"]: one["source"] for one in before or () if values.get(one["name"]) == one["value"]}
    return [
        {"name": name, "value": value, "source": kept.get(name) or (source if name in given else "file")}
        for name, value in values.items()
    ]


def rebuild_values(known: list[dict[str, Any]], schema: ClinicalConfig) -> Values:
    """Reads the values that the database has of a case, float32 [K].

    Args:
        known: of `describe_sources`.
        schema: of the model that judged the case.
    """
    codes = {one.name for one in schema.columns if one.kind == "codes"}
    cells = {one["name"]: ";".join(one["value"]) or ";" if one["name"] in codes else one["value"] for one in known}
    return read_given(cells, schema)


def view_evidence(found: JointEvidence) -> dict[str, Any]:
    """Takes the numbers of `EvidenceView` from what `explain` computes."""
    return {"image": found.image, "values": dict(found.values), "score": found.score, "empty": found.empty, "error": found.error}


def _column_name(name: str) -> str:
    """The name before a unit in brackets, as `common.data.clinical` reads a header."""
    return _BEFORE_UNIT.split(plain_text(name).lower(), maxsplit=1)[0]


def _schema_of_one(schema: ClinicalConfig, column: ClinicalColumn) -> ClinicalConfig:
    return schema.model_copy(update={"columns": (column,)})


def _problem(name: str, value: GivenValue | None, column: ClinicalColumn, schema: ClinicalConfig) -> ValueProblem:
    """The word for a value that `values_of` refused."""
    try:
        find_sources(_schema_of_one(schema, column), [plain_text(name).lower()], {}, "clinical values")
    except DataError:
        return "value_unit"
    if column.kind != "number":
        return "value_yes_no" if column.kind == "binary" else "value_code"
    try:
        return "value_range" if math.isfinite(float(plain_text(str(value)).replace(",", "."))) else "value_number"
    except ValueError:
        return "value_number"
