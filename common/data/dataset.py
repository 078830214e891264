"""A party's images, decoded and labelled, as training and evaluation take them."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pneumofed.common.config.classes import LabelTask, class_index, classes_of, task_words
from pneumofed.common.config.experiment import ImageConfig
from pneumofed.common.data.cache import Block, Pixels, load_block, load_digests
from pneumofed.common.data.manifest import DataReport, DataWarning, ImageRecord, Manifest
from pneumofed.common.data.tables import TableWriter
from pneumofed.common.errors import EmptySiteError, SkipReason
from pneumofed.common.files import OnProgress, atomic_write, pass_if_disk_full, tell_nobody

SKIPPED_FILE = "skipped.csv"
"""Beside the cache: which images were left out, and why. It names files, so it stays at its site."""


@dataclass(frozen=True)
class Dataset:
    """Decoded images with their labels; row i of each is the same image.

    `pixels` is mapped from disk: `pixels[index]` reads the rows asked for and no others, so a site may hold more images than
    fit in memory as long as it takes them a batch at a time.

    Attributes:
        pixels: uint8 [N, S, S], read-only; of CT volumes uint8 [N, slices, S, S].
        labels: int64 [N], positions in the task's classes.
        patients: of each image.
        digests: hexadecimal SHA-256 of each image file.
        report: counts of the manifest's images: found, used, left out and why.
        records: the manifest's row of each image; empty where there is no manifest.
        clinical: float32 [N, K], the clinical values of each image, NaN where one is not known (`common.data.clinical`); None where the run
            uses none.
    """

    pixels: Pixels
    labels: NDArray[np.int64]
    patients: tuple[str, ...]
    digests: tuple[str, ...]
    report: DataReport
    records: tuple[ImageRecord, ...] = ()
    clinical: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Sequence[int] | NDArray[np.int64]) -> Dataset:
        """Copies the images at the positions `index` to memory, in that order; the report stays that of the whole."""
        rows = np.asarray(index, dtype=np.int64)
        patients = tuple(self.patients[row] for row in rows)
        digests = tuple(self.digests[row] for row in rows)
        records = tuple(self.records[row] for row in rows) if self.records else ()
        clinical = None if self.clinical is None else self.clinical[rows]
        return Dataset(self.pixels[rows], self.labels[rows], patients, digests, self.report, records, clinical)

    @classmethod
    def join(cls, parts: Sequence[Dataset]) -> Dataset:
        """Copies several data sets to memory as one, in order; with clinical values and records only where all of them have some."""
        records = [part.records for part in parts]
        clinical = [part.clinical for part in parts if part.clinical is not None]
        return cls(
            np.concatenate([part.pixels for part in parts]),
            np.concatenate([part.labels for part in parts]),
            tuple(patient for part in parts for patient in part.patients),
            tuple(digest for part in parts for digest in part.digests),
            sum((part.report for part in parts), DataReport()),
            tuple(record for part in records for record in part) if all(records) else (),
            np.concatenate(clinical) if len(clinical) == len(parts) else None,
        )


def load_dataset(
    manifest: Manifest,
    task: LabelTask,
    image: ImageConfig,
    cache_dir: Path,
    *,
    workers: int = 1,
    keep_duplicates: bool = False,
    on_progress: OnProgress = tell_nobody,
) -> Dataset:
    """Loads the images of `manifest` that have a class in `task`, in its order, decoded through the cache in `cache_dir`.

    An image that cannot be used is left out and counted, and named with the reason in `cache_dir/skipped.csv`, which stays at the
    site. An image whose file content came before is left out as a duplicate. The same files give the same dataset and report
    whether the cache was there or not.

    Args:
        manifest: of one party; give each manifest a `cache_dir` of its own.
        task: decides which labels have a class.
        image: size and fit, and the slices of a CT volume.
        cache_dir: made if missing.
        workers: threads that read and decode; at least 1.
        keep_duplicates: keep images whose content came before. For held-out sets that must stay as they were published, so that
            results can be compared; training would see such an image twice.
        on_progress: told of files that are read and images that are decoded.

    Raises:
        EmptySiteError: no image can be used; the text counts the reasons.
        DataError: `cache_dir` cannot be written.
    """
    outcomes = _identify(manifest, task, cache_dir, workers, image.slices > 0, on_progress)
    block = load_block(_first_paths(outcomes, manifest), image, cache_dir, workers, on_progress)
    reasons = [None if keep_duplicates and reason is SkipReason.DUPLICATE else reason for reason in _reasons(outcomes, block)]
    _write_skipped(reasons, manifest, cache_dir)
    records = [record for record, reason in zip(manifest.records, reasons, strict=True) if reason is None]
    labels = np.array([class_index(record.label, task) for record in records], dtype=np.int64)
    report = _report(reasons, records, task)
    report.warnings.update(_warnings(outcomes, manifest, block))
    if not records:
        raise EmptySiteError(f"no image can be used for the task '{task_words(task)}': {_explain(report, cache_dir)}")
    kept = [
        outcome
        for outcome, reason in zip(outcomes, reasons, strict=True)
        if reason is None and not isinstance(outcome, SkipReason)
    ]
    patients = tuple(record.patient for record in records)
    return Dataset(_rows(block, kept), labels, patients, tuple(str(digest) for digest in kept), report, tuple(records))


def check_causes(manifest: Manifest, task: LabelTask) -> None:
    """Refuses a task of causes for images whose pneumonias have none: only normal images would be left, and nothing to learn.

    Args:
        manifest: of one party.
        task: decides which labels have a class.

    Raises:
        EmptySiteError: there are pneumonias, and none has a class in `task`.
    """
    classes = {class_index(label, task) for label in set(manifest.labels)}
    if "pneumonia" in manifest.labels and not classes - {0, None}:
        causes, name = "' or '".join(classes_of(task)[1:]), task_words(task)
        raise EmptySiteError(
            f"the task '{name}' needs the cause of a pneumonia, '{causes}', and no image here has one; add causes, or choose task binary"
        )


def _rows(block: Block, digests: Sequence[str]) -> Pixels:
    """The pixels of `digests`; as they lie on the disk where the two orders agree, which they do without duplicates."""
    if tuple(digests) == tuple(block.digests):
        return block.pixels
    row = {digest: number for number, digest in enumerate(block.digests)}
    return block.pixels[[row[digest] for digest in digests]]


def _identify(
    manifest: Manifest, task: LabelTask, cache_dir: Path, workers: int, series: bool, on_progress: OnProgress
) -> list[str | SkipReason]:
    """The digest of each record's file, or why the record has none; files of records without a class are not read."""
    refusals = [_refuse(record, task) for record in manifest.records]
    paths = [record.path for record, reason in zip(manifest.records, refusals, strict=True) if reason is None]
    digests = iter(load_digests(paths, cache_dir, workers, series=series, on_progress=on_progress))
    return [next(digests) if reason is None else reason for reason in refusals]


