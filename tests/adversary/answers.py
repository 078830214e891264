"""A reading function whose answer says which file it is about, in processes that start in a moment."""

from __future__ import annotations

import hashlib
import time
from multiprocessing import get_context

from pneumofed.common.errors import ImageError, SkipReason
from pneumofed.inference.reading_room.file_judge import ImageJob
from pneumofed.inference.reading_room.viewing import ORIGINAL_FILE
from pneumofed.inference.reading_room.worker import JobOutcome, Read

FAST = get_context("fork")
"""Starts in milliseconds where a process of the reading room takes a second to import its libraries."""


def name_the_file(job: ImageJob) -> JobOutcome:
    """An answer that holds the hash of the file that was read."""
    return ImageError(SkipReason.CONSTANT, hashlib.sha256((job.folder / ORIGINAL_FILE).read_bytes()).hexdigest())


def load_at_once() -> Read:
    return name_the_file


def load_slowly() -> Read:
    time.sleep(0.02)
    return name_the_file
