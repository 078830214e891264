"""The Flower app as a folder of its own: what `flwr run` bundles and its workers run from, and the hash that a hospital approves.

It holds the modules that the two apps can import and nothing else: the closure of their import statements, function-level ones
included, so that a hospital approves the code that can run there, and a change anywhere else leaves the hash as it is.
"""

from __future__ import annotations

import ast
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from pneumofed.common.ops.study_code import FOLDER, StudyCode, write_codes

PACKAGE = "pneumofed"
APPS = {"serverapp": "pneumofed.server.app", "clientapp": "pneumofed.client.app"}
ROOT_INIT = '"""pneumofed, as far as its two Flower apps need it."""\n'
"""The bundle's `pneumofed/__init__.py`: the public Python API, which stands in the installed one, is no part of the apps."""
PROJECT = """\
[project]
name = "pneumofed"
version = "{version}"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "pneumofed"
fab-include = ["pneumofed/**/*.py"]

[tool.flwr.app.components]
serverapp = "{serverapp}:app"
clientapp = "{clientapp}:app"

[tool.flwr.app.config]
experiment = ""
coordinator = ""
sites = ""
"""


def write_app(folder: Path, codes: Sequence[StudyCode] = ()) -> Path:
    """Writes the installed code of the two apps into `folder` with a project file.

    Args:
        folder: made if missing.
        codes: a study's own networks and losses, which become part of the app, with what they import of ours.

    Returns:
        `folder`.
    """
    imported = {name for code in codes for name in _modules_named(code.source)}
    for name in sorted(import_closure(*APPS.values(), *imported)):
        source = module_file(name)
        assert source is not None  # the closure holds our own modules only
        target = folder.joinpath(*name.split("."))
        target = target / "__init__.py" if source.name == "__init__.py" else target.with_suffix(".py")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(ROOT_INIT.encode() if name == PACKAGE else source.read_bytes())
    write_codes(folder / PACKAGE / FOLDER, codes)
    (folder / "pyproject.toml").write_text(PROJECT.format(version=version("pneumofed"), **APPS), encoding="utf-8")
    return folder


def build_bundle(codes: Sequence[StudyCode] = ()) -> bytes:
    """Builds the app bundle (FAB) of the installed code, as `flwr run` would send it: the same code gives the same bytes.

    Args:
        codes: a study's own networks and losses, which become part of it.
    """
    from flwr.cli.build import build_fab_from_disk

    with tempfile.TemporaryDirectory(prefix="pneumofed-bundle-") as name:
        content: bytes = build_fab_from_disk(write_app(Path(name) / "pneumofed", codes))
    return content


def hash_bundle(content: bytes) -> str:
    """Computes the SHA-256 of a bundle in hexadecimal: Flower's `fab_hash`."""
    return hashlib.sha256(content).hexdigest()


def import_closure(*roots: str) -> frozenset[str]:
    """Collects our modules that importing `roots` can reach, with the packages that hold them; nothing is imported.

    Import statements count wherever they stand, but not below `if TYPE_CHECKING:`.
    """
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name in found or module_file(name) is None:
            continue
        found.add(name)
        waiting.append(name.rpartition(".")[0])
        if name != PACKAGE:  # its lazy attributes are the public API, see ROOT_INIT
            waiting.extend(imported_modules(name))
    return frozenset(found)


@cache
def imported_modules(name: str) -> frozenset[str]:
    """Collects our modules that the import statements of the module `name` name."""
    path = module_file(name)
    assert path is not None
    return _modules_named(path.read_bytes())


def _modules_named(source: bytes) -> frozenset[str]:
    found: set[str] = set()
    for node in _reachable(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(module for module in found if module_file(module) is not None)


@cache
def module_file(name: str) -> Path | None:
    """Finds the file of our module or package `name` ("pneumofed.client.app"); None where there is none, or `name` is not ours."""
    first, *rest = name.split(".")
    if first != PACKAGE:
        return None
    path = package_folder().joinpath(*rest)
    candidates = (path / "__init__.py", path.with_suffix(".py")) if rest else (path / "__init__.py",)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


@cache
def package_folder() -> Path:
    """Finds the folder of the installed package `pneumofed`."""
    spec = find_spec(PACKAGE)
    assert spec is not None and spec.origin is not None  # this module is a part of it
    folder = Path(spec.origin).parent
    return folder if (folder / "common").is_dir() else folder.parent  # `flwr build` puts the houses beside the package


def _reachable(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            yield from (part for statement in child.orelse for part in (statement, *_reachable(statement)))
        else:
            yield child
            yield from _reachable(child)
