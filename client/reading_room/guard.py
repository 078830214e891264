"""What every request passes: limits of its body, the refusal of foreign pages, headers of the answer, and errors that tell nothing."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from client.reading_room.measures import Measures
from client.reading_room.problems import error_response
from common.web.headers import is_foreign, security_headers

logger = logging.getLogger(__name__)

MAX_BODY = 16_384
"""Of a request that is no upload."""
UPLOADS = frozenset({"/api/cases", "/api/predict", "/api/explain"})
"""They count for themselves while their bodies come."""
METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "PUT", "PATCH", "OPTIONS"})
HEADERS = security_headers({"img-src": "'self' blob: data:", "font-src": "'self'", "manifest-src": "'self'"})


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, measures: Measures) -> None:
        self._app, self._measures = app, measures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _add(MutableHeaders(scope=message), HEADERS)
                self._measures.request(*_template(scope), status, time.perf_counter() - started)
            await send(message)

        refusal = _refusal(scope)
        try:
            await (refusal or self._app)(scope, receive, guarded)
        except ClientDisconnect:  # nobody is there to be told
            return
        except Exception as error:  # whatever a route raises that nobody foresaw
            _log(error)
            if status == 0:
                await error_response(500, "internal")(scope, receive, guarded)


def _refusal(scope: Scope) -> ASGIApp | None:
    if scope["method"] in ("GET", "HEAD"):
        return None
    headers = Headers(scope=scope)
    if is_foreign(headers):
        return error_response(403, "foreign_page")
    length = headers.get("content-length", "0")
    if scope["path"] in UPLOADS:
        return None
    if "transfer-encoding" in headers or not length.isdecimal() or int(length[:20]) > MAX_BODY:
        return error_response(413, "request_too_large")
    return None


def _add(headers: MutableHeaders, more: Mapping[str, str]) -> None:
    for name, value in more.items():
        headers.setdefault(name, value)


def _template(scope: Scope) -> tuple[str, str]:
    """(method, route without its parameters). Unknown ones have one name each, so that nobody can fill the memory with them."""
    route = getattr(scope.get("route"), "path", "unknown")
    return scope["method"] if scope["method"] in METHODS else "other", route


def _log(error: Exception) -> None:
    """Class and place of an error. Its text may quote what a request or a file held."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in reversed(frames))
    logger.error("a request failed: %s at %s", type(error).__name__, places)
