"""The routes of the page, without pictures, in two groups, and who asks on all routes.

`case_routes`: the worklist and its cases, uploaded, listed, opened and judged by readers. `session_routes`: signing in and out, and what
the page has to know once. Who asks is a reader by the session's cookie, or a program by its token; what each may do is said here for all
routes (`ReaderNow`, `AdminNow`, `ProgramNow`). The routes of programs are in `routes_programs`, those of pictures in `routes_images`.
"""

from __future__ import annotations

import asyncio
import hmac
import math
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.security import APIKeyCookie, HTTPAuthorizationCredentials, HTTPBearer

from pneumofed.common.ops.web import CSRF_HEADER
from pneumofed.inference.reading_room import schema
from pneumofed.inference.reading_room.cases import Case, User, agrees
from pneumofed.inference.reading_room.clinical import EvidenceView, GivenValues
from pneumofed.inference.reading_room.errors import Refusal
from pneumofed.inference.reading_room.image_facts import stored_facts
from pneumofed.inference.reading_room.labels import labels_csv
from pneumofed.inference.reading_room.room import SESSION_SEC, Room
from pneumofed.inference.reading_room.schema import Role
from pneumofed.inference.reading_room.settings import MIB
from pneumofed.inference.reading_room.upload import gather_series, receive_form
from pneumofed.inference.reading_room.users import weakness
from pneumofed.inference.reading_room.views import likeliest, view_case, view_case_line, view_finding

COOKIE = "pneumofed_room"
_cookie = APIKeyCookie(name=COOKIE, scheme_name="session", description="From POST /api/login.", auto_error=False)
_bearer = HTTPBearer(scheme_name="token", description="Of `pneumofed reading-room token add`.", auto_error=False)


@dataclass(frozen=True)
class Reader:
    """A user with a session."""

    name: str
    role: Role
    csrf: str
    session: str


def current_room(request: Request) -> Room:
    """Returns the room that the application serves."""
    return cast(Room, request.app.state.room)


def reader(request: Request, cookie: Annotated[str | None, Depends(_cookie)]) -> Reader:
    """The user whose session it is.

    Raises:
        Refusal: there is no session, or a change is asked for without its CSRF token.
    """
    room = current_room(request)
    identifier = cookie or ""
    session = room.sessions.find(identifier)
    user = room.users.find(session.owner) if session else None
    if session is None or user is None:
        raise Refusal(401, "not_signed_in")
    shown = request.headers.get(CSRF_HEADER, "")
    if request.method not in ("GET", "HEAD") and not hmac.compare_digest(shown.encode(), session.csrf.encode()):
        raise Refusal(403, "no_csrf")
    return Reader(user.name, cast(Role, user.role), session.csrf, identifier)


def admin(found: Annotated[Reader, Depends(reader)]) -> Reader:
    """The user, who is an administrator.

    Raises:
        Refusal: another asks.
    """
    if found.role != "admin":
        raise Refusal(403, "forbidden")
    return found


def program(
    request: Request,
    cookie: Annotated[str | None, Depends(_cookie)],
    token: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> str:
    """Name of the program whose token it is, or of the reader whose session; for the routes that keep nothing.

    Raises:
        Refusal: there is neither.
    """
    if token is None:
        return reader(request, cookie).name
    owner = current_room(request).users.owner_of(token.credentials.strip())
    if owner is None:
        raise Refusal(401, "not_signed_in", headers={"WWW-Authenticate": "Bearer"})
    return f"token:{owner}"


RoomNow = Annotated[Room, Depends(current_room)]
ReaderNow = Annotated[Reader, Depends(reader)]
AdminNow = Annotated[Reader, Depends(admin)]
ProgramNow = Annotated[str, Depends(program)]


case_routes = APIRouter(prefix="/api", tags=["cases"])
CaseInPath = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$", description="A case's id.")]
_UPLOAD_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "files": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}},
                        "clinical": {
                            "type": "array",
                            "items": {"type": "string"},
                            "description": "Clinical values as JSON objects by column, one a file in the same order; or none.",
                        },
                    },
                    "required": ["files"],
                    "additionalProperties": False,
                }
            }
        },
    }
}

session_routes = APIRouter(prefix="/api", tags=["session"])


