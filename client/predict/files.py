"""The files to judge: those that were named, and those below the folders that were named, found as they are needed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

MAX_DEPTH = 32
"""Folders below a named one; an archive's export has four (patient, study, series, image)."""
_INDEX = "DICOMDIR"  # PS3.10, 8.6: the index of a medium, no image


def find_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Absolute paths of all files in `paths`, folders searched with all folders below; in a fixed order, each file once a path.

    Only the names of the folders on the way are held, whatever the number of files. Hidden files and DICOMDIR are left out below
    folders. A folder is entered once even where links lead back to it, and not below `MAX_DEPTH`. One that cannot be listed is
    given back itself, so that reading it says why.
    """
    for path in paths:
        absolute = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would replace the user's link by its target
        if absolute.is_dir():
            yield from _walk(absolute, MAX_DEPTH, set())
        else:
            yield absolute


def _walk(folder: Path, depth: int, seen: set[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith(".") and entry.name != _INDEX)
    except OSError:
        yield folder
        return
    for name in names:
        path = folder / name
        if not path.is_dir():
            yield path
        elif depth > 0:
            yield from _walk(path, depth - 1, seen)
