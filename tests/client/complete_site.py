"""A complete site folder for tests, made by hand as a hospital would."""

from __future__ import annotations

from pathlib import Path

from pneumofed.client.site.folder import SiteFolder
from pneumofed.client.site.init import init_by_hand
from pneumofed.common.data.manifest import write_manifest
from tests.tiny import draw_manifest


def make_site(folder: Path, coordinator: str = "localhost:1", ca: Path | None = None, patients: int = 16) -> SiteFolder:
    init_by_hand(folder, "north", coordinator, ca)
    write_manifest(draw_manifest(folder / "data" / "images", patients, seed=0), folder / "data" / "manifest.csv")
    return SiteFolder.open(folder)