@case_routes.post(
    "/cases",
    openapi_extra=_UPLOAD_FORM,
    responses={408: {"model": schema.ErrorBody}, 507: {"model": schema.ErrorBody}},
)
async def upload(request: Request, reader: ReaderNow, room: RoomNow) -> schema.Upload:
    """Takes files as new cases, each judged by the time of the answer. A file that cannot be used is refused, and the others go on.

    Where the model judges CT, a request is one series: its DICOM files together, or one file with all of it. Each NIfTI and each zip is a
    series of its own.
    """
    room.require_model()
    async with AsyncExitStack() as stack, room.gate.enter():
        if not await asyncio.to_thread(room.has_room):
            raise Refusal(507, "disk_full")
        kind = request.headers.get("content-type", "")
        files = await receive_form(request.stream(), kind, stack, room.store.arriving, room.limits, room.takes_volumes)
        found = list(enumerate(files))
        if room.takes_volumes:
            found = await asyncio.to_thread(gather_series, files, stack.enter_context(room.store.arriving()))
        return schema.Upload(files=[await room.take(index, file, reader.name) for index, file in found])


@case_routes.post("/worklist")
def worklist(query: schema.WorklistQuery, reader: ReaderNow, room: RoomNow) -> schema.Worklist:
    """The cases that match, a page at a time."""
    total, unread, cases = room.cases.list(query)
    return schema.Worklist(total=total, open=unread, cases=[view_case_line(case) for case in cases])


@case_routes.post("/next")
def next_case(query: schema.NextQuery, reader: ReaderNow, room: RoomNow) -> schema.Next:
    """The case after another one."""
    case, remaining = room.cases.next(query)
    return schema.Next(case=case, remaining=remaining)


@case_routes.get("/cases/{case}")
def open_case(case: CaseInPath, reader: ReaderNow, room: RoomNow) -> schema.CaseDetail:
    """All of one case. The audit log keeps who opened it."""
    found = find_case(room, case)
    room.record(reader.name, "case-opened", case=case)
    return _view(room, found)


@case_routes.delete("/cases/{case}", status_code=204)
def remove_case(case: CaseInPath, user: AdminNow, room: RoomNow) -> None:
    """Deletes a case, its files and its findings."""
    find_case(room, case)
    room.record(user.name, "case-removed", case=case)
    if not room.cases.remove(case):
        raise Refusal(404, "not_found")
    room.store.remove(case)


@case_routes.post("/cases/{case}/findings", status_code=201)
def add_finding(case: CaseInPath, body: schema.NewFinding, reader: ReaderNow, room: RoomNow) -> schema.ReaderFinding:
    """Keeps what the reader says of the case, beside all that was said before."""
    found = find_case(room, case)
    if body.label not in room.model.labels:
        raise Refusal(422, "invalid_request")
    room.record(reader.name, "finding", case=case, label=body.label, agrees=agrees(found.verdict, body.label, likeliest(found)))
    if (row := room.cases.judge(case, reader.name, body.label, body.note.strip())) is None:
        raise Refusal(404, "not_found")
    finding = view_finding(row, found)
    room.metrics.found(finding.agrees)
    room.watch.read(found.monitored, body.label)
    return finding


@case_routes.post(
    "/cases/{case}/clinical", status_code=201, responses={409: {"model": schema.ErrorBody}, 503: {"model": schema.ErrorBody}}
)
async def judge_with_values(case: CaseInPath, body: GivenValues, reader: ReaderNow, room: RoomNow) -> schema.CaseDetail:
    """Judges the case with other clinical values: all that are known, in place of those before, which are kept."""
    room.require_model()
    async with room.gate.enter():
        await room.give_values(await asyncio.to_thread(find_case, room, case), body.values, reader.name)
    return await asyncio.to_thread(lambda: _view(room, find_case(room, case)))


@case_routes.get("/cases/{case}/evidence", responses={409: {"model": schema.ErrorBody}, 503: {"model": schema.ErrorBody}})
async def open_evidence(case: CaseInPath, reader: ReaderNow, room: RoomNow) -> EvidenceView:
    """What the answer rests on: the image and each clinical value. Takes seconds the first time, and is kept."""
    room.require_model()
    async with room.gate.enter():
        return EvidenceView.model_validate(await room.find_evidence(await asyncio.to_thread(find_case, room, case)))


