"""Patients who withdraw: their rows, readings, copies of their images and the decoded cache go, and they are not added again.

What the site did not copy (folders that it was pointed to, the archive) stays as it is. Models that were trained before stay trained on
them: what a model may have kept of one patient is bounded only by differential privacy.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pneumofed.client.data import readings
from pneumofed.client.data.manifest_update import Withdrawals
from pneumofed.client.federation import site_data
from pneumofed.client.site.folder import SiteFolder
from pneumofed.common.data.manifest import Manifest, read_manifest, write_manifest
from pneumofed.common.data.pseudonyms import Pseudonyms
from pneumofed.common.data.sources.table import find_column
from pneumofed.common.data.tables import decode_table, parse_cells, plain_text
from pneumofed.common.errors import DataError
from pneumofed.common.files import exclusive


@dataclass(frozen=True)
class Removal:
    """What a removal changed, in counts: patients found, rows taken out, copies deleted, rows left.

    `not_found` has the lines of the list (from 1) whose patient had no row, each with what would have found one; empty where nothing
    would. It never holds a number of a patient.
    """

    patients: int
    rows: int
    files: int
    total: int
    not_found: Mapping[int, str] = field(default_factory=dict)

    def describe(self) -> dict[str, object]:
        """Plain JSON values."""
        return asdict(self)


_HEADERS = ("patient", "patientid", "subject", "subjectid", "mrn", "id")
MOST_LEADING_ZEROS = 12


def read_list(content: bytes) -> dict[int, str]:
    """Reads a list of patients: one number a line, as text or as a table that a spreadsheet wrote, with or without a header.

    Args:
        content: the file; its characters are decided as in `common.data.tables`.

    Returns:
        Patient by line, from 1; blank lines and the header are left out.

    Raises:
        DataError: the characters cannot be known, or a line holds more than one cell and no header says which is the patient's.
    """
    found: dict[int, str] = {}
    column: int | None = None
    text = decode_table(content, "--patients")
    for number, line in enumerate(text.splitlines(), start=1):
        separator = next((mark for mark in ";\t" if mark in line), ",")
        cells = [
            plain_text(cell) for _, row in parse_cells(f"sep={separator}\n{line}\n", f"--patients, line {number}") for cell in row
        ]
        if not any(cells) or re.fullmatch(r"sep=.?", line.strip(' "'), re.IGNORECASE):
            continue
        if not found and column is None and (header := find_column([cell.lower() for cell in cells], _HEADERS)) is not None:
            column = [cell.lower() for cell in cells].index(header)
            continue
        filled = [cell for cell in cells if cell]
        if column is not None and column < len(cells) and cells[column]:
            found[number] = cells[column]
        elif len(filled) == 1:
            found[number] = filled[0]
        else:
            raise DataError(
                f"--patients, line {number}: {len(filled)} cells; give one patient number a line, or a header `patient`"
            )
    return found


def remove_patients(site: SiteFolder, patients: Iterable[str] | Mapping[int, str]) -> Removal:
    """Removes the patients and keeps them out; each is given by the hospital's own number or by the manifest's name for him.

    One who has no row is put on the list all the same, so that no later import brings him in, and is named by his line: only the
    hospital can know whether he was never here, or is written otherwise.

    The list of the withdrawn is written first, then copies and cache go, then the rows: a removal that was interrupted is completed by
    the same command.

    Args:
        site: the site's folder.
        patients: numbers or names, by line of a list or in its order; spaces around them do not count.

    Raises:
        ConfigError: the key of the pseudonyms cannot be used.
        DataError: the manifest is missing or damaged, or a file cannot be deleted.
    """
    asked = dict(patients) if isinstance(patients, Mapping) else dict(enumerate(patients, start=1))
    withdrawals = Withdrawals.of(site.data).extended(asked.values())
    try:
        site_data.forget_split(Path(site.config.work_dir), withdrawals.cover)
        with exclusive(site.data):
            withdrawals.write(site.data)
            readings.forget_readings(site.data, withdrawals.cover)
            rows = read_manifest(site.manifest).records
            gone = [record for record in rows if withdrawals.cover(record.patient)]
            files = sum(site.delete_copy(record) for record in gone)
            cache = Path(site.config.work_dir) / "cache"
            if cache.exists():
                shutil.rmtree(cache)
            left = tuple(record for record in rows if not withdrawals.cover(record.patient))
            write_manifest(Manifest(left), site.manifest)
    except OSError as error:
        raise DataError(f"{site.data} cannot be changed: {error.strerror}; fix that and give the same command again") from None
    names, pseudonyms = {record.patient for record in rows}, withdrawals.pseudonyms
    missed = {
        line: _near_miss(patient, names, pseudonyms)
        for line, patient in asked.items()
        if plain_text(patient) and not _is_known(patient, names, pseudonyms)
    }
    return Removal(len({record.patient for record in gone}), len(gone), files, len(left), missed)


def _is_known(patient: str, names: Collection[str], pseudonyms: Pseudonyms) -> bool:
    return plain_text(patient) in names or pseudonyms.patient(patient) in names


def _near_miss(patient: str, names: Collection[str], pseudonyms: Pseudonyms) -> str:
    """What would have found somebody: spreadsheets cut leading zeros and write whole numbers as `42.0`."""
    return next((change for change, text in _variants(plain_text(patient)) if _is_known(text, names, pseudonyms)), "")


def _variants(text: str) -> Iterator[tuple[str, str]]:
    bare = text.strip("\"'` ")
    yield "without quotes", bare
    whole = re.sub(r"[.,]0+$", "", bare)
    yield "without the decimals", whole
    plural = "without the decimals and " if whole != bare else ""
    short = whole.lstrip("0")
    for word in (whole, short):
        for zeros in range(1, MOST_LEADING_ZEROS):
            yield f"{plural}with {zeros} more leading zero{'s' * (zeros > 1)}", "0" * zeros + word
    yield f"{plural}without leading zeros", short
    yield "in capital letters", bare.upper()
    yield "in small letters", bare.lower()
    yield "without blanks and dashes", re.sub(r"[\s-]", "", bare)
