"""A folder of images, judged and put into the monitor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from client.monitor.monitor import Monitor
from common.dicom.header import read_header
from common.errors import ImageError
from common.images import Image, read_image
from common.seeds import numpy_generator

if TYPE_CHECKING:
    from common.model_bundle.predictor import Predictor

BATCH = 16


@dataclass
class Added:
    """What became of the files.

    Attributes:
        judged: images that were written.
        refused: of them, those that the model would not judge.
        patients_unknown: of them, those without a patient in the file, each of which counts as one of its own.
        skipped: files that are no usable image, by reason.
    """

    judged: int = 0
    refused: int = 0
    patients_unknown: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


def add_images(
    monitor: Monitor,
    predictor: Predictor,
    paths: Iterable[Path],
    day: date | None = None,
    patients: Mapping[Path, str] | None = None,
) -> Added:
    """Judges every file of `paths` (folders with all below them) as of `day`, today without one, and writes it to `monitor`.

    In random order: names often sort by class or by device, and such an order is itself a change to whoever watches.

    `patients` tells whose the images are, by absolute path; it wins over what a DICOM file says. Without it images of one patient that
    name none count as so many patients, and a set in which the sick have more images than the healthy looks unlike the reference,
    which has one image a patient.

    A file that is no usable image is counted with its reason. The same file added twice counts twice.

    Raises:
        DataError: the monitor's folder cannot be written.
    """
    listed = list(_files(paths))
    order = numpy_generator("drift", "arrival", monitor.reference.digest, len(listed)).permutation(len(listed))
    known = patients or {}
    added, files = Added(), iter([listed[row] for row in order])
    while batch := list(islice(files, BATCH)):
        read = [taken for path in batch if (taken := _read(path, predictor, added, known)) is not None]
        judgements = predictor.judge([image for image, _ in read])
        for (image, patient), judgement in zip(read, judgements, strict=True):
            monitor.record(judgement, image.info, day, patient)
            added.judged += 1
            added.refused += judgement.verdict == "cannot judge"
            added.patients_unknown += patient is None
    return added


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(found for found in path.rglob("*") if found.is_file() and not found.name.startswith("."))
        else:
            yield path


def _read(path: Path, predictor: Predictor, added: Added, known: Mapping[Path, str]) -> tuple[Image, str | None] | None:
    """(the image, its patient or else its study, if anything names one); None if it cannot be used."""
    try:
        image = read_image(path, window=predictor.window)
        if (patient := known.get(path.absolute())) or image.info.format != "dicom":
            return image, patient
        header = read_header(path)
        return image, header.patient or header.study_uid or None
    except ImageError as error:
        added.skipped[error.reason.value] += 1
        return None
