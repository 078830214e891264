"""Readers of four public chest X-ray sets, each by the layout that it is published in.

- Kaggle pediatric (Kermany et al. 2018, Cell 172): `{train,val,test}/{NORMAL,PNEUMONIA}/*.jpeg`.
- NIH ChestX-ray14 (Wang et al. 2017, CVPR): `Data_Entry_2017.csv` and the folders `images_001` to `images_012`.
- CheXpert (Irvin et al. 2019, AAAI): `train.csv` or `valid.csv` with 1, 0, -1 or nothing for each finding.
- PadChest (Bustos et al. 2020, Medical Image Analysis 66): one CSV file with a list of labels an image.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from pneumofed.common.data.manifest import DataReport, DataWarning, ImageRecord, Manifest, read_age, read_sex
from pneumofed.common.data.sources.table import (
    UncertainPolicy,
    check_uncertain_policy,
    collect,
    find_by_name,
    series_folders,
    settle_uncertain,
)
from pneumofed.common.data.tables import plain_text, read_columns, read_rows
from pneumofed.common.errors import DataError, SkipReason, in_a_row

_KAGGLE_CLASS_FOLDERS = ("NORMAL", "PNEUMONIA")

_KAGGLE_OPTIONAL_SPLITS = frozenset({"val"})
_KAGGLE_NUMBERING = {"val": "train"}
"""`val` continues the numbers of `train`; `test` numbers its persons anew."""

_NIH_COLUMNS = ("image index", "finding labels", "patient id")

_CHEXPERT_COLUMNS = ("path", "frontal/lateral", "no finding", "pneumonia")

_PADCHEST_COLUMNS = ("imageid", "patientid", "projection", "labels")
_PADCHEST_FRONTAL = frozenset({"PA", "AP", "AP_HORIZONTAL"})
_PADCHEST_UNUSABLE = frozenset({"suboptimal study", "exclude", "unchanged"})
"""`unchanged` refers to an earlier report that the set does not give."""


def read_kaggle(folder: Path, splits: Sequence[str] = ("train", "val")) -> tuple[Manifest, DataReport]:
    """Reads the images in the class folders of `splits`, ordered by split, class and file name.

    The patient comes from the file name. `person23_bacteria_77.jpeg` is person 23 whatever the cause, and `IM-0115-0001.jpeg`
    and `NORMAL2-IM-0115-0001.jpeg` are both number IM-0115: the set does not say whether the two prefixes and the two causes
    share their numbers, and to merge two patients never puts one on both sides of a split. A file named otherwise counts as a
    patient of its own and is counted in the report's warnings, since it cannot be known whose it is.

    The cause of a pneumonia comes from the file name as well; without it the label is `pneumonia`. Hidden files are ignored. All
    others are listed whatever their extension: what they are is seen when they are read. CT volumes may stand in the same layout: NIfTI
    files, folders with the DICOM files of one series each, and folders of a patient that hold such folders.

    Args:
        folder: holds the folders of the splits.
        splits: which of them; `val` may be missing, as some copies of the set lack it.

    Raises:
        DataError: a split or class folder is missing, or there is no image at all.
    """
    files = [(split, name, file) for split in splits for name, file in _kaggle_files(folder, split)]
    if not files:
        raise DataError(f"no image found in {folder}; expected images in {_kaggle_folders(splits)}")
    manifest, report = collect(_kaggle_record(split, name, file) for split, name, file in files)
    report.warnings[DataWarning.EMPTY_CLASS] = len(set(_KAGGLE_CLASS_FOLDERS) - {name for _, name, _ in files})
    untold = [file for _, name, file in files if _kaggle_named(name, file) == file and _kaggle_number(file.name) is None]
    report.warnings[DataWarning.PATIENT_FROM_FILE_NAME] = len(untold)
    return manifest, report


def read_nih(table: Path, images: Path) -> tuple[Manifest, DataReport]:
    """Reads the images of `table` that are anywhere below `images`.

    Findings with `Pneumonia` among them are pneumonia, `No Finding` is normal. Images with only other findings are neither and
    are counted as of no known label; images that are not there (the set comes in twelve parts) as missing.

    Args:
        table: `Data_Entry_2017.csv` or a later release of it.
        images: searched with all folders below it.

    Raises:
        ConfigError: the table does not exist.
        DataError: it lacks a column, or the folder cannot be listed.
    """
    present = read_columns(table)
    sex = next((name for name in ("patient sex", "patient gender") if name in present), "")  # later releases say sex
    files = find_by_name(images)
    return collect(_nih_record(row, files, sex) for _, row in read_rows(table, _NIH_COLUMNS))


def read_chexpert(table: Path, root: Path, uncertain: UncertainPolicy = "ignore") -> tuple[Manifest, DataReport]:
    """Reads the frontal images of `table` with or without pneumonia.

    `Pneumonia` 1 is pneumonia; -1 is what `uncertain` says; otherwise `No Finding` 1 is normal, and an image with only other
    findings is counted as of no known label. Laterals are left out. The patient is the folder `patient00001` of the path.
    Whether the files exist is seen when they are read.

    Args:
        table: the CSV file.
        root: the folder that holds `train` and `valid`, or the one above it.
        uncertain: `ignore` leaves uncertain images out, `positive` takes them as pneumonia, `negative` as without.

    Raises:
        ConfigError: the table does not exist or `uncertain` is none of the three.
        DataError: the table lacks a column.
    """
    check_uncertain_policy(uncertain)
    root = root.absolute()
    is_inner = any((root / name).is_dir() for name in ("train", "valid"))
    return collect(_chexpert_record(row, root, is_inner, uncertain) for _, row in read_rows(table, _CHEXPERT_COLUMNS))


def read_padchest(table: Path, images: Path, uncertain: UncertainPolicy = "ignore") -> tuple[Manifest, DataReport]:
    """Reads the frontal images of `table` that are anywhere below `images`.

    `pneumonia` among the labels is pneumonia, `normal` as the only label is normal, images with only other labels are counted as of
    no known label. `atypical pneumonia` without `pneumonia` counts as uncertain. Images whose labels hold `suboptimal study`,
    `exclude` or `unchanged` are left out as uncertain under every policy.

    Args:
        table: the CSV file.
        images: searched with all folders below it.
        uncertain: `ignore` leaves uncertain images out, `positive` takes them as pneumonia, `negative` as without.

    Raises:
        ConfigError: the table does not exist or `uncertain` is none of the three.
        DataError: the table lacks a column, or the folder cannot be listed.
    """
    check_uncertain_policy(uncertain)
    files = find_by_name(images)
    return collect(_padchest_record(row, files, uncertain) for _, row in read_rows(table, _PADCHEST_COLUMNS))


def is_kaggle(folder: Path, split: str = "train") -> bool:
    """Says whether `folder` holds both classes of `split` in the Kaggle layout.

    Args:
        folder: the one that holds train/ and test/.
        split: `train`, `val` or `test`.
    """
    return all((folder / split / name).is_dir() for name in _KAGGLE_CLASS_FOLDERS)


def require_kaggle_folders(folder: Path, split: str) -> None:
    """Does nothing where `folder` holds both classes of `split` in the Kaggle layout. Reads no image.

    Args:
        folder: the one that holds train/ and test/.
        split: `train`, `val` or `test`.

    Raises:
        DataError: a class folder is missing.
    """
    for name in _KAGGLE_CLASS_FOLDERS:
        if not (folder / split / name).is_dir():
            missing = folder / split / name
            raise DataError(f"{missing} is missing; give the folder that itself holds {_kaggle_folders([split])}")


def _kaggle_files(folder: Path, split: str) -> Iterator[tuple[str, Path]]:
    if split in _KAGGLE_OPTIONAL_SPLITS and not (folder / split).is_dir():
        return
    require_kaggle_folders(folder, split)
    for name in _KAGGLE_CLASS_FOLDERS:
        for path in sorted(path for path in (folder / split / name).iterdir() if not path.name.startswith(".")):
            yield from ((name, found) for found in ([path] if path.is_file() else series_folders(path)))


def _kaggle_record(split: str, class_folder: str, file: Path) -> ImageRecord:
    named = _kaggle_named(class_folder, file)
    number = _kaggle_number(named.name) or (named.name if named.is_dir() else Path(named.name.removesuffix(".gz")).stem)
    label = "normal" if class_folder == "NORMAL" else _kaggle_cause(named.name)
    return ImageRecord(path=file, patient=f"{_KAGGLE_NUMBERING.get(split, split)}/{number}", label=label)


def _kaggle_named(class_folder: str, file: Path) -> Path:
    """What tells the patient: an image, a series' folder, or the patient's folder that holds it."""
    return file if file.parent.name == class_folder else file.parent


def _kaggle_number(name: str) -> str | None:
    """The patient's number in a file name, in one spelling, or None if it has none."""
    match = re.match(r"(person)(\d+)_|(?:NORMAL\d*-)?(IM-)(\d+)-", name, re.IGNORECASE)
    if match is None:
        return None
    return f"person{int(match[2])}" if match[1] else f"IM-{int(match[4]):04d}"


