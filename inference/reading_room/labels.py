"""Readers' findings as the table that `pneumofed site data feedback` reads (see `client.data.readings`)."""

from __future__ import annotations

import getpass
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from pneumofed.common.audit.log import AuditLog
from pneumofed.common.data.manifest import MANIFEST_COLUMNS
from pneumofed.common.data.tables import TableWriter
from pneumofed.common.files import atomic_write
from pneumofed.common.imaging.dicom_header import Pseudonyms, load_pseudonyms
from pneumofed.inference.reading_room.cases import Case, Cases, FindingRow, open_room_database
from pneumofed.inference.reading_room.settings import CaseFiles, RoomFolder
from pneumofed.inference.reading_room.viewing import original_of

EXPORT_COLUMNS = (*MANIFEST_COLUMNS, "reader", "time", "case")


def labels_csv(folder: RoomFolder, cases: Cases) -> tuple[bytes, int]:
    """Builds the CSV table with the latest word of each reader on each case.

    `reader` is the user's name, `time` ISO 8601 in UTC, `case` the case's random id, `path` where the file lies, or the folder of a CT
    series. `patient` is a pseudonym,
    empty where the file names nobody: a picture whose patient is unknown must not become a patient of its own in training.

    Args:
        folder: the room's; says whose pseudonyms are used.
        cases: in the room's database.

    Returns:
        The table in UTF-8, and its number of rows.

    Raises:
        ConfigError: the key of the pseudonyms cannot be used.
    """
    pseudonyms, store = load_pseudonyms(_pseudonym_folder(folder)), CaseFiles(folder.store, folder.quarantine)
    rows = [_cells(case, said, original_of(store.path(case.id)), pseudonyms) for case, said in cases.readings()]
    text = io.StringIO(newline="")
    TableWriter(text).write_all([EXPORT_COLUMNS, *rows])
    return text.getvalue().encode("utf-8", errors="surrogateescape"), len(rows)


def write_labels(folder: RoomFolder, cases: Cases, path: Path) -> int:
    """Writes the table as the file `path`, mode 0600, and returns its number of rows.

    Args:
        folder: the room's.
        cases: in the room's database.
        path: replaced if it exists.

    Raises:
        OSError: it cannot be written.
    """
    content, count = labels_csv(folder, cases)
    with atomic_write(path) as file:
        file.write(content)
    return count


@contextmanager
def export_of_room(path: Path) -> Iterator[Path]:
    """Writes the table of the room at `path` as a file that lasts as long as the block; the room's audit log keeps that it was asked for.

    Raises:
        ConfigError: there is no room, or its database or the key of the pseudonyms cannot be used.
    """
    folder = RoomFolder.open(path)
    engine = open_room_database(folder.database)
    try:
        with TemporaryDirectory(dir=folder.quarantine) as name:
            table = Path(name) / "labels.csv"
            count = write_labels(folder, Cases(engine), table)
            AuditLog(folder.audit, f"os:{getpass.getuser()}").record("labels-exported", count=count)
            yield table
    finally:
        engine.dispose()


def _pseudonym_folder(folder: RoomFolder) -> Path:
    """Where the key lies: the site folder's, so that a patient has one pseudonym whichever way the image came, or the room's own."""
    if folder.settings.site is None:
        return folder.keys
    from pneumofed.client.site.folder import SiteFolder

    return SiteFolder.open(folder.inside(folder.settings.site)).data


def _cells(case: Case, said: FindingRow, path: Path, pseudonyms: Pseudonyms) -> list[str]:
    patient = pseudonyms.patient(case.patient) if case.patient else ""
    age = "" if case.age_years is None else repr(case.age_years)
    known = [case.view or "", case.sex or "", age, case.manufacturer or ""]
    return [str(path), patient, said.label, *known, said.by, said.at.isoformat(), case.id]
