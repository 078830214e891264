"""The Flower app as a folder of its own: what `flwr run` bundles and its workers run from.

Not the checkout: Flower would look through all of it, and workers started in another checkout would mix two versions of packages
with names as plain as `client` and `common`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import client
import common
import server

PROJECT = """\
[project]
name = "pneumofed"
version = "{version}"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "pneumofed"
fab-include = ["client/**/*.py", "common/**/*.py", "server/**/*.py"]

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
experiment = ""
coordinator = ""
sites = ""
"""


def write_app(folder: Path) -> Path:
    """Copies the running code of `client`, `common` and `server` into `folder` with a project file, and returns `folder`."""
    from importlib.metadata import version

    for package in (client, common, server):
        source = Path(str(package.__file__)).parent
        shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    (folder / "pyproject.toml").write_text(PROJECT.format(version=version("pneumofed")), encoding="utf-8")
    return folder
