"""Silence for libraries whose warnings quote what is in a file, and with it a patient's name."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_users = 0
_filters: warnings.catch_warnings[None] | None = None


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """Silences all warnings of this process while any thread is within such a block.

    Counted under a lock, because `warnings.catch_warnings` alone leaves the wrong filters behind when two threads leave it in
    the order in which they came: warnings would stay silenced for ever, or speak while another thread still reads a patient's file.
    """
    global _users, _filters
    with _lock:
        if _users == 0:
            _filters = warnings.catch_warnings()
            _filters.__enter__()
            warnings.simplefilter("ignore")
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and _filters is not None:
                _filters.__exit__(None, None, None)
