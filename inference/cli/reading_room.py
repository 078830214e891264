"""`pneumofed reading-room`: what the hospital's engineer types. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pneumofed.common.errors import counted
from pneumofed.common.ops.command_line import Json, print_json, say

if TYPE_CHECKING:
    from pneumofed.inference.reading_room.settings import RoomFolder
    from pneumofed.inference.reading_room.users import Users


app = typer.Typer(no_args_is_help=True, help="The page for radiologists, on the hospital's own machine and without a network.")
user_app = typer.Typer(no_args_is_help=True, help="Who may sign in.")
token_app = typer.Typer(no_args_is_help=True, help="Programs that may ask for judgements, each by a token.")
app.add_typer(user_app, name="user")
app.add_typer(token_app, name="token")

Room = Annotated[Path, typer.Option("--room", "-C", help="The room's folder.")]
Name = Annotated[str, typer.Argument(metavar="NAME")]
Stdin = Annotated[bool, typer.Option("--password-stdin", help="Read the password from the first line of standard input.")]


@app.command("init")
def make_room(
    bundle: Annotated[Path, typer.Option(help="The model bundle: a folder or an archive from the coordinator.")],
    folder: Annotated[Path, typer.Argument(help="The room's folder; made if missing.")] = Path(),
    hospital: Annotated[str, typer.Option(help="Name of the hospital, shown on the page.")] = "Reading room",
    trusted: Annotated[
        list[Path] | None, typer.Option(help="Public key of who may sign bundles; may stand more than once.")
    ] = None,
    site: Annotated[Path | None, typer.Option(help="The hospital's site folder, if it has one.")] = None,
) -> None:
    """Make a room: its folder, its settings (room.yaml), its database. The bundle is checked and stays where it is."""
    from pneumofed.inference.reading_room.serve import init_room

    room, opened = init_room(folder, bundle, hospital, trusted, site)
    say(f"reading room: {room.path}")
    say(f"model: {opened.manifest.name}, signed by {opened.signer}" + ("" if trusted else " (compare it on the telephone)"))
    command, there = "pneumofed reading-room", f"-C {room.path}"
    say(f"next: {command} user add NAME --role admin {there}, then {command} start {there}")


@app.command("start")
def start_room(room: Room = Path()) -> None:
    """Serve the page until Ctrl-C or a signal; under systemd too."""
    from pneumofed.inference.reading_room.serve import serve_room

    serve_room(_open(room), say)


@app.command("clean")
def room_clean(room: Room = Path(), json_: Json = False) -> None:
    """Delete cases that are older than `retention_days`, and what crashes left behind. The running server does it by itself."""
    from dataclasses import asdict

    from pneumofed.inference.reading_room.cases import Cases, open_room_database
    from pneumofed.inference.reading_room.room import delete_old_cases
    from pneumofed.inference.reading_room.settings import CaseFiles

    folder = _open(room)
    done = delete_old_cases(
        Cases(open_room_database(folder.database)),
        CaseFiles(folder.store, folder.quarantine),
        folder.settings.retention_days,
        lambda case: _record(folder, "case-removed", case=case),
    )
    _record(folder, "cleaned", cases=done.cases)
    print_json(asdict(done)) if json_ else say(
        f"{counted(done.cases, 'case')} deleted, {counted(done.left_behind, 'folder')} left behind by crashes"
    )


@app.command("labels")
def room_export_labels(out: Annotated[Path, typer.Argument(help="CSV file that is written.")], room: Room = Path()) -> None:
    """Write what readers said of the cases, with pseudonyms of the patients, for `pneumofed site data feedback`."""
    from pneumofed.inference.reading_room.cases import Cases, open_room_database
    from pneumofed.inference.reading_room.labels import write_labels

    folder = _open(room)
    count = write_labels(folder, Cases(open_room_database(folder.database)), out)
    _record(folder, "labels-exported", count=count)
    say(f"{count} readings: {out}")


@user_app.command("add")
def room_add_user(
    name: Name,
    role: Annotated[
        Literal["radiologist", "admin"], typer.Option(help="An admin may also delete cases and export labels.")
    ] = "radiologist",
    room: Room = Path(),
    stdin: Stdin = False,
) -> None:
    """Add a user; asks for the password."""
    folder = _open(room)
    _users(folder).add(name, role, _password(stdin))
    _record(folder, "user-added", user=name, role=role)
    say(f"{name} may sign in as {role}")


@user_app.command("password")
def room_set_password(name: Name, room: Room = Path(), stdin: Stdin = False) -> None:
    """Give a user another password."""
    folder = _open(room)
    _users(folder).set_password(name, _password(stdin))
    _record(folder, "user-changed", user=name)
    say(f"{name} has a new password")


@user_app.command("list")
def room_list_users(room: Room = Path(), json_: Json = False) -> None:
    """Show who may sign in."""
    users = _users(_open(room)).all()
    lines = [{"name": user.name, "role": user.role, "last_login": user.last_login} for user in users]
    if json_:
        print_json(lines)
        return
    for line in lines:
        say(f"{line['name']}  {line['role']}  last login {line['last_login'] or 'never'}")


@user_app.command("remove")
def room_remove_user(name: Name, room: Room = Path()) -> None:
    """Take a user away; what was found under the name stays."""
    from pneumofed.common.errors import ConfigError

    folder = _open(room)
    if not _users(folder).remove(name):
        raise ConfigError(f"no user {name}; `pneumofed reading-room user list` shows them")
    _record(folder, "user-removed", user=name)
    say(f"{name} may no longer sign in")


@token_app.command("add")
def room_add_token(name: Name, room: Room = Path()) -> None:
    """Make a token for a program, and show it this once."""
    folder = _open(room)
    token = _users(folder).add_token(name)
    _record(folder, "token-added", token=name)
    say(f"token of {name}, shown this once: {token}")


@token_app.command("list")
def room_list_tokens(room: Room = Path(), json_: Json = False) -> None:
    """Show which programs have a token."""
    tokens = [{"name": token.name, "added": token.added} for token in _users(_open(room)).tokens()]
    if json_:
        print_json(tokens)
        return
    for line in tokens:
        say(f"{line['name']}  added {line['added']}")


@token_app.command("remove")
def room_remove_token(name: Name, room: Room = Path()) -> None:
    """Make a token void."""
    from pneumofed.common.errors import ConfigError

    folder = _open(room)
    if not _users(folder).remove_token(name):
        raise ConfigError(f"no token {name}; `pneumofed reading-room token list` shows them")
    _record(folder, "token-removed", token=name)
    say(f"the token of {name} is void")


def _open(path: Path) -> RoomFolder:
    from pneumofed.inference.reading_room.settings import RoomFolder

    return RoomFolder.open(path)


def _users(folder: RoomFolder) -> Users:
    from pneumofed.inference.reading_room.cases import open_room_database
    from pneumofed.inference.reading_room.users import Users

    return Users(open_room_database(folder.database))


def _record(folder: RoomFolder, event: str, **facts: Any) -> None:
    """In the audit log, under the name that the operating system knows the engineer by."""
    import getpass

    from pneumofed.common.audit.log import AuditLog

    AuditLog(folder.audit, f"os:{getpass.getuser()}").record(event, **facts)


def _password(stdin: bool) -> str:
    if stdin:
        return sys.stdin.readline().rstrip("\r\n")
    return str(typer.prompt("Password", hide_input=True, confirmation_prompt=True))
