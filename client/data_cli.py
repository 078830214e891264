"""`pneumofed site data`: a hospital's images, from folders, tables and the archive, into its manifest, and their check."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from client import data_add_cli, data_archive_cli
from client.data_output import Json, Site, exit_codes, show_report
from common.config_types import TaskName
from common.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="The site's images: add them to its manifest, remove them, and check them.")
add = typer.Typer(
    no_args_is_help=True, help="Add images to the site's manifest. Images that are there already are not added twice."
)
add.add_typer(data_add_cli.app)
add.add_typer(data_archive_cli.app)
app.add_typer(add, name="add")


@app.command()
def check(
    task: Annotated[TaskName, typer.Option(help="Decides which labels have a class.")] = "binary",
    size: Annotated[int, typer.Option(min=32, max=1024, help="Side in pixels, as the run will have it.")] = 128,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read and decode.")] = 1,
    site: Site = Path(),
    as_json: Json = False,
) -> None:
    """Read and decode every image of the manifest as training would, and say what cannot be used and why."""
    with exit_codes(as_json):
        from client.folder import SiteFolder
        from common.config import ImageConfig
        from common.data.dataset import SKIPPED, load_dataset
        from common.data.manifest import read_manifest

        opened = SiteFolder.open(site)
        cache = Path(opened.config.work_dir) / "cache"
        dataset = load_dataset(read_manifest(opened.manifest), task, ImageConfig(size_px=size), cache, workers=workers)
        show_report(dataset.report.public(), as_json)
        if dataset.report.skipped and not as_json:
            typer.echo(f"which ones: {cache / SKIPPED}")


@app.command()
def remove(
    patients: Annotated[
        Path, typer.Option("--patients", help="File with a patient number (the hospital's own) a line; - is the standard input.")
    ],
    site: Site = Path(),
    as_json: Json = False,
) -> None:
    """Take out patients who have withdrawn: rows, copies and decoded images. They are not added again."""
    with exit_codes(as_json):
        from client.data_remove import remove_patients
        from client.folder import SiteFolder

        removal = remove_patients(SiteFolder.open(site), _lines(patients)).describe()
        if as_json:
            typer.echo(json.dumps(removal, indent=1))
            return
        typer.echo(f"{removal['patients']} patients removed: {removal['rows']} rows, {removal['files']} copies of images")
        typer.echo(f"manifest: {removal['total']} images are left. Models that were trained before still hold what they learnt.")


def _lines(file: Path) -> list[str]:
    """Patient numbers are no arguments: these would stay in the shell's history and show in the list of processes."""
    try:
        return sys.stdin.read().splitlines() if file == Path("-") else file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ConfigError("--patients: the file cannot be read as text; give one patient number a line") from None
