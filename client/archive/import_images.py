"""Images on their way from the archive into the site folder: listed, labelled, fetched, de-identified, stored, each once.

import_images     the whole way, for all images that a query finds
prepare_import    the de-identified file of one image, or why it is left out
ImportRules       which of the labelled images are kept
ImageStore        where de-identified images lie in the site folder
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from pydicom.dataset import Dataset

from pneumofed.client.archive.deidentify import deidentify, encode_file, is_burnt_in
from pneumofed.client.archive.query import Archive, ArchiveQuery, Instance, list_instances
from pneumofed.common.data.manifest import LABELS, ImageRecord, Manifest
from pneumofed.common.data.pseudonyms import Pseudonyms
from pneumofed.common.data.report import DataReport, DataWarning
from pneumofed.common.data.sources.dicom import Labels, find_label, record_of
from pneumofed.common.data.sources.table import collect
from pneumofed.common.errors import ArchiveError, DataError, ImageError, PneumofedError, SkipReason
from pneumofed.common.files import StateFile, atomic_write, to_json
from pneumofed.common.imaging.dicom_header import read_header
from pneumofed.common.imaging.dicom_tags import quiet_warnings, text_of
from pneumofed.common.imaging.dicom_views import read_body_part, read_view
from pneumofed.common.imaging.views import is_frontal, is_other_part

logger = logging.getLogger(__name__)
ImportOutcome = ImageRecord | SkipReason
"""The record of an image in the site folder, or why there is none."""
_TRANSIENT = frozenset({SkipReason.NOT_DELIVERED, SkipReason.MISSING, SkipReason.UNREADABLE})
"""Not the image's fault, so it is asked for again the next time."""


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
    on_progress: Callable[[int, int], None] = lambda done, found: None,
) -> Arrival:
    """Imports the labelled images that `query` finds; those that are in `store` already are not fetched again.

    An image without a label stays in the archive. A bad image is left out and counted. When the archive or the disk fails for
    good, the images that arrived before are given back with the error.

    Args:
        archive: an open connection, over either protocol.
        query: which images the site wants; it is narrowed to the examinations that `labels` names.
        labels: the site's label table: labels by kind of key (`sop_uid`, `study_uid`, `accession`) and value.
        store: where images are put, with the pseudonyms and rules of the site.
        on_progress: called after each image with the number of those that are done and of all that were found.

    Raises:
        ConfigError: the labels name no examination and the query has no other limit.
    """
    query = query.with_keys_of(labels)
    outcomes: dict[Instance, ImportOutcome] = {}
    stopped: PneumofedError | None = None
    try:
        with quiet_warnings():
            instances = list(islice(list_instances(archive, query), query.limit))
            for instance in instances:
                outcomes[instance] = _take(archive, instance, find_label(instance.keys(), labels), store)
                on_progress(len(outcomes), len(instances))
    except (ArchiveError, DataError) as error:
        stopped = error
    finally:
        store.save_refused()
    manifest, report = collect(outcomes.values())
    if stopped is None and query.limit is None:
        report.warnings[DataWarning.NOT_IN_ARCHIVE] = _count_unknown(labels, outcomes)
    return Arrival(manifest, report, stopped)


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
        raise ImageError(SkipReason.TOO_LARGE) from None
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

    The name is the state: an image whose file is there has arrived. Those that cannot be used are remembered in `refused.json` by
    the same pseudonyms, so that they are not fetched again.
    """

    folder: Path
    pseudonyms: Pseudonyms
    rules: ImportRules = field(default_factory=ImportRules)
    refused: dict[str, SkipReason] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Makes the folder.

        Raises:
            DataError: it cannot be made.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{self.folder} cannot be made: {error.strerror}; check its owner and permissions") from None
        self.refused = _refused_file(self.folder).read()

    def name(self, instance: Instance) -> str:
        """The pseudonym of an image."""
        return self.pseudonyms.uid(instance.sop_uid)

    def path(self, instance: Instance) -> Path:
        """Where the image is, or would be."""
        return self.folder / f"{self.name(instance)}.dcm"

    def reason_against(self, instance: Instance) -> SkipReason | None:
        """Why an earlier import left the image out, unless the rules have changed since."""
        reason = self.refused.get(self.name(instance))
        return None if reason is None or self.rules.overrules(reason) else reason

    def refuse(self, instance: Instance, reason: SkipReason) -> None:
        """Remembers that the image cannot be used, until `save_refused` writes it down.

        Args:
            instance: the image, by the hospital's own numbers.
            reason: why; one that may pass (not delivered, missing, unreadable) is not kept, so that the image is asked for
                again.
        """
        if reason not in _TRANSIENT:
            self.refused[self.name(instance)] = reason

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
        self.refused.pop(self.name(instance), None)

    def save_refused(self) -> None:
        """Writes down which images cannot be used. Where that fails they are fetched once more the next time, no harm done."""
        try:
            _refused_file(self.folder).write(self.refused)
        except OSError as error:
            logger.warning("the list of refused images cannot be written: %s", error.strerror)


def _count_unknown(labels: Labels, instances: Iterable[Instance]) -> int:
    """Examinations in the label table of which the archive listed no image."""
    found = {key for instance in instances for keys in instance.keys().values() for key in keys}
    return sum(key not in found for kind in ("study_uid", "accession") for key in labels.get(kind, ()))


def _take(archive: Archive, instance: Instance, label: str, store: ImageStore) -> ImportOutcome:
    """The record of one image, fetched if need be, or why there is none."""
    if label not in LABELS:
        return SkipReason.UNKNOWN_LABEL if label else SkipReason.NO_LABEL
    try:
        if not store.path(instance).exists():
            earlier = store.reason_against(instance)
            if earlier is not None:
                return earlier
            store.write(instance, prepare_import(archive.fetch(instance), instance.sop_uid, store.pseudonyms, store.rules))
        return _record(store.path(instance), label)
    except ImageError as error:
        store.refuse(instance, error.reason)
        logger.info("image %s left out: %s", store.name(instance), error)
        return error.reason


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


def _record(path: Path, label: str) -> ImageRecord:
    return record_of(path, read_header(path), label)


def _refused_file(folder: Path) -> StateFile[dict[str, SkipReason]]:
    return StateFile(
        folder / "refused.json",
        kind="the list of refused images",
        parse=lambda content: {str(name): SkipReason[reason] for name, reason in json.loads(content).items()},
        missing={},
        remedy="they are fetched again",
        dump=lambda refused: to_json({name: reason.name for name, reason in refused.items()}),
    )
