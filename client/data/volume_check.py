"""Checks a site's CT volumes before a run does: each is read, and a table says in words what was found of it.

A run decodes a volume to its grid and counts a bad one under a reason that may leave the site, which holds no number of its own. Here the
whole sentence is written down (how many slices are missing and where, how many series lie in a folder), and of a good volume its size, its
spacing and what was set aside. The table names files, so it stays at the site.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pneumofed.common.config.classes import LabelTask, class_index, classes_of
from pneumofed.common.data.manifest import DataReport, DataWarning, ImageRecord, Manifest
from pneumofed.common.data.tables import TableWriter
from pneumofed.common.errors import DataError, ImageError, SkipReason
from pneumofed.common.files import OnProgress, atomic_write, count_off, tell_nobody
from pneumofed.common.imaging.volumes import read_volume

VOLUMES_FILE = "volumes.csv"
"""Beside the cache."""
_HEADER = ("path", "used", "slices", "rows", "columns", "slice_mm", "row_mm", "column_mm", "words")


@dataclass(frozen=True)
class CheckedVolume:
    """What is known of one volume once it has been read.

    Attributes:
        record: of the manifest.
        reason: why it cannot be used; None where it can.
        words: the whole sentence of the reason, or what was set aside.
        shape: slices, rows and columns; empty where it was not read.
        spacing_mm: between them.
    """

    record: ImageRecord
    reason: SkipReason | None
    words: str = ""
    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()


def check_volumes(
    manifest: Manifest, task: LabelTask, folder: Path, workers: int = 1, on_progress: OnProgress = tell_nobody
) -> DataReport:
    """Reads every volume of `manifest` that has a class in `task`, and writes `VOLUMES_FILE`.

    Args:
        manifest: of one site.
        task: decides which labels have a class.
        folder: of the table; made if missing.
        workers: threads that read; each holds one volume in memory.
        on_progress: told of each volume.

    Returns:
        Counts of the volumes found, used and left out by reason, as a run counts them; equal contents are not looked for.

    Raises:
        DataError: the table cannot be written.
    """
    checked = list(count_off(_check_all(manifest, task, workers), "volumes read", len(manifest), on_progress))
    text = io.StringIO(newline="")
    writer = TableWriter(text)
    writer.write(_HEADER)
    writer.write_all(_row(one) for one in checked)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with atomic_write(folder / VOLUMES_FILE) as file:
            file.write(text.getvalue().encode("utf-8", errors="surrogateescape"))
    except OSError as error:
        raise DataError(
            f"{folder / VOLUMES_FILE} cannot be written ({type(error).__name__}); check the disk and its permissions"
        ) from None
    return _report(checked, task)


def check_volume(record: ImageRecord, task: LabelTask) -> CheckedVolume:
    """Reads the volume of one record.

    Args:
        record: of the manifest.
        task: decides which labels have a class; a volume without one is not read.
    """
    if not record.label or class_index(record.label, task) is None:
        reason = SkipReason.UNKNOWN_LABEL if record.label else SkipReason.NO_LABEL
        return CheckedVolume(record, reason, reason.value)
    try:
        volume = read_volume(record.path)
    except ImageError as error:
        return CheckedVolume(record, error.reason, str(error))
    return CheckedVolume(record, None, "; ".join(volume.notes), volume.hounsfield.shape, volume.spacing_mm)


def _check_all(manifest: Manifest, task: LabelTask, workers: int) -> Iterator[CheckedVolume]:
    """A few at a time, so that an interrupted check does not wait for all that were begun."""
    records = iter(manifest.records)
    with ThreadPoolExecutor(workers) as pool:
        while some := list(islice(records, 2 * workers)):
            yield from pool.map(lambda record: check_volume(record, task), some)


def _row(one: CheckedVolume) -> list[object]:
    sizes: list[float | None] = [*one.shape, *(round(step, 4) for step in one.spacing_mm)]
    sizes = sizes or [None] * 6
    return [str(one.record.path), "no" if one.reason else "yes", *sizes, one.words]


def _report(checked: list[CheckedVolume], task: LabelTask) -> DataReport:
    used = [one.record for one in checked if one.reason is None]
    classes = Counter(dict.fromkeys(classes_of(task), 0))
    classes.update(classes_of(task)[class_index(record.label, task) or 0] for record in used)
    return DataReport(
        found=len(checked),
        used=len(used),
        skipped=Counter(one.reason for one in checked if one.reason is not None),
        classes=classes,
        patients=len({record.patient for record in used}),
        warnings=Counter({DataWarning.EMPTY_CLASS: list(classes.values()).count(0)}),
    )
