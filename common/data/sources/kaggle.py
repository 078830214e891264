"""The Kaggle pediatric chest X-ray set (Kermany et al. 2018, Cell 172): `{train,val,test}/{NORMAL,PNEUMONIA}/*.jpeg`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.data.manifest import ImageRecord, Manifest
from common.data.report import DataReport, DataWarning
from common.data.sources.collect import collect
from common.errors import DataError

CLASS_FOLDERS = ("NORMAL", "PNEUMONIA")

_OPTIONAL_SPLITS = frozenset({"val"})
_NUMBERING = {"val": "train"}
"""`val` continues the numbers of `train`; `test` numbers its persons anew."""


def read_kaggle(folder: Path, splits: Sequence[str] = ("train", "val")) -> tuple[Manifest, DataReport]:
    """The images in the class folders of `splits`, ordered by split, class and file name.

    The patient comes from the file name. `person23_bacteria_77.jpeg` is person 23 whatever the cause, and `IM-0115-0001.jpeg`
    and `NORMAL2-IM-0115-0001.jpeg` are both number IM-0115: the set does not say whether the two prefixes and the two causes
    share their numbers, and to merge two patients never puts one on both sides of a split. A file named otherwise counts as a
    patient of its own and is counted in the report's warnings, since it cannot be known whose it is.

    The cause of a pneumonia comes from the file name as well; without it the label is `pneumonia`. Hidden files are ignored. All
    others are listed whatever their extension: what they are is seen when they are read.

    Args:
        folder: holds the folders of the splits.
        splits: which of them; `val` may be missing, as some copies of the set lack it.

    Raises:
        DataError: a split or class folder is missing, or there is no image at all.
    """
    files = [(split, name, file) for split in splits for name, file in _split_files(folder, split)]
    if not files:
        raise DataError(f"no image found in {folder}; expected images in {_expected(splits)}")
    manifest, report = collect(_record(split, name, file) for split, name, file in files)
    report.warnings[DataWarning.EMPTY_CLASS] = len(set(CLASS_FOLDERS) - {name for _, name, _ in files})
    report.warnings[DataWarning.PATIENT_FROM_FILE_NAME] = sum(_number(file.name) is None for _, _, file in files)
    return manifest, report


def _split_files(folder: Path, split: str) -> Iterator[tuple[str, Path]]:
    if split in _OPTIONAL_SPLITS and not (folder / split).is_dir():
        return
    for name in CLASS_FOLDERS:
        class_folder = folder / split / name
        if not class_folder.is_dir():
            raise DataError(f"{class_folder} is missing; give the folder that itself holds {_expected([split])}")
        files = (file for file in class_folder.iterdir() if not file.name.startswith("."))
        yield from ((name, file) for file in sorted(files) if file.is_file())


def _record(split: str, class_folder: str, file: Path) -> ImageRecord:
    number = _number(file.name) or file.stem
    label = "normal" if class_folder == "NORMAL" else _cause(file.name)
    return ImageRecord(path=file, patient=f"{_NUMBERING.get(split, split)}/{number}", label=label)


def _number(name: str) -> str | None:
    """The patient's number in a file name, in one spelling, or None if it has none."""
    match = re.match(r"(person)(\d+)_|(?:NORMAL\d*-)?(IM-)(\d+)-", name, re.IGNORECASE)
    if match is None:
        return None
    return f"person{int(match[2])}" if match[1] else f"IM-{int(match[4]):04d}"


def _cause(name: str) -> str:
    match = re.match(r"person\d+_(bacteria|virus)_", name, re.IGNORECASE)
    if match is None:
        return "pneumonia"
    return "bacterial" if match[1].lower() == "bacteria" else "viral"


def _expected(splits: Sequence[str]) -> str:
    return " and ".join(f"{split}/{name}" for split in splits for name in CLASS_FOLDERS)
