"""Where results go: a CSV file, a JSON document, a table at the terminal, and the site's monitor of drift. Each takes one after the other
and holds few.

`Recorder` is the monitor's place on the way (`pneumofed monitor`), which must not stop the results that pass it.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from pneumofed.common.config.classes import positive_word
from pneumofed.common.data.tables import TableWriter
from pneumofed.common.errors import ConfigError, PneumofedError, counted, printable_line
from pneumofed.common.files import atomic_write
from pneumofed.common.imaging.patient_groups import AGE, PatientGroups
from pneumofed.common.model_bundle.manifest import BundleManifest
from pneumofed.common.model_bundle.population import PopulationStatus, describe_groups
from pneumofed.common.model_bundle.predictor import Predictor
from pneumofed.inference.predict.predict import (
    CLINICAL_COLUMNS,
    CSV_COLUMNS,
    ROW_SCHEMA,
    FileResult,
    PredictionSummary,
    csv_row,
    json_row,
)

if TYPE_CHECKING:
    from pneumofed.inference.monitor.monitor import Monitor


TABLE_ROWS = 200
"""More files than a reader goes through at a terminal; what comes after is counted."""
_STYLES = {"pneumonia": "bold red", "finding": "bold red", "normal": "green", "cannot judge": "yellow", "unreadable": "magenta"}


class Output(Protocol):
    """Takes results while its context is open."""

    def add(self, result: FileResult) -> None: ...


class _Csv:
    def __init__(self, file: TextIO, predictor: Predictor) -> None:
        second = () if predictor.clinical is None else CLINICAL_COLUMNS
        self._columns = [
            *CSV_COLUMNS,
            *second,
            *(f"probability_{name}" for name in predictor.manifest.classes),
            *_likeliest(predictor),
            "model",
        ]
        self._writer, self._predictor = TableWriter(file), predictor
        self._writer.write(self._columns)

    def add(self, result: FileResult) -> None:
        row = csv_row(result, self._predictor.manifest.threshold.value)
        cells = {**row, "model": self._predictor.bundle.digest}
        self._writer.write(cells.get(column) for column in self._columns)


def _likeliest(predictor: Predictor) -> list[str]:
    """The column of the class that a finding most probably is, where that is a question."""
    return ["likeliest"] if len(predictor.manifest.classes) > 2 else []


@contextmanager
def open_csv(path: Path, predictor: Predictor) -> Iterator[Output]:
    """Writes rows into the CSV file `path` (UTF-8), which appears whole when the context ends well; mode 0600.

    Args:
        path: replaced if it exists.
        predictor: whose classes name the columns and whose digest stands in each row.

    Raises:
        ConfigError: the folder is missing or cannot be written.
    """
    try:
        with atomic_write(path) as binary:
            file = io.TextIOWrapper(binary, encoding="utf-8", newline="", errors="surrogateescape")
            yield _Csv(file, predictor)
            file.flush()
            file.detach()
    except OSError as error:
        raise ConfigError(f"--csv {path}: cannot be written ({error.strerror}); give a file in a folder that exists") from None


class _Json:
    def __init__(self, file: TextIO, threshold: float) -> None:
        self._file, self._threshold, self._between = file, threshold, "\n"

    def add(self, result: FileResult) -> None:
        self._file.write(self._between + json.dumps(json_row(result, self._threshold)))
        self._between = ",\n"


@contextmanager
def open_json(file: TextIO, predictor: Predictor, summary: PredictionSummary) -> Iterator[Output]:
    """Writes one JSON document to `file` as rows come: `schema`, `model`, `images`, then `studies` and `summary` of `summary`.

    Args:
        file: open for text; the document is not whole before the context ends.
        predictor: described under `model`.
        summary: read when the context ends, so it must have counted the same results by then.
    """
    head = json.dumps({"schema": ROW_SCHEMA, "model": describe_model(predictor)})
    file.write(f'{head[:-1]}, "images": [')
    yield _Json(file, predictor.manifest.threshold.value)
    tail = {"studies": [study.to_json() for study in summary.studies.values()], "summary": summary.to_json()}
    file.write(f"\n], {json.dumps(tail)[1:]}\n")


def describe_model(predictor: Predictor) -> dict[str, Any]:
    """Returns what names the model in audit trails, as plain JSON values."""
    manifest = predictor.manifest
    return {
        "name": manifest.name,
        "digest": predictor.bundle.digest,
        "signer": predictor.bundle.signer,
        "created": manifest.created.isoformat(),
        "threshold": manifest.threshold.value,
        "policy": manifest.threshold.policy,
        **({"threshold_of": manifest.threshold.site} if manifest.threshold.site else {}),
        "phantom": manifest.card.phantom,
    }


def population_sentences(manifest: BundleManifest, summary: PredictionSummary) -> list[str]:
    """Words for whom the model was judged, and how many of the images are of others.

    Args:
        manifest: of the bundle.
        summary: of the files.
    """
    counts, judged = summary.populations, manifest.population.judged(AGE) if manifest.population else ()
    if not judged:
        told = [manifest.check_population(PatientGroups()).sentence.capitalize() + "."]
    else:
        told = [f"The model was judged on {describe_groups(AGE, judged)}."]
    if counts["not_judged"]:
        told.append(f"{counts['not_judged']} of the images are of patients that it was not judged for: do not rely on it there.")
    if counts["age_unknown"]:
        told.append(f"Of {counted(counts['age_unknown'], 'image')} the patient's age is not known.")
    return told


class _Rows:
    def __init__(self) -> None:
        self.kept: list[tuple[str, Path, tuple[Text, ...]]] = []
        """Study, path and cells only: a result holds its image."""

    def add(self, result: FileResult) -> None:
        if len(self.kept) < TABLE_ROWS:
            self.kept.append((result.loaded.study, result.loaded.path, table_cells(result)))


@contextmanager
def open_table(console: Console, predictor: Predictor, summary: PredictionSummary) -> Iterator[Output]:
    """Shows the first `TABLE_ROWS` rows as a table, images of a study together, and the counts of all of them.

    Args:
        console: where the table is printed, when the context ends.
        predictor: named in the title.
        summary: read when the context ends, so it must have counted the same results by then.
    """
    rows = _Rows()
    yield rows
    positive = positive_word(predictor.manifest.classes)
    heading = "Pneumonia" if positive == "pneumonia" else "Any finding"
    # A name that is too long goes on in the next line: names of archives differ in their last characters only.
    table = Table(Column("File", overflow="fold"), heading, "95 % interval", "Finding", "Why", title=_title(predictor))
    order = {study: place for place, study in enumerate(dict.fromkeys(study for study, *_ in rows.kept))}
    kept = sorted(rows.kept, key=lambda row: order[row[0]])
    common = _common_folder([path for _, path, _ in kept])
    for (study, path, cells), following in zip(kept, [*kept[1:], None], strict=True):
        name = _plain(str(path.relative_to(common)))
        table.add_row(name, *cells, end_section=bool(study and following and following[0] != study))
    show = partial(console.print, soft_wrap=False)  # the table fits the terminal's width
    show(table)
    if summary.files > len(rows.kept):
        show(f"and {summary.files - len(rows.kept)} more: --csv FILE or --json shows all")
    counts, files = summary.statuses, counted(summary.files, "file")
    show(
        f"{files}: {summary.findings[positive]} {positive}, {summary.findings['normal']} normal, "
        f"{counts['cannot_judge']} cannot be judged, {counts['unreadable']} cannot be read"
    )
    for sentence in population_sentences(predictor.manifest, summary):
        show(sentence)
    show("A second look, not a diagnosis: whoever reads the image decides.", style="dim")


def _title(predictor: Predictor) -> str:
    manifest = predictor.manifest
    phantom = ", trained on PHANTOMS: says nothing about patients" if manifest.card.phantom else ""
    whose = f" of {manifest.threshold.site}" if manifest.threshold.site else ""
    return f"{manifest.name} {predictor.bundle.digest[:12]}, threshold {_percent(manifest.threshold.value)}{whose}{phantom}"


def _common_folder(paths: list[Path]) -> Path:
    """The innermost folder that holds all of the absolute `paths`, so that the names below it tell them apart."""
    return Path(os.path.commonpath([path.parent for path in paths])) if paths else Path("/")


def table_cells(result: FileResult) -> tuple[Text, ...]:
    """Builds the file's line in the table at the terminal, behind its name: probability, interval, finding, and why it is so."""
    found = result.prediction
    finding = found.decision if found else result.status.replace("_", " ")
    shown = (
        f"{finding}: {found.likeliest} {_percent(found.classes[found.likeliest])}" if finding == "finding" and found else finding
    )
    interval = f"{_percent(found.low)} to {_percent(found.high)}" if found else ""
    why = "; ".join(filter(None, (_population_note(result), _threshold_sentence(result), result.explanation, result.note)))
    texts = (_percent(found.probability) if found else "", interval, shown, why)
    return tuple(_plain(text, _STYLES.get(finding, "") if place == 2 else "") for place, text in enumerate(texts))


