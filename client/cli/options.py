"""What the commands of `pneumofed site data` share: options, the report that they print, their exit codes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pneumofed.common.errors import ArchiveError, ConfigError, DataError, EmptySiteError, PneumofedError
from pneumofed.common.ops.command_line import FAILURE, UNREACHABLE, USAGE_ERROR, exit_on_error, print_json, say

if TYPE_CHECKING:
    from pneumofed.client.site.folder import SiteFolder
    from pneumofed.common.data.manifest import Manifest
    from pneumofed.common.data.report import DataReport


LabelTable = Annotated[
    Path, typer.Option("--labels", help="CSV with a column label and AccessionNumber, StudyInstanceUID or SOPInstanceUID.")
]
AllViews = Annotated[bool, typer.Option("--all-views", help="Lateral and oblique views too.")]


def finish(
    site: SiteFolder, manifest: Manifest, report: DataReport, as_json: bool, stopped: PneumofedError | None = None
) -> None:
    """Merges the manifest and shows the report; what arrived before an import was stopped is added too."""
    from pneumofed.client.data.manifest_update import merge_images

    addition = merge_images(site, manifest, report).describe()
    if stopped is not None:
        addition["stopped"] = str(stopped)
    show_report(addition, as_json)
    if stopped is not None:
        raise stopped if not as_json else typer.Exit(_exit_code(stopped))
    if not report.used:
        raise typer.Exit(FAILURE)


def show_report(report: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(report, indent=1)
        return
    say(f"{report['found']} images found, {report['used']} used, of {report['patients']} patients")
    for title in ("classes", "skipped", "warnings"):
        for name, count in report[title].items():
            say(f"  {title}: {name}: {count}")
    if "total" in report:
        changed = f"{report['added']} added, {report['updated']} updated, {report['unchanged']} unchanged"
        say(f"manifest: {changed}; {report['total']} images in all")


def exit_codes(as_json: bool) -> AbstractContextManager[None]:
    """Ends the command with one sentence and the code of its kind: 1 nothing usable, 2 wrong command or configuration, 3 archive."""
    return exit_on_error(_exit_code, as_json=as_json)


def _exit_code(error: PneumofedError) -> int:
    if isinstance(error, ArchiveError):
        return UNREACHABLE
    if isinstance(error, EmptySiteError):
        return FAILURE
    return USAGE_ERROR if isinstance(error, (ConfigError, DataError)) else FAILURE
