"""From files to answers: decoding in threads, a few files ahead of the network, so that neither waits for the other."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

from common.errors import ImageError, SkipReason
from common.images import Image, read_image
from common.model_bundle.judgement import Judgement
from common.model_bundle.predictor import BATCH, Predictor, prepare

T = TypeVar("T")
R = TypeVar("R")

_UID = re.compile(r"[0-9.]{1,64}")  # PS3.5, 9.1


@dataclass(frozen=True)
class Loaded:
    """A file as the network wants it, or the reason why it cannot be read.

    Attributes:
        path: absolute.
        image: its pixels are the model's square already, so that waiting files take little memory.
        problem: why there is none.
        study: Study Instance UID; empty for other files than DICOM.
        instance: SOP Instance UID; likewise.
        patient: the hospital's number of the patient; likewise. It goes into no row.
    """

    path: Path
    image: Image | None = None
    problem: SkipReason | None = None
    study: str = ""
    instance: str = ""
    patient: str = field(default="", repr=False)


@dataclass(frozen=True)
class Answer:
    """What became of one file; `judgement` is None where it could not be read."""

    loaded: Loaded
    judgement: Judgement | None


class _Judge(Protocol):
    def __call__(self, images: list[Image]) -> list[Judgement]: ...


def answer_files(paths: Iterable[Path], predictor: Predictor, workers: int = 0) -> Iterator[Answer]:
    """One answer for each of `paths`, in their order; a file that cannot be read is an answer too, with its reason.

    At most 2 `BATCH` + 2 `workers` squares and `workers` whole images are in memory, whatever the number of files. Answers do not
    depend on `workers` or on the other files, but for float32's last digits.

    Args:
        paths: taken as they are needed.
        predictor: judges in this thread.
        workers: threads that decode; 0 is one for each processor.
    """
    threads = workers or os.cpu_count() or 1
    loaded = map_ahead(lambda path: load(path, predictor), paths, threads, ahead=BATCH + 2 * threads)
    while batch := list(islice(loaded, BATCH)):
        yield from _answer_batch(batch, predictor.judge)


def load(path: Path, predictor: Predictor) -> Loaded:
    """The file `path`, prepared for `predictor`; never raises for what the file holds."""
    try:
        image = read_image(path, window=predictor.window)
        study, instance, patient = _identify(path) if image.info.format == "dicom" else ("", "", "")
    except ImageError as error:
        return Loaded(path, problem=error.reason)
    square = prepare(
        image.pixels, predictor.manifest.preprocessing
    )  # judging prepares again, which leaves such a square as it is
    return Loaded(path, replace(image, pixels=square), study=study, instance=instance, patient=patient)


def map_ahead(function: Callable[[T], R], items: Iterable[T], threads: int, ahead: int) -> Iterator[R]:
    """`map(function, items)` in its order, with `function` run by `threads` threads on up to `ahead` items before they are asked for."""
    source, waiting = iter(items), deque[Future[R]]()
    pool = ThreadPoolExecutor(threads, "decode")
    try:
        while True:
            waiting.extend(pool.submit(function, item) for item in islice(source, ahead - len(waiting)))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _answer_batch(batch: list[Loaded], judge: _Judge) -> Iterator[Answer]:
    judgements = iter(judge([loaded.image for loaded in batch if loaded.image]))
    for loaded in batch:
        yield Answer(loaded, next(judgements) if loaded.image else None)


def _identify(path: Path) -> tuple[str, str, str]:
    from common.dicom.header import read_header  # pydicom takes a third of a second to import: only those who have DICOM pay

    header = read_header(path)
    study, instance = (uid if _UID.fullmatch(uid) else "" for uid in (header.study_uid, header.sop_uid))
    return study, instance, header.patient
