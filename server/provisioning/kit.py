"""A start-up kit on disk: a folder, and the same as one archive. Files that are right already are not touched."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pneumofed.common.files import atomic_write

PRIVATE_MODE, EXECUTABLE_MODE = 0o600, 0o700


@dataclass(frozen=True)
class KitFile:
    """One file of a kit. With `keep`, one that its owner has changed stays as it is."""

    content: bytes
    mode: int = PRIVATE_MODE
    keep: bool = False


@dataclass(frozen=True)
class Kit:
    """What one party gets. `gone` names files of earlier kits that must not stay."""

    name: str
    files: Mapping[str, KitFile]
    gone: tuple[str, ...] = field(default=())


def write_kit(out: Path, kit: Kit) -> bool:
    """Writes the kit into `out/NAME/` and `out/NAME.tar.gz`, and returns whether anything changed.

    Args:
        out: folder of all kits.
        kit: what one party gets.
    """
    folder = out / kit.name
    changed = [_write(folder / name, file) for name, file in sorted(kit.files.items())]
    changed += [_remove(folder / name) for name in kit.gone]
    archive = KitFile(_archive(folder, kit))
    return _write(out / f"{kit.name}.tar.gz", archive) or any(changed)


def write_private(path: Path, content: bytes) -> bool:
    """Writes a file with mode 0600 unless it is there already, and returns whether it was not.

    Args:
        path: its folder is made with mode 0700 where it is missing.
        content: what it must hold.
    """
    return _write(path, KitFile(content))


def _write(path: Path, file: KitFile) -> bool:
    if path.is_file() and (file.keep or path.read_bytes() == file.content):
        path.chmod(file.mode)
        return False
    _make_private_folder(path.parent)
    with atomic_write(path) as output:
        os.fchmod(output.fileno(), file.mode)
        output.write(file.content)
    return True


def _make_private_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_private_folder(folder.parent)
        folder.mkdir(mode=0o700)


def _remove(path: Path) -> bool:
    there = path.is_file()
    path.unlink(missing_ok=True)
    return there


def _archive(folder: Path, kit: Kit) -> bytes:
    """The kit as `.tar.gz`, without time or user, so that the same kit gives the same bytes."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, file in sorted(kit.files.items()):
            content = (folder / name).read_bytes()
            entry = tarfile.TarInfo(f"{kit.name}/{name}")
            entry.size, entry.mode = len(content), file.mode
            tar.addfile(entry, io.BytesIO(content))
    return gzip.compress(packed.getvalue(), mtime=0)
