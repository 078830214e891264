"""An approved app bundle on its way to being run: unpacked under its whole hash, and kept apart from the installed code."""

from __future__ import annotations

import sys
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path

from common.app_bundle import PACKAGES


def unpack(folder: Path, content: bytes, install: Callable[..., Path]) -> Path:
    """`folder` with the unpacked bundle in it, which appears whole or not at all. `install` is Flower's `install_from_fab`."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as name:
        unpacked = Path(install(content, install_dir=Path(name), skip_prompt=True))
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return folder


def app_reference(unpacked: Path) -> str:
    """Which object of the bundle is the app, by its own project file; what the coordinator says of the bundle counts for nothing."""
    project = tomllib.loads((unpacked / "pyproject.toml").read_text(encoding="utf-8"))
    return str(project["tool"]["flwr"]["app"]["components"]["clientapp"])


def forget_our_modules() -> None:
    """Makes the next import of `client`, `common` or `server` look for them anew."""
    for module in [module for module in sys.modules if module.partition(".")[0] in PACKAGES]:
        del sys.modules[module]
