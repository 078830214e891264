"""From files to judgements: decoding in threads, a few files ahead of the network, so that neither waits for the other."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from common.errors import ImageError, SkipReason
from common.image_types import Image
from common.model_bundle.judgement import Judgement, Prediction
from common.model_bundle.predictor import BATCH, Predictor

if TYPE_CHECKING:
    from common.dicom.header import DicomHeader

T = TypeVar("T")
R = TypeVar("R")

Status = Literal["judged", "cannot_judge", "unreadable"]

_UID = re.compile(r"[0-9.]{1,64}")  # PS3.5, 9.1


@dataclass(frozen=True)
class Loaded:
    """A file as the network wants it, or the reason why it cannot be read.

    Attributes:
        path: absolute.
        image: its pixels are the model's square already, so that waiting files take little memory.
        problem: why there is none.
        header: the identifying tags of a DICOM file; None for other files.
    """

    path: Path
    image: Image | None = None
    problem: SkipReason | None = None
    header: DicomHeader | None = field(default=None, repr=False)

    @property
    def study(self) -> str:
        """Study Instance UID; empty where the file has none that is a UID."""
        return _valid_uid(self.header.study_uid) if self.header else ""

    @property
    def instance(self) -> str:
        """SOP Instance UID; likewise."""
        return _valid_uid(self.header.sop_uid) if self.header else ""

    @property
    def patient(self) -> str | None:
        """Whom the monitor of drift counts the image as: the patient, else the study; None where the file names neither."""
        return (self.header.patient or self.header.study_uid or None) if self.header else None


@dataclass(frozen=True)
class FileResult:
    """What came of one file: its judgement, None where it could not be read, and what was written beside it.

    Attributes:
        loaded: the file.
        judgement: of its image.
        report, overlay: paths of the DICOM objects or pictures that were written, or empty.
        note: why one of them was not, or empty.
    """

    loaded: Loaded
    judgement: Judgement | None
    report: str = ""
    overlay: str = ""
    note: str = ""

    @property
    def prediction(self) -> Prediction | None:
        """The model's answer; None where the file was not read or its image cannot be judged."""
        return self.judgement.prediction if self.judgement else None

    @property
    def status(self) -> Status:
        if self.judgement is None:
            return "unreadable"
        return "judged" if self.judgement.prediction else "cannot_judge"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why there is no prediction, in fixed words: values of `Reason`, or a `SkipReason`'s name in small letters."""
        if self.loaded.problem:
            return (self.loaded.problem.name.lower(),)
        return tuple(reason.value for reason in self.judgement.reasons) if self.judgement else ()

    @property
    def explanation(self) -> str:
        """The reasons in plain English."""
        if self.loaded.problem:
            return self.loaded.problem.value
        return self.judgement.explanation if self.judgement else ""


def judge_files(paths: Iterable[Path], predictor: Predictor, workers: int = 0) -> Iterator[FileResult]:
    """One result for each of `paths`, in their order; a file that cannot be read is a result too, with its reason.

    At most 2 `BATCH` + 2 `workers` squares and `workers` whole images are in memory, whatever the number of files. Results do not
    depend on `workers` or on the other files, but for float32's last digits.

    Args:
        paths: taken as they are needed.
        predictor: judges in this thread.
        workers: threads that decode; 0 is one for each processor.
    """
    threads = workers or os.cpu_count() or 1
    loaded = map_ahead(lambda path: load(path, predictor), paths, threads, ahead=BATCH + 2 * threads)
    while batch := list(islice(loaded, BATCH)):
        yield from _judge_batch(batch, predictor)


def load(path: Path, predictor: Predictor) -> Loaded:
    """The file `path`, prepared for `predictor`; never raises for what the file holds."""
    try:
        read = predictor.read(path)
    except ImageError as error:
        return Loaded(path, problem=error.reason)
    # Judging prepares again, which leaves such a square as it is.
    return Loaded(path, replace(read.image, pixels=predictor.prepare(read.image)), header=read.header)


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


def _judge_batch(batch: list[Loaded], predictor: Predictor) -> Iterator[FileResult]:
    images = {str(loaded.path): loaded.image for loaded in batch if loaded.image}
    judgements = predictor.judge(list(images.values()), list(images))
    by_name = {judgement.image: judgement for judgement in judgements}
    for loaded in batch:
        yield FileResult(loaded, by_name.get(str(loaded.path)))


def _valid_uid(text: str) -> str:
    return text if _UID.fullmatch(text) else ""
