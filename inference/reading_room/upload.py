"""Files on their way in: streamed from a request into quarantine, piece by piece, within limits, under random names.

Where the model judges CT, the files of a request are one series (`gather_series`).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from pneumofed.inference.reading_room.clinical import MOST_VALUE_BYTES, GivenValue, GivenValues
from pneumofed.inference.reading_room.errors import Refusal
from pneumofed.inference.reading_room.schema import ErrorCode
from pneumofed.inference.reading_room.series import FileKind, kind_of, name_nifti
from pneumofed.inference.reading_room.settings import MIB, UploadLimits
from pneumofed.inference.reading_room.viewing import ORIGINAL_FILE

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks


FORM_FIELD, VALUES_FIELD = b"files", b"clinical"

Folders = Callable[[], AbstractContextManager[Path]]

_AS_RADIOGRAPH: dict[FileKind, ErrorCode] = {"zip": "archive_file", "nifti": "ct_image", "nifti.gz": "ct_image"}
"""What is wrong with kinds of files where the model judges radiographs."""


@dataclass
class Arrived:
    """One file in its folder, or the files of a series. `error` is why it is refused already; `volumes`, whether it may be a CT series."""

    folder: Path
    volumes: bool = False
    kind: FileKind = "file"
    sha256: str = ""
    error: ErrorCode | None = None
    size: int = 0
    given: Mapping[str, GivenValue | None] = field(default_factory=dict, repr=False)
    """Clinical values that came with it, by column."""
    _digest: hashlib._Hash = field(default_factory=hashlib.sha256, repr=False)
    _file: BinaryIO | None = field(default=None, repr=False)

    def open(self) -> None:
        descriptor = os.open(self.folder / ORIGINAL_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._file = os.fdopen(descriptor, "wb")

    def write(self, data: bytes, most: int) -> None:
        """Takes a piece of the file; beyond `most` bytes everything is thrown away, also what came before.

        Args:
            data: the piece.
            most: bytes that the whole file may have.
        """
        self.size += len(data)
        if self._file is None or self.error:
            return
        if self.size > most:
            self.error = "file_too_large"
            self._file.truncate(0)
            return
        self._digest.update(data)
        self._file.write(data)

    def close(self) -> None:
        """Ends the file, and looks whether it is one at all."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        self.sha256 = self._digest.hexdigest()
        if self.error is None and self.size == 0:
            self.error = "empty"
        elif self.error is None:
            self.kind = kind_of(self.folder / ORIGINAL_FILE)
            self.error = None if self.volumes else _AS_RADIOGRAPH.get(self.kind)
            if self.kind == "archive":
                self.error = "archive_file"


class Gate:
    """Lets `at_once` requests in at a time and `waiting` wait for it."""

    def __init__(self, limits: UploadLimits) -> None:
        self._free = asyncio.Semaphore(limits.at_once)
        self._most = limits.waiting
        self.waiting = 0

    @asynccontextmanager
    async def enter(self) -> AsyncIterator[None]:
        """Waits for its turn.

        Raises:
            Refusal: too many wait already.
        """
        if self._free.locked() and self.waiting >= self._most:
            raise Refusal(429, "busy", retry_sec=2)
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        try:
            yield
        finally:
            self._free.release()


async def receive_one(stream: AsyncIterator[bytes], folder: Path, limits: UploadLimits, volumes: bool = False) -> Arrived:
    """Receives the body of a request as one file.

    Args:
        stream: pieces of the body.
        folder: of `CaseFiles.arriving`; the file is written there as `ORIGINAL_FILE`.
        limits: of size and time.
        volumes: whether the model judges CT series.

    Raises:
        Refusal: it is too large, refused for another reason, or does not come to its end in time.
    """
    arrived = Arrived(folder, volumes)
    arrived.open()
    try:
        async with asyncio.timeout(limits.seconds):
            async for piece in stream:
                arrived.write(piece, limits.file_mb * MIB)
                if arrived.error:
                    break
    except TimeoutError:
        raise Refusal(408, "too_slow") from None
    finally:
        arrived.close()
    if arrived.error:
        raise Refusal(413 if arrived.error == "file_too_large" else 422, arrived.error)
    return arrived


