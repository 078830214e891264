"""The page's HTTP interface: JSON below `/api`, the page itself, and who may do what.

GET  /health                      that it answers; for anybody
POST /api/login  /api/logout      a token for a session, and its end
GET  /api/me                      who looks
GET  /api/runs  /api/runs/{name}  runs, and one in full
GET  /api/sites  /api/events      sites now (`view_sites`), and the activity log
GET  /metrics                     counts and times for Prometheus
POST /api/runs/{name}/stop        only with the coordinator's token

`create_dashboard` builds the application. What it shows of runs is made in `server.dashboard.views`.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from pneumofed.common.errors import ConfigError, PneumofedError
from pneumofed.common.ops.web import CSRF_HEADER, is_foreign, security_headers
from pneumofed.server.dashboard import views
from pneumofed.server.dashboard.access import SESSION_SEC, Access, Visitor
from pneumofed.server.dashboard.prometheus import CoordinatorMetrics
from pneumofed.server.dashboard.views import run_line, view_run, without_paths
from pneumofed.server.operations.overview import Overview, build_links, site_states
from pneumofed.server.runs.events import EVENTS_FILE, read_activity
from pneumofed.server.runs.registry import RUN_NAME, Registry
from pneumofed.server.runs.runs import Runs
from pneumofed.server.runs.tables import RunRow

ASSETS_FOLDER = Path(__file__).parent / "assets"
ASSET_TYPES = {"style.css": "text/css", "app.js": "text/javascript", "charts.js": "text/javascript", "icon.svg": "image/svg+xml"}
SESSION_COOKIE = "pneumofed_session"
MAX_BODY_BYTES = 4096
WRONG_TOKEN_SEC = 0.5
SECURITY_HEADERS = security_headers()


@dataclass
class Dashboard:
    """What the routes work with. `overview` is the last look at processes and sites, taken by `server.dashboard.serve`."""

    runs: Runs
    access: Access
    overview: Overview | None = None

    @property
    def registry(self) -> Registry:
        return self.runs.registry


def create_dashboard(page: Dashboard, hosts: Sequence[str] = ("127.0.0.1", "localhost")) -> FastAPI:
    """Builds the application.

    Args:
        page: what the routes work with.
        hosts: the names that it answers under, so that no foreign name can be pointed at it.
    """
    app = FastAPI(title="pneumofed coordinator", docs_url=None, redoc_url=None, openapi_url="/api/openapi.json")
    app.state.page = page
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    app.middleware("http")(_guard)
    app.add_exception_handler(PneumofedError, _error_response)
    for add in (_add_page, _add_session, _add_reading, _add_metrics, _add_stopping):
        add(app)
    return app


def current_visitor(request: Request) -> Visitor:
    """Finds who asks, by bearer token or session; 401 for anybody else."""
    access: Access = request.app.state.page.access
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    found = (
        access.by_token(token.strip())
        if scheme.lower() == "bearer"
        else access.by_session(request.cookies.get(SESSION_COOKIE, ""))
    )
    if found is None:
        raise HTTPException(401, "show a token", {"WWW-Authenticate": "Bearer"})
    return found


def current_page(request: Request) -> Dashboard:
    """Finds what the routes work with."""
    found: Dashboard = request.app.state.page
    return found


VisitorNow = Annotated[Visitor, Depends(current_visitor)]
PageNow = Annotated[Dashboard, Depends(current_page)]


async def _guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Refuses large bodies and changes asked for by foreign pages, and puts the headers on every answer."""
    refusal = _refuse(request) if request.method not in ("GET", "HEAD") else None
    response = refusal or await call_next(request)
    response.headers.update({name: value for name, value in SECURITY_HEADERS.items() if name not in response.headers})
    return response


def _refuse(request: Request) -> Response | None:
    length = request.headers.get("content-length", "")
    if "transfer-encoding" in request.headers or not (length or "0").isdigit() or int(length or "0") > MAX_BODY_BYTES:
        return JSONResponse({"detail": f"a body has {MAX_BODY_BYTES} bytes at most, and says how many"}, 413)
    if is_foreign(request.headers):
        return JSONResponse({"detail": "asked for by another page"}, 403)
    return None


async def _error_response(_: Request, error: Exception) -> Response:
    """Answers our own errors as a sentence. Only the coordinator's routes raise them."""
    return JSONResponse({"detail": str(error)}, 404 if isinstance(error, ConfigError) else 502)


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    def index() -> FileResponse:
        return FileResponse(ASSETS_FOLDER / "index.html", media_type="text/html")

    @app.get("/assets/{name}", include_in_schema=False)
    def asset(name: str) -> FileResponse:
        if name not in ASSET_TYPES:
            raise HTTPException(404, "no such file")
        return FileResponse(ASSETS_FOLDER / name, media_type=ASSET_TYPES[name], headers={"Cache-Control": "no-cache"})

    @app.get("/health")
    def health() -> views.PageHealth:
        return views.PageHealth()


