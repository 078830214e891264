"""Archives for tests that fail on purpose: DICOMweb over HTTP, and the classic protocol. Everything is on loopback.

Both hold the same images (`make_image`): examination N has the accession number `ACC-N` and one image of patient `MRN-N`. A fault is set
for one examination and taken away again, as an archive is repaired.
"""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import UID, AllTransferSyntaxes, ExplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    DigitalXRayImageStorageForPresentation,
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)

from pneumofed.common.ops.processes import free_port
from tests.dicom_factory import dicom_bytes, draw_radiograph

BOUNDARY = b"0a1b2c"
LEVELS = ("STUDY", "SERIES", "IMAGE")


def make_image(number: int, syntax: str = ExplicitVRLittleEndian, **tags: Any) -> bytes:
    """The DICOM file of examination `number`."""
    values = {
        "PatientID": f"MRN-{number}",
        "PatientName": f"Archived^Person{number}",
        "AccessionNumber": f"ACC-{number}",
        "StudyInstanceUID": f"1.2.826.99.{number}",
        "SeriesInstanceUID": f"1.2.826.99.{number}.1",
        "SOPInstanceUID": f"1.2.826.99.{number}.1.1",
        "SOPClassUID": DigitalXRayImageStorageForPresentation,
        "BodyPartExamined": "CHEST",
        "ViewPosition": "PA",
        **tags,
    }
    return dicom_bytes(draw_radiograph() + np.uint16(number), syntax=UID(syntax), BitsStored=13, **values)


@dataclass(frozen=True)
class Reply:
    """An HTTP answer; `declared` is its Content-Length where that is to be wrong."""

    status: int = 200
    body: bytes = b""
    media_type: str = "application/octet-stream"
    headers: Mapping[str, str] = field(default_factory=dict)
    declared: int | None = None


Fault = Callable[[bytes, str], Reply]
"""Makes the answer of the good one's body (an image, or matches as JSON) and the request's Accept field."""


def multipart(image: bytes, ending: bytes = b"\r\n", before: bytes = b"", close: bool = True) -> bytes:
    """A multipart message of one part (RFC 2046, 5.1.1)."""
    head = before + b"--" + BOUNDARY + ending + b"Content-Type: application/dicom" + ending * 2
    return head + image + (ending + b"--" + BOUNDARY + b"--" + ending if close else b"")


def deliver(image: bytes, accept: str = "", body: bytes | None = None, **changes: Any) -> Reply:
    """The good answer to a retrieval."""
    media_type = f'multipart/related; type="application/dicom"; boundary={BOUNDARY.decode()}'
    return Reply(**{"body": multipart(image) if body is None else body, "media_type": media_type, **changes})


