"""A reading function for a worker that does what a broken decoder may do; it imports little, since each worker imports it anew."""

from __future__ import annotations

import os
import signal

import numpy as np

from pneumofed.common.errors import ImageError, SkipReason
from pneumofed.inference.reading_room.file_judge import ImageJob
from pneumofed.inference.reading_room.viewing import ORIGINAL_FILE
from pneumofed.inference.reading_room.worker import JobOutcome, Read


def treacherous(job: ImageJob) -> JobOutcome:
    """Does what the file's first word says."""
    word = (job.folder / ORIGINAL_FILE).read_bytes().split(b" ")[0]
    if word == b"die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == b"hang":
        signal.pause()
    if word == b"eat":
        np.ones(2**40, np.uint8)
    if word == b"raise":
        raise RuntimeError("patient Doe")
    return ImageError(SkipReason.CONSTANT)


def load_treacherous() -> Read:
    return treacherous
