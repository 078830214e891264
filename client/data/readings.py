"""Readings of images: who gave which label, when, and which label the image had before.

    read_export    the reading room's export: the columns of a manifest, and reader, time and case of each reading
    ReadImage      all readings of one image, and the label that follows from them
    Readings       those of a site, kept beside its manifest in `readings.json`, which names readers and cases and stays at the site

A row's label is a pure function of its original label and all readings: the latest reading of each reader counts, and where these
differ the original label stands, or the image stays out if it has none. So an export can be read twice, or after a table was added
anew, and a reader who comes later can contradict.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pneumofed.common.config.classes import is_class_name
from pneumofed.common.data.manifest import LABELS, ImageRecord, find_image, read_age, read_label, read_sex
from pneumofed.common.data.tables import plain_text, read_rows
from pneumofed.common.errors import ConfigError, DataError, SkipReason
from pneumofed.common.files import StateFile, to_json

READINGS_FILE = "readings.json"
EXPORT_FILE = "labels.csv"
"""The export in a reading room's folder."""
EXPORT_COLUMNS = ("path", "label")
"""Columns that an export has at least."""
UNSURE = "unsure"
"""The label of a reader who does not decide; no image gets it."""


@dataclass(frozen=True)
class StoredReading:
    """One reader's label of one image; `time` is ISO 8601 in UTC, so that texts sort by time."""

    reader: str
    time: str
    label: str
    case: str = ""


@dataclass(frozen=True)
class ReadImage:
    """An image with readings.

    Attributes:
        patient: as the manifest names him.
        path: the file in the manifest, resolved; None while the image is not in it.
        original: its label in the manifest before any reading; None if it came from the reading room.
        readings: in the order in which they came.
    """

    patient: str
    path: str | None = None
    original: str | None = None
    readings: tuple[StoredReading, ...] = ()

    def agreed(self) -> str | SkipReason:
        """Returns the label that all readers of the image give it now, or why there is none."""
        latest: dict[str, str] = {}
        for reading in sorted(self.readings, key=lambda reading: reading.time):
            latest[reading.reader] = reading.label
        labels = set(latest.values())
        if UNSURE in labels:
            return SkipReason.UNCERTAIN_LABEL
        if len(labels) > 1:
            return SkipReason.DISAGREED
        label = labels.pop() if labels else ""
        return label if label in LABELS or is_class_name(label) else (SkipReason.UNKNOWN_LABEL if label else SkipReason.NO_LABEL)

    def label(self) -> str | None:
        """The label that the manifest should give it; None if it should not be there."""
        agreed = self.agreed()
        return self.original if isinstance(agreed, SkipReason) else agreed

    def with_readings(self, new: tuple[StoredReading, ...]) -> ReadImage:
        """This and those of `new` that it does not hold yet."""
        return replace(self, readings=tuple(dict.fromkeys((*self.readings, *new))))


@dataclass
class Readings:
    """The readings of a site by the SHA-256 of the file that the readers saw."""

    images: dict[str, ReadImage] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Readings:
        """Reads those in `folder`, the manifest's.

        Raises:
            DataError: the file is damaged.
        """
        return _file(folder).read()

    def write(self, folder: Path) -> None:
        _file(folder).write(self)

    def by_path(self) -> dict[str, ReadImage]:
        """The images that have a row in the manifest, or had one."""
        return {image.path: image for image in self.images.values() if image.path is not None}

    def rename(self, names: Mapping[str, str]) -> None:
        """Renames patients: `names` has the new name by the old one."""
        for digest, image in self.images.items():
            self.images[digest] = replace(image, patient=names.get(image.patient, image.patient))

    def learn_originals(self, rows: Mapping[str, ImageRecord]) -> bool:
        """Takes the labels of `rows` (by resolved path) for the original ones; returns whether any row has readings."""
        known = {digest: image for digest, image in self.images.items() if image.path in rows}
        for digest, image in known.items():
            self.images[digest] = replace(image, original=rows[str(image.path)].label)
        return bool(known)

    def settle(self, rows: Mapping[str, ImageRecord]) -> dict[str, ImageRecord]:
        """Returns `rows` of the manifest by resolved path, each with the label that its readers agree on; without those that are
        disputed and had none before.
        """
        read = self.by_path()
        settled: dict[str, ImageRecord] = {}
        for path, row in rows.items():
            label = read[path].label() if path in read else row.label
            if label is not None:
                settled[path] = replace(row, label=label)
        return settled


