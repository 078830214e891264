"""Sums of clinical numbers, from which a federation standardises them: what a coordinator asks before the first round, and what a site
answers.

    ColumnSums                  patients, sum and sum of squares of one column; sums of disjoint patients add up
    pack_sums, unpack_sums      the reply, as records {site, clinical}
    standardize                 mean and deviation of each column, from the sums of all sites

A number x is counted as u = (x - middle) / half of the schema's range, so that |u| <= 1 and no site, hostile or not, can move a mean beyond
the range that everybody agreed on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flwr.app import ConfigRecord

from pneumofed.common.config.experiment import ClinicalColumn, ClinicalConfig
from pneumofed.common.errors import MessageError
from pneumofed.common.wire.fields import MOST_COUNT, bounded_text
from pneumofed.common.wire.messages import CLINICAL, Content, Presence, pack_presence, record_named, unpack_presence

LEAST_PATIENTS = 10
"""A column that fewer patients of a site have is not told, and one that fewer have over all sites is standardised by its range."""
SUMS = "sums"
MAX_SUMS_BYTES = 2**15
LEAST_DEVIATION = 0.01
"""Of u: a column that hardly varies is not blown up."""


@dataclass(frozen=True)
class ColumnSums:
    """Of one column at one site or several, in units of u: patients, sum of u, sum of u squared. With noise none is a whole number."""

    patients: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def __add__(self, other: ColumnSums) -> ColumnSums:
        return ColumnSums(self.patients + other.patients, self.total + other.total, self.squares + other.squares)


def scale_of(column: ClinicalColumn) -> tuple[float, float]:
    """Returns the middle and half the width of a number's range."""
    assert column.low is not None and column.high is not None
    return (column.low + column.high) / 2.0, (column.high - column.low) / 2.0


def asked_columns(schema: ClinicalConfig) -> list[ClinicalColumn]:
    """Lists the columns whose sums a run needs: numbers that state no mean."""
    return [column for column in schema.columns if column.kind == "number" and column.mean is None]


def standardize(schema: ClinicalConfig, answers: Iterable[Mapping[str, ColumnSums]]) -> ClinicalConfig:
    """States mean and deviation in the schema, from the sums of all sites.

    mean = S1 / n, deviation^2 = S2 / n - mean^2, over patients, each of whom counts once. A column that fewer than `LEAST_PATIENTS` have
    stays without, and is standardised by its range.

    Args:
        schema: of the run.
        answers: of each site, sums by column.
    """
    pooled: dict[str, ColumnSums] = {}
    for answer in answers:
        for name, sums in answer.items():
            pooled[name] = pooled.get(name, ColumnSums()) + sums
    columns = []
    asked = {column.name for column in asked_columns(schema)}
    for column in schema.columns:
        sums = pooled.get(column.name, ColumnSums())
        if column.name in asked and sums.patients >= LEAST_PATIENTS:
            middle, half = scale_of(column)
            mean = min(1.0, max(-1.0, sums.total / sums.patients))  # noise may lead out
            deviation = math.sqrt(max(LEAST_DEVIATION**2, min(1.0, sums.squares / sums.patients) - mean**2))
            column = column.model_copy(update={"mean": middle + half * mean, "deviation": half * deviation})
        columns.append(column)
    return schema.model_copy(update={"columns": tuple(columns)})


def pack_sums(site: str, sums: Mapping[str, ColumnSums]) -> Content:
    """Packs a site's answer.

    Args:
        site: its name.
        sums: by column, those that may leave.
    """
    content = pack_presence(Presence(site, ""))
    numbers = {name: [one.patients, one.total, one.squares] for name, one in sums.items()}
    content[CLINICAL] = ConfigRecord({SUMS: json.dumps(numbers)})
    return content


def unpack_sums(content: Content, schema: ClinicalConfig) -> tuple[Presence, dict[str, ColumnSums]]:
    """Unpacks a site's answer.

    Args:
        content: of the reply, not trusted.
        schema: whose columns may be answered.

    Raises:
        MessageError: it is no such answer, or numbers that no patients can have.
    """
    presence = unpack_presence(content)
    text = bounded_text(record_named(content.config_records, CLINICAL).get(SUMS), CLINICAL, MAX_SUMS_BYTES)
    try:
        found = {str(name): ColumnSums(*map(float, numbers)) for name, numbers in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise MessageError("clinical sums: expected three numbers by column") from None
    asked = {column.name for column in asked_columns(schema)}
    for name, one in found.items():
        numbers = (one.patients, one.total, one.squares)
        if name not in asked or not all(math.isfinite(number) and abs(number) <= MOST_COUNT for number in numbers):
            raise MessageError("clinical sums: expected finite numbers of the columns that were asked")
        if one.patients < LEAST_PATIENTS:
            raise MessageError(f"clinical sums: expected columns of {LEAST_PATIENTS} patients at least")
        if abs(one.total) > one.patients or not 0.0 <= one.squares <= one.patients:
            raise MessageError("clinical sums: expected those of numbers within the stated range")
    return presence, found
