"""Decoded images on disk, keyed by content and preprocessing, so that no image is decoded twice.

`load_block` is the entry: it gives the decoded images of a manifest as a `Block`, from the disk or freshly decoded. `load_digests` gives
the SHA-256 of the image files that the blocks are keyed by, and remembers them so that a later process need not read the files again.
The cache folder may be deleted at any time.

A block is a set of images after one preprocessing, in two files: `NAME.pixels`, the bare uint8 [M, S, S], of volumes
[M, slices, S, S], and `NAME.json`, which holds the digest of each row, the images that could not be decoded, and the CRC-32 of both.
The index is written after the pixels and each file appears in one step, so a process that is stopped leaves nothing that could be taken
for a block.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import stat
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pneumofed.common.config.experiment import ImageConfig
from pneumofed.common.errors import PASSING_REASONS, ImageError, SkipReason
from pneumofed.common.files import OnProgress, StateFile, atomic_write, count_off, exclusive, pass_if_disk_full, tell_nobody
from pneumofed.common.imaging.images import decoder_version, fit_square, read_image

log = logging.getLogger(__name__)

CACHE_FORMAT = 2
"""Part of every key; to be raised when decoding gives other pixels or the files change their layout."""

_IMAGES_PER_WORKER = 32
_LOG_EVERY_SEC = 10.0

Pixels = NDArray[np.uint8]
DecodeResult = Pixels | SkipReason
"""A decoded image, uint8 [S, S], a volume, uint8 [slices, S, S], or why there is none."""

DigestMemo = dict[str, tuple[int, int, str]]
"""(bytes, time of last change in ns, hexadecimal SHA-256) by absolute path."""

_PATHS_PER_TASK = 64


def load_block(
    wanted: Mapping[str, Path], image: ImageConfig, folder: Path, workers: int, on_progress: OnProgress = tell_nobody
) -> Block:
    """Loads the decoded images of `wanted`, from the cache where it has them.

    Of several processes that want one block, one builds it and the others wait. A block that is damaged is built again. Images
    that another block holds are copied, not decoded; blocks that hold nothing beyond the new one are then removed. When the
    disk is full the images are kept in memory.

    Args:
        wanted: the file of each image by its SHA-256 (`load_digests`).
        image: size and fit; another one means another block.
        folder: the cache; made if missing.
        workers: threads that decode; at least 1.
        on_progress: told of each image that is decoded.

    Returns:
        A block whose rows are in the order of `wanted`, without those that cannot be decoded, which it names.

    Raises:
        DataError: the folder cannot be written for another reason than a full disk.
    """
    store = folder / f"{image.size_px}px-{_hash_parts(str(CACHE_FORMAT), image.model_dump_json())[:12]}"
    index = store / f"{_hash_parts(*wanted)[:32]}.json"
    block = read_block(index)
    if block is not None and _covers(block, wanted):
        return block
    try:
        return _build(index, wanted, image, workers, on_progress)
    except OSError as error:
        pass_if_disk_full(error, store)
    return gather_block(_decode_all(wanted, {}, image, workers, on_progress), len(wanted), image)


def decode_for_cache(path: Path, image: ImageConfig) -> Pixels:
    """Decodes an image file as the model will see it.

    Args:
        path: a file that `read_image` reads; of a volume what `read_volume` reads, a file or the folder of a series.
        image: size, fit and slices.

    Returns:
        uint8 [S, S], rounded from [0, 1] to 0..255; of a volume (`image.slices`) uint8 [slices, S, S] of the lung window.

    Raises:
        ImageError: the file is no image that can be used.
    """
    if image.slices:
        from pneumofed.common.imaging.volumes import fit_volume, read_volume  # of CT only

        return fit_volume(read_volume(path), image.size_px, image.slices)
    pixels = fit_square(read_image(path).pixels, image.size_px, image.fit)
    return np.rint(pixels * 255.0).astype(np.uint8)


@dataclass(frozen=True)
class Block:
    """Decoded images.

    Attributes:
        pixels: uint8 [M, S, S], or [M, slices, S, S] of volumes.
        digests: of the image in each row.
        refused: why an image has no row, by digest.
        stored: whether the pixels are on disk rather than in this process's memory.
    """

    pixels: Pixels
    digests: tuple[str, ...]
    refused: Mapping[str, SkipReason]
    stored: bool = True

    def items(self) -> Iterator[tuple[str, DecodeResult]]:
        """Iterates over (digest, result) of each image in the block: first the rows, then the refused ones."""
        yield from zip(self.digests, self.pixels, strict=True)
        yield from self.refused.items()


def read_block(index: Path) -> Block | None:
    """Reads the block whose index file is `index`, its pixels memory-mapped; None if it is missing, cannot be read or is damaged.

    What another version of the decoders refused is left out, so that it is tried again.
    """
    try:
        content = json.loads(index.read_bytes())
        digests, checksum = tuple(content["digests"]), int(content["crc32"])
        shape = ImageConfig(size_px=int(content["size_px"]), slices=int(content.get("slices", 0))).shape
        refused = {digest: SkipReason[name] for digest, name in content["refused"].items()}
        decoder = str(content.get("decoder", ""))
        pixels = _map_pixels(index.with_suffix(".pixels"), len(digests), shape)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        log.warning("cached images %s are damaged; they are decoded again", index.stem)
        return None
    if _block_checksum(zlib.crc32(pixels.data), digests, refused, decoder) != checksum:
        log.warning("cached images %s have a wrong checksum; they are decoded again", index.stem)
        return None
    return Block(pixels, digests, refused if decoder == decoder_version() else {})


def write_block(index: Path, results: Iterable[tuple[str, DecodeResult]], count: int, image: ImageConfig) -> Block:
    """Writes the block of `results` as they come and opens it memory-mapped.

    The pixels are written as a stream, never through a mapping: on a full disk the one raises an error, the other kills the
    process.

    Args:
        index: the block's `NAME.json`, in a folder that exists.
        results: (digest, uint8 of `image.shape` or the reason why there is none) of each image.
        count: images in `results` at most, for a first look at the free space.
        image: size and slices of the images.

    Returns:
        The block. Reasons that may pass, such as a missing file, are in it but not on the disk.

    Raises:
        OSError: a file cannot be written; nothing of the block stays.
    """
    if shutil.disk_usage(index.parent).free < count * prod(image.shape):
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
    lasting = {digest: reason for digest, reason in refused.items() if reason not in PASSING_REASONS}
    content = {
        "size_px": image.size_px,
        **({"slices": image.slices} if image.slices else {}),
        "crc32": _block_checksum(checksum, digests, lasting, decoder_version()),
        "digests": digests,
        "refused": {digest: reason.name for digest, reason in lasting.items()},
        "decoder": decoder_version(),
    }
    with atomic_write(index) as file:
        file.write(json.dumps(content).encode())
    return Block(_map_pixels(index.with_suffix(".pixels"), len(digests), image.shape), tuple(digests), refused)


def gather_block(results: Iterable[tuple[str, DecodeResult]], count: int, image: ImageConfig) -> Block:
    """Gathers `results` into a block in memory.

    Args:
        results: (digest, uint8 of `image.shape` or the reason why there is none) of each image.
        count: images in `results` at most; memory is taken for so many.
        image: size and slices of the images.
    """
    pixels = np.empty((count, *image.shape), dtype=np.uint8)
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


def forget_refused(folder: Path) -> int:
    """Forgets which images could not be decoded, in all blocks of the cache `folder`, so that they are tried again; how many.

    Raises:
        OSError: the folder cannot be written.
    """
    forgotten: set[str] = set()
    for index in sorted(folder.glob("*px-*/*.json")):
        with exclusive(index.parent):
            block = read_block(index)
            if block is not None and block.refused:
                forgotten |= block.refused.keys()
                content = json.loads(index.read_bytes())
                checksum = _block_checksum(zlib.crc32(block.pixels.data), block.digests, {}, decoder_version())
                content |= {"refused": {}, "crc32": checksum}
                with atomic_write(index) as file:
                    file.write(json.dumps(content).encode())
    return len(forgotten)


def load_digests(
    paths: Sequence[Path], folder: Path, workers: int, *, series: bool = False, on_progress: OnProgress = tell_nobody
) -> list[str | SkipReason]:
    """Computes the SHA-256 of each file, or looks it up.

    A file is read only if the memo in `folder` does not know its path with its present size and time of last change.

    Args:
        paths: image files; relative ones are taken from the current folder.
        folder: the cache, which keeps the memo; made if missing.
        workers: threads that read; at least 1.
        series: whether a path may be a folder, the files of one series: its digest is that of its files' digests in ascending order,
            whatever the files are called.
        on_progress: told of the files that are known.

    Returns:
        For each path, in order, the hexadecimal digest or the reason why it has none.

    Raises:
        DataError: `folder` cannot be made or written. A full disk is no error: the files are read again the next time.
    """
    memo_file = _memo_file(folder)
    memo = memo_file.read()
    if len(paths) <= _PATHS_PER_TASK:  # one task: a thread would be started for it with each message of a small site
        results = [_file_digest(path, memo, series) for path in next(_chunks(paths), [])]
    else:
        with ThreadPoolExecutor(workers) as pool:
            chunks = pool.map(lambda chunk: [_file_digest(path, memo, series) for path in chunk], _chunks(paths))
            results = list(count_off((result for chunk in chunks for result in chunk), "files read", len(paths), on_progress))
    new = {path: entry for path, entry in results if not isinstance(entry, SkipReason) and memo.get(path) != entry}
    if new:
        _extend_memo(new, memo_file)
    return [entry if isinstance(entry, SkipReason) else entry[2] for _, entry in results]


def _build(index: Path, wanted: Mapping[str, Path], image: ImageConfig, workers: int, on_progress: OnProgress) -> Block:
    store = index.parent
    store.mkdir(mode=0o700, parents=True, exist_ok=True)
    with exclusive(store):
        block = read_block(index)
        if block is not None and _covers(block, wanted):
            return block
        _remove_leftovers(store)
        others = {other: block for other in sorted(store.glob("*.json")) if (block := read_block(other))}
        known = {digest: result for block in others.values() for digest, result in block.items() if digest in wanted}
        block = write_block(index, _decode_all(wanted, known, image, workers, on_progress), len(wanted), image)
        for other, old in others.items():
            if set(wanted) > {*old.digests, *old.refused} and other != index:
                remove_block(other)
    return block


def _covers(block: Block, wanted: Mapping[str, Path]) -> bool:
    return len(block.digests) + len(block.refused) == len(wanted)


def _remove_leftovers(store: Path) -> None:
    """Removes what killed processes left half-written; only the lock's holder may call it."""
    for temporary in store.glob(".*"):
        temporary.unlink(missing_ok=True)


