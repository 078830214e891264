"""The manifest: a CSV table with one row an image, its patient, its label and what else is known.

Its columns are `path,patient,label` and, where known, `view,sex,age,manufacturer`; other columns are kept as they stand, and looked at
only where a run names them as clinical values (`common.data.clinical`). It stays at its site.
`read_manifest` and `write_manifest` carry it to and from the file, `common.config.classes` says which class a label is. The file
is UTF-8; only a path may hold other bytes, as names of files may.

`DataReport` says how many images were found, used, and left out for which reason when a manifest was made or read. Only counts may leave
the site.
"""

from __future__ import annotations

import io
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pneumofed.common.config.classes import SYNONYMS
from pneumofed.common.data.tables import TableWriter, plain_text, read_rows
from pneumofed.common.errors import DataError, SkipReason
from pneumofed.common.files import atomic_write

LABELS = ("normal", "pneumonia", "bacterial", "viral")
"""The labels that every site knows. `bacterial` and `viral` are pneumonias. A site's own words are mapped by `common.data.label_words`."""

MANIFEST_COLUMNS = ("path", "patient", "label", "view", "sex", "age", "manufacturer")

_AGE_UNITS_PER_YEAR = {"D": 365.25, "W": 365.25 / 7, "M": 12.0, "Y": 1.0, "": 1.0}


@dataclass(frozen=True)
class ImageRecord:
    """One image of the manifest.

    Attributes:
        path: the image file; of a CT volume also the folder of its series.
        patient: identifies the patient within the site; images of one patient stay together.
        label: one of LABELS, or another word, which no task knows.
        view: projection, e.g. `PA`.
        sex: `M` or `F`.
        age_years: age at the examination.
        manufacturer: of the X-ray device.
        others: the manifest's other columns, name and cell, in its order, without empty cells.
        row: of the table that it was read from, the header being 1; 0 where it is of none.
    """

    path: Path
    patient: str
    label: str
    view: str | None = None
    sex: str | None = None
    age_years: float | None = None
    manufacturer: str | None = None
    others: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    row: int = field(default=0, compare=False, repr=False)


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


def read_label(text: str) -> str:
    """Reads `text` as a word of LABELS where it is one or a known synonym, regardless of case; otherwise stripped and lower case."""
    word = plain_text(text).lower()
    return SYNONYMS.get(word, word)


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
    return Manifest(tuple(_record(path, row, cells) for row, cells in read_rows(path, MANIFEST_COLUMNS[:3], own=True)))


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
    others = tuple(dict.fromkeys(name for record in manifest.records for name, _ in record.others))
    writer.write((*MANIFEST_COLUMNS, *others))
    known = ((record, dict(record.others)) for record in manifest.records)
    folder = path.absolute().parent
    writer.write_all([*_cells(record, folder), *(cells.get(name, "") for name in others)] for record, cells in known)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode("utf-8", errors="surrogateescape"))


def find_image(folder: Path, text: str) -> Path:
    """Finds the file that a table's cell means: as it stands, else without blanks around it, with `\\` for `/`, or in other characters.

    Args:
        folder: what a relative path is relative to.
        text: the cell.

    Returns:
        The first of these that exists; the path as it stands where none does.
    """
    path = folder / text
    if text.isascii() and text == text.strip() and "\\" not in text:
        return path
    plain = [text, text.strip(), text.strip().replace("\\", "/")]
    spelt = [unicodedata.normalize(form, word) for word in plain for form in ("NFC", "NFD")]
    former = [
        os.fsdecode(word.encode(codec, "ignore")) for word in plain for codec in ("gb18030", "cp1252") if not word.isascii()
    ]
    return next((folder / word for word in (*plain, *spelt, *former) if (folder / word).exists()), path)


