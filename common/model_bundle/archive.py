"""A bundle as one file: a plain .zip or .tar, packed the same way each time and unpacked without trust."""

from __future__ import annotations

import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from common.errors import BundleError
from common.model_bundle.sealing import MAX_BYTES, MAX_FILES, list_files

_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that zip can say: the same files give the same bytes
_CHUNK = 2**20
_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, ValueError, RuntimeError, NotImplementedError)


def pack(folder: Path, archive: Path) -> Path:
    """Writes the bundle in `folder` as the zip file `archive`, all below one folder of the archive's name; returns `archive`."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name in list_files(folder):
            entry = zipfile.ZipInfo(f"{archive.stem}/{name}", _DATE)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            with (folder / name).open("rb") as source, file.open(entry, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, _CHUNK)
    return archive


def unpack_bundle(archive: Path, folder: Path) -> Path:
    """Unpacks `archive` into the empty `folder`; returns where the bundle lies, which is `folder` or the one folder in it.

    Only plain files with plain relative names are taken, and no more of them or their bytes than a bundle may have, whatever the
    archive claims of their sizes.

    Raises:
        BundleError: the archive is damaged, is no zip or tar, or holds anything else.
    """
    try:
        if _begins(archive, b"PK"):  # not is_zipfile, which would find the weights' own zip at the end of a .tar
            with zipfile.ZipFile(archive) as zip_file:
                _take(_zip_entries(zip_file), folder)
        else:
            with tarfile.open(archive, "r:") as tar_file:
                _take(_tar_entries(tar_file), folder)
    except _DAMAGED as error:
        raise BundleError(f"{archive} is damaged or is no .zip or .tar ({type(error).__name__}); get it again") from None
    inside = list(folder.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder


def _begins(archive: Path, magic: bytes) -> bool:
    with archive.open("rb") as file:
        return file.read(len(magic)) == magic


def _zip_entries(archive: zipfile.ZipFile) -> Iterator[tuple[str, IO[bytes]]]:
    for entry in archive.infolist():
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if entry.is_dir() and kind in (0, stat.S_IFDIR):
            continue
        if kind not in (0, stat.S_IFREG):
            raise BundleError("the archive holds a link or a device, which a model bundle must not")
        with archive.open(entry) as content:
            yield entry.filename, content


def _tar_entries(archive: tarfile.TarFile) -> Iterator[tuple[str, IO[bytes]]]:
    for entry in archive:
        if entry.isdir():
            continue
        content = archive.extractfile(entry) if entry.isreg() and not entry.issparse() else None
        if content is None:
            raise BundleError("the archive holds a link or a device, which a model bundle must not")
        yield entry.name, content


def _take(entries: Iterator[tuple[str, IO[bytes]]], folder: Path) -> None:
    room = MAX_BYTES
    for count, (name, content) in enumerate(entries, start=1):
        if count > MAX_FILES:
            raise BundleError(f"the archive holds more than {MAX_FILES} files, more than any model bundle")
        target = folder / _plain(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            while chunk := content.read(min(_CHUNK, room + 1)):
                room -= len(chunk)
                if room < 0:
                    raise BundleError(f"the archive unpacks to more than {MAX_BYTES} bytes, more than any model bundle")
                file.write(chunk)


def _plain(name: str) -> PurePosixPath:
    """`name` as a path that stays below where it is put."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or any(sign in name for sign in ("\\", ":", "\0")):
        raise BundleError("the archive holds a file name that leads out of its folder; do not use it")
    return path
