"""Where rows go: a CSV file, a JSON document, a table at the terminal. Each takes one row after the other and holds few."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from client.predict.rows import COLUMNS, SCHEMA, Row
from client.predict.studies import Tally
from common.data.atomic import atomic_write
from common.errors import ConfigError
from common.model_bundle.predictor import Predictor

TABLE_ROWS = 200
"""More files than a reader goes through at a terminal; what comes after is counted."""
_STYLES = {"pneumonia": "bold red", "normal": "green", "cannot judge": "yellow", "unreadable": "magenta"}


class Output(Protocol):
    """Takes rows while its context is open."""

    def add(self, row: Row) -> None: ...


class _Csv:
    def __init__(self, file: TextIO, classes: tuple[str, ...], model: str) -> None:
        columns = [*COLUMNS, *(f"probability_{name}" for name in classes), "model"]
        self._writer, self._model = csv.DictWriter(file, columns, restval=""), model
        self._writer.writeheader()

    def add(self, row: Row) -> None:
        self._writer.writerow({**row.to_csv(), "model": self._model})


@contextmanager
def open_csv(path: Path, predictor: Predictor) -> Iterator[Output]:
    """Writes rows into the CSV file `path` (UTF-8), which appears whole when the context ends well; mode 0600.

    Raises:
        ConfigError: the folder is missing or cannot be written.
    """
    try:
        with atomic_write(path) as binary:
            file = io.TextIOWrapper(binary, encoding="utf-8", newline="", errors="surrogateescape")
            yield _Csv(file, predictor.manifest.classes, predictor.bundle.digest)
            file.flush()
            file.detach()
    except OSError as error:
        raise ConfigError(f"--csv {path}: cannot be written ({error.strerror}); give a file in a folder that exists") from None


class _Json:
    def __init__(self, file: TextIO) -> None:
        self._file, self._between = file, "\n"

    def add(self, row: Row) -> None:
        self._file.write(self._between + json.dumps(row.to_json()))
        self._between = ",\n"


@contextmanager
def open_json(file: TextIO, predictor: Predictor, tally: Tally) -> Iterator[Output]:
    """Writes one JSON document to `file` as rows come: `schema`, `model`, `images`, then `studies` and `summary` of `tally`."""
    head = json.dumps({"schema": SCHEMA, "model": describe_model(predictor)})
    file.write(f'{head[:-1]}, "images": [')
    yield _Json(file)
    tail = {"studies": [study.to_json() for study in tally.studies.values()], "summary": tally.to_json()}
    file.write(f"\n], {json.dumps(tail)[1:]}\n")


def describe_model(predictor: Predictor) -> dict[str, Any]:
    """What names the model in audit trails, as plain JSON values."""
    manifest = predictor.manifest
    return {
        "name": manifest.name,
        "digest": predictor.bundle.digest,
        "signer": predictor.bundle.signer,
        "created": manifest.created.isoformat(),
        "threshold": manifest.threshold.value,
        "policy": manifest.threshold.policy,
        "phantom": manifest.card.phantom,
    }


class _Rows:
    def __init__(self) -> None:
        self.kept: list[Row] = []

    def add(self, row: Row) -> None:
        if len(self.kept) < TABLE_ROWS:
            self.kept.append(row)


@contextmanager
def open_table(console: Console, predictor: Predictor, tally: Tally) -> Iterator[Output]:
    """Shows the first `TABLE_ROWS` rows as a table, images of a study together, and the counts of all of them."""
    rows = _Rows()
    yield rows
    table = Table("File", "Pneumonia", "95 % interval", "Finding", "Why", title=_title(predictor))
    order = {study: place for place, study in enumerate(dict.fromkeys(row.study for row in rows.kept))}
    kept = sorted(rows.kept, key=lambda row: order[row.study])
    for row, following in zip(kept, [*kept[1:], None], strict=True):
        table.add_row(*_cells(row), end_section=bool(row.study and following and following.study != row.study))
    console.print(table)
    if tally.files > len(rows.kept):
        console.print(f"and {tally.files - len(rows.kept)} more: --csv FILE or --json shows all")
    counts = tally.statuses
    console.print(
        f"{tally.files} files: {tally.findings['pneumonia']} pneumonia, {tally.findings['normal']} normal, "
        f"{counts['cannot_judge']} cannot be judged, {counts['unreadable']} cannot be read"
    )
    console.print("A second look, not a diagnosis: whoever reads the image decides.", style="dim")


def _title(predictor: Predictor) -> str:
    manifest = predictor.manifest
    phantom = ", trained on PHANTOMS: says nothing about patients" if manifest.card.phantom else ""
    return f"{manifest.name} {predictor.bundle.digest[:12]}, threshold {_percent(manifest.threshold.value)}{phantom}"


def _cells(row: Row) -> tuple[Text, ...]:
    finding = row.finding or row.status.replace("_", " ")
    interval = "" if row.low is None or row.high is None else f"{_percent(row.low)} to {_percent(row.high)}"
    name = "/".join(Path(row.file).parts[-2:])
    texts = (name, _percent(row.probability), interval, finding, row.explanation or row.note)
    # File names are foreign text: no markup, no control characters that a terminal would obey.
    return tuple(Text(_printable(text), style=_STYLES.get(finding, "") if place == 3 else "") for place, text in enumerate(texts))


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
