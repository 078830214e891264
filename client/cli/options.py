"""What the commands of `pneumofed site data` share: options, the report that they print, their exit codes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pneumofed.common.errors import ArchiveError, ConfigError, DataError, EmptySiteError, PneumofedError

if TYPE_CHECKING:
    from pneumofed.client.site.folder import SiteFolder
    from pneumofed.common.data.manifest import Manifest
    from pneumofed.common.data.report import DataReport


NOTHING_USABLE, USAGE_ERROR, UNREACHABLE = 1, 2, 3

Site = Annotated[Path, typer.Option("--site", "-C", help="The site's folder, with site.yaml.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
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
        raise typer.Exit(NOTHING_USABLE)


def show_report(report: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report, indent=1))
        return
    typer.echo(f"{report['found']} images found, {report['used']} used, of {report['patients']} patients")
    for title in ("classes", "skipped", "warnings"):
        for name, count in report[title].items():
            typer.echo(f"  {title}: {name}: {count}")
    if "total" in report:
        changed = f"{report['added']} added, {report['updated']} updated, {report['unchanged']} unchanged"
        typer.echo(f"manifest: {changed}; {report['total']} images in all")


@contextmanager
def exit_codes(as_json: bool) -> Iterator[None]:
    """Ends the command with one sentence and the code of its kind: 1 nothing usable, 2 wrong command or configuration, 3 archive."""
    try:
        yield
    except PneumofedError as error:
        if as_json:
            typer.echo(json.dumps({"error": type(error).__name__, "message": str(error)}, indent=1))
        typer.secho(f"pneumofed: {error}", fg="red", err=True)
        raise typer.Exit(_exit_code(error)) from None


def _exit_code(error: PneumofedError) -> int:
    if isinstance(error, ArchiveError):
        return UNREACHABLE
    if isinstance(error, EmptySiteError):
        return NOTHING_USABLE
    return USAGE_ERROR if isinstance(error, (ConfigError, DataError)) else NOTHING_USABLE
