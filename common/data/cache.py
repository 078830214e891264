"""Decoded images, keyed by content and preprocessing, so that no image is decoded twice.

The cache folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from common.config import ImageConfig
from common.data.atomic import exclusive, pass_if_disk_full
from common.data.blocks import Block, Pixels, Result, gather_block, read_block, remove_block, write_block
from common.errors import ImageError
from common.images import fit_square, read_image

log = logging.getLogger(__name__)

FORMAT = 1
"""Part of every key; to be raised when decoding gives other pixels or the files change their layout."""

_TASKS_PER_WORKER = 32
_LOG_EVERY_SEC = 10.0


def load_block(wanted: Mapping[str, Path], image: ImageConfig, folder: Path, workers: int) -> Block:
    """The decoded images whose digests and files are `wanted`, rows in that order; from the cache where it has them.

    Of several processes that want one block, one builds it and the others wait. A block that is damaged is built again. Images
    that another block holds are copied, not decoded; blocks that hold nothing beyond the new one are then removed. When the
    disk is full the images are kept in memory.

    Raises:
        DataError: the folder cannot be written for another reason than a full disk.
    """
    store = folder / f"{image.size_px}px-{_key(str(FORMAT), image.model_dump_json())[:12]}"
    index = store / f"{_key(*wanted)[:32]}.json"
    block = read_block(index)
    if block is not None and _covers(block, wanted):
        return block
    try:
        return _build(index, wanted, image, workers)
    except OSError as error:
        pass_if_disk_full(error, store)
    return gather_block(_decode_all(wanted, {}, image, workers), len(wanted), image.size_px)


def decode(path: Path, image: ImageConfig) -> Pixels:
    """The image file as the model will see it: uint8 [S, S], rounded from [0, 1] to 0..255.

    Raises:
        ImageError: the file is no image that can be used.
    """
    pixels = fit_square(read_image(path).pixels, image.size_px, image.fit)
    return np.rint(pixels * 255.0).astype(np.uint8)


def _build(index: Path, wanted: Mapping[str, Path], image: ImageConfig, workers: int) -> Block:
    store = index.parent
    store.mkdir(mode=0o700, parents=True, exist_ok=True)
    with exclusive(store):
        block = read_block(index)
        if block is not None and _covers(block, wanted):
            return block
        _remove_leftovers(store)
        others = {other: block for other in sorted(store.glob("*.json")) if (block := read_block(other))}
        known = {digest: result for block in others.values() for digest, result in block.items() if digest in wanted}
        block = write_block(index, _decode_all(wanted, known, image, workers), len(wanted), image.size_px)
        for other, old in others.items():
            if set(wanted) > {*old.digests, *old.refused} and other != index:
                remove_block(other)
    return block


def _covers(block: Block, wanted: Mapping[str, Path]) -> bool:
    return len(block.digests) + len(block.refused) == len(wanted)


def _remove_leftovers(store: Path) -> None:
    """Removes what killed processes left half-written; to be called by the lock's holder alone."""
    for temporary in store.glob(".*"):
        temporary.unlink(missing_ok=True)


def _decode_all(
    wanted: Mapping[str, Path], known: Mapping[str, Result], image: ImageConfig, workers: int
) -> Iterator[tuple[str, Result]]:
    """(digest, result) of each of `wanted`, in order, from `known` or decoded by `workers` threads, a few images ahead."""

    def result(item: tuple[str, Path]) -> tuple[str, Result]:
        digest, path = item
        return digest, known[digest] if digest in known else _try_decode(path, image)

    items = list(wanted.items())
    step = workers * _TASKS_PER_WORKER
    logged = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(items), step):
            yield from pool.map(result, items[start : start + step])
            if time.monotonic() - logged > _LOG_EVERY_SEC:
                logged = time.monotonic()
                log.info("decoded %d of %d images", start, len(items))


def _try_decode(path: Path, image: ImageConfig) -> Result:
    try:
        return decode(path, image)
    except ImageError as error:
        return error.reason


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
