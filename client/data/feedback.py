"""The reading room's labels on their way into the site's manifest, with the images that are new there.

    two readers differ, or one is unsure     nothing changes, counted; an image that came from the reading room is set aside
    an image of the manifest                 its label becomes the readers'; the original one is kept in readings.json
    an image that is new                     copied into the site's folder, de-identified, under a name that identifies nobody, and added
    the same image again                     one row, whatever the file's name: matched by its bytes, a DICOM file also by its instance
    a CT series of the manifest              its label becomes the readers', as of an image
    a CT series that is new                  left out, counted: what de-identifies radiographs knows no CT, so nothing is copied
    a patient who has withdrawn              left out, counted

`add_feedback` merges an export; `Candidate` is one of its images and brings it into the site's folder.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pneumofed.client.archive.import_images import ImageStore, prepare_import
from pneumofed.client.archive.query import Instance
from pneumofed.client.archive.receiver import parse_file
from pneumofed.client.data.manifest_update import Withdrawals, identify, unite_names
from pneumofed.client.data.readings import ReadImage, Readings, ReadRow, read_export
from pneumofed.client.site.folder import SiteFolder
from pneumofed.common.data.cache import load_digests
from pneumofed.common.data.manifest import ImageRecord, Manifest, read_manifest, write_manifest
from pneumofed.common.data.sources.dicom import record_of
from pneumofed.common.errors import DataError, ImageError, SkipReason
from pneumofed.common.files import atomic_write, exclusive
from pneumofed.common.imaging.dicom_header import DicomHeader, Pseudonyms, load_pseudonyms, read_header
from pneumofed.common.imaging.images import read_image
from pneumofed.common.imaging.patient_groups import is_frontal
from pneumofed.common.imaging.volumes import is_nifti
from pneumofed.common.model_bundle.series import read_series_header

Rows = dict[str, ImageRecord]
"""The manifest by resolved path."""


@dataclass(frozen=True)
class Feedback:
    """What an export changed. Counts of images only.

    Attributes:
        found: images that the export has readings of.
        added: new rows.
        corrected: rows whose label is another than before.
        confirmed: rows whose label the readers share.
        set_aside: rows taken out, since readers came to differ on them.
        skipped: images that changed nothing, by reason.
        total, read: rows of the manifest now, and those of them that have readings. Cases that were read are no random sample of the
            hospital's, so their share is worth watching.
        classes, classes_read: of these rows, by label.
    """

    found: int = 0
    added: int = 0
    corrected: int = 0
    confirmed: int = 0
    set_aside: int = 0
    skipped: Counter[SkipReason] = field(default_factory=Counter)
    total: int = 0
    read: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    classes_read: Counter[str] = field(default_factory=Counter)

    def describe(self) -> dict[str, Any]:
        """Plain JSON values."""
        counts = {key: dict(value) if isinstance(value, Counter) else value for key, value in vars(self).items()}
        return {**counts, "skipped": {reason.value: count for reason, count in sorted(self.skipped.items())}}


def add_feedback(site: SiteFolder, table: Path) -> Feedback:
    """Merges the reading room's export `table` into the site's manifest. Doing it twice is the same as once.

    Args:
        site: the site's folder; its manifest is made if there is none.
        table: a CSV file, or the folder that holds it as `labels.csv`.

    Raises:
        ConfigError: there is no such table, or the key of the pseudonyms cannot be used.
        DataError: the table, the manifest or readings.json is damaged, or cannot be written; the manifest is left as it was.
    """
    rows, pseudonyms = read_export(table), load_pseudonyms(site.data)
    digests = load_digests([row.path for row in rows], _cache(site), workers=1, series=True)
    by_image: dict[str, list[ReadRow]] = {}
    unreadable: dict[Path, SkipReason] = {}
    for row, digest in zip(rows, digests, strict=True):
        if isinstance(digest, SkipReason):
            unreadable[row.path] = digest
        else:
            by_image.setdefault(digest, []).append(row)
    try:
        with exclusive(site.data):
            merge = _Merge.of(site, Withdrawals.of(site.data, pseudonyms))
            skipped = Counter(unreadable.values())
            for digest, readings in by_image.items():
                skipped.update(merge.take(digest, readings))
            return replace(merge.finish(), found=len(by_image) + len(unreadable), skipped=skipped)
    except OSError as error:
        raise DataError(f"{site.data} cannot be written: {error.strerror}; fix that and give the same command again") from None


@dataclass(frozen=True)
class Candidate:
    """An image that the reading room saw: its file, the row that names it, and its header if it is a DICOM file."""

    row: ReadRow
    digest: str
    header: DicomHeader | None
    pseudonyms: Pseudonyms
    is_series: bool = False
    """Whether it is a CT series; one multi-frame file counts as a file."""

    @classmethod
    def of(cls, row: ReadRow, digest: str, pseudonyms: Pseudonyms) -> Candidate:
        """Reads the header of the file that `row` names, of a series that of its first file; a picture of another format has none.

        Args:
            row: a reading of the image.
            digest: SHA-256 of the file's bytes, in hexadecimal.
            pseudonyms: the site's keyed pseudonyms.

        Raises:
            ImageError: the file cannot be opened or is damaged.
        """
        if row.path.is_dir() or is_nifti(row.path):
            return cls(row, digest, read_series_header(row.path) if row.path.is_dir() else None, pseudonyms, is_series=True)
        try:
            return cls(row, digest, read_header(row.path), pseudonyms)
        except ImageError as error:
            if error.reason is not SkipReason.UNKNOWN_FORMAT:
                raise
            return cls(row, digest, None, pseudonyms)

    @property
    def patient(self) -> str:
        """The patient as the manifest would name him; empty where nobody knows him."""
        number = self.header.patient if self.header else self.row.patient
        if not number or self.pseudonyms.is_pseudonym(number):
            return number
        return self.pseudonyms.patient(number)

    def path_in(self, folder: Path) -> Path:
        """Where the image lies, or would lie, in the site's folder of images. A DICOM file has the name that an import from the archive
        gives it, so that the two ways lead to one image; a picture has that of its bytes."""
        if self.header is not None and not self.is_series:
            return ImageStore(folder, self.pseudonyms).path(self._instance(self.header))
        return folder / self.digest

    def bring(self, folder: Path, label: str) -> ImageRecord:
        """Copies the image into `folder`, de-identified, and returns the manifest's row of it.

        Args:
            folder: the site's folder of images, made if there is none.
            label: the readers' label, which the row gets.

        Raises:
            ImageError: it cannot be used: no patient, no frontal view, writing burnt in, damaged, or a CT series.
            DataError: the folder cannot be written.
        """
        if not self.patient:
            raise ImageError(SkipReason.NO_PATIENT)
        if self.is_series:
            raise ImageError(SkipReason.NOT_COPIED)
        return self._bring_picture(folder, label) if self.header is None else self._bring_dicom(self.header, folder, label)

    def _bring_dicom(self, header: DicomHeader, folder: Path, label: str) -> ImageRecord:
        store, instance = ImageStore(folder, self.pseudonyms), self._instance(header)
        if not store.path(instance).exists():
            original = parse_file(self.row.path.read_bytes())
            store.write(instance, prepare_import(original, header.sop_uid, self.pseudonyms, store.rules))
        return record_of(store.path(instance), read_header(store.path(instance)), label)

    def _bring_picture(self, folder: Path, label: str) -> ImageRecord:
        row, path = self.row, self.path_in(folder)
        if not is_frontal(row.view or ""):
            raise ImageError(SkipReason.NOT_FRONTAL)
        read_image(row.path)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic_write(path) as file:
                file.write(row.path.read_bytes())
        except OSError as error:
            raise DataError(f"{folder} cannot be written: {error.strerror}; free some space and run this again") from None
        return ImageRecord(path, self.patient, label, row.view, row.sex, row.age_years, row.manufacturer)

    @staticmethod
    def _instance(header: DicomHeader) -> Instance:
        return Instance(header.study_uid, "", header.sop_uid, header.accession)


@dataclass
class _Merge:
    """A merge in progress, under the lock of the site's data."""

    site: SiteFolder
    withdrawals: Withdrawals
    before: Rows
    rows: Rows
    readings: Readings
    by_digest: Mapping[str, str]
    """Resolved path of each image of the manifest by its SHA-256."""

    @classmethod
    def of(cls, site: SiteFolder, withdrawals: Withdrawals) -> _Merge:
        records = read_manifest(site.manifest).records if site.manifest.exists() else ()
        digests = load_digests([record.path for record in records], _cache(site), workers=1, series=True)
        rows = {identify(record): record for record in records}
        by_digest = {str(digest): identify(record) for digest, record in zip(digests, records, strict=True)}
        return cls(site, withdrawals, rows, dict(rows), Readings.of(site.data), by_digest)

    def take(self, digest: str, rows: list[ReadRow]) -> list[SkipReason]:
        """Takes up what readers said of one image; the reasons why its label is not the manifest's now."""
        try:
            candidate = Candidate.of(rows[0], digest, self.withdrawals.pseudonyms)
            key, image = self._known(candidate)
            if self.withdrawals.cover(image.patient):
                return [SkipReason.WITHDRAWN]
            image = image.with_readings(tuple(row.reading for row in rows))
            agreed = image.agreed()
            if image.path not in self.rows and not isinstance(agreed, SkipReason):
                image = self._add(candidate, image, agreed)
        except ImageError as error:
            return [error.reason]
        self.readings.images[key] = image
        return [agreed] if isinstance(agreed, SkipReason) else []

    def finish(self) -> Feedback:
        """Writes the readings, then the manifest, and returns what changed: a merge that dies between them is completed by the next."""
        named = unite_names(self.site, self.withdrawals.pseudonyms, self.rows.values(), self.readings)
        self.readings.write(self.site.data)
        settled = self.readings.settle(dict(zip(self.rows, named, strict=True)))
        write_manifest(Manifest(tuple(settled.values())), self.site.manifest)
        read = self.readings.by_path()
        with_readings = {path: row for path, row in settled.items() if path in read}
        old = {path: self.before[path] for path in with_readings if path in self.before}
        return Feedback(
            added=len(settled.keys() - self.before.keys()),
            corrected=sum(row.label != with_readings[path].label for path, row in old.items()),
            confirmed=sum(row.label == with_readings[path].label == read[path].agreed() for path, row in old.items()),
            set_aside=len(self.before.keys() - settled.keys()),
            total=len(settled),
            read=len(with_readings),
            classes=Counter(row.label for row in settled.values()),
            classes_read=Counter(row.label for row in with_readings.values()),
        )

    def _known(self, candidate: Candidate) -> tuple[str, ReadImage]:
        """What was known of the image before and under which digest: from earlier readings, of this file or of another one of the same
        image, or as a row of the manifest, whose patient then counts.
        """
        earlier = self.readings.images.get(candidate.digest, ReadImage(candidate.patient))
        if earlier.path is not None:
            return candidate.digest, earlier
        path = self.by_digest.get(candidate.digest) or os.path.realpath(candidate.path_in(self.site.images))
        for digest, image in self.readings.images.items():
            if image.path == path:
                return digest, image.with_readings(earlier.readings)
        if path in self.rows:
            row = self.rows[path]
            return candidate.digest, replace(earlier, patient=row.patient, path=path, original=row.label)
        return candidate.digest, earlier

    def _add(self, candidate: Candidate, image: ReadImage, label: str) -> ReadImage:
        record = candidate.bring(self.site.images, label)
        path = identify(record)
        self.rows[path] = record
        return replace(image, patient=record.patient, path=path)


def _cache(site: SiteFolder) -> Path:
    return Path(site.config.work_dir) / "cache"