def _add_session(app: FastAPI) -> None:
    @app.post("/api/login")
    async def login(body: views.TokenLogin, request: Request, response: Response, page: PageNow) -> views.Viewer:
        identifier = page.access.open_session(body.token.strip())
        visitor = page.access.by_session(identifier) if identifier else None
        if identifier is None or visitor is None:
            await asyncio.sleep(WRONG_TOKEN_SEC)
            raise HTTPException(401, "nobody has this token")
        secure = request.url.scheme == "https"
        response.set_cookie(SESSION_COOKIE, identifier, max_age=int(SESSION_SEC), httponly=True, samesite="strict", secure=secure)
        return _me(visitor)

    @app.post("/api/logout", status_code=204)
    def logout(request: Request, response: Response, visitor: VisitorNow, page: PageNow) -> None:
        _check_csrf(request, visitor)
        page.access.close_session(request.cookies.get(SESSION_COOKIE, ""))
        response.delete_cookie(SESSION_COOKIE)

    @app.get("/api/me")
    def me(visitor: VisitorNow) -> views.Viewer:
        return _me(visitor)


def _add_reading(app: FastAPI) -> None:
    @app.get("/api/runs")
    def runs(visitor: VisitorNow, page: PageNow) -> list[views.RunLine]:
        return [run_line(run, _full(visitor)) for run in page.registry.runs()]

    @app.get("/api/runs/{name}")
    def run(name: str, visitor: VisitorNow, page: PageNow) -> views.RunDetail:
        return view_run(_find(page, name), _full(visitor))

    @app.get("/api/sites")
    def sites(visitor: VisitorNow, page: PageNow) -> views.Sites:
        return view_sites(page.registry, page.overview, _full(visitor))

    @app.get("/api/events")
    def events(
        visitor: VisitorNow,
        page: PageNow,
        run: str | None = None,
        after: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 200,
    ) -> list[views.EventLine]:
        if run is not None:
            _find(page, run)
        keys = ("id", "time", "run", "round", "site", "kind")
        return [
            views.EventLine(**{key: getattr(event, key) for key in keys}, text=_shown(event.text, visitor))
            for event in page.registry.events(run, after, limit)
        ]


def _add_metrics(app: FastAPI) -> None:
    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    def metrics(visitor: VisitorNow, page: PageNow) -> Response:
        """Counts and times in Prometheus's text format, for whoever may read the page."""
        text = CoordinatorMetrics(page.registry, page.overview).text()
        return Response(text, media_type="text/plain; version=0.0.4")


def _add_stopping(app: FastAPI) -> None:
    @app.post("/api/runs/{name}/stop")
    def stop(name: str, request: Request, visitor: VisitorNow, page: PageNow) -> views.RunLine:
        if visitor.role != "coordinator":
            raise HTTPException(403, "an auditor can read and nothing else")
        _check_csrf(request, visitor)
        _find(page, name)
        return run_line(page.runs.stop(name, "the coordinator on the live page"), full=True)


def _check_csrf(request: Request, visitor: Visitor) -> None:
    if visitor.csrf is not None and not hmac.compare_digest(request.headers.get(CSRF_HEADER, "").encode(), visitor.csrf.encode()):
        raise HTTPException(403, "the session's CSRF token is missing; load the page again")


def _find(page: Dashboard, name: str) -> RunRow:
    found = page.registry.find_run(name) if RUN_NAME.fullmatch(name) else None
    if found is None:
        raise HTTPException(404, "no such run")
    return found


def _full(visitor: Visitor) -> bool:
    return visitor.role == "coordinator"


def _shown(text: str, visitor: Visitor) -> str:
    return text if _full(visitor) else without_paths(text)


def _me(visitor: Visitor) -> views.Viewer:
    return views.Viewer(name=visitor.name, role=visitor.role, csrf=visitor.csrf)


def view_sites(registry: Registry, overview: Overview | None, full: bool) -> views.Sites:
    """Shows sites and processes as they are now.

    Args:
        registry: where sites and open runs stand.
        overview: the last look at processes and connections; None before the first one.
        full: whether file names are shown; without it they are cut out.
    """
    known = registry.sites()
    open_runs = registry.open_runs()
    events: list[dict[str, Any]] = []
    for run in open_runs[-1:]:  # the newest: a site does one thing at a time
        events = read_activity(Path(run.folder) / EVENTS_FILE)
    links = overview.links if overview else build_links(known, None)
    states = site_states(links, events, datetime.now(UTC))
    rows = {site.name: site for site in known}
    lines = [
        views.SiteLine(
            name=name,
            state=now.state,
            detail=now.detail,
            fingerprint=rows[name].fingerprint if name in rows else "",
            first_seen=rows[name].first_seen if name in rows else None,
            last_seen=rows[name].last_seen if name in rows else None,
        )
        for name, now in states.items()
    ]
    return views.Sites(taken=overview.taken if overview else None, sites=lines, processes=_processes(overview, full))


def _processes(overview: Overview | None, full: bool) -> list[views.ProcessLine]:
    found = overview.processes if overview else ()
    return [
        views.ProcessLine(name=p.name, serving=p.serving, detail=p.detail if full else without_paths(p.detail)) for p in found
    ]
