"""Which images of the archive cannot be used, remembered so that they are not fetched again, and which examinations failed.

What is remembered of an image is a property of its bytes: their SHA-256, the reason, and the version of the decoders that found it. With
another version the image is asked for again, and `forget_refusals` makes it so at once. A reason that a transfer which went wrong could
also give (`DOUBTFUL_REASONS`) counts only when a later import gets the same bytes. A fault of the machine or of the way to the archive is
not remembered at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pneumofed.client.archive.query import RequestError
from pneumofed.common.errors import PASSING_REASONS, ArchiveError, SkipReason
from pneumofed.common.files import StateFile, exclusive, to_json
from pneumofed.common.imaging.dicom_header import Pseudonyms
from pneumofed.common.imaging.images import decoder_version

logger = logging.getLogger(__name__)

DOUBTFUL_REASONS = frozenset(
    {SkipReason.CORRUPT, SkipReason.NO_PIXEL_DATA, SkipReason.EMPTY, SkipReason.UNKNOWN_FORMAT, SkipReason.CONSTANT}
)
"""Reasons that may lie in the transfer: seen twice with the same bytes, they are the image's."""
STOP_AFTER = 5
"""Examinations in a row that fail before an import stops."""


@dataclass(frozen=True)
class RefusedImage:
    """Why an image cannot be used, and what that was found with.

    Attributes:
        reason: the kind.
        sha256: of the bytes that the archive sent, in hexadecimal.
        decoder: `decoder_version` of then.
        seen: imports that found it, with the same bytes and decoders.
    """

    reason: SkipReason
    sha256: str
    decoder: str
    seen: int = 1

    def is_certain(self) -> bool:
        """Whether the image need not be fetched again to know."""
        return self.decoder == decoder_version() and (self.seen > 1 or self.reason not in DOUBTFUL_REASONS)


@dataclass
class RefusedImages:
    """Images that cannot be used, by pseudonym, in `refused.json` of a folder; `save` writes them."""

    folder: Path
    by_name: dict[str, RefusedImage] = field(init=False)

    def __post_init__(self) -> None:
        self.by_name = _refused_file(self.folder).read()

    def find(self, name: str) -> SkipReason | None:
        """Why the image `name` cannot be used, where that is certain."""
        known = self.by_name.get(name)
        return known.reason if known is not None and known.is_certain() else None

    def add(self, name: str, reason: SkipReason, data: bytes) -> None:
        """Remembers that an image cannot be used, unless the reason is one that passes.

        Args:
            name: the image's pseudonym.
            reason: why.
            data: the bytes of the image, as the archive sent them.
        """
        if reason in PASSING_REASONS:
            return
        new = RefusedImage(reason, hashlib.sha256(data).hexdigest(), decoder_version())
        known = self.by_name.get(name)
        same = known is not None and (known.reason, known.sha256, known.decoder) == (new.reason, new.sha256, new.decoder)
        self.by_name[name] = RefusedImage(reason, new.sha256, new.decoder, seen=2) if same else new

    def drop(self, name: str) -> None:
        """Forgets the image `name`: it is here now."""
        self.by_name.pop(name, None)

    def save(self) -> None:
        """Writes them down. Where that fails the images are fetched once more the next time, no harm done."""
        try:
            _refused_file(self.folder).write(self.by_name)
        except OSError as error:
            logger.warning("the list of refused images cannot be written: %s", error.strerror)


def forget_refusals(folder: Path) -> Counter[SkipReason]:
    """Forgets which images of `folder` cannot be used, so that the next import asks for them again; how many, by reason.

    Raises:
        OSError: the folder cannot be written.
    """
    if not folder.exists():
        return Counter()
    with exclusive(folder):
        file = _refused_file(folder)
        counts = Counter(refusal.reason for refusal in file.read().values())
        if counts:
            file.write({})
    return counts


class FailedExaminations:
    """Examinations that an import could not bring, of which several in a row end it.

    They are remembered by pseudonym in `failed.json`. The next import asks for them last and does not count them again, so that the same
    examinations cannot end it at the same place each time.
    """

    def __init__(self, folder: Path, pseudonyms: Pseudonyms) -> None:
        self._folder = folder
        self._pseudonyms = pseudonyms
        self._before = frozenset(_failed_file(folder).read())
        self._left = set(self._before)
        self._now: set[str] = set()
        self._row: set[str] = set()
        self.last: RequestError | None = None

    def failed_before(self, examination: str) -> bool:
        """Whether the last import failed to bring it; `examination` is its Study Instance UID or accession number."""
        return self._name(examination) in self._before

    def has_failed(self, examination: str) -> bool:
        """Whether it failed in this import."""
        return self._name(examination) in self._now

    def add(self, examination: str, error: RequestError) -> None:
        """Counts a failure.

        Args:
            examination: Study Instance UID or accession number.
            error: what went wrong.

        Raises:
            ArchiveError: it is the last of `STOP_AFTER` examinations in a row.
        """
        name = self._name(examination)
        logger.warning("archive: an examination is left to the next import (%s)", error)
        self.last = error
        self._now.add(name)
        if name not in self._before:
            self._row.add(name)
        if len(self._row) >= STOP_AFTER:
            raise ArchiveError(
                f"{STOP_AFTER} examinations in a row failed, so the import stopped; the last one: {error}. What had arrived is kept; the "
                "same command goes on from here and asks for those that failed at the end"
            )

    def visit(self, examination: str) -> None:
        """Notes that this import asks for it, so that it is remembered only if it fails again."""
        self._left.discard(self._name(examination))

    def succeed(self) -> None:
        """Notes that the archive delivers: a row of failures ends."""
        self._row.clear()

    def save(self) -> None:
        """Writes down which failed, and those of the last import that this one did not come to."""
        try:
            _failed_file(self._folder).write(sorted(self._left | self._now))
        except OSError as error:
            logger.warning("the list of failed examinations cannot be written: %s", error.strerror)

    def _name(self, examination: str) -> str:
        return self._pseudonyms.uid(examination)


def _parse_refused(content: bytes) -> dict[str, RefusedImage]:
    """Entries of earlier versions are a reason only: nothing says of which bytes, so they do not count."""
    entries = {str(name): entry for name, entry in json.loads(content).items() if isinstance(entry, dict)}
    return {
        name: RefusedImage(SkipReason[entry["reason"]], str(entry["sha256"]), str(entry["decoder"]), int(entry["seen"]))
        for name, entry in entries.items()
    }


def _refused_file(folder: Path) -> StateFile[dict[str, RefusedImage]]:
    return StateFile(
        folder / "refused.json",
        kind="the list of refused images",
        parse=_parse_refused,
        missing={},
        remedy="they are fetched again",
        dump=lambda refused: to_json({name: asdict(entry) | {"reason": entry.reason.name} for name, entry in refused.items()}),
    )


def _failed_file(folder: Path) -> StateFile[list[str]]:
    return StateFile(
        folder / "failed.json",
        kind="the list of failed examinations",
        parse=lambda content: [str(name) for name in json.loads(content)],
        missing=[],
        remedy="they are asked for in the usual order",
    )