def _population_note(result: FileResult) -> str:
    """A warning where the model was not judged for such a patient; where all is well, or nothing is known of the model, nothing."""
    found = result.judgement.population if result.judgement else None
    if found is None or found.status in (PopulationStatus.JUDGED, PopulationStatus.MODEL_UNKNOWN):
        return ""
    return "age not known" if found.status is PopulationStatus.AGE_UNKNOWN else found.sentence


def _threshold_sentence(result: FileResult) -> str:
    """Why a probability above one half is called normal, or one below it not; empty where nobody wonders."""
    found, judgement = result.prediction, result.judgement
    if not found or not judgement or (found.probability >= 0.5) == (found.decision != "normal"):
        return ""
    side = "below" if found.decision == "normal" else "at or above"
    digits = 1  # as many as tell them apart
    while digits < 6 and f"{found.probability:.{digits}%}" == f"{judgement.threshold:.{digits}%}":
        digits += 1
    return f"{side} the threshold of {_percent(judgement.threshold, digits)}"


def _plain(text: str, style: str = "") -> Text:
    """File names are foreign text: no markup, no control characters that a terminal would obey."""
    return Text(printable_line(text), style=style)


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


@dataclass
class Recorder:
    """Puts judgements into `monitor`, in their order, as of today; after the first failure, which `tell` is called with, no more.

    Attributes:
        recorded: images that the monitor has taken.
    """

    monitor: Monitor
    tell: Callable[[str], None]
    recorded: int = 0

    def pass_on(self, results: Iterable[FileResult]) -> Iterator[FileResult]:
        """Passes `results` on as they are, and records those that were judged."""
        works = True
        for result in results:
            if works:
                works = self._record(result)
            yield result

    def _record(self, result: FileResult) -> bool:
        if result.judgement is None or result.loaded.image is None:
            return True
        try:
            self.monitor.record(result.judgement, result.loaded.image.info, patient=result.loaded.patient)
        except (PneumofedError, OSError) as error:
            self.tell(f"--monitor: stopped after {counted(self.recorded, 'image')}, judging goes on: {_sentence(error)}")
            return False
        self.recorded += 1
        return True


def _sentence(error: PneumofedError | OSError) -> str:
    return str(error) if isinstance(error, PneumofedError) else type(error).__name__
