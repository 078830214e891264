"""Images of the reading room on their way into the site's own folder: de-identified, under names that tell nothing, each once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from client.archive.arrivals import prepare
from client.archive.pseudonyms import Pseudonyms
from client.archive.query import Instance
from client.archive.receiver import parse_file
from client.archive.store import ImageStore
from client.continual.export_table import ReadRow
from common.data.atomic import atomic_write
from common.data.manifest import ImageRecord
from common.data.sources.collect import is_frontal
from common.data.sources.dicom import record_of
from common.dicom.header import DicomHeader, read_header
from common.errors import DataError, ImageError, SkipReason
from common.images import read_image


@dataclass(frozen=True)
class Candidate:
    """An image that the reading room saw: its file, the row that told of it, and its header if it is a DICOM file."""

    row: ReadRow
    digest: str
    header: DicomHeader | None
    pseudonyms: Pseudonyms

    @classmethod
    def of(cls, row: ReadRow, digest: str, pseudonyms: Pseudonyms) -> Candidate:
        """
        Raises:
            ImageError: the file cannot be opened or is damaged.
        """
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
        if self.header is not None:
            return ImageStore(folder, self.pseudonyms).path(self._instance(self.header))
        return folder / self.digest

    def bring(self, folder: Path, label: str) -> ImageRecord:
        """The manifest's row of the image, which then lies in `folder`.

        Raises:
            ImageError: it cannot be used: no patient, no frontal view, writing burnt in, or damaged.
            DataError: the folder cannot be written.
        """
        if not self.patient:
            raise ImageError(SkipReason.NO_PATIENT)
        return self._bring_picture(folder, label) if self.header is None else self._bring_dicom(self.header, folder, label)

    def _bring_dicom(self, header: DicomHeader, folder: Path, label: str) -> ImageRecord:
        store, instance = ImageStore(folder, self.pseudonyms), self._instance(header)
        if not store.path(instance).exists():
            original = parse_file(self.row.path.read_bytes())
            store.write(instance, prepare(original, header.sop_uid, self.pseudonyms, store.rules))
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
