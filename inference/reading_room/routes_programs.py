"""The routes of programs: judgements of single files of which nothing is kept, health, and metrics for Prometheus.

A file is the body of the request, or with clinical values a form: `files` once, `clinical` once as a JSON object by column. Of a CT series
`files` stands once for each of its files.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import APIRouter, Request, Response

from pneumofed.common.errors import ImageError
from pneumofed.inference.reading_room import schema
from pneumofed.inference.reading_room.clinical import ClinicalAnswer, describe_sources, named_values, read_given
from pneumofed.inference.reading_room.errors import Refusal, error_code
from pneumofed.inference.reading_room.file_judge import ImageJob
from pneumofed.inference.reading_room.room import Room
from pneumofed.inference.reading_room.routes import ProgramNow, RoomNow
from pneumofed.inference.reading_room.upload import Arrived, gather_series, receive_form, receive_one
from pneumofed.inference.reading_room.viewing import JudgedFile
from pneumofed.inference.reading_room.views import view_judgement, view_map

FORM_TYPE = "multipart/form-data"

program_routes = APIRouter(tags=["programs"])
_BINARY = {"schema": {"type": "string", "format": "binary", "minLength": 1}}
_FORM = {
    "schema": {
        "type": "object",
        "properties": {"files": {"type": "string", "format": "binary", "minLength": 1}, "clinical": {"type": "string"}},
        "required": ["files"],
        "additionalProperties": False,
    }
}
_FILE_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/octet-stream": _BINARY, FORM_TYPE: _FORM}}
}
_FILE_ERRORS: dict[int | str, dict[str, Any]] = {408: {"model": schema.ErrorBody}, 503: {"model": schema.ErrorBody}}


@program_routes.post("/api/predict", openapi_extra=_FILE_BODY, responses=_FILE_ERRORS)
async def predict_file(request: Request, who: ProgramNow, room: RoomNow) -> schema.JudgementOut:
    """The judgement of the image file that is the body, whatever its content type says; of a form with clinical values, of its file."""
    file, values = await _read(request, who, room, explain=False)
    return view_judgement(file.judgement, values)


@program_routes.post("/api/explain", openapi_extra=_FILE_BODY, responses=_FILE_ERRORS)
async def explain_file(request: Request, who: ProgramNow, room: RoomNow) -> schema.ExplanationView:
    """The judgement of the file, where its evidence lies, whether that is a place for it, and what image and clinical values add."""
    file, values = await _read(request, who, room, explain=True)
    viewing = file.viewing
    return schema.ExplanationView(
        judgement=view_judgement(file.judgement, values),
        map=None if viewing.map is None else view_map(viewing.map, viewing.area, viewing.warnings, viewing.span),
        evidence=None if file.evidence is None else schema.EvidenceView.model_validate(file.evidence),
    )


@program_routes.get("/api/health", responses={503: {"model": schema.RoomHealth, "description": "Not ready"}})
def health(response: Response, room: RoomNow) -> schema.RoomHealth:
    """Whether the room can judge. For anybody."""
    ready = room.ready
    response.status_code = 200 if ready else 503
    return schema.RoomHealth(ready=ready)


@program_routes.get(
    "/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
)
def prometheus_metrics(who: ProgramNow, room: RoomNow) -> Response:
    """Counts and times in Prometheus's text format."""
    return Response(room.metrics.text(), media_type="text/plain; version=0.0.4")


async def _read(request: Request, who: str, room: Room, *, explain: bool) -> tuple[JudgedFile, ClinicalAnswer | None]:
    """What came of the file, which is deleted afterwards, and the clinical values that it was judged with."""
    room.require_model()
    async with room.gate.enter(), _arrived(request, room) as arrived:
        values = read_given(arrived.given, room.clinical) if arrived.given else None
        try:
            file = await room.judge(ImageJob(arrived.folder, explain=explain, values=values, evidence=explain), who)
        except ImageError as error:
            room.metrics.refused(error_code(error))
            raise
        named = named_values(file.values, room.clinical)
        if not named:
            return file, None
        found = file.judgement.prediction
        known = describe_sources(named, named_values(values, room.clinical), "given")
        answer = {"values": known, "image_only": found.image_only if found else None}
        return file, ClinicalAnswer.model_validate(answer)


@asynccontextmanager
async def _arrived(request: Request, room: Room) -> AsyncIterator[Arrived]:
    """The file or the series of the request, in its folder."""
    kind, limits, volumes = request.headers.get("content-type", ""), room.limits, room.takes_volumes
    async with AsyncExitStack() as stack:
        if not kind.lower().startswith(FORM_TYPE):
            files = [await receive_one(request.stream(), stack.enter_context(room.store.arriving()), limits, volumes)]
        else:
            files = await receive_form(request.stream(), kind, stack, room.store.arriving, limits, volumes)
        if volumes:
            found = await asyncio.to_thread(gather_series, files, stack.enter_context(room.store.arriving()))
            files = [file for _, file in found]
        if len(files) > 1:
            raise Refusal(413, "too_many_files")
        if files[0].error:
            raise Refusal(413 if files[0].error == "file_too_large" else 422, files[0].error)
        yield files[0]
