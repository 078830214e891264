"""Patience with an archive that is busy or a network that stumbles."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from common.errors import ArchiveError

T = TypeVar("T")
logger = logging.getLogger(__name__)


class PassingArchiveError(ArchiveError):
    """A failure that may pass: the same request is worth another try."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for an answer, and how often to ask again."""

    timeout_sec: float = 30.0
    attempts: int = 4
    first_wait_sec: float = 1.0
    """Doubled after each failure."""

    def retry(self, request: Callable[[], T]) -> T:
        """The answer to `request`, asked up to `attempts` times while it raises PassingArchiveError; then the last one is raised."""
        wait_sec = self.first_wait_sec
        for attempt in range(1, self.attempts):
            try:
                return request()
            except PassingArchiveError as error:
                logger.warning("archive: attempt %d of %d failed (%s); next in %.1f s", attempt, self.attempts, error, wait_sec)
                time.sleep(wait_sec)
                wait_sec *= 2
        return request()
