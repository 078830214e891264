"""A reading room that an earlier version left: its users sign in, its cases and findings are there, and it takes another case."""

from __future__ import annotations

from pathlib import Path

from fastapi.testclient import TestClient

from pneumofed.inference.reading_room.app import create_room_app
from pneumofed.inference.reading_room.serve import open_room, open_room_bundle
from pneumofed.inference.reading_room.settings import RoomFolder
from tests.former.make import PASSWORDS, wait_until_ready
from tests.former.opened import call


def test_a_former_room_goes_on(former: Path) -> None:
    folder = RoomFolder.open(former / "room")
    room = open_room(folder, open_room_bundle(folder, folder.settings))
    try:
        with TestClient(create_room_app(room, ["testserver"])) as client:
            go_on(client, former)
    finally:
        room.close()
    call("audit", "verify", "room/state/audit.jsonl")
    assert "2 readings" in call("reading-room", "labels", former / "labels.csv", "-C", "room")


def go_on(client: TestClient, former: Path) -> None:
    """Signs in, looks at what is there, and adds a case and a finding."""
    assert client.post("/api/login", json={"user": "li", "password": PASSWORDS["wang"]}).status_code == 401
    me = client.post("/api/login", json={"user": "li", "password": PASSWORDS["li"]})
    assert me.status_code == 200, me.text
    client.headers["x-csrf-token"] = me.json()["csrf"]
    listed = client.post("/api/worklist", json={}).json()
    assert (listed["total"], listed["open"]) == (2, 1)
    for line in listed["cases"]:
        case = client.get(f"/api/cases/{line['id']}")
        assert case.status_code == 200, case.text
    read = next(line["id"] for line in listed["cases"] if client.get(f"/api/cases/{line['id']}").json()["findings"])
    (finding,) = client.get(f"/api/cases/{read}").json()["findings"]
    assert (finding["by"], finding["label"], finding["note"]) == ("wang", "normal", "clear")
    wait_until_ready(client.get)
    old, new = sorted((former / "images" / "test").rglob("*.jpeg"))[:2]
    files = [("files", (path.name, path.read_bytes())) for path in (old, new)]
    told = client.post("/api/cases", files=files).json()["files"]
    assert [one["outcome"] for one in told] == ["known", "new"]
    posted = client.post(f"/api/cases/{told[1]['case']}/findings", json={"label": "viral", "note": ""})
    assert posted.status_code == 201, posted.text
