"""What is asked of an archive, in the terms that DICOMweb and the classic protocol share (DICOM PS3.4, annex C; PS3.18, 10.6).

ArchiveQuery      which images a site wants
Archive           an archive under either protocol: `client.archive.dicomweb`, `client.archive.dimse`
list_instances    the images that one search, or all searches of a query, find
RetryPolicy       how long to wait for an archive that is busy or a network that fails for a moment

What an archive does wrong is one of three: an ArchiveError ends the import, as nothing else would succeed either; a RequestError is of one
examination, and the import goes on without it; a TransientArchiveError is asked again first, and then is one of the two.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date
from typing import Literal, Protocol, TypeVar

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
    asked_accession: str = ""
    """The accession number that was searched for, where the archive's answer states none; the image itself has to confirm it."""

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

    def fetch(self, instance: Instance) -> bytes:
        """The image as a DICOM file, as the archive sent it: nothing in it is checked yet.

        Raises:
            ImageError: the archive says that it does not have this one.
            RequestError: it fails to deliver this one.
            ArchiveError: it cannot be reached or refuses.
        """
        ...

    def close(self) -> None:
        """Ends the connection."""
        ...


class TransientArchiveError(ArchiveError):
    """A failure that may pass: the same request is worth another try."""


class RequestError(ArchiveError):
    """A request failed where others may succeed: its examination is left to the next import."""


class TransientRequestError(RequestError, TransientArchiveError):
    """A failed request that is worth another try before its examination is left."""


OnFailure = Callable[[str, RequestError], None]
"""Takes the examination that failed, by its Study Instance UID or the key that was searched for, and how. It may raise, to stop."""


def raise_failure(examination: str, error: RequestError) -> None:
    """Stops at the first examination that fails: the `OnFailure` of who goes on with none."""
    raise error


def list_instances(
    archive: Archive,
    query: ArchiveQuery,
    searches: Iterable[Mapping[str, str]] | None = None,
    on_failure: OnFailure = raise_failure,
    seen: set[str] | None = None,
) -> Iterator[Instance]:
    """Lists the images that `query` describes, each once, as the archive answers.

    Args:
        archive: an open connection.
        query: which images; several searches may find one study, which then comes once.
        searches: which of the query's searches for studies; all of them where unset.
        on_failure: called for each examination that cannot be listed.
        seen: Study Instance UIDs that are listed already; the new ones are added.

    Raises:
        ArchiveError: the archive cannot be reached or refuses.
    """
    seen = set() if seen is None else seen
    for conditions in query.study_conditions() if searches is None else searches:
        examination = search_key(conditions)
        try:
            studies = archive.search("STUDY", conditions)
        except RequestError as error:
            on_failure(examination, error)
            continue
        for study in studies:
            uid = study.get("StudyInstanceUID", "") or conditions.get("StudyInstanceUID", "")
            if not uid:
                on_failure(examination, RequestError("the archive listed a study without its Study Instance UID"))
            elif uid not in seen:
                seen.add(uid)
                accession = study.get("AccessionNumber", "")
                asked = "" if accession else conditions.get("AccessionNumber", "")
                yield from _list_study(archive, query, Instance(uid, "", "", accession, asked), on_failure)


def search_key(conditions: Mapping[str, str]) -> str:
    """The Study Instance UID or accession number that a search for studies names; empty where it names none."""
    return conditions.get("StudyInstanceUID", "") or conditions.get("AccessionNumber", "")


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


def _list_study(archive: Archive, query: ArchiveQuery, study: Instance, on_failure: OnFailure) -> Iterator[Instance]:
    """The images of `study`, which has no series and no image yet. A series that fails does not cost the others."""
    conditions = {"StudyInstanceUID": study.study_uid}
    try:
        all_series = archive.search("SERIES", conditions)
    except RequestError as error:
        on_failure(study.study_uid, error)
        return
    listed: set[str] = set()
    for series in filter(query.accepts, all_series):
        series_uid = series.get("SeriesInstanceUID", "")
        if not series_uid:
            on_failure(study.study_uid, RequestError("the archive listed a series without its Series Instance UID"))
            continue
        try:
            images = archive.search("IMAGE", {**conditions, "SeriesInstanceUID": series_uid})
        except RequestError as error:
            on_failure(study.study_uid, error)
            continue
        for sop_uid in (image.get("SOPInstanceUID", "") for image in images):
            if not sop_uid:
                on_failure(study.study_uid, RequestError("the archive listed an image without its SOP Instance UID"))
            elif sop_uid not in listed:
                listed.add(sop_uid)
                yield replace(study, series_uid=series_uid, sop_uid=sop_uid)