@dataclass
class WebArchive:
    """What the server has and does. Faults are by examination, or by (level, examination) for searches; a level's own has None."""

    images: dict[int, bytes]
    fetch_faults: dict[int, Fault] = field(default_factory=dict)
    search_faults: dict[tuple[str, int | None], Fault] = field(default_factory=dict)
    no_match: Reply = field(default_factory=lambda: Reply(204))
    behind_the_end: Reply = field(default_factory=lambda: Reply(204))
    page: int = 100
    fetched: Counter[int] = field(default_factory=Counter)
    port: int = 0

    @property
    def url(self) -> str:
        """Address of the DICOMweb service."""
        return f"http://127.0.0.1:{self.port}/dicom-web"

    def answer(self, target: str, accept: str) -> Reply:
        """The answer to GET of `target`."""
        parts = urlsplit(target)
        query = dict(parse_qsl(parts.query))
        path = parts.path.removeprefix("/dicom-web")
        number = int(match[1]) if (match := re.match(r"/studies/1\.2\.826\.99\.(\d+)", path)) else None
        if path.count("/") == 6:
            assert number is not None
            self.fetched[number] += 1
            if number not in self.images:
                return Reply(404)
            return self.fetch_faults.get(number, deliver)(self.images[number], accept)
        level = LEVELS[path.count("/") // 2]
        return self._search(level, number, query, accept)

    def _search(self, level: str, number: int | None, query: Mapping[str, str], accept: str) -> Reply:
        numbers = sorted(self.images) if number is None else [number] * (number in self.images)
        matches = []
        for each in numbers:
            tags = dcmread(BytesIO(self.images[each]), stop_before_pixels=True)
            if all(
                str(tags.get(key, wanted)) == wanted
                for key, wanted in query.items()
                if key in ("AccessionNumber", "StudyInstanceUID")
            ):
                matches.append((each, tags))
        offset = int(query.get("offset", 0))
        if not matches:
            return self.no_match
        if offset >= len(matches):
            return self.behind_the_end
        shown = matches[offset : min(offset + self.page, offset + int(query.get("limit", self.page)))]
        body = json.dumps([_as_json(tags, level) for _, tags in shown]).encode()
        good: Fault = lambda body, accept: Reply(body=body, media_type="application/dicom+json")  # noqa: E731
        fault = self.search_faults.get((level, None)) or self.search_faults.get((level, shown[0][0]), good)
        return fault(body, accept)


def _as_json(tags: Dataset, level: str) -> dict[str, Any]:
    wanted = {
        "STUDY": ("StudyInstanceUID", "AccessionNumber"),
        "SERIES": ("SeriesInstanceUID", "Modality", "BodyPartExamined"),
        "IMAGE": ("SOPInstanceUID",),
    }[level]
    return {f"{tags[key].tag:08X}": {"vr": tags[key].VR, "Value": [str(tags[key].value)]} for key in wanted if key in tags}


@contextmanager
def run_web(images: Mapping[int, bytes]) -> Iterator[WebArchive]:
    """A DICOMweb service with `images`, by examination."""
    archive = WebArchive(dict(images))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            reply = archive.answer(self.path, self.headers.get("Accept", ""))
            self.send_response(reply.status)
            if reply.body or reply.status not in (202, 204):
                self.send_header("Content-Type", reply.media_type)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply.body) if reply.declared is None else reply.declared))
            self.end_headers()
            self.wfile.write(reply.body)
            self.close_connection = reply.declared is not None

        def log_message(self, *arguments: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    archive.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield archive
    finally:
        server.shutdown()
        server.server_close()


@dataclass
class DimseFaults:
    """What the classic archive has and does; a fault is a status, or a word of `_get` and `_find`."""

    images: dict[int, bytes]
    move_port: int
    get_faults: dict[int, int | str] = field(default_factory=dict)
    find_faults: dict[tuple[str, int], int | str] = field(default_factory=dict)
    fetched: Counter[int] = field(default_factory=Counter)
    port: int = 0

    def find(self, event: Any) -> Iterator[tuple[int, Dataset | None]]:
        """Answers C-FIND."""
        asked = event.identifier
        level = asked.QueryRetrieveLevel
        for number, data in sorted(self.images.items()):
            tags = dcmread(BytesIO(data), stop_before_pixels=True)
            keys = ("AccessionNumber", "StudyInstanceUID", "SeriesInstanceUID")
            if any(asked.get(key) and asked.get(key) != tags.get(key) for key in keys):
                continue
            fault = self.find_faults.get((level, number))
            if fault == "abort":
                event.assoc.abort()
                return
            if isinstance(fault, int):
                yield fault, None
                return
            answer = Dataset()
            answer.QueryRetrieveLevel = level
            for element in asked:
                if element.keyword in tags and element.keyword != fault:
                    answer[element.keyword] = tags[element.keyword]
            yield 0xFF00, answer

    def retrieve(self, event: Any) -> Iterator[Any]:
        """Answers C-GET, and C-MOVE after the destination."""
        number = int(str(event.identifier.StudyInstanceUID).rpartition(".")[2])
        self.fetched[number] += 1
        fault = self.get_faults.get(number)
        if fault == "abort":
            event.assoc.abort()
            return
        yield 1
        if isinstance(fault, int):
            yield fault, None
            return
        tags = dcmread(BytesIO(self.images[number]))
        if fault == "another image":
            tags = dcmread(BytesIO(make_image(number, SOPInstanceUID="1.2.826.98.7")))
        if fault == "syntax":
            tags.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.4.102")  # MPEG-4, which no site offers for radiographs
        yield 0xFF00, tags

    def move(self, event: Any) -> Iterator[Any]:
        """Answers C-MOVE."""
        yield "127.0.0.1", self.move_port
        yield from self.retrieve(event)


@contextmanager
def run_dimse(images: Mapping[int, bytes]) -> Iterator[DimseFaults]:
    """An archive of the classic protocol with `images`, by examination; its AE title is ARCHIVE."""
    faults = DimseFaults(dict(images), free_port())
    entity = AE(ae_title="ARCHIVE")
    for model in (
        StudyRootQueryRetrieveInformationModelFind,
        StudyRootQueryRetrieveInformationModelGet,
        StudyRootQueryRetrieveInformationModelMove,
    ):
        entity.add_supported_context(model)
    entity.add_supported_context(DigitalXRayImageStorageForPresentation, AllTransferSyntaxes[:30], scu_role=True, scp_role=True)
    entity.add_requested_context(DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian)
    handlers: list[Any] = [(evt.EVT_C_FIND, faults.find), (evt.EVT_C_GET, faults.retrieve), (evt.EVT_C_MOVE, faults.move)]
    server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
    assert server is not None
    faults.port = server.server_address[1]
    try:
        yield faults
    finally:
        server.shutdown()
