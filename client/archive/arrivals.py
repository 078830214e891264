"""The way of images from the archive into the site folder: listed, labelled, fetched, de-identified, stored, each once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pydicom.dataset import Dataset

from client.archive.burnt_in import is_burnt_in
from client.archive.deidentify import deidentify, encode
from client.archive.pseudonyms import Pseudonyms
from client.archive.query import Archive, ArchiveQuery, Instance, list_instances
from client.archive.store import ImageStore, Rules
from common.data.manifest import LABELS, ImageRecord, Manifest
from common.data.report import DataReport, DataWarning
from common.data.sources.collect import collect, is_frontal
from common.data.sources.dicom import Labels, find_label, record_of
from common.dicom.header import read_header
from common.dicom.tags import text_of
from common.errors import ArchiveError, DataError, ImageError, PneumofedError, SkipReason
from common.quiet import quiet_warnings

logger = logging.getLogger(__name__)

Outcome = ImageRecord | SkipReason


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
    """The labelled images that `query` finds, as they lie in `store` in the end; those that are there already are not fetched.

    An image without a label stays in the archive. A bad image is left out and counted. When the archive or the disk fails for
    good, the images that arrived before are given back with the error.
    """
    query = query.with_keys_of(labels)
    outcomes: dict[Instance, Outcome] = {}
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


def _count_unknown(labels: Labels, instances: Iterable[Instance]) -> int:
    """Examinations in the label table of which the archive listed no image."""
    found = {key for instance in instances for keys in instance.keys().values() for key in keys}
    return sum(key not in found for kind in ("study_uid", "accession") for key in labels.get(kind, ()))


def _take(archive: Archive, instance: Instance, label: str, store: ImageStore) -> Outcome:
    """The record of one image, fetched if need be, or why there is none."""
    if label not in LABELS:
        return SkipReason.UNKNOWN_LABEL if label else SkipReason.NO_LABEL
    try:
        if not store.path(instance).exists():
            earlier = store.reason_against(instance)
            if earlier is not None:
                return earlier
            store.write(instance, prepare(archive.fetch(instance), instance.sop_uid, store.pseudonyms, store.rules))
        return _record(store.path(instance), label)
    except ImageError as error:
        store.refuse(instance, error.reason)
        logger.info("image %s left out: %s", store.name(instance), error)
        return error.reason


def prepare(original: Dataset, sop_uid: str, pseudonyms: Pseudonyms, rules: Rules) -> bytes:
    """The de-identified file of an image that came from the archive when `sop_uid` was asked for.

    Raises:
        ImageError: it cannot be used, or the site's rules leave it out.
    """
    try:
        with quiet_warnings():
            _check_wanted(original, sop_uid, rules)
            return encode(deidentify(original, pseudonyms))
    except ImageError:
        raise
    except MemoryError:
        raise ImageError(SkipReason.TOO_LARGE) from None
    except Exception as error:  # hostile bytes make pydicom and the decoders raise nearly any class
        raise ImageError(SkipReason.CORRUPT, type(error).__name__) from None


def _check_wanted(original: Dataset, sop_uid: str, rules: Rules) -> None:
    """Raises ImageError unless `original` is the image that was asked for and the site's rules keep it."""
    if text_of(original, "SOPInstanceUID") != sop_uid:
        raise ImageError(SkipReason.NOT_DELIVERED, "another image came")
    if is_burnt_in(original) and not rules.keep_burnt_in:
        raise ImageError(SkipReason.BURNT_IN)
    if rules.frontal_only and not is_frontal(text_of(original, "ViewPosition")):
        raise ImageError(SkipReason.NOT_FRONTAL)


def _record(path: Path, label: str) -> ImageRecord:
    return record_of(path, read_header(path), label)
