"""A site folder for the tests of `pneumofed site data`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from pneumofed.cli.main import app
from pneumofed.common.data.manifest import Manifest, read_manifest


def make_site(folder: Path) -> Path:
    """Writes `site.yaml` into `folder` and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "site.yaml").write_text("name: north\nmanifest: data/manifest.csv\nwork_dir: work\n")
    return folder


def run_data(site: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """(exit code, report) of `pneumofed site data ARGUMENTS --site SITE --json`; an empty report where none was printed."""
    result = CliRunner().invoke(app, ["site", "data", *arguments, "--site", str(site), "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    text = result.stdout.strip()
    return result.exit_code, json.loads(text) if text else {}


def manifest_of(site: Path) -> Manifest:
    return read_manifest(site / "data" / "manifest.csv")
