"""New images in a site's manifest: each once, under the site's own pseudonyms of its patients, and none of a patient who withdrew.

    merge_images       adds the rows of a manifest to the site's
    with_pseudonyms    replaces the hospital's patient numbers first
    Withdrawals        the site's list of patients who are not added again

The list of withdrawals lies beside the manifest. It holds no number of a patient as the hospital knows it, only the site's keyed
pseudonym of it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pneumofed.client.data.readings import Readings
from pneumofed.client.site.folder import SiteFolder
from pneumofed.common.data.manifest import ImageRecord, Manifest, read_manifest, write_manifest
from pneumofed.common.data.pseudonyms import Pseudonyms, load_pseudonyms
from pneumofed.common.data.report import DataReport
from pneumofed.common.data.tables import plain_text
from pneumofed.common.errors import DataError, SkipReason
from pneumofed.common.files import exclusive, write_file

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
    manifest, report = _without_withdrawn(site, *_without_contradictions(manifest, report))
    try:
        with exclusive(site.data):
            rows = {identify(record): record for record in read_manifest(site.manifest).records} if site.manifest.exists() else {}
            new = {identify(record): record for record in manifest.records}
            added, unchanged = len(new.keys() - rows.keys()), sum(_same(rows[key], new[key]) for key in new.keys() & rows.keys())
            rows |= new
            readings = Readings.of(site.data)
            if readings.learn_originals(new):
                readings.write(site.data)
                rows = readings.settle(rows)
            write_manifest(Manifest(tuple(rows.values())), site.manifest)
    except OSError as error:
        raise DataError(f"{site.manifest} cannot be written: {error.strerror}; nothing was changed") from None
    return Addition(report, added, len(new) - added - unchanged, unchanged, len(rows))


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
    def of(cls, folder: Path) -> Withdrawals:
        """Reads the list in `folder`, the manifest's; not to be called while its lock is held.

        Raises:
            ConfigError: the key of the pseudonyms cannot be used.
        """
        path = folder / WITHDRAWALS_FILE
        listed = frozenset(path.read_text(encoding="utf-8").splitlines()) if path.exists() else frozenset()
        return cls(listed, load_pseudonyms(folder))

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


def _without_withdrawn(site: SiteFolder, manifest: Manifest, report: DataReport) -> tuple[Manifest, DataReport]:
    withdrawals = Withdrawals.of(site.data)
    gone = [record for record in manifest.records if withdrawals.cover(record.patient)]
    for record in gone:
        site.delete_copy(record)
    return _leave_out(manifest, report, gone, SkipReason.WITHDRAWN) if gone else (manifest, report)


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


def _same(old: ImageRecord, new: ImageRecord) -> bool:
    return replace(old, path=new.path) == new
