"""Who may import whom: `common` none of ours, `client` and `server` only `common`, nobody `simulation` or `tests`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {"common": {"common"}, "client": {"client", "common"}, "server": {"server", "common"}}
DOORS = {
    "flwr": (
        "client/app.py",
        "client/site/code_gate.py",
        "client/site/supernode.py",
        "client/site/connection_checks.py",
        "server/",
        "common/wire/messages.py",
        "common/ops/app_bundle.py",
        "common/secure_aggregation/protocol.py",
    ),
    "opacus": ("client/privacy/", "common/privacy/"),
    "pydicom": ("common/dicom/", "client/archive/", "client/predict/archive/"),
    "highdicom": ("client/predict/archive/",),
    "pynetdicom": ("client/archive/",),
    "dicomweb_client": ("client/archive/",),
    "cryptography": ("common/wire/keys.py", "common/secure_sum/", "server/provisioning/", "common/privacy/"),
    "sqlalchemy": ("common/ops/database.py", "server/registry/", "client/reading_room/"),
    "alembic": ("common/ops/database.py", "server/registry/migrations/", "client/reading_room/migrations/"),
    "fastapi": ("server/page/", "client/reading_room/"),
    "torchvision": ("common/models/compute.py", "common/models/architectures.py", "common/models/build.py"),
}
OURS = {"common", "client", "server", "simulation", "tests"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_package_imports_only_what_it_may(package: str) -> None:
    wrong = {str(path): found for path in (ROOT / package).rglob("*.py") if (found := (imported(path) & OURS) - ALLOWED[package])}
    assert not wrong


@pytest.mark.parametrize("dependency", sorted(DOORS))
def test_heavy_dependency_has_one_door(dependency: str) -> None:
    files = [path for package in ALLOWED for path in (ROOT / package).rglob("*.py")]
    users = sorted(str(path.relative_to(ROOT)) for path in files if dependency in imported(path))
    assert not [user for user in users if not user.startswith(DOORS[dependency])]
