"""The manifest: a CSV table with one row an image, its patient, its label and what else is known.

Its columns are `path,patient,label` and, where known, `view,sex,age,manufacturer`; other columns are ignored. It stays at its site.
`read_manifest` and `write_manifest` carry it to and from the file, `CLASSES` maps labels to the classes of a task. `read_columns` and
`read_rows` read any CSV table; their errors name the column and the row but never what is in it.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pneumofed.common.config.experiment import TaskName
from pneumofed.common.data.csv_tables import TableWriter, read_table
from pneumofed.common.errors import ConfigError, DataError
from pneumofed.common.files import atomic_write

LABELS = ("normal", "pneumonia", "bacterial", "viral")
"""The vocabulary of the label column. `bacterial` and `viral` are pneumonias."""

CLASSES: dict[TaskName, tuple[str, ...]] = {
    "binary": ("normal", "pneumonia"),
    "three_class": ("normal", "bacterial", "viral"),
}
"""Classes of each task, in the order of the model's outputs. Class 0 is normal."""

MANIFEST_COLUMNS = ("path", "patient", "label", "view", "sex", "age", "manufacturer")

_SYNONYMS = {"bacteria": "bacterial", "virus": "viral", "no finding": "normal"}
_AGE_UNITS_PER_YEAR = {"D": 365.25, "W": 365.25 / 7, "M": 12.0, "Y": 1.0, "": 1.0}


@dataclass(frozen=True)
class ImageRecord:
    """One image of the manifest.

    Attributes:
        path: the image file.
        patient: identifies the patient within the site; images of one patient stay together.
        label: one of LABELS, or another word, which no task knows.
        view: projection, e.g. `PA`.
        sex: `M` or `F`.
        age_years: age at the examination.
        manufacturer: of the X-ray device.
    """

    path: Path
    patient: str
    label: str
    view: str | None = None
    sex: str | None = None
    age_years: float | None = None
    manufacturer: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The images of one party, in order."""

    records: tuple[ImageRecord, ...]

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def patients(self) -> tuple[str, ...]:
        """The patient of each record, so a patient appears once for each image of theirs."""
        return tuple(record.patient for record in self.records)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The label of each record."""
        return tuple(record.label for record in self.records)

    def subset(self, index: Iterable[int]) -> Manifest:
        """Picks the records at the positions `index`, in that order."""
        return Manifest(tuple(self.records[int(i)] for i in index))


def class_index(label: str, task: TaskName) -> int | None:
    """Looks up the class of a label.

    Args:
        label: a word of `LABELS`, or any other word, which has no class.
        task: whose classes.

    Returns:
        The position in `CLASSES[task]`; None if the label has no class there, e.g. `pneumonia` of unknown cause under `three_class`.
    """
    if task == "binary" and label in ("bacterial", "viral"):
        return 1
    return CLASSES[task].index(label) if label in CLASSES[task] else None


def read_label(text: str) -> str:
    """Reads `text` as a word of LABELS where it is one or a known synonym, regardless of case; otherwise stripped and lower case."""
    word = text.strip().lower()
    return _SYNONYMS.get(word, word)


def read_sex(text: str) -> str | None:
    """Reads `M` or `F` from texts such as `m` or `Female`; None for anything else."""
    return {"m": "M", "male": "M", "f": "F", "female": "F"}.get(text.strip().lower())


def read_age(text: str) -> float | None:
    """Reads years from `63`, `63.5` or a DICOM age string such as `063Y` or `018M` (PS3.5, section 6.2, AS); None for anything else."""
    match = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)([DWMY]?)", text.strip().upper())
    return float(match[1]) / _AGE_UNITS_PER_YEAR[match[2]] if match else None


def read_manifest(path: Path) -> Manifest:
    """Reads the manifest in the CSV file `path`; relative image paths are relative to its folder.

    A label that no task knows, or none, is kept: it is counted when the data are loaded.

    Raises:
        ConfigError: the file does not exist or cannot be opened.
        DataError: a column is missing, or a row has no path, no patient, or an age that is no number; the text names the column
            and the row but never what is in it.
    """
    return Manifest(tuple(_record(path, row, cells) for row, cells in read_rows(path, MANIFEST_COLUMNS[:3])))


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Writes a manifest as a CSV file, with mode 0600, so that `read_manifest` gives it back.

    Args:
        manifest: its images inside the file's folder are written relative to it, so that the folder can be moved; others with their
            full path.
        path: the file, in a folder that exists; an older one is replaced.

    Raises:
        OSError: the file cannot be written; an older one is left as it was.
    """
    text = io.StringIO(newline="")
    writer = TableWriter(text)
    writer.write(MANIFEST_COLUMNS)
    writer.write_all(_cells(record, path.absolute().parent) for record in manifest.records)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode("utf-8", errors="surrogateescape"))


def read_columns(table: Path) -> list[str]:
    """Reads the column names in the first row of the CSV file `table`: stripped and lower case.

    Raises:
        ConfigError: the file does not exist or cannot be opened.
        DataError: the file is empty or is no text.
    """
    for _, cells in _read_cells(table):
        return [cell.strip().lower() for cell in cells]
    raise DataError(f"{table} is empty; expected a CSV file whose first row names the columns")


def read_rows(table: Path, required: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Iterates over (row number, cell by column) of each row of the CSV file `table` that is not blank.

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
    """Refuses a table that lacks a column or has it twice.

    Args:
        table: the CSV file, which the error names.
        columns: the columns that it has, as `read_columns` gives them.
        required: lower-case names of columns that must be there exactly once.

    Raises:
        DataError: one of `required` is missing or there more than once.
    """
    for name in required:
        if name not in columns:
            raise DataError(f"{table}: column '{name}' is missing; the columns there are: {', '.join(filter(None, columns))}")
        if columns.count(name) > 1:
            raise DataError(f"{table}: column '{name}' is there {columns.count(name)} times; keep one")


def _record(manifest: Path, row: int, cells: Mapping[str, str]) -> ImageRecord:
    for column in ("path", "patient"):
        if not cells[column].strip():
            raise DataError(f"{manifest}, row {row}: column '{column}' is empty; each image needs its {column}")
    age = cells.get("age", "").strip()
    if age and read_age(age) is None:
        raise DataError(f"{manifest}, row {row}: column 'age' must be years, e.g. 63, or empty")
    return ImageRecord(
        path=manifest.absolute().parent / cells["path"],
        patient=cells["patient"].strip(),
        label=read_label(cells["label"]),
        view=cells.get("view", "").strip() or None,
        sex=read_sex(cells.get("sex", "")),
        age_years=read_age(age),
        manufacturer=cells.get("manufacturer", "").strip() or None,
    )


def _cells(record: ImageRecord, folder: Path) -> list[str]:
    path = Path(os.path.abspath(record.path))  # noqa: PTH100 - resolve() would follow links out of the folder
    inside = path.is_relative_to(folder)
    age = "" if record.age_years is None else repr(record.age_years)
    known = (record.view or "", record.sex or "", age, record.manufacturer or "")
    return [str(path.relative_to(folder) if inside else path), record.patient, record.label, *known]


def _read_cells(table: Path) -> Iterator[tuple[int, list[str]]]:
    try:
        with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            first = file.readline()
            file.seek(0)
            yield from enumerate(read_table(file, max(",;\t", key=first.count)), start=1)
    except FileNotFoundError:
        raise ConfigError(f"table {table} does not exist") from None
    except OSError as error:
        raise ConfigError(f"table {table} cannot be opened: {error.strerror}") from None
    except csv.Error as error:
        raise DataError(f"{table} is no well-formed CSV file: {error}") from None