def _kaggle_cause(name: str) -> str:
    match = re.match(r"person\d+_(bacteria|virus)_", name, re.IGNORECASE)
    if match is None:
        return "pneumonia"
    return "bacterial" if match[1].lower() == "bacteria" else "viral"


def _kaggle_folders(splits: Sequence[str]) -> str:
    return in_a_row(f"{split}/{name}" for split in splits for name in _KAGGLE_CLASS_FOLDERS)


def _nih_record(row: Mapping[str, str], files: Mapping[str, Path], sex: str) -> ImageRecord | SkipReason:
    findings = {finding.strip() for finding in row["finding labels"].split("|")}
    if "Pneumonia" not in findings and findings != {"No Finding"}:
        return SkipReason.UNKNOWN_LABEL if any(findings) else SkipReason.NO_LABEL
    if not plain_text(row["patient id"]):
        return SkipReason.NO_PATIENT
    path = files.get(row["image index"].strip())
    if path is None:
        return SkipReason.MISSING
    return ImageRecord(
        path=path.absolute(),
        patient=plain_text(row["patient id"]),
        label="pneumonia" if "Pneumonia" in findings else "normal",
        view=row.get("view position", "").strip() or None,
        sex=read_sex(row.get(sex, "")),
        age_years=read_age(row.get("patient age", "")),
    )


