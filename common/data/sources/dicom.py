"""A folder of DICOM files or CT series, however nested, with a table of labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from pneumofed.common.data.label_words import LabelWords
from pneumofed.common.data.manifest import DataReport, ImageRecord, Manifest, read_sex
from pneumofed.common.data.sources.table import collect, find_column, holds_dicom, is_dicom_file, walk_files
from pneumofed.common.data.tables import describe_columns, plain_text, read_columns, read_rows
from pneumofed.common.errors import DataError, ImageError, SkipReason
from pneumofed.common.files import OnProgress, count_off, tell_nobody
from pneumofed.common.imaging.dicom_header import DicomHeader, read_header
from pneumofed.common.imaging.patient_groups import is_frontal, is_other_part

_KEYS = {
    "sop_uid": ("sopinstanceuid", "sopuid", "sop"),
    "file": ("path", "filename", "file", "filepath"),
    "series_uid": ("seriesinstanceuid", "seriesuid", "series"),
    "study_uid": ("studyinstanceuid", "studyuid", "study"),
    "accession": ("accessionnumber", "accession"),
}
"""Usual names of the columns that say which images a label is for, the most exact first."""

Labels = dict[str, dict[str, str]]
"""Label by value, for each kind of key."""


def read_dicom_folder(
    folder: Path,
    label_table: Path,
    frontal_only: bool = True,
    words: LabelWords | None = None,
    on_progress: OnProgress = tell_nobody,
) -> tuple[Manifest, DataReport]:
    """Reads the DICOM files below `folder` that have a label, whatever their names; only their headers are read.

    The label table is a CSV file with a column `label` and one or more of: SOP instance UID, file (a path relative to `folder`,
    or a bare name, which counts only if no other file has it), series instance UID, study instance UID, accession number. Where
    several fit an image the most exact decides. The patient is the Patient ID; an image without one is left out and counted, as is
    one without a label, one with a label outside the manifest's vocabulary, or a file that is no DICOM. Hidden files and DICOMDIR
    are ignored.

    Args:
        folder: searched with all folders below it.
        label_table: the CSV file.
        frontal_only: leave out what is stated to be no frontal view or not the chest; an image that does not say it stays.
        words: the site's own words for labels; None for none.
        on_progress: told of each header.

    Raises:
        ConfigError: the table does not exist.
        DataError: the folder cannot be listed, the table lacks a column, or it gives one key two labels.
    """
    words = words or LabelWords()
    labels = read_labels(label_table, words)
    files = [file for file in walk_files(folder) if file.name != "DICOMDIR"]  # PS3.10, 8.6: the index of a medium
    if not files:
        raise DataError(f"no file found in {folder}; expected a folder that holds DICOM files, itself or in folders below")
    names = Counter(file.name for file in files)
    found = (_record(file, file, _file_keys(file, folder, names), labels, words, frontal_only) for file in files)
    return collect(count_off(found, "headers read", len(files), on_progress))


def read_ct_folder(
    folder: Path, label_table: Path, words: LabelWords | None = None, on_progress: OnProgress = tell_nobody
) -> tuple[Manifest, DataReport]:
    """Reads the CT series below `folder` that have a label: each folder that holds DICOM files is one; only one header of each is read.

    The label table is as of `read_dicom_folder`; `filename` is the series' folder. Whether a folder holds one whole series is seen when
    it is read (`common.imaging.volumes`).

    Args:
        folder: searched with all folders below it.
        label_table: the CSV file.
        words: the site's own words for labels; None for none.
        on_progress: told of each series' header.

    Raises:
        ConfigError: the table does not exist.
        DataError: the folder cannot be listed or holds no series, the table lacks a column, or it gives one key two labels.
    """
    words = words or LabelWords()
    labels = read_labels(label_table, words)
    series = [parent for parent in dict.fromkeys(file.parent for file in walk_files(folder)) if holds_dicom(parent)]
    if not series:
        raise DataError(f"no series found in {folder}; expected folders with the DICOM files of one CT series each")
    names = Counter(one.name for one in series)
    found = (_record(one, _first_dicom(one), _file_keys(one, folder, names), labels, words, False) for one in series)
    return collect(count_off(found, "headers read", len(series), on_progress))


def read_labels(table: Path, words: LabelWords | None = None) -> Labels:
    """Reads the labels in the CSV file `table`, for each kind of key that it has a column for; see `read_dicom_folder`.

    Args:
        table: the file.
        words: the site's own words for labels; None for none. A word that they do not know stays as it is.

    Raises:
        ConfigError: the table does not exist.
        DataError: the table lacks a column, or it gives one key two labels.
    """
    present, words = read_columns(table), words or LabelWords()
    columns = {kind: column for kind, usual in _KEYS.items() if (column := find_column(present, usual))}
    if not columns:
        raise DataError(
            f"{table}: no column tells which image a label is for; expected one named SOPInstanceUID, SeriesInstanceUID, "
            f"StudyInstanceUID, AccessionNumber or filename; {describe_columns(present, ['label'])}"
        )
    labels: Labels = {kind: {} for kind in columns}
    for number, row in read_rows(table, ["label", *columns.values()]):
        label = words.read(row["label"])
        for kind, column in columns.items():
            key = _plain_key(row[column])
            if key and label and labels[kind].setdefault(key, label) != label:
                raise DataError(f"{table}, row {number}: column '{column}' has a value that an earlier row gives another label")
    return labels


def record_of(file: Path, header: DicomHeader, label: str) -> ImageRecord:
    """Builds the manifest's row of a DICOM file.

    Args:
        file: its path, which becomes absolute.
        header: of that file; empty texts become None.
        label: as `LabelWords.read` gives it.
    """
    return ImageRecord(
        path=file.absolute(),
        patient=header.patient,
        label=label,
        view=header.view or None,
        sex=read_sex(header.sex),
        age_years=header.age_years,
        manufacturer=header.manufacturer or None,
    )


def find_label(keys: Mapping[str, Sequence[str]], labels: Labels) -> str:
    """Finds the label of an image in a label table.

    Args:
        keys: the image's keys of each kind: `sop_uid`, `file`, `series_uid`, `study_uid`, `accession`; a kind may be missing.
        labels: the table, as `read_labels` gives it.

    Returns:
        The label of the most exact key that the table has; an empty text where it has none.
    """
    plain = {kind: [_plain_key(key) for key in found] for kind, found in keys.items()}
    found = (table[key] for kind, table in labels.items() for key in plain.get(kind, ()) if key in table)
    return next(found, "")


def _plain_key(key: str) -> str:
    """A key as both the table's cell and the file are compared: one spelling in Unicode, `/` in paths."""
    return plain_text(key).replace("\\", "/")


