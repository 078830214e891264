"""A disk that is full, or a process that is killed, at the n-th change below a folder: `disk.c`, preloaded into processes of a test."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest

from tests.tiny import folder_of_process

COMPILER = shutil.which("cc") or shutil.which("gcc")
COUNT, FULL, KILL = 0, 1, 2
"""What happens at the moment: nothing, the disk is full from then on, or the process is killed."""


@lru_cache
def library() -> Path | None:
    """The compiled library; None where there is no C compiler."""
    if COMPILER is None:
        return None
    path = folder_of_process("pneumofed-disk-") / "disk.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run([COMPILER, "-O1", "-shared", "-fPIC", "-o", str(path), str(source), "-ldl"], check=True)
    return path


def environment(folder: Path | None = None, at: int = 0, mode: int = COUNT) -> dict[str, str]:
    """Variables for a process that is to have the library, armed where a folder is given."""
    path = library()
    armed = {"DISK_FOLDER": str(folder), "DISK_AT": str(at), "DISK_MODE": str(mode)} if folder else {}
    return {"LD_PRELOAD": str(path), **armed} if path else {}


def arm(folder: Path, at: int, mode: int) -> None:
    """Arms the library in this process and in those that it will start; without the library only a mode that does nothing will do."""
    if "LD_PRELOAD" not in os.environ:
        assert mode == COUNT
        return
    os.environ.update(environment(folder, at, mode) if mode != COUNT else {})
    ctypes.CDLL(None).disk_arm(str(folder).encode(), ctypes.c_long(at), mode)


def disarm() -> None:
    """What follows is the test's own."""
    if "LD_PRELOAD" in os.environ:
        ctypes.CDLL(None).disk_arm(b"", ctypes.c_long(0), COUNT)


def changes() -> int:
    """How many changes this process made since it was armed."""
    if "LD_PRELOAD" not in os.environ:
        return 0
    count = ctypes.CDLL(None).disk_changes
    count.restype = ctypes.c_long
    return int(count())


needs_library = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler, as `cc`")
