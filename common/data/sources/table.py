"""A CSV file with a row an image as a source of images: columns are found by their usual names or given by the user.

It also holds what all sources share: walking a folder (`walk_files`), joining records to a manifest and a report (`collect`), and the
policy for labels that their authors marked uncertain.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NoReturn, get_args

from pneumofed.common.data.label_words import LabelWords
from pneumofed.common.data.manifest import (
    MANIFEST_COLUMNS,
    DataReport,
    ImageRecord,
    Manifest,
    find_image,
    read_age,
    read_sex,
)
from pneumofed.common.data.tables import check_columns, describe_columns, plain_text, read_columns, read_rows
from pneumofed.common.errors import ConfigError, DataError, SkipReason
from pneumofed.common.imaging.patient_groups import is_frontal

_USUAL_NAMES = {
    "path": ("path", "filename", "file", "filepath", "imagepath", "image", "imageid", "imageindex"),
    "patient": ("patient", "patientid", "subject", "subjectid"),
    "label": ("label", "class", "diagnosis"),
    "view": ("view", "viewposition", "projection"),
    "sex": ("sex", "gender", "patientsex", "patientgender"),
    "age": ("age", "ageyears", "patientage"),
    "manufacturer": ("manufacturer", "vendor"),
}

_FIRST_FILES = 5

UncertainPolicy = Literal["ignore", "positive", "negative"]
"""What a label that its authors marked uncertain counts as: left out, pneumonia, or no pneumonia (U-Ignore, U-Ones and U-Zeroes
of Irvin et al. 2019, section 3)."""


def read_csv(
    table: Path,
    folder: Path | None = None,
    columns: Mapping[str, str] | None = None,
    label_map: Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
) -> tuple[Manifest, DataReport]:
    """Reads the images that the CSV file `table` names.

    Rows without a label or patient, with a label outside the manifest's vocabulary, or with a view that is not frontal are left
    out and counted. Whether the files exist is seen when they are read.

    Args:
        table: the CSV file.
        folder: what relative paths are relative to; by default the table's folder.
        columns: the table's column for some of `path`, `patient`, `label`, `view`, `sex`, `age`, `manufacturer`; the others
            are found by their usual names, e.g. `filename` or `PatientID`.
        label_map: the table's labels, regardless of case, to `normal`, `pneumonia`, `bacterial`, `viral` or a class that a run may have;
            other labels are taken as they are.
        keep: further columns, of clinical values, that go into the manifest as they stand; a unit in brackets behind the name may be
            left out. No other column does, since a hospital's table may name people.

    Raises:
        ConfigError: the file does not exist, or `columns` or `label_map` names something that no manifest has.
        DataError: a column is not there, or none is known for the path, the patient or the label.
    """
    found = find_columns(table, columns or {})
    words = LabelWords.of(label_map or {}, "label_map")
    base = (folder or table.parent).absolute()
    kept = find_kept(read_columns(table), keep)
    rows = (row for _, row in read_rows(table, list(found.values())))
    return collect(
        _record({name: row[column] for name, column in found.items()}, base, words, [(name, row[name]) for name in kept])
        for row in rows
    )


def find_kept(present: Sequence[str], keep: Sequence[str]) -> list[str]:
    """Finds the table's columns of the names in `keep`, as they stand or before a unit in brackets.

    Args:
        present: the table's columns, in small letters.
        keep: names; one that is not there is left out.
    """
    wanted = {plain_text(name).lower() for name in keep}
    plain = {name: name.partition("[")[0].partition("(")[0].strip() for name in present}
    return [name for name in present if name not in MANIFEST_COLUMNS and (name in wanted or plain[name] in wanted)]


def find_columns(table: Path, columns: Mapping[str, str]) -> dict[str, str]:
    """Finds the table's column for each column of a manifest.

    Args:
        table: the CSV file.
        columns: the user's choice for some of them, as in `read_csv`.

    Returns:
        The lower-case name in the table by the manifest's name, without those that the table does not have.

    Raises:
        ConfigError: the file does not exist, or `columns` names something that no manifest has.
        DataError: a column is not there, or none is known for the path, the patient or the label.
    """
    present, chosen = read_columns(table), [plain_text(column).lower() for column in columns.values()]
    found = {name: find_column(present, usual) for name, usual in _USUAL_NAMES.items()}
    known = {*chosen, *filter(None, found.values())}
    for name, column in columns.items():
        if name not in MANIFEST_COLUMNS:
            raise ConfigError(f"columns: '{name}' is no column of a manifest; expected some of {', '.join(MANIFEST_COLUMNS)}")
        check_columns(table, present, [plain_text(column).lower()], known)
        found[name] = plain_text(column).lower()
    for name in MANIFEST_COLUMNS[:3]:
        if found[name] is None:
            raise DataError(f"{table}: no column looks like the {name}; say which is; {describe_columns(present, known)}")
    return {name: column for name, column in found.items() if column is not None}


def find_column(present: Sequence[str], usual: Sequence[str]) -> str | None:
    """Finds a column by its usual names, without regard to `_`, `-` and spaces.

    Args:
        present: lower-case columns of the table; of two that read the same the first counts.
        usual: names without separators, the most usual first.

    Returns:
        The column as the table has it; None where there is none.
    """
    plain = {column.translate({ord(mark): None for mark in "_- "}): column for column in reversed(present)}
    return next((plain[name] for name in usual if name in plain), None)


def collect(results: Iterable[ImageRecord | SkipReason]) -> tuple[Manifest, DataReport]:
    """Collects the records among `results` into a manifest, with the report that counts all of them."""
    records: list[ImageRecord] = []
    skipped: Counter[SkipReason] = Counter()
    for result in results:
        if isinstance(result, SkipReason):
            skipped[result] += 1
        else:
            records.append(result)
    report = DataReport(
        found=len(records) + skipped.total(),
        used=len(records),
        skipped=skipped,
        classes=Counter(record.label for record in records),
        patients=len({record.patient for record in records}),
    )
    return Manifest(tuple(records)), report


def walk_files(folder: Path) -> Iterator[Path]:
    """Iterates over all files below `folder`, in a fixed order; hidden ones are ignored, links to folders followed once.

    Raises:
        DataError: a folder does not exist or cannot be listed.
    """
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        real = os.path.realpath(parent)
        visible = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        folders[:] = visible
        if real not in seen:
            seen.add(real)
            yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))


def series_folders(folder: Path) -> list[Path]:
    """Lists the CT series of `folder`: itself where it holds DICOM files, else the folders in it that do.

    Raises:
        DataError: the folder cannot be listed.
    """
    if holds_dicom(folder):
        return [folder]
    try:
        inner = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        _refuse_folder(error)
    return [path for path in inner if path.is_dir() and holds_dicom(path)]


def holds_dicom(folder: Path) -> bool:
    """Says whether one of the first few files in `folder` is a DICOM file; texts and pictures may stand before them."""
    try:
        files = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file())
    except OSError:
        return False
    return any(map(is_dicom_file, files[:_FIRST_FILES]))


def is_dicom_file(file: Path) -> bool:
    """Says whether `file` begins as a DICOM file (PS3.10, 7.1), and is not the index of a medium (PS3.10, 8.6)."""
    try:
        with file.open("rb") as opened:
            return file.name != "DICOMDIR" and opened.read(132)[128:] == b"DICM"
    except OSError:
        return False


def find_by_name(folder: Path) -> dict[str, Path]:
    """Lists the files below `folder` by their name, which the public sets use once each.

    Raises:
        DataError: the folder does not exist or cannot be listed.
    """
    return {file.name: file for file in walk_files(folder)}


def check_uncertain_policy(policy: str) -> None:
    """Refuses a policy that is none.

    Raises:
        ConfigError: `policy` is no UncertainPolicy.
    """
    if policy not in get_args(UncertainPolicy):
        raise ConfigError(f"policy for uncertain labels: expected one of {', '.join(get_args(UncertainPolicy))}, got '{policy}'")


def settle_uncertain(policy: UncertainPolicy, otherwise: str | SkipReason) -> str | SkipReason:
    """Decides on the label of an image whose pneumonia is uncertain.

    Args:
        policy: `ignore` leaves the image out, `positive` takes it as pneumonia, `negative` as without.
        otherwise: the label, or the reason to leave it out, that the image has if the pneumonia does not count.

    Returns:
        The label, or the reason why the image is left out.
    """
    if policy == "negative":
        return otherwise
    return "pneumonia" if policy == "positive" else SkipReason.UNCERTAIN_LABEL


def _record(
    cells: Mapping[str, str], base: Path, words: LabelWords, others: Iterable[tuple[str, str]] = ()
) -> ImageRecord | SkipReason:
    label = words.read(cells["label"])
    view = cells.get("view", "").strip()
    reason = _refuse(cells, label, words, view)
    if reason is not None:
        return reason
    return ImageRecord(
        path=find_image(base, cells["path"]),
        patient=plain_text(cells["patient"]),
        label=label,
        view=view or None,
        sex=read_sex(cells.get("sex", "")),
        age_years=read_age(cells.get("age", "")),
        manufacturer=cells.get("manufacturer", "").strip() or None,
        others=tuple((name, cell) for name, cell in others if cell.strip()),
    )


def _refuse(cells: Mapping[str, str], label: str, words: LabelWords, view: str) -> SkipReason | None:
    if not cells["path"].strip():
        return SkipReason.MISSING
    if not plain_text(cells["patient"]):
        return SkipReason.NO_PATIENT
    if not words.knows(label):
        return SkipReason.UNKNOWN_LABEL if label else SkipReason.NO_LABEL
    return None if is_frontal(view) else SkipReason.NOT_FRONTAL


def _refuse_folder(error: OSError) -> NoReturn:
    raise DataError(f"folder {error.filename} cannot be listed: {error.strerror}; check the path and its permissions") from None
