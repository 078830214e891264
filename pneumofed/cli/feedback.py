"""`pneumofed site data feedback`: from a reading room, or its export, into a site's manifest. It joins the room with the site."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from pneumofed.client.cli.archive import exit_codes
from pneumofed.common.ops.command_line import Json, Site, print_json, say

ROOM = "room.yaml"
"""What makes a folder a reading room."""


def feedback(
    export: Annotated[
        Path, typer.Argument(help="The reading room's folder, or its export of labels (CSV, or a folder with labels.csv).")
    ],
    site: Site = Path(),
    as_json: Json = False,
) -> None:
    """Take the readers' labels into the manifest: corrections of images that are there, and new cases."""
    with exit_codes(as_json):
        from pneumofed.client.data.feedback import add_feedback
        from pneumofed.client.site.folder import SiteFolder
        from pneumofed.common.audit.log import LABELS_TAKEN

        folder = SiteFolder.open(site)
        with readers_export(export) as table:
            told = add_feedback(folder, table).describe()
        changed = {name: told[name] for name in ("found", "added", "corrected", "confirmed", "set_aside", "total")}
        folder.audit.record(LABELS_TAKEN, **changed)
        if as_json:
            print_json(told, indent=1)
            return
        say(
            f"{told['found']} images read: {told['added']} added, {told['corrected']} labels corrected, "
            f"{told['confirmed']} confirmed, {told['set_aside']} set aside"
        )
        for reason, count in told["skipped"].items():
            say(f"  unchanged: {reason}: {count}")
        share = told["read"] / told["total"] if told["total"] else 0.0
        say(f"manifest: {told['total']} images, {told['read']} of them ({share:.0%}) from readers, who choose their cases")


def readers_export(path: Path) -> AbstractContextManager[Path]:
    """The table of readers' labels: `path` itself, or that of the reading room whose folder it is, for as long as the block lasts.

    Raises:
        ConfigError: the room, its database or the key of its pseudonyms cannot be used.
    """
    if not (path / ROOM).is_file():
        return nullcontext(path)
    from pneumofed.inference.reading_room.labels import export_of_room  # SQLAlchemy, for those only who have a room

    return export_of_room(path)