async def receive_form(
    stream: AsyncIterator[bytes],
    content_type: str,
    stack: AsyncExitStack,
    folders: Folders,
    limits: UploadLimits,
    volumes: bool = False,
) -> list[Arrived]:
    """Receives the files of a multipart form (RFC 7578), in order, each in a folder that lives as long as `stack`.

    Beside the files, `clinical` is a JSON object of clinical values, one a file in the same order, or none at all. File names are thrown
    away: they may name a patient, or a place outside the room.

    Args:
        stream: pieces of the body.
        content_type: header of the request; gives the boundary.
        stack: keeps the folders until the caller is done.
        folders: makes a folder for one file, as `CaseFiles.arriving`.
        limits: of sizes, number of files and time. A file that is too large is marked and the others go on.
        volumes: whether the model judges CT series.

    Raises:
        Refusal: it is no such form, or it goes beyond a limit of requests.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise Refusal(422, "invalid_request")
    form = _Form(stack, folders, limits, volumes)
    received = 0
    try:
        parser = MultipartParser(options[b"boundary"], form.callbacks())
        async with asyncio.timeout(limits.seconds):
            async for piece in stream:
                received += len(piece)
                if received > limits.request_mb * MIB:
                    raise Refusal(413, "request_too_large")
                parser.write(piece)
        parser.finalize()
    except FormParserError:
        raise Refusal(422, "invalid_request") from None
    except TimeoutError:
        raise Refusal(408, "too_slow") from None
    finally:
        form.close()
    if not form.files or not form.complete or len(form.values) not in (0, len(form.files)):
        raise Refusal(422, "invalid_request")
    for file, text in zip(form.files, form.values, strict=False):
        file.given = _read_values(bytes(text))
    return form.files


def gather_series(files: Sequence[Arrived], folder: Path) -> list[tuple[int, Arrived]]:
    """Gathers the files of a request into CT series: each NIfTI and each zip is one of its own, all others together are one.

    A file that is refused already refuses the series that it belongs to, which would have a gap without it.

    Args:
        files: of `receive_form`, in order.
        folder: of `CaseFiles.arriving`, for the series of several files.

    Returns:
        Each series with the place of its first file in the request.
    """
    from pneumofed.common.data.cache import series_digest

    own = [(index, file) for index, file in enumerate(files) if file.kind not in ("file", "series")]
    slices = [(index, file) for index, file in enumerate(files) if file.kind == "file"]
    for _, file in own:
        if file.error is None:
            name_nifti(file.folder, file.kind)
    bad = [(index, file) for index, file in slices if file.error]
    if len(slices) < 2 or bad:
        return sorted(own + (bad[:1] or slices), key=lambda one: one[0])
    series = Arrived(folder, volumes=True, kind="series", size=sum(file.size for _, file in slices))
    series.sha256 = series_digest(file.sha256 for _, file in slices)
    inside = folder / ORIGINAL_FILE
    inside.mkdir(mode=0o700)
    for number, (_, file) in enumerate(slices, start=1):
        (file.folder / ORIGINAL_FILE).rename(inside / f"{number:05d}")
    return sorted([*own, (slices[0][0], series)], key=lambda one: one[0])


def _read_values(text: bytes) -> Mapping[str, GivenValue | None]:
    """The clinical values of one file, as JSON in a form.

    Raises:
        Refusal: they are not as `GivenValues` says.
    """
    try:
        return GivenValues.model_validate({"values": json.loads(text)}).values
    except (ValueError, RecursionError):
        raise Refusal(422, "invalid_request") from None


class _Form:
    """Takes the parser's events."""

    def __init__(self, stack: AsyncExitStack, folders: Folders, limits: UploadLimits, volumes: bool) -> None:
        self._stack, self._folders, self._limits, self._volumes = stack, folders, limits, volumes
        self.files: list[Arrived] = []
        self.values: list[bytearray] = []
        self._text: bytearray | None = None
        self.complete = False
        self._name, self._value = bytearray(), bytearray()
        self._disposition = b""
        self._current: Arrived | None = None

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header,
            "on_headers_finished": self._open,
            "on_part_data": self._data,
            "on_part_end": self.close,
            "on_end": self._finish,
        }

    def close(self) -> None:
        if self._current is not None:
            self._current.close()
            self._current = None
        self._text = None

    def _begin(self) -> None:
        self._disposition = b""

    def _header(self) -> None:
        if bytes(self._name).lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def _open(self) -> None:
        _, options = parse_options_header(self._disposition)
        if options.get(b"name") not in (FORM_FIELD, VALUES_FIELD):
            raise Refusal(422, "invalid_request")
        if options[b"name"] == VALUES_FIELD:
            self._begin_values()
            return
        if len(self.files) >= self._limits.files:
            raise Refusal(413, "too_many_files")
        self._current = Arrived(self._stack.enter_context(self._folders()), self._volumes)
        self._current.open()
        self.files.append(self._current)

    def _begin_values(self) -> None:
        if len(self.values) >= self._limits.files:
            raise Refusal(413, "too_many_files")
        self._text = bytearray()
        self.values.append(self._text)

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._text is not None:
            self._text.extend(data[start:end])
            if len(self._text) > MOST_VALUE_BYTES:
                raise Refusal(413, "request_too_large")
        if self._current is not None:
            self._current.write(data[start:end], self._limits.file_mb * MIB)

    def _finish(self) -> None:
        self.complete = True
