"""Answers of a DICOMweb service, read as archives and the gateways before them send them (DICOM PS3.18, 8.6 and 8.7; RFC 2046, 5.1).

read_matches    what a search found: JSON, with a byte order mark or without
read_instance      the one DICOM file of a retrieval: in a multipart message, or bare

An answer that is no DICOM at all (a login page, an error message with status 200, an empty or cut message) is a failed request and says
nothing about the image.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from email.message import Message
from typing import Any

import httpx
from pydicom.datadict import keyword_for_tag

from pneumofed.client.archive.query import Answer, RequestError, TransientRequestError

_BLANK_LINE = re.compile(rb"\r?\n\r?\n")
_LENGTH = re.compile(rb"^content-length:[ \t]*(\d{1,12})[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
_FIRST_TAGS = (b"\x02\x00\x00\x00", b"\x08\x00")
"""How a DICOM file without preamble begins: group 0002 (PS3.10, 7.1) or 0008, little endian."""


def read_matches(response: httpx.Response) -> list[Answer]:
    """Reads the matches of a search: texts of a JSON array of DICOM data sets (PS3.18, F.2).

    Raises:
        RequestError: the answer is something else.
    """
    if not response.content.strip():
        return []
    try:
        content = json.loads(response.content.decode(json.detect_encoding(response.content), errors="replace"))
    except (ValueError, RecursionError):
        raise _no_dicom(response, "the matches of a search as JSON") from None
    matches = [content] if isinstance(content, dict) else content  # some services send a single match bare
    if not isinstance(matches, list) or not all(_is_dataset(match) for match in matches):
        raise _no_dicom(response, "the matches of a search as JSON")
    return [_read_texts(match) for match in matches]


def read_instance(response: httpx.Response) -> bytes:
    """Reads the DICOM file of an answer; of several, the first.

    Raises:
        TransientRequestError: the answer was cut off on its way.
        RequestError: there is no DICOM file in it.
    """
    body = response.content
    header = Message()
    header["Content-Type"] = response.headers.get("Content-Type", "")
    boundary = header.get_boundary()
    if boundary is None and body.startswith(b"--"):
        boundary = body[2 : max(body.find(b"\n"), 2)].strip().decode("latin-1")
    parts = [body] if _is_dicom(body) or not boundary else _read_parts(body, boundary.encode("latin-1", "replace"))
    if parts is None:
        raise TransientRequestError(f"the archive {_host(response)} sent an image that was cut off on its way")
    images = [part for part in parts if _is_dicom(part)]
    if not images:
        raise _no_dicom(response, "an image")
    return images[0]


def describe_body(response: httpx.Response) -> str:
    """Says what kind of thing came; never any of its content."""
    start = response.content[:512].removeprefix(b"\xef\xbb\xbf").strip().lower()
    media_type = re.match(r"[a-z0-9.+-]{1,40}/[a-z0-9.+-]{1,40}", response.headers.get("Content-Type", "").strip().lower())
    if not start:
        return "an empty answer"
    if start.startswith((b"<!doctype html", b"<html")) or (media_type and media_type[0] == "text/html"):
        return "a web page (HTML)"
    if start.startswith((b"{", b"[")):
        return "a JSON message that holds no DICOM"
    if start.startswith(b"--"):
        return "a multipart message without DICOM"
    return f"content of the type {media_type[0] if media_type else 'unknown'}"


def _host(response: httpx.Response) -> str:
    return response.url.netloc.decode("ascii", "replace")


def _no_dicom(response: httpx.Response, wanted: str) -> RequestError:
    hint = "its own log says why"
    if describe_body(response).startswith("a web page"):
        hint = "it may be the login page of a gateway: check user, password or token, and the address"
    return RequestError(
        f"the archive {_host(response)} answered with {describe_body(response)} (HTTP {response.status_code}) where {wanted} was "
        f"expected; {hint}"
    )


def _is_dicom(data: bytes) -> bool:
    return data[128:132] == b"DICM" or data.startswith(_FIRST_TAGS)


def _read_parts(body: bytes, boundary: bytes) -> list[bytes] | None:
    """Splits a multipart message; None where it ends within a part.

    What stands before the first boundary and behind the last does not count; lines may end with a bare LF. A last part without a closing
    boundary is whole if it has the length that its header declares.
    """
    marker = b"--" + boundary
    begin = 0 if body.startswith(marker) else body.find(b"\n" + marker) + 1
    if not body.startswith(marker, begin):
        return [] if not body.strip() else None
    parts: list[bytes] = []
    while True:
        line_end = body.find(b"\n", begin)
        if line_end < 0 or body.startswith(b"--", begin + len(marker)):
            return parts
        ending = b"\r\n" if body[line_end - 1 : line_end] == b"\r" else b"\n"
        blank = _BLANK_LINE.search(body, line_end + 1 - len(ending))
        if blank is None:
            return parts or None
        content = blank.end()
        stop = _find_end(body, content, _LENGTH.search(body, line_end, content), ending, marker)
        if stop is None:
            return None
        parts.append(body[content:stop])
        begin = body.find(marker, stop)
        if begin < 0:
            return parts


def _find_end(body: bytes, content: int, length: re.Match[bytes] | None, ending: bytes, marker: bytes) -> int | None:
    """Where the part that begins at `content` ends: at its declared length if a boundary or nothing follows there, else at the next
    boundary; None if it is cut."""
    if length is not None:
        stop = content + int(length[1])
        rest = body[stop : stop + len(marker) + 2]
        if stop <= len(body) and (not rest.strip() or rest.lstrip(b"\r\n").startswith(marker)):
            return stop
    stop = body.find(ending + marker, content)
    if stop < 0:
        stop = body.find(b"\n" + marker, content)
    return stop if stop >= 0 else None


def _is_dataset(match: Any) -> bool:
    """Whether `match` is an object whose members are named by tags, `GGGGEEEE` (PS3.18, F.2.2)."""
    return isinstance(match, Mapping) and all(re.fullmatch("[0-9A-Fa-f]{8}", str(tag)) for tag in match)


def _read_texts(match: Mapping[str, Any]) -> Answer:
    """Texts of a DICOM JSON object (PS3.18, F.2.2): `{"00080050": {"vr": "SH", "Value": ["A7"]}}`."""
    answer: dict[str, str] = {}
    for tag, element in match.items():
        values = element.get("Value") if isinstance(element, Mapping) else None
        if isinstance(values, list) and values and isinstance(values[0], str | int | float):
            answer[keyword_for_tag(int(tag, 16)) or tag] = str(values[0]).strip(" \0")
    return answer