def _record(manifest: Path, row: int, cells: Mapping[str, str]) -> ImageRecord:
    for column in ("path", "patient"):
        if not cells[column].strip():
            raise DataError(f"{manifest}, row {row}: column '{column}' is empty; each image needs its {column}")
        if column == "patient" and not _is_text(cells[column] + cells["label"]):
            raise DataError(
                f"{manifest}, row {row}: patient or label is no UTF-8; save the table as 'CSV UTF-8' in the spreadsheet"
            )
    age = cells.get("age", "").strip()
    if age and read_age(age) is None:
        raise DataError(f"{manifest}, row {row}: column 'age' must be years, e.g. 63, or empty")
    return ImageRecord(
        path=find_image(manifest.absolute().parent, cells["path"]),
        patient=plain_text(cells["patient"]),
        label=read_label(cells["label"]),
        view=cells.get("view", "").strip() or None,
        sex=read_sex(cells.get("sex", "")),
        age_years=read_age(age),
        manufacturer=cells.get("manufacturer", "").strip() or None,
        others=tuple((name, cell) for name, cell in cells.items() if name and name not in MANIFEST_COLUMNS and cell.strip()),
        row=row,
    )


def _is_text(cell: str) -> bool:
    """Whether no byte of it could not be decoded (PEP 383)."""
    return not any("\ud800" <= letter <= "\udfff" for letter in cell)


def _cells(record: ImageRecord, folder: Path) -> list[str]:
    path = Path(os.path.abspath(record.path))  # noqa: PTH100 - resolve() would follow links out of the folder
    inside = path.is_relative_to(folder)
    age = "" if record.age_years is None else repr(record.age_years)
    known = (record.view or "", record.sex or "", age, record.manufacturer or "")
    return [str(path.relative_to(folder) if inside else path), record.patient, record.label, *known]


K = TypeVar("K")


class DataWarning(StrEnum):
    """Something to know about images that are used all the same. The value is the sentence in the data report."""

    EMPTY_CLASS = "class without any image"
    PATIENT_FROM_FILE_NAME = "file name tells no patient; the image counts as a patient of its own"
    CONFLICTING_DUPLICATE = "same image content under another label or patient; the first was kept"
    NOT_IN_ARCHIVE = "label for an examination in which the archive has no such image"
    CACHE_IN_MEMORY = "disk full: decoded images are kept in memory and will be decoded again next time"


@dataclass(frozen=True)
class DataReport:
    """Counts of images; `used` and all of `skipped` together make `found`.

    Reports of disjoint data form a commutative monoid under `+` with `DataReport()` as its zero.

    Attributes:
        found: images that the source or manifest named.
        used: images that remain.
        skipped: images left out, by reason.
        classes: used images by class or label.
        patients: patients of the used images.
        warnings: how often each warning applies.
    """

    found: int = 0
    used: int = 0
    skipped: Counter[SkipReason] = field(default_factory=Counter)
    classes: Counter[str] = field(default_factory=Counter)
    patients: int = 0
    warnings: Counter[DataWarning] = field(default_factory=Counter)

    def __add__(self, other: DataReport) -> DataReport:
        """The report of both parties' data, which share no patient."""
        return DataReport(
            found=self.found + other.found,
            used=self.used + other.used,
            skipped=_sum(self.skipped, other.skipped),
            classes=_sum(self.classes, other.classes),
            patients=self.patients + other.patients,
            warnings=_sum(self.warnings, other.warnings),
        )

    def then(self, later: DataReport) -> DataReport:
        """Joins the reports of two steps in a row, where `later` was given what this one left (`later.found == self.used`)."""
        return DataReport(
            found=self.found,
            used=later.used,
            skipped=_sum(self.skipped, later.skipped),
            classes=later.classes,
            patients=later.patients,
            warnings=_sum(self.warnings, later.warnings),
        )

    def public(self) -> dict[str, Any]:
        """Writes what may leave the site as plain JSON values: counts and fixed sentences only."""
        return {
            "found": self.found,
            "used": self.used,
            "skipped": {reason.value: n for reason, n in sorted(self.skipped.items()) if n},
            "classes": dict(sorted(self.classes.items())),
            "patients": self.patients,
            "warnings": {warning.value: n for warning, n in sorted(self.warnings.items()) if n},
        }


def _sum(first: Counter[K], second: Counter[K]) -> Counter[K]:
    total = Counter(first)
    total.update(second)  # unlike Counter's `+`, keeps classes that count zero
    return total
