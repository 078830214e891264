"""Images on their way from the archive into the site folder: listed, labelled, fetched, de-identified, stored, each once.

import_images     the whole way, for all images that a query finds
prepare_import    the de-identified file of one image, or why it is left out
ImportRules       which of the labelled images are kept
ImageStore        where de-identified images lie in the site folder
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from pydicom.dataset import Dataset

from pneumofed.client.archive.deidentify import deidentify, encode_file, is_burnt_in
from pneumofed.client.archive.query import Archive, ArchiveQuery, Instance, RequestError, list_instances, search_key
from pneumofed.client.archive.receiver import parse_file
from pneumofed.client.archive.refusals import FailedExaminations, RefusedImages
from pneumofed.common.data.label_words import LabelWords
from pneumofed.common.data.manifest import DataReport, DataWarning, ImageRecord, Manifest
from pneumofed.common.data.sources.dicom import Labels, find_label, record_of
from pneumofed.common.data.sources.table import collect
from pneumofed.common.errors import ArchiveError, DataError, ImageError, PneumofedError, SkipReason
from pneumofed.common.files import OnProgress, atomic_write, tell_nobody
from pneumofed.common.imaging.dicom_header import DicomHeader, Pseudonyms, read_header
from pneumofed.common.imaging.dicom_tags import quiet_warnings, text_of
from pneumofed.common.imaging.dicom_views import read_body_part, read_view
from pneumofed.common.imaging.patient_groups import is_frontal, is_other_part

logger = logging.getLogger(__name__)
ImportOutcome = ImageRecord | SkipReason
"""The record of an image in the site folder, or why there is none."""


@dataclass(frozen=True)
class Arrival:
    """What came of an import. `stopped` is why it ended early; what had arrived until then is in `manifest` all the same."""

    manifest: Manifest
    report: DataReport
    stopped: PneumofedError | None = None


def import_images(
    archive: Archive,
    query: ArchiveQuery,
    labels: Labels,
    store: ImageStore,
    on_progress: OnProgress = tell_nobody,
    words: LabelWords | None = None,
) -> Arrival:
    """Imports the labelled images that `query` finds; those that are in `store` already are not fetched again.

    An image without a label stays in the archive. A bad image is left out and counted. An examination that the archive fails to list or
    to deliver is counted as not delivered and asked for last the next time. When `STOP_AFTER` of them in a row fail, or the archive or the
    disk fails for good, the images that arrived before are given back with the error.

    Args:
        archive: an open connection, over either protocol.
        query: which images the site wants; it is narrowed to the examinations that `labels` names.
        labels: the site's label table: labels by kind of key (`sop_uid`, `study_uid`, `accession`) and value.
        store: where images are put, with the pseudonyms and rules of the site.
        on_progress: told of each image; how many there are as far as is known.
        words: the site's own words for labels, by which `labels` were read; None for none.

    Raises:
        ConfigError: the labels name no examination and the query has no other limit.
    """
    failed = FailedExaminations(store.folder, store.pseudonyms)
    work = _Import(archive, query.with_keys_of(labels), labels, store, failed, words or LabelWords())
    stopped: PneumofedError | None = None
    try:
        with quiet_warnings():
            work.run(on_progress)
    except (ArchiveError, DataError) as error:
        stopped = error
    finally:
        store.refusals.save()
        work.failed.save()
    manifest, report = collect([*work.outcomes.values(), *[SkipReason.NOT_DELIVERED] * work.unlisted])
    if stopped is None and query.limit is None:
        report.warnings[DataWarning.NOT_IN_ARCHIVE] = _count_unknown(labels, work.outcomes, work.failed)
    return Arrival(manifest, report, stopped or (work.failed.last if not report.used else None))


@dataclass
class _Import:
    """An import in progress: one search for studies after the other, each listed and then fetched."""

    archive: Archive
    query: ArchiveQuery
    labels: Labels
    store: ImageStore
    failed: FailedExaminations
    words: LabelWords
    outcomes: dict[Instance, ImportOutcome] = field(default_factory=dict)
    unlisted: int = 0
    """Examinations, or series of them, of which the archive gave no list."""

    def run(self, on_progress: OnProgress) -> None:
        """Takes all images; those of examinations that failed in the last import come last."""
        searches = sorted(self.query.study_conditions(), key=lambda search: self.failed.failed_before(search_key(search)))
        studies: set[str] = set()
        for done, search in enumerate(searches, start=1):
            left = None if self.query.limit is None else self.query.limit - len(self.outcomes)
            instances = self._list(search, studies, left)
            for position, instance in enumerate(instances, start=1):
                self.outcomes[instance] = self._take(instance, search_key(search))
                found = len(self.outcomes) + len(instances) - position + len(searches) - done
                on_progress("images from the archive", len(self.outcomes), found)
            if instances and not self.failed.has_failed(search_key(search)):
                self.failed.succeed()
            if left is not None and len(instances) >= left:
                return

    def _list(self, search: Mapping[str, str], studies: set[str], limit: int | None) -> list[Instance]:
        def leave(examination: str, error: RequestError) -> None:
            self.unlisted += 1
            self.failed.add(search_key(search) or examination, error)

        self.failed.visit(search_key(search))
        found = islice(list_instances(self.archive, self.query, [search], leave, studies), limit)
        return sorted(found, key=lambda instance: self.failed.failed_before(instance.study_uid))

    def _take(self, instance: Instance, searched: str) -> ImportOutcome:
        """The record of one image, fetched if need be, or why there is none."""
        label = find_label(instance.keys(), self.labels)
        is_assumed = not label and bool(instance.asked_accession)
        if is_assumed:
            label = find_label({"accession": [instance.asked_accession]}, self.labels)
        if not self.words.knows(label):
            return SkipReason.UNKNOWN_LABEL if label else SkipReason.NO_LABEL
        self.failed.visit(instance.study_uid)
        try:
            header = self.store.read(instance)
            if header is None:
                earlier = self.store.reason_against(instance)
                if earlier is not None:
                    return earlier
                header = self._fetch(instance)
        except RequestError as error:
            self.failed.add(searched or instance.study_uid, error)
            return SkipReason.NOT_DELIVERED
        except ImageError as error:
            logger.info("image %s left out: %s", self.store.name(instance), error)
            return error.reason
        if is_assumed and header.accession != self.store.pseudonyms.accession(instance.asked_accession):
            return SkipReason.NO_LABEL  # only the image itself can say that it is of the examination that was searched for
        return record_of(self.store.path(instance), header, label)

    def _fetch(self, instance: Instance) -> DicomHeader:
        """Fetches an image into the store; its header there.

        Raises:
            ImageError: it is not delivered, or cannot be used, which is remembered.
            ArchiveError: the request or the archive fails.
        """
        data = self.archive.fetch(instance)
        self.failed.succeed()
        try:
            clean = prepare_import(parse_file(data), instance.sop_uid, self.store.pseudonyms, self.store.rules)
        except ImageError as error:
            self.store.refusals.add(self.store.name(instance), error.reason, data)
            raise
        self.store.write(instance, clean)
        return read_header(self.store.path(instance))


def prepare_import(original: Dataset, sop_uid: str, pseudonyms: Pseudonyms, rules: ImportRules) -> bytes:
    """Makes the de-identified file of an image that came from the archive when `sop_uid` was asked for.

    Args:
        original: the data set that came.
        sop_uid: SOP Instance UID that was asked for, the hospital's own; another image is refused.
        pseudonyms: the site's keyed pseudonyms.
        rules: which images are kept.

    Returns:
        The bytes of a DICOM file (see `deidentify` and `encode_file`).

    Raises:
        ImageError: it cannot be used, or the site's rules leave it out.
    """
    try:
        with quiet_warnings():
            _check_wanted(original, sop_uid, rules)
            return encode_file(deidentify(original, pseudonyms))
    except ImageError:
        raise
    except MemoryError:
        raise ImageError(SkipReason.OUT_OF_MEMORY) from None
    except Exception as error:  # hostile bytes make pydicom and the decoders raise nearly any class
        raise ImageError(SkipReason.CORRUPT, type(error).__name__) from None


@dataclass(frozen=True)
class ImportRules:
    """Which of the labelled images are kept."""

    frontal_only: bool = True
    keep_burnt_in: bool = False

    def overrules(self, reason: SkipReason) -> bool:
        """Whether an image that was left out for `reason` earlier would be kept now."""
        return (reason is SkipReason.BURNT_IN and self.keep_burnt_in) or (
            reason in (SkipReason.NOT_FRONTAL, SkipReason.NOT_CHEST) and not self.frontal_only
        )


@dataclass
class ImageStore:
    """De-identified images in a folder of the site, each named after the pseudonym of its SOP Instance UID.

    The name is the state: an image whose file is there has arrived. Those that cannot be used are remembered by the same pseudonyms in
    `refusals`.
    """

    folder: Path
    pseudonyms: Pseudonyms
    rules: ImportRules = field(default_factory=ImportRules)
    refusals: RefusedImages = field(init=False)

    def __post_init__(self) -> None:
        """Makes the folder.

        Raises:
            DataError: it cannot be made.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{self.folder} cannot be made: {error.strerror}; check its owner and permissions") from None
        self.refusals = RefusedImages(self.folder)

    def name(self, instance: Instance) -> str:
        """The pseudonym of an image."""
        return self.pseudonyms.uid(instance.sop_uid)

    def path(self, instance: Instance) -> Path:
        """Where the image is, or would be."""
        return self.folder / f"{self.name(instance)}.dcm"

    def read(self, instance: Instance) -> DicomHeader | None:
        """Reads the header of an image that has arrived; None where it has not, or its file was damaged since."""
        try:
            return read_header(self.path(instance))
        except ImageError as error:
            if error.reason is not SkipReason.MISSING:
                logger.warning(
                    "image %s is damaged on the disk (%s); it is fetched again", self.name(instance), error.reason.value
                )
            return None

    def patients(self, besides: Collection[str] = ()) -> Iterator[tuple[str, str]]:
        """Iterates over (file, patient's pseudonym) of all images here, as each file itself says it; one that says none is left out.

        What a process that was killed had begun to write counts too.

        Args:
            besides: resolved paths of files that are left out.
        """
        for file in self.folder.glob("*.dcm*"):  # a file that is being written is `.NAME.dcm.` and some letters
            path = os.path.realpath(file)
            if path not in besides:
                with suppress(ImageError):
                    if patient := read_header(file).patient:
                        yield path, patient

    def reason_against(self, instance: Instance) -> SkipReason | None:
        """Why an earlier import left the image out, unless the rules or the decoders have changed since."""
        reason = self.refusals.find(self.name(instance))
        return None if reason is None or self.rules.overrules(reason) else reason

    def write(self, instance: Instance, data: bytes) -> None:
        """Stores a de-identified file, whole or not at all.

        Args:
            instance: the image, by the hospital's own numbers; the file is named after its pseudonym.
            data: the file, de-identified.

        Raises:
            DataError: the folder cannot be written or the disk is full.
        """
        try:
            with atomic_write(self.path(instance)) as file:
                file.write(data)
        except OSError as error:
            raise DataError(f"{self.folder} cannot be written: {error.strerror}; free some space and run this again") from None
        self.refusals.drop(self.name(instance))


def _count_unknown(labels: Labels, instances: Iterable[Instance], failed: FailedExaminations) -> int:
    """Examinations in the label table of which the archive listed no image, though it could be asked."""
    found = {key for instance in instances for keys in instance.keys().values() for key in keys}
    found |= {instance.asked_accession for instance in instances}
    keys = [key for kind in ("study_uid", "accession") for key in labels.get(kind, ())]
    return sum(key not in found and not failed.has_failed(key) for key in keys)


def _check_wanted(original: Dataset, sop_uid: str, rules: ImportRules) -> None:
    """Raises ImageError unless `original` is the image that was asked for and the site's rules keep it."""
    if text_of(original, "SOPInstanceUID") != sop_uid:
        raise ImageError(SkipReason.NOT_DELIVERED, "another image came")
    if is_burnt_in(original) and not rules.keep_burnt_in:
        raise ImageError(SkipReason.BURNT_IN)
    if rules.frontal_only and not is_frontal(read_view(original).word):
        raise ImageError(SkipReason.NOT_FRONTAL)
    if rules.frontal_only and is_other_part(read_body_part(original)):
        raise ImageError(SkipReason.NOT_CHEST)
