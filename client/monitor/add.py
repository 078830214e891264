"""A folder of images, judged and put into the monitor."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from client.monitor.monitor import Monitor
from client.predict.answers import judge_files
from client.predict.files import find_files
from common.seeds import numpy_generator

if TYPE_CHECKING:
    from common.model_bundle.predictor import Predictor


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


def record_images(
    monitor: Monitor,
    predictor: Predictor,
    paths: Iterable[Path],
    day: date | None = None,
    patients: Mapping[Path, str] | None = None,
) -> Added:
    """Judges every file of `paths` (folders with all below them) as of `day`, today without one, and writes it to `monitor`.

    In random order: names often sort by class or by device, and such an order is itself a change to whoever watches.

    A file that is no usable image is counted with its reason. The same file added twice counts twice.

    Args:
        monitor: takes the judgements.
        predictor: of the bundle that `monitor` was opened for.
        paths: files, and folders as `find_files` searches them.
        day: of the images.
        patients: whose the images are, by path; it wins over what a DICOM file says. Without it images of one patient that name none
            count as so many patients, and a set in which the sick have more images than the healthy looks unlike the reference, which
            has one image a patient.

    Raises:
        DataError: the monitor's folder cannot be written.
    """
    listed = list(find_files(paths))
    order = numpy_generator("drift", "arrival", monitor.reference.digest, len(listed)).permutation(len(listed))
    known = {os.path.abspath(path): patient for path, patient in (patients or {}).items()}  # noqa: PTH100 - as `find_files` has them
    added = Added()
    for result in judge_files((listed[row] for row in order), predictor):
        loaded, judgement = result.loaded, result.judgement
        if judgement is None or loaded.image is None:
            added.skipped[result.explanation] += 1
            continue
        patient = known.get(str(loaded.path)) or loaded.patient
        monitor.record(judgement, loaded.image.info, day, patient)
        added.judged += 1
        added.refused += judgement.prediction is None
        added.patients_unknown += patient is None
    return added
