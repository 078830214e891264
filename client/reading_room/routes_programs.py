"""For programs: judgements of single files of which nothing is kept, health, and numbers for Prometheus."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from client.reading_room import schema
from client.reading_room.access import ProgramNow, RoomNow
from client.reading_room.arrivals import receive_one
from client.reading_room.problems import error_code
from client.reading_room.reading import JudgedFile
from client.reading_room.room import Room
from client.reading_room.views import view_judgement, view_map
from client.reading_room.workers import ImageJob
from common.errors import ImageError

router = APIRouter(tags=["programs"])
_BINARY = {"schema": {"type": "string", "format": "binary", "minLength": 1}}
_BODY: dict[str, Any] = {"requestBody": {"required": True, "content": {"application/octet-stream": _BINARY}}}
_ERRORS: dict[int | str, dict[str, Any]] = {408: {"model": schema.ErrorBody}}


@router.post("/api/predict", openapi_extra=_BODY, responses=_ERRORS)
async def predict_file(request: Request, who: ProgramNow, room: RoomNow) -> schema.JudgementOut:
    """The judgement of the DICOM, JPEG or PNG file that is the body, whatever its content type says."""
    file = await _read(request, who, room, explain=False)
    return view_judgement(file.judgement)


@router.post("/api/explain", openapi_extra=_BODY, responses=_ERRORS)
async def explain_file(request: Request, who: ProgramNow, room: RoomNow) -> schema.Explanation:
    """The judgement of the file, where its evidence lies, and whether that is a place for it."""
    file = await _read(request, who, room, explain=True)
    viewing = file.viewing
    return schema.Explanation(
        judgement=view_judgement(file.judgement),
        map=None if viewing.map is None else view_map(viewing.map, viewing.area, viewing.warnings),
    )


@router.get("/api/health", responses={503: {"model": schema.RoomHealth, "description": "Not ready"}})
def health(response: Response, room: RoomNow) -> schema.RoomHealth:
    """Whether the room can judge. For anybody."""
    ready = room.ready
    response.status_code = 200 if ready else 503
    return schema.RoomHealth(ready=ready)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
def prometheus_metrics(who: ProgramNow, room: RoomNow) -> Response:
    """Counts and times in Prometheus's text format."""
    return Response(room.measures.text(), media_type="text/plain; version=0.0.4")


async def _read(request: Request, who: str, room: Room, *, explain: bool) -> JudgedFile:
    """What came of the body, which is deleted afterwards."""
    async with room.gate.enter():
        with room.store.arriving() as folder:
            await receive_one(request.stream(), folder, room.settings.upload)
            try:
                return await room.judge(ImageJob(folder, explain=explain), who)
            except ImageError as error:
                room.measures.refused(error_code(error))
                raise
