"""The room's web application: routes, their description, the page's files, and what every request passes."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from client.reading_room import routes_cases, routes_pictures, routes_programs, routes_session
from client.reading_room.guard import Guard
from client.reading_room.problems import RESPONSES, Refusal, add_problem_handlers
from client.reading_room.room import Room, delete_old_cases

logger = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
TYPES = {
    "html": "text/html",
    "css": "text/css",
    "js": "text/javascript",
    "svg": "image/svg+xml",
    "png": "image/png",
    "woff2": "font/woff2",
    "json": "application/json",
}
CLEAN_EVERY_SEC = 6 * 3600.0


def create_room_app(room: Room, hosts: Sequence[str] = ("127.0.0.1", "localhost")) -> FastAPI:
    """The application. It answers under the names in `hosts` alone, so that no foreign name can be pointed at it."""
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
    for routes in (routes_session, routes_cases, routes_pictures, routes_programs):
        app.include_router(routes.router)
    _add_page(app)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    app.add_middleware(Guard, measures=room.measures)
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
        await asyncio.gather(*tasks, return_exceptions=True)


async def _clean_now_and_then(room: Room) -> None:
    while True:
        try:
            done = await asyncio.to_thread(delete_old_cases, room.cases, room.store, room.settings.retention_days)
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
    kind = TYPES.get(name.rpartition(".")[2])
    path = STATIC / name
    if kind is None or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or not path.is_file():
        raise Refusal(404, "not_found")
    return FileResponse(path, media_type=kind, headers={"Cache-Control": "no-cache"})
