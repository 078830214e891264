"""Who asks: a reader by the session's cookie, or a program by its token. What each may do is said here for all routes."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request
from fastapi.security import APIKeyCookie, HTTPAuthorizationCredentials, HTTPBearer

from pneumofed.common.ops.web import CSRF_HEADER
from pneumofed.inference.reading_room.errors import Refusal
from pneumofed.inference.reading_room.room import Room
from pneumofed.inference.reading_room.schema import Role

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