def forget_readings(folder: Path, gone: Callable[[str], bool]) -> None:
    """Removes the readings of patients of whom `gone` is true; to be called while the folder's lock is held.

    Args:
        folder: the manifest's folder; nothing happens where it holds no readings.
        gone: whether a patient, by his name in the manifest, is to be taken out.

    Raises:
        DataError: the file is damaged.
    """
    if (folder / READINGS_FILE).exists():
        readings = Readings.of(folder)
        Readings({digest: image for digest, image in readings.images.items() if not gone(image.patient)}).write(folder)


@dataclass(frozen=True)
class ReadRow:
    """One row: a reading, the file that was read, and what else is known of it; `patient` is the hospital's own number."""

    path: Path
    patient: str
    reading: StoredReading
    view: str | None
    sex: str | None
    age_years: float | None
    manufacturer: str | None


def read_export(table: Path) -> list[ReadRow]:
    """Reads the rows of an export, or of `labels.csv` in the folder `table`.

    Columns are `path` (relative to the table's folder) and `label`, and where known `patient`, `view`, `sex`, `age`, `manufacturer`,
    `reader`, `time` (ISO 8601; without a zone it is UTC) and `case`. A row without a reader counts as that of a reader of its own.

    Raises:
        ConfigError: the file does not exist or cannot be opened.
        DataError: a column is missing, or a row has no path or a time that is none; the text never says what is in it.
    """
    file = table / EXPORT_FILE if table.is_dir() else table
    if not file.is_file():
        raise ConfigError(f"{file} does not exist; give the reading room's folder, or its export of labels (a CSV file)")
    return _read(file)


def _file(folder: Path) -> StateFile[Readings]:
    return StateFile(
        folder / READINGS_FILE,
        kind="the list of readings",
        parse=lambda content: Readings({digest: _image(values) for digest, values in json.loads(content).items()}),
        missing=Readings(),
        remedy="restore it from a backup, or remove it and give `pneumofed site data feedback` the reading room's export again: then "
        "the labels that images have now count as their original ones",
        refuse=DataError,
        dump=lambda readings: to_json({digest: asdict(image) for digest, image in readings.images.items()}),
    )


def _image(values: Mapping[str, Any]) -> ReadImage:
    readings = tuple(StoredReading(**reading) for reading in values["readings"])
    return ReadImage(values["patient"], values["path"], values["original"], readings)


def _read(file: Path) -> list[ReadRow]:
    return [_row(file, number, cells) for number, cells in read_rows(file, EXPORT_COLUMNS)]


def _row(file: Path, number: int, cells: dict[str, str]) -> ReadRow:
    def cell(name: str) -> str:
        return cells.get(name, "").strip()

    if not cell("path"):
        raise DataError(f"{file}, row {number}: column 'path' is empty; each reading is of a file")
    reader = cell("reader") or f"unknown reader of row {number}"
    reading = StoredReading(
        reader, _time(file, number, cell("time")), read_label(cells["label"]), cell("case") or cell("case_id")
    )
    return ReadRow(
        path=find_image(file.absolute().parent, cell("path")),
        patient=plain_text(cell("patient")),
        reading=reading,
        view=cell("view") or None,
        sex=read_sex(cell("sex")),
        age_years=read_age(cell("age")),
        manufacturer=cell("manufacturer") or None,
    )


def _time(file: Path, number: int, text: str) -> str:
    """`text` in UTC to the microsecond, so that texts sort by time; empty stays empty and sorts first."""
    if not text:
        return ""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise DataError(f"{file}, row {number}: column 'time' must be like 2026-03-01T14:05:00+01:00, or empty") from None
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return aware.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
