"""From files to judgements: files are found, decoded, judged, counted by study, and written as rows.

`find_files` lists the files that were named and those below the folders that were named, as they are needed. `judge_files` decodes in
threads, a few files ahead of the network, so that neither waits for the other. `PredictionSummary` counts files and gathers the images of
one examination, as a worklist asks of a DICOM study. `json_row` and `csv_row` are the stable schema for scripts: see docs/predict.md.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pneumofed.common.config.classes import positive_word
from pneumofed.common.errors import ImageError, SkipReason
from pneumofed.common.imaging.patient_groups import Projection, classify_view
from pneumofed.common.imaging.types import Image
from pneumofed.common.model_bundle.population import PopulationStatus
from pneumofed.common.model_bundle.predictor import BATCH, Predictor
from pneumofed.common.model_bundle.series import find_series, search_folders
from pneumofed.common.model_bundle.suitability import Judgement, Prediction
from pneumofed.inference.predict.clinical_table import ClinicalTable, describe_values

if TYPE_CHECKING:
    from pneumofed.common.imaging.dicom_header import DicomHeader


T = TypeVar("T")
R = TypeVar("R")

Status = Literal["judged", "cannot_judge", "unreadable"]

_VALID_UID = re.compile(r"[0-9.]{1,64}")  # PS3.5, 9.1

ROW_SCHEMA = 1
"""Raised when a column is renamed, removed, or means something else; new columns may come without that."""

CSV_COLUMNS = (
    *("file", "study", "instance", "status", "finding", "probability", "low", "high", "threshold"),
    *("reasons", "explanation", "report", "overlay", "note"),
    *("population", "age_group", "sex", "view", "population_note"),
)
"""Of the CSV table, before one column `probability_CLASS` for each class, `likeliest` where there are more than two, and then `model`."""

CLINICAL_COLUMNS = ("clinical", "image_only")
"""Behind `CSV_COLUMNS`, of a model that takes clinical values: those that were given, and the probability without them."""

NOT_OF_THE_KIND = (SkipReason.NOT_CT,)
"""Read well, but nothing that the model judges, as a radiograph given to a model for CT."""
NOTE_FOR_PROCESSING = "caution: raw values of the detector (FOR PROCESSING), not the picture that is read"
NOTE_NO_VIEW = "the file states no view"


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
        note: why one of them was not, and what calls for caution with the image; or empty.
        values: its clinical values in words, by column; None where the model takes none.
    """

    loaded: Loaded
    judgement: Judgement | None
    report: str = ""
    overlay: str = ""
    note: str = ""
    values: Mapping[str, str] | None = None

    @property
    def prediction(self) -> Prediction | None:
        """The model's answer; None where the file was not read or its image cannot be judged."""
        return self.judgement.prediction if self.judgement else None

    @property
    def status(self) -> Status:
        if self.judgement is None:
            return "cannot_judge" if self.loaded.problem in NOT_OF_THE_KIND else "unreadable"
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


def judge_files(
    paths: Iterable[Path], predictor: Predictor, workers: int = 0, clinical: ClinicalTable | None = None
) -> Iterator[FileResult]:
    """Yields one result for each of `paths`, in their order; a file that cannot be read is a result too, with its reason.

    At most 2 `BATCH` + 2 `workers` squares and `workers` whole images are in memory, whatever the number of files. Results do not
    depend on `workers` or on the other files, but for float32's last digits.

    Args:
        paths: taken as they are needed.
        predictor: judges in this thread.
        workers: threads that decode; 0 is one for each processor.
        clinical: values beside the images, for a model that takes some; a file without a row is judged by its image.
    """
    threads = workers or os.cpu_count() or 1
    loaded = map_ahead(lambda path: load(path, predictor), paths, threads, ahead=BATCH + 2 * threads)
    while batch := list(islice(loaded, BATCH)):
        yield from _judge_batch(batch, predictor, clinical)


def load(path: Path, predictor: Predictor) -> Loaded:
    """Reads the file `path` and prepares it for `predictor`; never raises for what the file holds.

    Args:
        path: absolute.
        predictor: says how the network's square is made.
    """
    try:
        read = predictor.read(path)
    except ImageError as error:
        return Loaded(path, problem=error.reason)
    # Judging prepares again, which leaves such a square as it is.
    return Loaded(path, replace(read.image, pixels=predictor.prepare(read.image)), header=read.header)


def map_ahead(function: Callable[[T], R], items: Iterable[T], threads: int, ahead: int) -> Iterator[R]:
    """Yields `function(item)` for each of `items` in their order, computed by threads before it is asked for.

    Args:
        function: must be safe to call from several threads; what it raises is raised at the item's turn and ends the iteration.
        items: taken as they are needed, in the caller's thread.
        threads: number of threads, at least 1.
        ahead: most items that are under way or wait to be taken, at least 1; bounds the memory.
    """
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


def _judge_batch(batch: list[Loaded], predictor: Predictor, clinical: ClinicalTable | None) -> Iterator[FileResult]:
    images = {str(loaded.path): loaded.image for loaded in batch if loaded.image}
    headers = {str(loaded.path): loaded.header for loaded in batch}
    values = {name: clinical.find(Path(name), headers[name]) if clinical else None for name in images}
    judgements = predictor.judge(list(images.values()), list(images), list(values.values()))
    by_name = {judgement.image: judgement for judgement in judgements}
    for loaded in batch:
        name, words = str(loaded.path), None
        if predictor.clinical is not None:
            found = values.get(name)
            words = {} if found is None else describe_values(found, predictor.clinical)
        yield FileResult(loaded, by_name.get(name), note=_caution(loaded), values=words)


