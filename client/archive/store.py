"""Where de-identified images lie in the site folder, and which of them are kept."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

from client.archive.pseudonyms import Pseudonyms
from client.archive.query import Instance
from common.data.atomic import StateFile, atomic_write, to_json
from common.errors import DataError, SkipReason

logger = logging.getLogger(__name__)

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


@dataclass
class ImageStore:
    """De-identified images in a folder of the site, each named after the pseudonym of its SOP Instance UID.

    The name is the state: an image whose file is there has arrived. Those that cannot be used are remembered in `refused.json` by
    the same pseudonyms, so that they are not fetched again.
    """

    folder: Path
    pseudonyms: Pseudonyms
    rules: Rules = field(default_factory=Rules)
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
        """Remembers that the image cannot be used, if that will not pass."""
        if reason not in _PASSING:
            self.refused[self.name(instance)] = reason

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
        self.refused.pop(self.name(instance), None)

    def save_refused(self) -> None:
        """Writes down which images cannot be used. Where that fails they are fetched once more the next time, no harm done."""
        try:
            _refused_file(self.folder).write(self.refused)
        except OSError as error:
            logger.warning("the list of refused images cannot be written: %s", error.strerror)


def _refused_file(folder: Path) -> StateFile[dict[str, SkipReason]]:
    return StateFile(
        folder / "refused.json",
        kind="the list of refused images",
        parse=lambda content: {str(name): SkipReason[reason] for name, reason in json.loads(content).items()},
        missing={},
        remedy="they are fetched again",
        dump=lambda refused: to_json({name: reason.name for name, reason in refused.items()}),
    )
