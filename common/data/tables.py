"""Rows of CSV files, with errors that name the column and the row but never what is in it."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.errors import ConfigError, DataError


def read_columns(table: Path) -> list[str]:
    """Column names in the first row of the CSV file `table`: stripped and lower case.

    Raises:
        ConfigError: the file does not exist or cannot be opened.
        DataError: the file is empty or is no text.
    """
    for _, cells in _read_cells(table):
        return [cell.strip().lower() for cell in cells]
    raise DataError(f"{table} is empty; expected a CSV file whose first row names the columns")


def read_rows(table: Path, required: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(row number, cell by column) for each row of the CSV file `table` that is not blank.

    Rows count as a spreadsheet shows them: the header is row 1. Column names are stripped and lower case, cells are as they
    stand, cells missing at the end of a row are empty. Commas, semicolons and tabs are recognized as separators.

    Args:
        table: a UTF-8 file, with or without a byte order mark.
        required: lower-case names of columns that must be there.

    Raises:
        ConfigError: the file does not exist or cannot be opened.
        DataError: a required column is missing or there twice, a row has more cells than the header, or it is no CSV text.
    """
    columns = read_columns(table)
    check_columns(table, columns, required)
    for number, cells in _read_cells(table):
        if number == 1 or not any(cells):
            continue
        if len(cells) > len(columns):
            problem = f"{len(cells)} cells where the header names {len(columns)} columns; cells with separators need quotes"
            raise DataError(f"{table}, row {number}: {problem}")
        yield number, dict.fromkeys(columns, "") | dict(zip(columns, cells, strict=False))


def check_columns(table: Path, columns: Sequence[str], required: Sequence[str]) -> None:
    """Raises DataError unless each of `required` is exactly once in `columns`."""
    for name in required:
        if name not in columns:
            raise DataError(f"{table}: column '{name}' is missing; the columns there are: {', '.join(filter(None, columns))}")
        if columns.count(name) > 1:
            raise DataError(f"{table}: column '{name}' is there {columns.count(name)} times; keep one")


def _read_cells(table: Path) -> Iterator[tuple[int, list[str]]]:
    try:
        with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            first = file.readline()
            file.seek(0)
            yield from enumerate(csv.reader(file, delimiter=max(",;\t", key=first.count), strict=True), start=1)
    except FileNotFoundError:
        raise ConfigError(f"table {table} does not exist") from None
    except OSError as error:
        raise ConfigError(f"table {table} cannot be opened: {error.strerror}") from None
    except csv.Error as error:
        raise DataError(f"{table} is no well-formed CSV file: {error}") from None
