"""The room's web application, and the guard around it.

`create_room_app` joins the routes, their description and the page's files. `Guard` is what every request passes: it limits the body,
refuses requests of foreign pages, adds headers to the answer, and makes errors that show nothing.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import traceback
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pneumofed.common.files import is_disk_full
from pneumofed.common.ops.web import is_foreign, security_headers
from pneumofed.inference.reading_room import routes, routes_images, routes_programs
from pneumofed.inference.reading_room.errors import RESPONSES, Refusal, add_problem_handlers, error_response
from pneumofed.inference.reading_room.room import Room, delete_old_cases
from pneumofed.inference.reading_room.watching import RoomMetrics

logger = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
MEDIA_TYPES = {
    "html": "text/html",
    "css": "text/css",
    "js": "text/javascript",
    "svg": "image/svg+xml",
    "png": "image/png",
    "woff2": "font/woff2",
    "json": "application/json",
}
CLEAN_EVERY_SEC = 6 * 3600.0

MAX_BODY_BYTES = 16_384
"""Of a request that is no upload."""
UPLOAD_PATHS = frozenset({"/api/cases", "/api/predict", "/api/explain"})
"""They count for themselves while their bodies come."""
HTTP_METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "PUT", "PATCH", "OPTIONS"})
PAGE_HEADERS = security_headers({"img-src": "'self' blob: data:", "font-src": "'self'", "manifest-src": "'self'"})


def create_room_app(room: Room, hosts: Sequence[str] = ("127.0.0.1", "localhost")) -> FastAPI:
    """Builds the application, which answers only under the names in `hosts`, so that no foreign name can be pointed at it.

    Args:
        room: open; its workers start with the application.
        hosts: names and addresses without a port, as they stand in the header Host.
    """
    app = FastAPI(
        title="pneumofed reading room",
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/openapi.json",
        responses=RESPONSES,
        lifespan=_lifespan,
    )
    app.state.room = room
    add_problem_handlers(app)
    for router in (routes.session_routes, routes.case_routes, routes_images.image_routes, routes_programs.program_routes):
        app.include_router(router)
    _add_page(app)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    app.add_middleware(Guard, metrics=room.metrics)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Workers start, and old cases go, while the room is open."""
    room: Room = app.state.room
    tasks = [asyncio.create_task(room.workers.start()), asyncio.create_task(_clean_now_and_then(room))]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.to_thread(room.workers.close)  # else a worker that still starts holds the end up
        await asyncio.gather(*tasks, return_exceptions=True)


def _record_removed(room: Room, case: str) -> None:
    room.record("", "case-removed", case=case)


async def _clean_now_and_then(room: Room) -> None:
    while True:
        try:
            done = await asyncio.to_thread(
                delete_old_cases, room.cases, room.store, room.settings.retention_days, partial(_record_removed, room)
            )
            if done.cases:
                await asyncio.to_thread(room.record, "", "cleaned", cases=done.cases)
        except Exception as error:  # a task that died would keep patients' images for ever
            logger.error("old cases could not be deleted: %s", type(error).__name__)
        await asyncio.sleep(CLEAN_EVERY_SEC)


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    def index() -> FileResponse:
        return _file("index.html")

    @app.get("/static/{name}", include_in_schema=False)
    def static(name: str) -> FileResponse:
        return _file(name)


def _file(name: str) -> FileResponse:
    """A file of the page. Its name is a plain one, so it leads nowhere else."""
    kind = MEDIA_TYPES.get(name.rpartition(".")[2])
    path = STATIC / name
    if kind is None or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or not path.is_file():
        raise Refusal(404, "not_found")
    return FileResponse(path, media_type=kind, headers={"Cache-Control": "no-cache"})


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, metrics: RoomMetrics) -> None:
        self._app, self._metrics = app, metrics

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
                _add(MutableHeaders(scope=message), PAGE_HEADERS)
                self._metrics.request(*_template(scope), status, time.perf_counter() - started)
            await send(message)

        refusal = _refusal(scope)
        try:
            await (refusal or self._app)(scope, receive, guarded)
        except ClientDisconnect:  # nobody is there to answer
            return
        except Exception as error:  # whatever a route raises that nobody foresaw
            _log(error)
            if status == 0:
                problem = error_response(507, "disk_full") if is_disk_full(error) else error_response(500, "internal")
                await problem(scope, receive, guarded)


def _refusal(scope: Scope) -> ASGIApp | None:
    if scope["method"] in ("GET", "HEAD"):
        return None
    headers = Headers(scope=scope)
    if is_foreign(headers):
        return error_response(403, "foreign_page")
    length = headers.get("content-length", "0")
    if scope["path"] in UPLOAD_PATHS:
        return None
    if "transfer-encoding" in headers or not length.isdecimal() or int(length[:20]) > MAX_BODY_BYTES:
        return error_response(413, "request_too_large")
    return None


def _add(headers: MutableHeaders, more: Mapping[str, str]) -> None:
    for name, value in more.items():
        headers.setdefault(name, value)


def _template(scope: Scope) -> tuple[str, str]:
    """(method, route without its parameters). Unknown ones have one name each, so that nobody can fill the memory with them."""
    route = getattr(scope.get("route"), "path", "unknown")
    return scope["method"] if scope["method"] in HTTP_METHODS else "other", route


def _log(error: Exception) -> None:
    """Class and place of an error. Its text may quote what a request or a file held."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in reversed(frames))
    logger.error("a request failed: %s at %s", type(error).__name__, places)
