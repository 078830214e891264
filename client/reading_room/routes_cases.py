"""The worklist and its cases: uploaded, listed, opened, judged by readers."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response

from client.reading_room import schema
from client.reading_room.access import AdminNow, ReaderNow, RoomNow
from client.reading_room.arrivals import receive_form
from client.reading_room.labels import labels_csv
from client.reading_room.problems import Refusal
from client.reading_room.room import Room
from client.reading_room.tables import Case
from client.reading_room.views import view_case, view_case_line, view_finding

router = APIRouter(prefix="/api", tags=["cases"])
CaseInPath = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$", description="A case's id.")]
_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"files": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}}},
                    "required": ["files"],
                    "additionalProperties": False,
                }
            }
        },
    }
}


@router.post(
    "/cases",
    openapi_extra=_FORM,
    responses={408: {"model": schema.ErrorBody}, 507: {"model": schema.ErrorBody}},
)
async def upload(request: Request, reader: ReaderNow, room: RoomNow) -> schema.Upload:
    """Takes files as new cases, each judged by the time of the answer. A file that cannot be used is refused, and the others go on."""
    async with AsyncExitStack() as stack, room.gate.enter():
        if not await asyncio.to_thread(room.has_room):
            raise Refusal(507, "disk_full")
        kind = request.headers.get("content-type", "")
        files = await receive_form(request.stream(), kind, stack, room.store.arriving, room.settings.upload)
        return schema.Upload(files=[await room.take(index, file, reader.name) for index, file in enumerate(files)])


@router.post("/worklist")
def worklist(query: schema.WorklistQuery, reader: ReaderNow, room: RoomNow) -> schema.Worklist:
    """The cases that match, a page at a time."""
    total, unread, cases = room.cases.list(query)
    return schema.Worklist(total=total, open=unread, cases=[view_case_line(case) for case in cases])


@router.post("/next")
def next_case(query: schema.NextQuery, reader: ReaderNow, room: RoomNow) -> schema.Next:
    """The case after another one."""
    case, remaining = room.cases.next(query)
    return schema.Next(case=case, remaining=remaining)


@router.get("/cases/{case}")
def open_case(case: CaseInPath, reader: ReaderNow, room: RoomNow) -> schema.CaseDetail:
    """All of one case. The audit log keeps who opened it."""
    found = find_case(room, case)
    room.record(reader.name, "case-opened", case=case)
    return view_case(found, room.cases.findings(found), room.cases.previous(found))


@router.delete("/cases/{case}", status_code=204)
def remove_case(case: CaseInPath, user: AdminNow, room: RoomNow) -> None:
    """Deletes a case, its files and its findings."""
    if not room.cases.remove(case):
        raise Refusal(404, "not_found")
    room.store.remove(case)
    room.record(user.name, "case-removed", case=case)


@router.post("/cases/{case}/findings", status_code=201)
def add_finding(case: CaseInPath, body: schema.NewFinding, reader: ReaderNow, room: RoomNow) -> schema.ReaderFinding:
    """Keeps what the reader says of the case, beside all that was said before."""
    row = room.cases.judge(case, reader.name, body.label, body.note.strip())
    found = room.cases.find(case)
    if row is None or found is None:
        raise Refusal(404, "not_found")
    finding = view_finding(row, found)
    room.record(reader.name, "finding", case=case, label=row.label, agrees=finding.agrees)
    room.measures.found(finding.agrees)
    room.watch.read(found.monitored, body.label)
    return finding


@router.get("/labels.csv", response_class=Response, responses={200: {"content": {"text/csv": {"schema": {"type": "string"}}}}})
def labels_table(user: AdminNow, room: RoomNow) -> Response:
    """The latest word of each reader on each case, with pseudonyms of the patients and the places of the files on this machine."""
    text, count = labels_csv(room.folder, room.cases)
    room.record(user.name, "labels-exported", count=count)
    return Response(text, media_type="text/csv", headers={"Content-Disposition": 'attachment; filename="labels.csv"'})


def find_case(room: Room, identifier: str) -> Case:
    """The case.

    Raises:
        Refusal: there is none.
    """
    case = room.cases.find(identifier)
    if case is None:
        raise Refusal(404, "not_found")
    return case
