"""The way of images from the archive into the site folder: listed, labelled, fetched, de-identified, stored, each once."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from pydicom.dataset import Dataset

from client.archive.burnt_in import is_burnt_in
from client.archive.deidentify import deidentify, encode
from client.archive.pseudonyms import Pseudonyms
from client.archive.query import Archive, ArchiveQuery, Instance, list_instances
from common.data.atomic import atomic_write
from common.data.manifest import LABELS, ImageRecord, Manifest, read_sex
from common.data.report import DataReport, DataWarning
from common.data.sources.collect import collect, is_frontal
from common.data.sources.dicom import Labels, find_label
from common.dicom.header import read_header
from common.dicom.tags import text_of
from common.errors import ArchiveError, DataError, ImageError, PneumofedError, SkipReason
from common.quiet import quiet_warnings

logger = logging.getLogger(__name__)

Outcome = ImageRecord | SkipReason

_REFUSED = "refused.json"
_PASSING = frozenset({SkipReason.NOT_DELIVERED, SkipReason.MISSING, SkipReason.UNREADABLE})
"""Not the image's fault, so it is asked for again the next time."""


@dataclass(frozen=True)
class Rules:
    """Which of the labelled images are kept."""

    frontal_only: bool = True
    keep_burnt_in: bool = False

    def overrules(self, reason: SkipReason) -> bool:
        """Whether an image that was left out for `reason` earlier would be kept now."""
        return (reason is SkipReason.BURNT_IN and self.keep_burnt_in) or (
            reason is SkipReason.NOT_FRONTAL and not self.frontal_only
        )


@dataclass(frozen=True)
class Arrival:
    """What came of an import. `stopped` is why it ended early; what had arrived until then is in `manifest` all the same."""

    manifest: Manifest
    report: DataReport
    stopped: PneumofedError | None = None


@dataclass
class ImageStore:
    """De-identified images in a folder of the site, each named after the pseudonym of its SOP Instance UID.

    The name is the state: an image whose file is there has arrived. Those that cannot be used are remembered in `refused.json` by
    the same pseudonyms, so that they are not fetched again.
    """

    folder: Path
    pseudonyms: Pseudonyms
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
        self.refused = _read_refused(self.folder / _REFUSED)

    def name(self, instance: Instance) -> str:
        """The pseudonym of an image."""
        return self.pseudonyms.uid(instance.sop_uid)

    def path(self, instance: Instance) -> Path:
        """Where the image is, or would be."""
        return self.folder / f"{self.name(instance)}.dcm"

    def write(self, instance: Instance, data: bytes) -> None:
        """Stores a de-identified file, whole or not at all.

        Raises:
            DataError: the folder cannot be written or the disk is full.
        """
        try:
            with atomic_write(self.path(instance)) as file:
                file.write(data)
        except OSError as error:
            raise DataError(f"{self.folder} cannot be written: {error.strerror}; free some space and run this again") from None

    def save_refused(self) -> None:
        """Writes down which images cannot be used. Where that fails they are fetched once more the next time, no harm done."""
        content = {name: reason.name for name, reason in self.refused.items() if reason not in _PASSING}
        try:
            with atomic_write(self.folder / _REFUSED) as file:
                file.write(json.dumps(content).encode())
        except OSError as error:
            logger.warning("the list of refused images cannot be written: %s", error.strerror)


def import_images(
    archive: Archive,
    query: ArchiveQuery,
    labels: Labels,
    store: ImageStore,
    rules: Rules,
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
                outcomes[instance] = _take(archive, instance, find_label(instance.keys(), labels), store, rules)
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


def _take(archive: Archive, instance: Instance, label: str, store: ImageStore, rules: Rules) -> Outcome:
    """The record of one image, fetched if need be, or why there is none."""
    if label not in LABELS:
        return SkipReason.UNKNOWN_LABEL if label else SkipReason.NO_LABEL
    name = store.name(instance)
    try:
        if not store.path(instance).exists():
            earlier = store.refused.get(name)
            if earlier and not rules.overrules(earlier):
                return earlier
            store.write(instance, prepare(archive.fetch(instance), instance.sop_uid, store.pseudonyms, rules))
            store.refused.pop(name, None)
        return _record(store.path(instance), label)
    except ImageError as error:
        if error.reason not in _PASSING:
            store.refused[name] = error.reason
        logger.info("image %s left out: %s", name, error)
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
    header = read_header(path)
    return ImageRecord(
        path=path.absolute(),
        patient=header.patient,
        label=label,
        view=header.view or None,
        sex=read_sex(header.sex),
        age_years=header.age_years,
        manufacturer=header.manufacturer or None,
    )


def _read_refused(file: Path) -> dict[str, SkipReason]:
    try:
        content: Mapping[str, str] = json.loads(file.read_bytes())
        return {str(name): SkipReason[reason] for name, reason in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        logger.warning("the list of refused images cannot be read; they are fetched again")
        return {}
