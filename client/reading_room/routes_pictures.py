"""The pictures of a case. They are made in threads, a few at a time, since each may take the memory of a large image."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import FileResponse

from client.reading_room import pictures, schema
from client.reading_room.access import ReaderNow, RoomNow
from client.reading_room.problems import Refusal
from client.reading_room.reading import PIXELS
from client.reading_room.room import Room
from client.reading_room.routes_cases import CaseInPath, find_case
from client.reading_room.tables import Case
from client.reading_room.views import view_map
from common.image_types import MAX_SIDE_PX, Window

router = APIRouter(prefix="/api/cases", tags=["pictures"])


class _Stored(FileResponse):
    """A file of several megabytes in a few pieces; each piece waits for a thread."""

    chunk_size = 2**20


MaxSide = Annotated[int, Query(ge=64, le=MAX_SIDE_PX, description="Scale down to so many pixels on the longer side.")]
Center = Annotated[float | None, Query(ge=-10, le=10, allow_inf_nan=False)]
Width = Annotated[float | None, Query(ge=1e-6, le=20, allow_inf_nan=False)]
BINARY = "application/octet-stream"
_PNG: dict[int | str, dict[str, Any]] = {200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}}
_RAW: dict[int | str, dict[str, Any]] = {200: {"content": {BINARY: {"schema": {"type": "string", "format": "binary"}}}}}


def _found(case: CaseInPath, reader: ReaderNow, room: RoomNow) -> Case:
    return find_case(room, case)


def _found_with_map(case: Annotated[Case, Depends(_found)]) -> Case:
    if not case.has_map:
        raise Refusal(404, "no_map")
    return case


FoundCase = Annotated[Case, Depends(_found)]
CaseWithMap = Annotated[Case, Depends(_found_with_map)]


@router.get("/{case}/image.png", response_class=Response, responses=_PNG)
async def image(
    case: FoundCase,
    room: RoomNow,
    center: Center = None,
    width: Width = None,
    invert: bool = False,
    max_side: MaxSide = MAX_SIDE_PX,
) -> Response:
    """The image in 8 bits of grey through a window, by default the file's own."""
    window = Window(case.window_center if center is None else center, case.window_width if width is None else width)

    def draw() -> bytes:
        return pictures.render_image(_pixels(room, case), window, invert=invert, max_side=max_side)

    async with room.rendering:
        return Response(await asyncio.to_thread(draw), media_type="image/png")


@router.get("/{case}/pixels", response_class=Response, responses=_RAW)
async def pixels(case: FoundCase, request: Request, room: RoomNow, max_side: MaxSide = MAX_SIDE_PX) -> Response:
    """uint16, little endian, row by row; X-Image-Width and X-Image-Height tell the shape."""
    if max_side >= max(case.height, case.width) and "gzip" in request.headers.get("accept-encoding", ""):
        headers = {"Content-Encoding": "gzip", **_shape(case.height, case.width)}  # as they lie on the disk
        return _Stored(room.store.path(case.id) / PIXELS, media_type=BINARY, headers=headers)
    async with room.rendering:
        values = await asyncio.to_thread(lambda: pictures.shrink(_pixels(room, case), max_side))
        return Response(values.tobytes(), media_type=BINARY, headers=_shape(*values.shape))


@router.get("/{case}/map")
def heat_map(case: CaseWithMap, room: RoomNow) -> schema.HeatMap:
    """Where the evidence lies, as numbers, and whether that is a place for it."""
    return view_map(pictures.read_map(room.store.path(case.id)), case.map_area, case.map_warnings)


@router.get("/{case}/map.png", response_class=Response, responses=_PNG)
def heat_map_picture(case: CaseWithMap, room: RoomNow) -> Response:
    """Where the evidence lies, in colour, to be laid over the image."""
    values = pictures.read_map(room.store.path(case.id))
    return Response(pictures.render_map(values, case.map_area, case.height, case.width), media_type="image/png")


def _pixels(room: Room, case: Case) -> np.ndarray:
    return pictures.read_pixels(room.store.path(case.id), case.height, case.width)


def _shape(height: int, width: int) -> dict[str, str]:
    return {"X-Image-Width": str(width), "X-Image-Height": str(height)}
