"""Signing in and out, and what the page has to know once."""

from __future__ import annotations

import asyncio
import math

from fastapi import APIRouter, Request, Response

from client.reading_room import schema
from client.reading_room.access import COOKIE, Reader, ReaderNow, RoomNow
from client.reading_room.folder import MIB
from client.reading_room.passwords import weakness
from client.reading_room.problems import Refusal
from client.reading_room.room import SESSION_SEC, Room
from client.reading_room.tables import User

router = APIRouter(prefix="/api", tags=["session"])


@router.post("/login")
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


@router.post("/logout", status_code=204)
def logout(response: Response, reader: ReaderNow, room: RoomNow) -> None:
    """Ends the session."""
    room.sessions.close(reader.session)
    room.record(reader.name, "logout")
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")


@router.get("/me")
def me(reader: ReaderNow, room: RoomNow) -> schema.SessionInfo:
    """Who is signed in."""
    return schema.SessionInfo(user=reader.name, role=reader.role, csrf=reader.csrf, idle_sec=_idle(room))


@router.post("/password", status_code=204)
async def change_password(body: schema.NewPassword, reader: ReaderNow, room: RoomNow) -> None:
    """Gives the reader another password and ends the other sessions of the name."""
    if weakness(body.new, reader.name):
        raise Refusal(422, "weak_password")
    await _sign_in(room, reader.name, body.old)
    await asyncio.to_thread(_change, room, reader, body.new)


@router.get("/room")
def room_facts(reader: ReaderNow, room: RoomNow) -> schema.RoomInfo:
    """The hospital, the model, and the limits of uploads."""
    upload = room.settings.upload
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