def _view(room: Room, found: Case) -> schema.CaseDetail:
    facts, values = stored_facts(room.store.path(found.id)), room.values.latest(found)
    return view_case(found, facts, values, room.cases.findings(found), room.cases.previous(found))


@case_routes.get(
    "/labels.csv", response_class=Response, responses={200: {"content": {"text/csv": {"schema": {"type": "string"}}}}}
)
def labels_table(user: AdminNow, room: RoomNow) -> Response:
    """The latest word of each reader on each case, with pseudonyms of the patients and the places of the files on this machine."""
    text, count = labels_csv(room.folder, room.cases)
    room.record(user.name, "labels-exported", count=count)
    return Response(text, media_type="text/csv", headers={"Content-Disposition": 'attachment; filename="labels.csv"'})


def find_case(room: Room, identifier: str) -> Case:
    """Finds the case in the room's database.

    Args:
        room: that is asked.
        identifier: of the case, as the address has it.

    Raises:
        Refusal: there is none.
    """
    case = room.cases.find(identifier)
    if case is None:
        raise Refusal(404, "not_found")
    return case


@session_routes.post("/login")
async def login(body: schema.Credentials, request: Request, response: Response, room: RoomNow) -> schema.SessionInfo:
    """Changes a name and a password for a session, whose cookie comes with the answer."""
    user = await _sign_in(room, body.user, body.password)
    identifier = room.sessions.open(user.name)
    session = room.sessions.find(identifier)
    if session is None:
        raise Refusal(429, "busy", retry_sec=1)
    await asyncio.to_thread(room.record, user.name, "login")
    secure = request.url.scheme == "https"
    response.set_cookie(COOKIE, identifier, max_age=int(SESSION_SEC), httponly=True, samesite="strict", secure=secure)
    return schema.SessionInfo.model_validate(
        {"user": user.name, "role": user.role, "csrf": session.csrf, "idle_sec": _idle(room)}
    )


@session_routes.post("/logout", status_code=204)
def logout(response: Response, reader: ReaderNow, room: RoomNow) -> None:
    """Ends the session."""
    room.sessions.close(reader.session)
    room.record(reader.name, "logout")
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")


@session_routes.get("/me")
def me(reader: ReaderNow, room: RoomNow) -> schema.SessionInfo:
    """Who is signed in."""
    return schema.SessionInfo(user=reader.name, role=reader.role, csrf=reader.csrf, idle_sec=_idle(room))


@session_routes.post("/password", status_code=204)
async def change_password(body: schema.NewPassword, reader: ReaderNow, room: RoomNow) -> None:
    """Gives the reader another password and ends the other sessions of the name."""
    if weakness(body.new, reader.name):
        raise Refusal(422, "weak_password")
    await _sign_in(room, reader.name, body.old)
    await asyncio.to_thread(_change, room, reader, body.new)


@session_routes.get("/room")
def room_facts(reader: ReaderNow, room: RoomNow) -> schema.RoomInfo:
    """The hospital, the model, and the limits of uploads."""
    upload = room.limits
    return schema.RoomInfo(
        hospital=room.settings.hospital,
        model=room.model,
        limits=schema.Limits(file_bytes=upload.file_mb * MIB, files=upload.files, request_bytes=upload.request_mb * MIB),
        retention_days=room.settings.retention_days,
    )


async def _sign_in(room: Room, name: str, password: str) -> User:
    """The user, checked in a thread and not too many at a time.

    Raises:
        Refusal: the name has to wait, or name or password are wrong.
    """
    wait = room.back_off.wait_sec(name)
    if wait > 0:
        raise Refusal(429, "locked", retry_sec=math.ceil(wait))
    room.back_off.wrong(name)
    async with room.sign_ins:
        user = await asyncio.to_thread(room.users.sign_in, name, password)
    if user is None:
        await asyncio.to_thread(room.record, "", "login-refused")
        raise Refusal(401, "wrong_login")
    room.back_off.right(name)
    return user


def _change(room: Room, reader: Reader, password: str) -> None:
    room.users.set_password(reader.name, password)
    room.sessions.close_all(reader.name, but=reader.session)
    room.record(reader.name, "password-changed")


def _idle(room: Room) -> int:
    return 60 * room.settings.idle_min
