"""The commands of the reading room."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from pneumofed.common.audit.log import read_entries
from pneumofed.common.errors import BundleError, ConfigError
from pneumofed.common.wire.keys import NodeKey, format_public_key
from pneumofed.inference.cli.reading_room import app
from pneumofed.inference.reading_room.settings import RoomFolder, RoomSettings
from tests.inference.reading_room.stage import PASSWORD, bundle
from tests.model_bundles import signing_key


def run(*arguments: str | Path, text: str | None = None) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=text)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_a_room_is_made_for_its_owner_alone_and_never_made_again(tmp_path: Path) -> None:
    room = tmp_path / "room"
    run("init", room, "--bundle", bundle().folder, "--hospital", "北医院")
    assert stat.S_IMODE(room.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in room.rglob("*")} == {0}
    assert RoomFolder.open(room).settings.hospital == "北医院"
    with pytest.raises(ConfigError, match="exists"):
        run("init", room, "--bundle", bundle().folder)


def test_a_bundle_of_a_stranger_makes_no_room(tmp_path: Path) -> None:
    stranger, known = tmp_path / "stranger.pub", tmp_path / "known.pub"
    stranger.write_bytes(NodeKey.generate("stranger").public)
    known.write_bytes(format_public_key(signing_key().public_key(), "coordinator"))
    with pytest.raises(BundleError):
        run("init", tmp_path / "room", "--bundle", bundle().folder, "--trusted", stranger)
    assert not (tmp_path / "room").exists()
    run("init", tmp_path / "room", "--bundle", bundle().folder, "--trusted", known)


def test_users_and_tokens_come_and_go_and_the_log_keeps_it(tmp_path: Path) -> None:
    room = tmp_path / "room"
    run("init", room, "--bundle", bundle().folder)
    run("user", "add", "li", "--role", "admin", "-C", room, text=f"{PASSWORD}\n{PASSWORD}\n")
    run("user", "add", "wang", "--password-stdin", "-C", room, text=f"{PASSWORD}\n")
    run("user", "password", "wang", "--password-stdin", "-C", room, text="another pass phrase\n")
    with pytest.raises(ConfigError, match="exists"):
        run("user", "add", "li", "--password-stdin", "-C", room, text=f"{PASSWORD}\n")
    with pytest.raises(ConfigError, match="at least"):
        run("user", "add", "zhao", "--password-stdin", "-C", room, text="short\n")
    users = json.loads(run("user", "list", "--json", "-C", room))
    assert [(user["name"], user["role"]) for user in users] == [("li", "admin"), ("wang", "radiologist")]
    token = run("token", "add", "ris", "-C", room).split()[-1]
    assert token not in (room / "state" / "room.db").read_bytes().decode("latin-1")
    assert json.loads(run("token", "list", "--json", "-C", room))[0]["name"] == "ris"
    run("token", "remove", "ris", "-C", room)
    run("user", "remove", "wang", "-C", room)
    with pytest.raises(ConfigError, match="no user"):
        run("user", "remove", "wang", "-C", room)
    events = [entry.event for entry in read_entries(room / "state" / "audit.jsonl")]
    assert events == ["user-added", "user-added", "user-changed", "token-added", "token-removed", "user-removed"]


def test_labels_and_clean_work_on_an_empty_room(tmp_path: Path) -> None:
    room = tmp_path / "room"
    run("init", room, "--bundle", bundle().folder)
    assert "0 readings" in run("labels", tmp_path / "labels.csv", "-C", room)
    assert (tmp_path / "labels.csv").read_text().startswith("path,patient,label")
    assert json.loads(run("clean", "--json", "-C", room)) == {"cases": 0, "left_behind": 0}


def test_nobody_outside_reaches_a_room_without_tls() -> None:
    facts: dict[str, Any] = {"hospital": "x", "bundle": "b"}
    with pytest.raises(ValidationError, match="certificate"):
        RoomSettings(**facts, host="0.0.0.0")
    with pytest.raises(ValidationError, match="belong together"):
        RoomSettings(**facts, certificate="c.pem")
    assert RoomSettings(**facts, host="0.0.0.0", certificate="c.pem", key="k.pem").port == 8443
