"""The fixtures of an earlier version in a test's own folder, and the command line that opens them."""

from __future__ import annotations

import json
import sqlite3
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from pneumofed.cli.main import app
from tests.former.make import ARCHIVES, PLACE

VERSION = Path(__file__).parent / "0.2.0"


def unpack(folder: Path, *archives: str) -> Path:
    """The named archives (all without a name) unpacked into `folder`, whose path then stands in the files; returns `folder`."""
    for archive in archives or ARCHIVES:
        with tarfile.open(VERSION / f"{archive}.tar.xz") as tar:
            tar.extractall(folder, filter="data")
            names = [folder / member.name for member in tar.getmembers() if member.isfile()]
        for path in names:
            relocate(path, folder)
    return folder


def relocate(path: Path, folder: Path) -> None:
    """Puts `folder` in the place of `PLACE`, in a text file or in the registry."""
    if path.suffix in (".yaml", ".csv", ".json"):
        path.write_text(path.read_text().replace(PLACE, str(folder)))
    if path.name == "registry.db":
        connection = sqlite3.connect(path)
        connection.execute("UPDATE run SET folder = replace(folder, ?, ?)", (PLACE, str(folder)))
        connection.commit()
        connection.close()


def call(*arguments: str | Path, ok: Sequence[int] = (0,), text: str | None = None) -> str:
    """What `pneumofed ARGUMENTS` printed on its standard output; the test fails on another exit code than `ok`."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=text)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in ok, f"{result.exit_code}: {result.output}"
    return result.stdout


def read_json(name: str) -> Any:
    """A JSON file beside the archives."""
    return json.loads((VERSION / f"{name}.json").read_text())