def _refuse(record: ImageRecord, task: LabelTask) -> SkipReason | None:
    if not record.patient:
        return SkipReason.NO_PATIENT
    if not record.label:
        return SkipReason.NO_LABEL
    return SkipReason.UNKNOWN_LABEL if class_index(record.label, task) is None else None


def _first_paths(outcomes: Sequence[str | SkipReason], manifest: Manifest) -> dict[str, Path]:
    """The first file of each content."""
    paths: dict[str, Path] = {}
    for outcome, record in zip(outcomes, manifest.records, strict=True):
        if not isinstance(outcome, SkipReason):
            paths.setdefault(outcome, record.path)
    return paths


def _reasons(outcomes: Iterable[str | SkipReason], block: Block) -> Iterator[SkipReason | None]:
    """Why each record is left out; None for those that have a row in `block`, in its order."""
    seen: set[str] = set()
    for outcome in outcomes:
        if isinstance(outcome, SkipReason):
            yield outcome
        elif outcome in block.refused:
            yield block.refused[outcome]
        else:
            yield SkipReason.DUPLICATE if outcome in seen else None
            seen.add(outcome)


def _report(reasons: Sequence[SkipReason | None], records: Sequence[ImageRecord], task: LabelTask) -> DataReport:
    classes = Counter(dict.fromkeys(classes_of(task), 0))
    classes.update(classes_of(task)[class_index(record.label, task) or 0] for record in records)
    return DataReport(
        found=len(reasons),
        used=len(records),
        skipped=Counter(reason for reason in reasons if reason is not None),
        classes=classes,
        patients=len({record.patient for record in records}),
        warnings=Counter({DataWarning.EMPTY_CLASS: list(classes.values()).count(0)}),
    )


def _warnings(outcomes: Sequence[str | SkipReason], manifest: Manifest, block: Block) -> Counter[DataWarning]:
    first: dict[str, ImageRecord] = {}
    conflicts = 0
    for outcome, record in zip(outcomes, manifest.records, strict=True):
        if not isinstance(outcome, SkipReason):
            kept = first.setdefault(outcome, record)
            conflicts += (kept.patient, kept.label) != (record.patient, record.label)
    return Counter({DataWarning.CONFLICTING_DUPLICATE: conflicts, DataWarning.CACHE_IN_MEMORY: int(not block.stored)})


def _write_skipped(reasons: Sequence[SkipReason | None], manifest: Manifest, cache_dir: Path) -> None:
    text = io.StringIO(newline="")
    writer = TableWriter(text)
    writer.write(("path", "reason"))
    writer.write_all((record.path, reason.value) for record, reason in zip(manifest.records, reasons, strict=True) if reason)
    content, path = text.getvalue().encode("utf-8", errors="surrogateescape"), cache_dir / SKIPPED_FILE
    try:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Each message loads the site's images, and the table seldom changes.
        if not path.is_file() or path.read_bytes() != content:
            with atomic_write(path) as file:
                file.write(content)
    except OSError as error:
        pass_if_disk_full(error, cache_dir)


def _explain(report: DataReport, cache_dir: Path) -> str:
    if not report.found:
        return "the manifest is empty"
    counts = ", ".join(f"{reason.value} ({count})" for reason, count in sorted(report.skipped.items()))
    return f"{counts}; each is named in {cache_dir / SKIPPED_FILE}"
