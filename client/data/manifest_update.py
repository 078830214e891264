"""Changes of a site's manifest: images come, each once and under the site's own pseudonyms of its patients, and patients withdraw.

    merge_images       adds the rows of a manifest to the site's, none of a patient who withdrew
    with_pseudonyms    replaces the hospital's patient numbers first
    remove_patients    rows, readings, copies of their images and the decoded cache of patients who withdraw go
    Withdrawals        the site's list of patients who are not added again

The list of withdrawals lies beside the manifest. It holds no number of a patient as the hospital knows it, only the site's keyed
pseudonym of it. What the site did not copy (folders that it was pointed to, the archive) stays as it is. Models that were trained before
stay trained on the patients: what a model may have kept of one patient is bounded only by differential privacy.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pneumofed.client.archive.import_images import ImageStore
from pneumofed.client.data import readings
from pneumofed.client.data.readings import Readings
from pneumofed.client.federation import site_data
from pneumofed.client.site.folder import SiteFolder
from pneumofed.common.data.manifest import DataReport, ImageRecord, Manifest, read_manifest, write_manifest
from pneumofed.common.data.sources.table import find_column
from pneumofed.common.data.tables import decode_table, parse_cells, plain_text, spelling_variants
from pneumofed.common.errors import DataError, SkipReason
from pneumofed.common.files import exclusive, write_file
from pneumofed.common.imaging.dicom_header import Pseudonyms, load_pseudonyms

WITHDRAWALS_FILE = "withdrawn.txt"


@dataclass(frozen=True)
class Addition:
    """What an addition changed; `total` is the number of rows that the manifest has now."""

    report: DataReport
    added: int
    updated: int
    unchanged: int
    total: int

    def describe(self) -> dict[str, Any]:
        """Plain JSON values, only counts and fixed sentences."""
        counts = {key: value for key, value in asdict(self).items() if key != "report"}
        return {**self.report.public(), **counts}


def merge_images(site: SiteFolder, manifest: Manifest, report: DataReport) -> Addition:
    """Merges `manifest` into the site's: an image that is there already gets the new row in its old place.

    An image whose new rows disagree on its label or its patient is left out with all of them and counted: which of them is right cannot
    be known. If the site's manifest has that image from before, it stays as it is there.

    Where readers of the reading room gave an image a label, theirs stays, and the new row's is kept beside it. Patients who have
    withdrawn are left out and counted. Two rows are of one image if their paths lead to the same file. Processes that add at the same
    time wait for each other.

    Args:
        site: the site's folder; its manifest is made if there is none.
        manifest: the new rows, with pseudonyms for patients (see `with_pseudonyms`).
        report: what the source of the new rows counted; withdrawn patients are moved in it from used to skipped.

    Raises:
        ConfigError: the key of the pseudonyms cannot be used.
        DataError: the site's manifest is damaged or cannot be written; it is left as it was.
    """
    pseudonyms = load_pseudonyms(site.data)
    try:
        with exclusive(site.data):
            withdrawals = Withdrawals.of(site.data, pseudonyms)
            manifest, report = _without_withdrawn(site, withdrawals, *_without_contradictions(manifest, report))
            readings = Readings.of(site.data)
            old = read_manifest(site.manifest).records if site.manifest.exists() else ()
            named = unite_names(site, pseudonyms, [*old, *manifest.records], readings)
            rows = {identify(record): record for record in named[: len(old)]}
            new = {identify(record): record for record in named[len(old) :]}
            new = {key: _with_others(record, rows.get(key)) for key, record in new.items()}
            _delete_strays(site, withdrawals, rows.keys() | new.keys())
            added, unchanged = len(new.keys() - rows.keys()), sum(_same(rows[key], new[key]) for key in new.keys() & rows.keys())
            rows |= new
            if readings.learn_originals(new):
                readings.write(site.data)
                rows = readings.settle(rows)
            write_manifest(Manifest(tuple(rows.values())), site.manifest)
    except OSError as error:
        raise DataError(f"{site.manifest} cannot be written: {error.strerror}; nothing was changed") from None
    return Addition(report, added, len(new) - added - unchanged, unchanged, len(rows))


def unite_names(site: SiteFolder, pseudonyms: Pseudonyms, rows: Iterable[ImageRecord], readings: Readings) -> list[ImageRecord]:
    """Returns `rows` with one name a patient: who stands there by number and by pseudonym has the pseudonym, also in `readings`, which
    are written then, and in the site's splits, where he stays on his side. To be called while the lock of the site's data is held.
    """
    rows = list(rows)
    names = pseudonyms.second_names(record.patient for record in rows)
    if names:
        readings.rename(names)
        readings.write(site.data)
        site_data.rename_split(site.work, names, held=site.data)
    return [replace(record, patient=names.get(record.patient, record.patient)) for record in rows]


def with_pseudonyms(site: SiteFolder, manifest: Manifest) -> Manifest:
    """Returns `manifest` with the hospital's own patient numbers replaced by the site's pseudonyms.

    So a patient whose images come from a folder, from a table and from the archive is one patient in the manifest, and never on
    both sides of a split.

    Args:
        site: whose key makes the pseudonyms.
        manifest: rows with the patient numbers of the hospital.

    Raises:
        ConfigError: the key of the pseudonyms cannot be used.
    """
    pseudonyms = load_pseudonyms(site.data)
    return Manifest(tuple(replace(record, patient=pseudonyms.patient(record.patient)) for record in manifest.records))


@dataclass(frozen=True)
class Withdrawals:
    """Pseudonyms of the patients who have withdrawn."""

    listed: frozenset[str]
    pseudonyms: Pseudonyms

    @classmethod
    def of(cls, folder: Path, pseudonyms: Pseudonyms) -> Withdrawals:
        """Reads the list in `folder`, the manifest's; to be called while its lock is held, so that no other process's change is missed.

        Args:
            folder: its list may be missing.
            pseudonyms: the site's; to load them takes the lock, so they come from before.
        """
        path = folder / WITHDRAWALS_FILE
        return cls(frozenset(path.read_text(encoding="utf-8").splitlines()) if path.exists() else frozenset(), pseudonyms)

    def cover(self, patient: str) -> bool:
        """Reports whether `patient`, a pseudonym or a number, is among them."""
        return patient in self.listed or self.pseudonyms.patient(patient) in self.listed

    def extended(self, patients: Iterable[str]) -> Withdrawals:
        """These and `patients`. Each is listed as the pseudonym of what was given; one that is a pseudonym already, as it is too."""
        given = {plain_text(patient) for patient in patients} - {""}
        own = {patient for patient in given if self.pseudonyms.is_pseudonym(patient)}
        return Withdrawals(self.listed | own | {self.pseudonyms.patient(patient) for patient in given}, self.pseudonyms)

    def write(self, folder: Path) -> None:
        write_file(folder / WITHDRAWALS_FILE, "".join(f"{name}\n" for name in sorted(self.listed)).encode())


def identify(record: ImageRecord) -> str:
    """Returns the file that the record's path leads to; two rows are of one image if theirs are the same."""
    return os.path.realpath(record.path)


