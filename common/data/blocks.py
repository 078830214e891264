"""Blocks of decoded images on disk.

A block is a set of images after one preprocessing, in two files: `NAME.pixels`, the bare uint8 [M, S, S], and `NAME.json`, which
holds the digest of each row, the images that could not be decoded, and the CRC-32 of both. The index is written after the
pixels and each file appears in one step, so a process that is stopped leaves nothing that could be taken for a block.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.data.atomic import atomic_write
from common.errors import SkipReason

log = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]
Result = Pixels | SkipReason
"""A decoded image, uint8 [S, S], or why there is none."""

_TRANSIENT = frozenset({SkipReason.MISSING, SkipReason.UNREADABLE})
"""Not the fault of the content, so not remembered with it: the file may be there again the next time."""


@dataclass(frozen=True)
class Block:
    """Decoded images.

    Attributes:
        pixels: uint8 [M, S, S].
        digests: of the image in each row.
        refused: why an image has no row, by digest.
        stored: whether the pixels are on disk rather than in this process's memory.
    """

    pixels: Pixels
    digests: tuple[str, ...]
    refused: Mapping[str, SkipReason]
    stored: bool = True

    def items(self) -> Iterator[tuple[str, Result]]:
        """(digest, result) of each image in the block."""
        yield from zip(self.digests, self.pixels, strict=True)
        yield from self.refused.items()


def read_block(index: Path) -> Block | None:
    """The block whose index file is `index`, its pixels memory-mapped; None if it is not there, cannot be read or is damaged."""
    try:
        content = json.loads(index.read_bytes())
        digests, size_px, checksum = tuple(content["digests"]), int(content["size_px"]), int(content["crc32"])
        refused = {digest: SkipReason[name] for digest, name in content["refused"].items()}
        pixels = _map(index.with_suffix(".pixels"), len(digests), size_px)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        log.warning("cached images %s are damaged; they are decoded again", index.stem)
        return None
    if _checksum(zlib.crc32(pixels.data), digests, refused) != checksum:
        log.warning("cached images %s have a wrong checksum; they are decoded again", index.stem)
        return None
    return Block(pixels, digests, refused)


def write_block(index: Path, results: Iterable[tuple[str, Result]], count: int, size_px: int) -> Block:
    """Writes the block of `results` (at most `count` images) as they come and gives it back memory-mapped.

    The pixels are written as a stream, never through a mapping: on a full disk the one raises an error, the other kills the
    process.

    Raises:
        OSError: a file cannot be written; nothing of the block stays.
    """
    if shutil.disk_usage(index.parent).free < count * size_px**2:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    digests: list[str] = []
    refused: dict[str, SkipReason] = {}
    checksum = 0
    with atomic_write(index.with_suffix(".pixels")) as file:
        for digest, result in results:
            if isinstance(result, SkipReason):
                refused[digest] = result
                continue
            digests.append(digest)
            checksum = zlib.crc32(result.tobytes(), checksum)
            file.write(result.tobytes())
    lasting = {digest: reason for digest, reason in refused.items() if reason not in _TRANSIENT}
    content = {
        "size_px": size_px,
        "crc32": _checksum(checksum, digests, lasting),
        "digests": digests,
        "refused": {digest: reason.name for digest, reason in lasting.items()},
    }
    with atomic_write(index) as file:
        file.write(json.dumps(content).encode())
    return Block(_map(index.with_suffix(".pixels"), len(digests), size_px), tuple(digests), refused)


def gather_block(results: Iterable[tuple[str, Result]], count: int, size_px: int) -> Block:
    """The block of `results` (at most `count` images) in memory."""
    pixels = np.empty((count, size_px, size_px), dtype=np.uint8)
    digests: list[str] = []
    refused: dict[str, SkipReason] = {}
    for digest, result in results:
        if isinstance(result, SkipReason):
            refused[digest] = result
        else:
            pixels[len(digests)] = result
            digests.append(digest)
    return Block(pixels[: len(digests)], tuple(digests), refused, stored=False)


def remove_block(index: Path) -> None:
    """Removes a block; a process that has it mapped keeps it."""
    for file in (index, index.with_suffix(".pixels")):
        file.unlink(missing_ok=True)


def _checksum(of_pixels: int, digests: Sequence[str], refused: Mapping[str, SkipReason]) -> int:
    """CRC-32 of the pixels and of what the index says about them."""
    said = json.dumps([*digests, *((digest, reason.name) for digest, reason in refused.items())])
    return zlib.crc32(said.encode(), of_pixels)


def _map(file: Path, count: int, size_px: int) -> Pixels:
    shape = (count, size_px, size_px)
    if file.stat().st_size != count * size_px**2:
        raise ValueError("the file's size does not fit its index")
    return np.memmap(file, dtype=np.uint8, mode="r", shape=shape) if count else np.empty(shape, dtype=np.uint8)
