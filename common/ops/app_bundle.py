"""The Flower app as a folder of its own: what `flwr run` bundles and its workers run from, and the hash that a hospital approves.

Not the checkout: Flower would look through all of it, and workers started in another checkout would mix two versions of packages
with names as plain as `client` and `common`.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("client", "common", "server")
PROJECT = """\
[project]
name = "pneumofed"
version = "{version}"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "pneumofed"
fab-include = ["client/**/*.py", "common/**/*.py", "server/**/*.py"]

[tool.flwr.app.components]
serverapp = "pneumofed.server.app:app"
clientapp = "pneumofed.client.app:app"

[tool.flwr.app.config]
experiment = ""
coordinator = ""
sites = ""
"""


def write_app(folder: Path) -> Path:
    """Copies the installed code of `client`, `common` and `server` into `folder` with a project file, and returns `folder`."""
    for package in PACKAGES:
        shutil.copytree(_package_dir(package), folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    (folder / "pyproject.toml").write_text(PROJECT.format(version=version("pneumofed")), encoding="utf-8")
    return folder


def build_bundle() -> bytes:
    """The app bundle (FAB) of the installed code, as `flwr run` would send it: the same code gives the same bytes."""
    from flwr.cli.build import build_fab_from_disk

    with tempfile.TemporaryDirectory(prefix="pneumofed-bundle-") as name:
        content: bytes = build_fab_from_disk(write_app(Path(name) / "pneumofed"))
    return content


def hash_bundle(content: bytes) -> str:
    """SHA-256 of a bundle in hexadecimal: Flower's `fab_hash`."""
    return hashlib.sha256(content).hexdigest()


def _package_dir(package: str) -> Path:
    spec = find_spec(package)  # finds without importing, which would cost seconds
    assert spec is not None and spec.origin is not None  # our own packages are installed together
    return Path(spec.origin).parent