def _first_dicom(folder: Path) -> Path:
    return next(file for file in sorted(folder.iterdir()) if is_dicom_file(file))


def _record(
    path: Path, file: Path, file_keys: list[str], labels: Labels, words: LabelWords, frontal_only: bool
) -> ImageRecord | SkipReason:
    """The record of the image or series at `path`, of which `file` tells the header."""
    try:
        header = read_header(file)
    except ImageError as error:
        return error.reason
    keys = {"sop_uid": [header.sop_uid], "file": file_keys, "series_uid": [header.series_uid]}
    keys |= {"study_uid": [header.study_uid], "accession": [header.accession]}
    label = find_label(keys, labels)
    reason = _refuse(header, label, words)
    if reason is None and frontal_only and not is_frontal(header.view):
        reason = SkipReason.NOT_FRONTAL
    if reason is None and frontal_only and is_other_part(header.body_part):
        reason = SkipReason.NOT_CHEST
    if reason is not None:
        return reason
    return record_of(path, header, label)


def _refuse(header: DicomHeader, label: str, words: LabelWords) -> SkipReason | None:
    if not words.knows(label):
        return SkipReason.UNKNOWN_LABEL if label else SkipReason.NO_LABEL
    return None if header.patient else SkipReason.NO_PATIENT


def _file_keys(file: Path, folder: Path, names: Counter[str]) -> list[str]:
    relative = file.relative_to(folder).as_posix()
    return [relative, file.name] if names[file.name] == 1 else [relative]
