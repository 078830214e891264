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
        "client/gate.py",
        "client/supernode.py",
        "client/checks/node.py",
        "server/",
        "common/messages.py",
        "common/app_bundle.py",
        "common/secure_sum/messages.py",
    ),
    "opacus": ("client/privacy/", "common/privacy/"),
    "pydicom": ("common/dicom/", "client/archive/", "client/predict/archive/"),
    "highdicom": ("client/predict/archive/",),
    "pynetdicom": ("client/archive/",),
    "dicomweb_client": ("client/archive/",),
    "cryptography": ("common/keys.py", "common/secure_sum/", "server/provisioning/", "common/privacy/"),
    "sqlalchemy": ("common/database.py", "server/registry/", "client/reading_room/"),
    "alembic": ("common/database.py", "server/registry/migrations/", "client/reading_room/migrations/"),
    "fastapi": ("server/page/", "client/reading_room/"),
    "torchvision": ("common/torchvision_shim.py", "common/architectures.py", "common/weights.py"),
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