def _without_contradictions(manifest: Manifest, report: DataReport) -> tuple[Manifest, DataReport]:
    said: dict[str, set[tuple[str, str]]] = {}
    for record in manifest.records:
        said.setdefault(identify(record), set()).add((record.patient, record.label))
    gone = [record for record in manifest.records if len(said[identify(record)]) > 1]
    return _leave_out(manifest, report, gone, SkipReason.CONTRADICTED) if gone else (manifest, report)


def _without_withdrawn(
    site: SiteFolder, withdrawals: Withdrawals, manifest: Manifest, report: DataReport
) -> tuple[Manifest, DataReport]:
    gone = [record for record in manifest.records if withdrawals.cover(record.patient)]
    for record in gone:
        site.delete_copy(record.path)
    return _leave_out(manifest, report, gone, SkipReason.WITHDRAWN) if gone else (manifest, report)


def _delete_strays(site: SiteFolder, withdrawals: Withdrawals, rows: Collection[str]) -> None:
    """Deletes copies of patients who have withdrawn that came without a row, as by an import that died."""
    strays = ImageStore(site.images, withdrawals.pseudonyms).patients(besides=rows) if withdrawals.listed else ()
    for path, patient in strays:
        if withdrawals.cover(patient):
            site.delete_copy(Path(path))


def _leave_out(
    manifest: Manifest, report: DataReport, gone: Sequence[ImageRecord], reason: SkipReason
) -> tuple[Manifest, DataReport]:
    """The manifest without the rows `gone`, which move in the report from used to skipped."""
    out = {id(record) for record in gone}
    kept = tuple(record for record in manifest.records if id(record) not in out)
    skipped = report.skipped + Counter({reason: len(gone)})
    classes = Counter(report.classes)
    classes.subtract(Counter(record.label for record in gone))
    patients = report.patients - len({record.patient for record in gone} - {record.patient for record in kept})
    return Manifest(kept), replace(report, used=report.used - len(gone), skipped=skipped, classes=classes, patients=patients)