def _caution(loaded: Loaded) -> str:
    """What a reader should know of an image that is judged all the same; empty where there is nothing."""
    info = loaded.image.info if loaded.image else None
    if info is None or info.format != "dicom":
        return ""
    if info.modality == "CT" and loaded.image is not None and loaded.image.pixels.ndim == 3:
        return ""  # a volume has no view
    is_unknown = classify_view(info.view or "") is Projection.UNKNOWN
    return "; ".join([NOTE_FOR_PROCESSING] * info.for_processing + [NOTE_NO_VIEW] * is_unknown)


def _valid_uid(text: str) -> str:
    return text if _VALID_UID.fullmatch(text) else ""


def find_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yields absolute paths of all files in `paths`, folders searched as `search_folders` does; in a fixed order, each file once a path."""
    return search_folders(paths, lambda _, inside: ((path, path.is_dir()) for path in inside))


def find_images(paths: Iterable[Path], predictor: Predictor) -> Iterator[Path]:
    """Yields what `predictor` may judge in `paths`: files (`find_files`), or of a model for CT series (`find_series`).

    Args:
        paths: files, and folders that are searched with all below them.
        predictor: of the bundle.
    """
    return find_series(paths) if predictor.takes_volumes else find_files(paths)


@dataclass
class Study:
    """The images of one Study Instance UID. The finding is that of the image with the highest probability: one is enough."""

    study: str
    images: int = 0
    judged: int = 0
    finding: str = ""
    probability: float | None = None
    instance: str = ""

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass
class PredictionSummary:
    """Counts of all files, and their studies; memory grows with the number of studies, not of images.

    Attributes:
        statuses: files by status.
        findings: judged files by decision.
        studies: by Study Instance UID.
        populations: images that were read, by whether the model was judged for such a patient.
    """

    statuses: dict[str, int] = field(default_factory=lambda: {"judged": 0, "cannot_judge": 0, "unreadable": 0})
    findings: dict[str, int] = field(default_factory=lambda: {"pneumonia": 0, "normal": 0})
    """A bundle of own classes has `finding` in place of `pneumonia`."""
    studies: dict[str, Study] = field(default_factory=dict)
    populations: dict[str, int] = field(default_factory=lambda: {status.value: 0 for status in PopulationStatus})

    @classmethod
    def of(cls, classes: Sequence[str]) -> PredictionSummary:
        """Makes the counts of no file, for a bundle of `classes`."""
        return cls(findings={positive_word(classes): 0, "normal": 0})

    @property
    def files(self) -> int:
        return sum(self.statuses.values())

    def add(self, result: FileResult) -> None:
        """Counts one file."""
        self.statuses[result.status] += 1
        if result.judgement:
            self.populations[result.judgement.population.status.value] += 1
        if result.prediction:
            self.findings[result.prediction.decision] += 1
        if name := result.loaded.study:
            self._add_to_study(self.studies.setdefault(name, Study(name)), result)

    def _add_to_study(self, study: Study, result: FileResult) -> None:
        study.images += 1
        found = result.prediction
        if found is None:
            return
        study.judged += 1
        if study.probability is None or found.probability > study.probability:
            study.probability, study.finding, study.instance = found.probability, found.decision, result.loaded.instance

    def to_json(self) -> dict[str, Any]:
        """Returns the counts, as plain JSON values."""
        counts = {"findings": dict(self.findings), "studies": len(self.studies), "populations": dict(self.populations)}
        return {"files": self.files, **self.statuses, **counts}


def json_row(result: FileResult, threshold: float) -> dict[str, Any]:
    """Returns one file as plain JSON values. What cannot be judged has no number that anybody might read.

    Args:
        result: of the file. Its absolute path may name a patient: rows go where the user asks for them and nowhere else.
        threshold: of the bundle; a file that cannot be read has it too.
    """
    loaded, found = result.loaded, result.prediction
    return {
        "file": str(loaded.path),
        "study": loaded.study,
        "instance": loaded.instance,
        "status": result.status,
        "finding": found.decision if found else "",
        "probability": found.probability if found else None,
        "low": found.low if found else None,
        "high": found.high if found else None,
        "threshold": threshold,
        "classes": dict(found.classes) if found else {},
        **({"likeliest": found.likeliest} if found and len(found.classes) > 2 else {}),
        "reasons": list(result.reasons),
        "explanation": result.explanation,
        "scores": dict(result.judgement.suitability) if result.judgement else {},
        "report": result.report,
        "overlay": result.overlay,
        "note": result.note,
        "population": result.judgement.population.to_json() if result.judgement else {},
        **_clinical_of(result),
    }


def _clinical_of(result: FileResult) -> dict[str, Any]:
    """Keys of a model that takes clinical values; none of another."""
    if result.values is None:
        return {}
    return {"clinical": dict(result.values), "image_only": result.prediction.image_only if result.prediction else None}


def csv_row(result: FileResult, threshold: float) -> dict[str, str]:
    """Returns text by column: numbers with six digits, an empty text for what is not there, reasons with a blank between them.

    Args:
        result: of the file.
        threshold: of the bundle.
    """
    row = json_row(result, threshold)
    groups = row["population"]
    words = {"reasons": " ".join(row["reasons"]), "population": groups.get("status"), "population_note": groups.get("sentence")}
    known = groups | row | words
    columns = (*CSV_COLUMNS, *(CLINICAL_COLUMNS if result.values is not None else ()))
    known |= {"clinical": "; ".join((result.values or {}).values())}
    values = {name: known.get(name) for name in columns}
    probabilities = {f"probability_{name}": value for name, value in row["classes"].items()}
    likeliest = {"likeliest": row["likeliest"]} if "likeliest" in row else {}
    return {name: _text(value) for name, value in (values | probabilities | likeliest).items()}


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6f}" if isinstance(value, float) else str(value)