def _decode_all(
    wanted: Mapping[str, Path], known: Mapping[str, DecodeResult], image: ImageConfig, workers: int, on_progress: OnProgress
) -> Iterator[tuple[str, DecodeResult]]:
    """(digest, result) of each of `wanted`, in order, from `known` or decoded by `workers` threads, a few images ahead."""

    def result(item: tuple[str, Path]) -> tuple[str, DecodeResult]:
        digest, path = item
        return digest, known[digest] if digest in known else _try_decode(path, image)

    items = list(wanted.items())
    step = workers * _IMAGES_PER_WORKER
    logged = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(items), step):
            for done, one in enumerate(pool.map(result, items[start : start + step]), start=start + 1):
                yield one
                on_progress("images decoded", done, len(items))
            if time.monotonic() - logged > _LOG_EVERY_SEC:
                logged = time.monotonic()
                log.info("decoded %d of %d images", start, len(items))


def _try_decode(path: Path, image: ImageConfig) -> DecodeResult:
    try:
        return decode_for_cache(path, image)
    except ImageError as error:
        return error.reason


def _hash_parts(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _block_checksum(of_pixels: int, digests: Sequence[str], refused: Mapping[str, SkipReason], decoder: str) -> int:
    """CRC-32 of the pixels and of what the index says about them; blocks of earlier versions name no decoder."""
    said = json.dumps([*digests, *((digest, reason.name) for digest, reason in refused.items()), *[decoder][: len(decoder)]])
    return zlib.crc32(said.encode(), of_pixels)


def _map_pixels(file: Path, count: int, shape: tuple[int, ...]) -> Pixels:
    if file.stat().st_size != count * prod(shape):
        raise ValueError("the file's size does not fit its index")
    rows = (count, *shape)
    return np.memmap(file, dtype=np.uint8, mode="r", shape=rows) if count else np.empty(rows, dtype=np.uint8)


def _chunks(paths: Sequence[Path]) -> Iterator[list[str]]:
    """Absolute paths, some at a time: to hand a thread one path costs more than to look it up."""
    for start in range(0, len(paths), _PATHS_PER_TASK):
        yield [os.path.abspath(path) for path in paths[start : start + _PATHS_PER_TASK]]  # noqa: PTH100 - resolve() follows links


def _memo_file(folder: Path) -> StateFile[DigestMemo]:
    def parse(content: bytes) -> DigestMemo:
        known = json.loads(content)
        return {path: (int(size), int(mtime_ns), str(digest)) for path, (size, mtime_ns, digest) in known.items()}

    return StateFile(folder / "digests.json", "the memo of file digests", parse, {}, "all files are read again")


def _extend_memo(new: DigestMemo, file: StateFile[DigestMemo]) -> None:
    try:
        with file.locked() as memo:
            file.write(memo | new)
    except OSError as error:
        pass_if_disk_full(error, file.path.parent)


def _file_digest(path: str, memo: DigestMemo, series: bool = False) -> tuple[str, tuple[int, int, str] | SkipReason]:
    try:
        if series and Path(path).is_dir():
            return path, _series_digest(Path(path), memo.get(path))
        status = _file_status(path)
        known = memo.get(path)
        if known and known[:2] == (status.st_size, status.st_mtime_ns):
            return path, known
        with Path(path).open("rb") as file:
            return path, (status.st_size, status.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest())
    except ImageError as error:
        return path, error.reason
    except (FileNotFoundError, NotADirectoryError):
        return path, SkipReason.MISSING
    except (OSError, ValueError):  # ValueError: a null character in the path
        return path, SkipReason.UNREADABLE


def series_digest(digests: Iterable[str]) -> str:
    """Computes the digest of a series from the hexadecimal SHA-256 of its files, in any order."""
    return _hash_parts("series", *sorted(digests))


def image_digest(path: Path) -> str:
    """Computes the hexadecimal SHA-256 of an image file, or of the folder of a series, as `load_digests` has it.

    Raises:
        ImageError: it cannot be read, or is empty.
    """
    if path.is_dir():
        return _series_digest(path, None)[2]
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _series_digest(folder: Path, known: tuple[int, int, str] | None) -> tuple[int, int, str]:
    """As of a file; its size is that of all its files, and its time of last change a hash of theirs, so that none goes unseen."""
    files = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file())
    statuses = [_file_status(str(path)) for path in files]
    if not files:
        raise ImageError(SkipReason.EMPTY)
    size = sum(status.st_size for status in statuses)
    changed = int(
        _hash_parts(*(f"{path.name} {status.st_mtime_ns}" for path, status in zip(files, statuses, strict=True)))[:15], 16
    )
    if known and known[:2] == (size, changed):
        return known
    return size, changed, series_digest([image_digest(path) for path in files])


def _file_status(path: str) -> os.stat_result:
    status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise ImageError(SkipReason.UNREADABLE)
    if status.st_size == 0:
        raise ImageError(SkipReason.EMPTY)
    return status