def _with_others(new: ImageRecord, old: ImageRecord | None) -> ImageRecord:
    """The new row, with those of the manifest's other columns that it does not have itself."""
    return new if old is None else replace(new, others=tuple((dict(old.others) | dict(new.others)).items()))


def _same(old: ImageRecord, new: ImageRecord) -> bool:
    return replace(old, path=new.path) == new


@dataclass(frozen=True)
class Removal:
    """What a removal changed, in counts: patients found, rows taken out, copies deleted, rows left.

    `not_found` has the lines of the list (from 1) whose patient had neither a row nor a copy, each with what would have found one; empty
    where nothing would. It never holds a number of a patient.
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
_PICTURE = re.compile(r"[0-9a-f]{64}|\.[0-9a-f]{64}\..*")
"""Copies that are named by their bytes, also while they are written."""


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

    Copies go whether they have a row or not: an import may have died before it wrote its rows. One who has no image here is put on the
    list all the same, so that no later import brings him in, and is named by his line: only the hospital can know whether he was never
    here, or is written otherwise.

    The list of the withdrawn is written first, then copies and cache go, then the rows, then the side in the splits, which a run draws
    anew for who has rows: a removal that was interrupted is completed by the same command.

    Args:
        site: the site's folder.
        patients: numbers or names, by line of a list or in its order; spaces around them do not count.

    Raises:
        ConfigError: the key of the pseudonyms cannot be used.
        DataError: the manifest is damaged, or a file cannot be deleted.
    """
    asked = dict(patients) if isinstance(patients, Mapping) else dict(enumerate(patients, start=1))
    pseudonyms = load_pseudonyms(site.data)
    try:
        with exclusive(site.data):
            withdrawals = Withdrawals.of(site.data, pseudonyms).extended(asked.values())
            withdrawals.write(site.data)
            rows = read_manifest(site.manifest).records if site.manifest.exists() else ()
            owners = _owners(site, pseudonyms, rows)
            gone = {path for path, patient in owners if not patient or withdrawals.cover(patient)}
            deleted = {path for path in gone if site.delete_copy(Path(path))}
            readings.forget_readings(site.data, withdrawals.cover)
            cache = Path(site.config.work_dir) / "cache"
            if cache.exists():
                shutil.rmtree(cache)
            kept = [record for record in rows if identify(record) not in deleted]
            left = tuple(record for record in kept if not withdrawals.cover(record.patient))
            if rows:
                write_manifest(Manifest(left), site.manifest)
        site_data.forget_split(Path(site.config.work_dir), withdrawals.cover)
    except OSError as error:
        raise DataError(f"{site.data} cannot be changed: {error.strerror}; fix that and give the same command again") from None
    names = {patient for _, patient in owners if patient}
    missed = {
        line: _near_miss(patient, names, pseudonyms)
        for line, patient in asked.items()
        if plain_text(patient) and not _is_known(patient, names, pseudonyms)
    }
    return Removal(sum(map(withdrawals.cover, names)), len(rows) - len(left), len(deleted), len(left), missed)


def _owners(site: SiteFolder, pseudonyms: Pseudonyms, rows: Sequence[ImageRecord]) -> list[tuple[str, str]]:
    """(file, patient) of each row, of each image that readers took out of the rows, and of each copy as its own header says it.

    So copies without a row have an owner too. Only a picture has no header: where a merge of readings died, nobody knows whose those
    are that it had copied, and the patient is empty.
    """
    by_row = [(identify(record), record.patient) for record in rows]
    known = {path: image.patient for path, image in Readings.of(site.data).by_path().items()} | dict(by_row)
    pictures = [os.path.realpath(file) for file in site.images.glob("*") if _PICTURE.fullmatch(file.name)]
    lost = [(path, "") for path in pictures if path not in known]
    return [*by_row, *known.items(), *ImageStore(site.images, pseudonyms).patients(), *lost]


def _is_known(patient: str, names: Collection[str], pseudonyms: Pseudonyms) -> bool:
    return plain_text(patient) in names or pseudonyms.patient(patient) in names


def _near_miss(patient: str, names: Collection[str], pseudonyms: Pseudonyms) -> str:
    """What would have found somebody."""
    return next((change for change, text in spelling_variants(plain_text(patient)) if _is_known(text, names, pseudonyms)), "")
