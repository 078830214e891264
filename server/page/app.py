"""The page's HTTP interface: JSON below `/api`, the page itself, and who may do what.

GET  /health                      that it answers; for anybody
POST /api/login  /api/logout      a token for a session, and its end
GET  /api/me                      who looks
GET  /api/runs  /api/runs/{name}  runs, and one in full
GET  /api/sites  /api/events      sites now, and the activity log
POST /api/runs/{name}/stop        the coordinator's token alone
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from common.errors import ConfigError, PneumofedError
from common.web.headers import CSRF_HEADER, is_foreign, security_headers
from server.overview import Overview
from server.page import schema
from server.page.access import SESSION_SEC, Access, Visitor
from server.page.site_view import view_sites
from server.page.views import view_line, view_run, without_paths
from server.registry.models import Run
from server.registry.registry import RUN_NAME, Registry
from server.runs import Runs

ASSETS = Path(__file__).parent / "assets"
FILES = {"style.css": "text/css", "app.js": "text/javascript", "charts.js": "text/javascript", "icon.svg": "image/svg+xml"}
COOKIE = "pneumofed_session"
MAX_BODY = 4096
WRONG_TOKEN_SEC = 0.5
HEADERS = security_headers()


@dataclass
class Page:
    """What the routes work with. `overview` is the last look at processes and sites, taken by `server.page.watch`."""

    runs: Runs
    access: Access
    overview: Overview | None = None

    @property
    def registry(self) -> Registry:
        return self.runs.registry


def create_app(page: Page, hosts: Sequence[str] = ("127.0.0.1", "localhost")) -> FastAPI:
    """The application. It answers under the names in `hosts` alone, so that no foreign name can be pointed at it."""
    app = FastAPI(title="pneumofed coordinator", docs_url=None, redoc_url=None, openapi_url="/api/openapi.json")
    app.state.page = page
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    app.middleware("http")(_guard)
    app.add_exception_handler(PneumofedError, _tell)
    for add in (_add_page, _add_session, _add_reading, _add_stopping):
        add(app)
    return app


def current_visitor(request: Request) -> Visitor:
    """Who asks, by bearer token or session; 401 for anybody else."""
    access: Access = request.app.state.page.access
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    found = access.by_token(token.strip()) if scheme.lower() == "bearer" else access.by_session(request.cookies.get(COOKIE, ""))
    if found is None:
        raise HTTPException(401, "show a token", {"WWW-Authenticate": "Bearer"})
    return found


def current_page(request: Request) -> Page:
    found: Page = request.app.state.page
    return found


VisitorNow = Annotated[Visitor, Depends(current_visitor)]
PageNow = Annotated[Page, Depends(current_page)]


async def _guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Refuses large bodies and changes asked for by foreign pages, and puts the headers on every answer."""
    refusal = _refuse(request) if request.method not in ("GET", "HEAD") else None
    response = refusal or await call_next(request)
    response.headers.update({name: value for name, value in HEADERS.items() if name not in response.headers})
    return response


def _refuse(request: Request) -> Response | None:
    length = request.headers.get("content-length", "")
    if "transfer-encoding" in request.headers or not (length or "0").isdigit() or int(length or "0") > MAX_BODY:
        return JSONResponse({"detail": f"a body has {MAX_BODY} bytes at most, and says how many"}, 413)
    if is_foreign(request.headers):
        return JSONResponse({"detail": "asked for by another page"}, 403)
    return None


async def _tell(_: Request, error: Exception) -> Response:
    """Our own errors as a sentence. Only the coordinator's routes raise them."""
    return JSONResponse({"detail": str(error)}, 404 if isinstance(error, ConfigError) else 502)


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    def index() -> FileResponse:
        return FileResponse(ASSETS / "index.html", media_type="text/html")

    @app.get("/assets/{name}", include_in_schema=False)
    def asset(name: str) -> FileResponse:
        if name not in FILES:
            raise HTTPException(404, "no such file")
        return FileResponse(ASSETS / name, media_type=FILES[name], headers={"Cache-Control": "no-cache"})

    @app.get("/health")
    def health() -> schema.Health:
        return schema.Health()


def _add_session(app: FastAPI) -> None:
    @app.post("/api/login")
    async def login(body: schema.Login, request: Request, response: Response, page: PageNow) -> schema.Me:
        identifier = page.access.open_session(body.token.strip())
        visitor = page.access.by_session(identifier) if identifier else None
        if identifier is None or visitor is None:
            await asyncio.sleep(WRONG_TOKEN_SEC)
            raise HTTPException(401, "nobody has this token")
        secure = request.url.scheme == "https"
        response.set_cookie(COOKIE, identifier, max_age=int(SESSION_SEC), httponly=True, samesite="strict", secure=secure)
        return _me(visitor)

    @app.post("/api/logout", status_code=204)
    def logout(request: Request, response: Response, visitor: VisitorNow, page: PageNow) -> None:
        _check_csrf(request, visitor)
        page.access.close_session(request.cookies.get(COOKIE, ""))
        response.delete_cookie(COOKIE)

    @app.get("/api/me")
    def me(visitor: VisitorNow) -> schema.Me:
        return _me(visitor)


def _add_reading(app: FastAPI) -> None:
    @app.get("/api/runs")
    def runs(visitor: VisitorNow, page: PageNow) -> list[schema.RunLine]:
        return [view_line(run, _full(visitor)) for run in page.registry.runs()]

    @app.get("/api/runs/{name}")
    def run(name: str, visitor: VisitorNow, page: PageNow) -> schema.RunDetail:
        return view_run(_find(page, name), _full(visitor))

    @app.get("/api/sites")
    def sites(visitor: VisitorNow, page: PageNow) -> schema.Sites:
        return view_sites(page.registry, page.overview, _full(visitor))

    @app.get("/api/events")
    def events(
        visitor: VisitorNow,
        page: PageNow,
        run: str | None = None,
        after: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 200,
    ) -> list[schema.EventLine]:
        if run is not None:
            _find(page, run)
        keys = ("id", "time", "run", "round", "site", "kind")
        return [
            schema.EventLine(**{key: getattr(event, key) for key in keys}, text=_shown(event.text, visitor))
            for event in page.registry.events(run, after, limit)
        ]


def _add_stopping(app: FastAPI) -> None:
    @app.post("/api/runs/{name}/stop")
    def stop(name: str, request: Request, visitor: VisitorNow, page: PageNow) -> schema.RunLine:
        if visitor.role != "coordinator":
            raise HTTPException(403, "an auditor can read and nothing else")
        _check_csrf(request, visitor)
        _find(page, name)
        return view_line(page.runs.stop(name, "the coordinator on the live page"), full=True)


def _check_csrf(request: Request, visitor: Visitor) -> None:
    if visitor.csrf is not None and not hmac.compare_digest(request.headers.get(CSRF_HEADER, "").encode(), visitor.csrf.encode()):
        raise HTTPException(403, "the session's CSRF token is missing; load the page again")


def _find(page: Page, name: str) -> Run:
    found = page.registry.find_run(name) if RUN_NAME.fullmatch(name) else None
    if found is None:
        raise HTTPException(404, "no such run")
    return found


def _full(visitor: Visitor) -> bool:
    return visitor.role == "coordinator"


def _shown(text: str, visitor: Visitor) -> str:
    return text if _full(visitor) else without_paths(text)


def _me(visitor: Visitor) -> schema.Me:
    return schema.Me(name=visitor.name, role=visitor.role, csrf=visitor.csrf)
