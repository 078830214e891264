"""What is asked of an archive, in the terms that DICOMweb and the classic protocol share (DICOM PS3.4, annex C; PS3.18, 10.6).

ArchiveQuery      which images a site wants
Archive           an archive under either protocol: `client.archive.dicomweb`, `client.archive.dimse`
list_instances    the images that a query finds, study by study
RetryPolicy       how long to wait for an archive that is busy or a network that fails for a moment
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Literal, Protocol, TypeVar

from pydicom.dataset import Dataset

from pneumofed.common.config.experiment import Section
from pneumofed.common.data.sources.dicom import Labels
from pneumofed.common.errors import ArchiveError, ConfigError

logger = logging.getLogger(__name__)
T = TypeVar("T")
Level = Literal["STUDY", "SERIES", "IMAGE"]
Answer = Mapping[str, str]
"""Text by keyword; empty where the archive gives none."""
RETURN_KEYS: dict[Level, tuple[str, ...]] = {
    "STUDY": ("StudyInstanceUID", "AccessionNumber"),
    "SERIES": ("SeriesInstanceUID", "Modality", "BodyPartExamined"),
    "IMAGE": ("SOPInstanceUID",),
}
"""What each level is asked for."""
_WILDCARDS = frozenset("*?\\")
"""Match anything, or part values (PS3.4, C.2.2.2.4; PS3.5, 6.2): a number with one of them could bring others' examinations."""


class ArchiveQuery(Section):
    """Which images a site wants. Conditions that are set hold together; the labels decide which of the images found are used."""

    modalities: tuple[str, ...] = ("CR", "DX")
    body_part: str | None = None
    """Body Part Examined (0018,0015), e.g. `CHEST`; an image that does not state its body part is then left out."""
    first_date: date | None = None
    last_date: date | None = None
    accessions: tuple[str, ...] = ()
    studies: tuple[str, ...] = ()
    """Study Instance UIDs; with `accessions`, either will do."""
    limit: int | None = None
    """At most this many images."""

    def with_keys_of(self, labels: Labels) -> ArchiveQuery:
        """This query for the examinations that `labels` names.

        Raises:
            ConfigError: the labels name only images and there is no other limit, so that the whole archive would be listed.
        """
        studies, accessions = tuple(labels.get("study_uid", ())), tuple(labels.get("accession", ()))
        bounded = studies or accessions or self.first_date or self.last_date or self.limit
        if not bounded:
            raise ConfigError(
                "the label table names no examination, so that the whole archive would be listed; add a column AccessionNumber or "
                "StudyInstanceUID to it, or give the first and last date of the examinations"
            )
        return self.model_copy(update={"studies": studies, "accessions": accessions})

    def study_conditions(self) -> Iterator[dict[str, str]]:
        """The conditions of each search for studies."""
        dates = {"StudyDate": self._date_range()} if self.first_date or self.last_date else {}
        for uid in self.studies:
            yield dates | {"StudyInstanceUID": uid}
        for accession in self.accessions:
            if not _WILDCARDS & set(accession):
                yield dates | {"AccessionNumber": accession}
        if not self.studies and not self.accessions:
            for modality in self.modalities:
                yield dates | {"ModalitiesInStudy": modality}

    def accepts(self, series: Answer) -> bool:
        """Whether a series that the archive described is wanted, whatever conditions the archive looks at."""
        fits = self.body_part is None or series.get("BodyPartExamined", "").strip().upper() == self.body_part.strip().upper()
        return fits and series.get("Modality", "").strip().upper() in self.modalities

    def _date_range(self) -> str:
        """Range matching of dates, e.g. `20240101-20241231`, open where an end is missing (PS3.4, C.2.2.2.5)."""
        first, last = (day.strftime("%Y%m%d") if day else "" for day in (self.first_date, self.last_date))
        return f"{first}-{last}"


@dataclass(frozen=True)
class Instance:
    """One image in the archive, by the hospital's own numbers."""

    study_uid: str
    series_uid: str
    sop_uid: str
    accession: str

    def keys(self) -> dict[str, list[str]]:
        """What a label table may name it by."""
        return {"sop_uid": [self.sop_uid], "study_uid": [self.study_uid], "accession": [self.accession] if self.accession else []}


class Archive(Protocol):
    """An archive under one of the two protocols."""

    def search(self, level: Level, conditions: Mapping[str, str]) -> list[Answer]:
        """Searches the archive at one level.

        Args:
            level: of the answers: studies, series or images.
            conditions: matching keys by keyword (PS3.4, C.2.2.2); for SERIES and IMAGE the higher levels' UIDs are among
                them.

        Returns:
            One answer a match, with the keywords of `RETURN_KEYS[level]`.

        Raises:
            ArchiveError: the archive cannot be reached or refuses.
        """
        ...

    def fetch(self, instance: Instance) -> Dataset:
        """The image, with file meta information.

        Raises:
            ImageError: the archive does not deliver this one.
            ArchiveError: the archive cannot be reached or refuses.
        """
        ...

    def close(self) -> None:
        """Ends the connection."""
        ...


def list_instances(archive: Archive, query: ArchiveQuery) -> Iterator[Instance]:
    """Lists the images that `query` describes, each once, as the archive answers.

    Args:
        archive: an open connection.
        query: which images; several searches may find one study, which then comes once.

    Raises:
        ArchiveError: the archive cannot be reached or refuses.
    """
    seen: set[str] = set()
    for conditions in query.study_conditions():
        for study in archive.search("STUDY", conditions):
            uid = study.get("StudyInstanceUID", "")
            if uid and uid not in seen:
                seen.add(uid)
                yield from _instances_of(archive, query, uid, study.get("AccessionNumber", ""))


class TransientArchiveError(ArchiveError):
    """A failure that may pass: the same request is worth another try."""


@dataclass(frozen=True)
class RetryPolicy:
    """How long to wait for an answer, and how often to ask again."""

    timeout_sec: float = 30.0
    attempts: int = 4
    first_wait_sec: float = 1.0
    """Doubled after each failure."""

    def retry(self, request: Callable[[], T]) -> T:
        """Returns the answer to `request`, made up to `attempts` times while it raises TransientArchiveError; the last is raised."""
        wait_sec = self.first_wait_sec
        for attempt in range(1, self.attempts):
            try:
                return request()
            except TransientArchiveError as error:
                logger.warning("archive: attempt %d of %d failed (%s); next in %.1f s", attempt, self.attempts, error, wait_sec)
                time.sleep(wait_sec)
                wait_sec *= 2
        return request()


def _instances_of(archive: Archive, query: ArchiveQuery, study_uid: str, accession: str) -> Iterator[Instance]:
    study = {"StudyInstanceUID": study_uid}
    seen: set[str] = set()
    for series in filter(query.accepts, archive.search("SERIES", study)):
        for image in archive.search("IMAGE", {**study, "SeriesInstanceUID": series["SeriesInstanceUID"]}):
            sop_uid = image.get("SOPInstanceUID", "")
            if sop_uid and sop_uid not in seen:
                seen.add(sop_uid)
                yield Instance(study_uid, series["SeriesInstanceUID"], sop_uid, accession)