def _chexpert_record(row: Mapping[str, str], root: Path, is_inner: bool, uncertain: UncertainPolicy) -> ImageRecord | SkipReason:
    """Reads one row; `is_inner` says that `root` is the folder that paths start with, e.g. `CheXpert-v1.0-small`."""
    if row["frontal/lateral"].strip().lower() == "lateral":
        return SkipReason.NOT_FRONTAL
    label = _chexpert_label(row, uncertain)
    if isinstance(label, SkipReason):
        return label
    place = row["path"].strip().replace("\\", "/")
    patient = re.search(r"(?:^|/)(patient\d+)/", place)
    if patient is None:
        return SkipReason.NO_PATIENT
    return ImageRecord(
        path=root.joinpath(*PurePosixPath(place).parts[is_inner:]),
        patient=patient[1],
        label=label,
        view=row.get("ap/pa", "").strip() or None,
        sex=read_sex(row.get("sex", "")),
        age_years=read_age(row.get("age", "")),
    )


def _chexpert_label(row: Mapping[str, str], uncertain: UncertainPolicy) -> str | SkipReason:
    without = "normal" if _chexpert_value(row["no finding"]) == 1 else SkipReason.UNKNOWN_LABEL
    mark = _chexpert_value(row["pneumonia"])
    if mark == -1:
        return settle_uncertain(uncertain, without)
    return "pneumonia" if mark == 1 else without


def _chexpert_value(text: str) -> int:
    """1, -1, or 0, which also stands for a finding that is not mentioned."""
    return {"1": 1, "1.0": 1, "-1": -1, "-1.0": -1}.get(text.strip(), 0)


def _padchest_record(row: Mapping[str, str], files: Mapping[str, Path], uncertain: UncertainPolicy) -> ImageRecord | SkipReason:
    if row["projection"].strip().upper() not in _PADCHEST_FRONTAL:
        return SkipReason.NOT_FRONTAL
    label = _padchest_label(_padchest_list(row["labels"]), uncertain)
    if isinstance(label, SkipReason):
        return label
    if not plain_text(row["patientid"]):
        return SkipReason.NO_PATIENT
    path = files.get(row["imageid"].strip())
    if path is None:
        return SkipReason.MISSING
    return ImageRecord(
        path=path.absolute(),
        patient=plain_text(row["patientid"]),
        label=label,
        view=row["projection"].strip(),
        sex=read_sex(row.get("patientsex_dicom", "")),
        age_years=_padchest_age(row),
        manufacturer=row.get("manufacturer_dicom", "").strip() or None,
    )


def _padchest_label(labels: set[str], uncertain: UncertainPolicy) -> str | SkipReason:
    if not labels:
        return SkipReason.NO_LABEL
    if labels & _PADCHEST_UNUSABLE:
        return SkipReason.UNCERTAIN_LABEL
    if "pneumonia" in labels:
        return "pneumonia"
    if "atypical pneumonia" in labels:
        return settle_uncertain(uncertain, SkipReason.UNKNOWN_LABEL)
    return "normal" if labels == {"normal"} else SkipReason.UNKNOWN_LABEL


def _padchest_list(text: str) -> set[str]:
    """The labels in a text such as `['normal', 'pneumonia ']`; none for `nan` or anything else."""
    try:
        labels = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return set()
    return {str(label).strip().lower() for label in labels} - {""} if isinstance(labels, list) else set()


def _padchest_age(row: Mapping[str, str]) -> float | None:
    """Years from the year of birth, e.g. `1930.0`, to that of the study, e.g. `20140915`; right to within one year."""
    try:
        age = int(row.get("studydate_dicom", "").strip()[:4]) - int(float(row.get("patientbirth", "")))
    except (ValueError, OverflowError):
        return None
    return float(age) if 0 <= age <= 120 else None
