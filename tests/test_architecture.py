"""The rules of the house: who may import whom, one meaning a name, no circles, and an app bundle of federated code only."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from pneumofed.common.ops.app_bundle import APPS, build_bundle, hash_bundle, import_closure, imported_modules, package_folder

ROOT = Path(__file__).resolve().parents[1]
HOUSES = ("common", "client", "server", "inference", "simulation")
MAY_IMPORT = {
    "common": {"common"},
    "client": {"client", "common"},
    "server": {"server", "common"},
    "inference": {"inference", "common"},
    "simulation": {"simulation", "server", "client", "inference", "common"},
}
"""What each house may import of ours. The package's own files (API, root of the command line) may import all of them."""
HANDS_LABELS_OVER = ("pneumofed.inference.reading_room.labels", "pneumofed.client.site.folder")
"""The one place where a finished model's reading room speaks to the site: readers' corrections become labels."""
DOORS = {
    "flwr": (
        "client/app.py",
        "client/site/code_gate.py",
        "client/site/supernode.py",
        "client/site/preflight.py",
        "server/",
        "common/wire/",
        "common/ops/app_bundle.py",
        "common/secure_aggregation/protocol.py",
        "simulation/",
    ),
    "opacus": ("client/privacy/", "common/privacy/"),
    "pydicom": (
        "common/imaging/",
        "client/archive/",
        "inference/predict/dicom_objects.py",
        "inference/predict/dicom_contents.py",
        "inference/reading_room/image_facts.py",
        "simulation/phantoms/",
        "simulation/hospitals/",
        "pneumofed/",
    ),
    "highdicom": ("inference/predict/dicom_objects.py",),
    "pynetdicom": ("client/archive/",),
    "cryptography": (
        "common/wire/keys.py",
        "common/ops/encryption.py",
        "common/secure_aggregation/",
        "server/provisioning/",
        "common/privacy/",
    ),
    "sqlalchemy": ("common/ops/database.py", "server/runs/", "server/operations/superlink.py", "inference/reading_room/"),
    "alembic": ("common/ops/database.py", "server/runs/migrations/", "inference/reading_room/migrations/"),
    "fastapi": ("server/dashboard/", "inference/reading_room/"),
    "jinja2": ("common/ops/",),
    "captum": ("inference/explain/",),
    "torchvision": ("common/models/",),
    "tensorboard": ("server/tracking/tensorboard.py",),
}
"""Who may import a heavy dependency: one subject each, so that replacing it touches one place."""
SAME_NAME = {
    "upgrade": "Alembic calls it by this name in every migration",
    "downgrade": "Alembic calls it by this name in every migration",
    "main": "the entry of a command",
}
"""Public names that stand in more than one module, and why."""


STAYS_IN_COMMON = {
    "pneumofed.common.data.sources.dicom": "the readers of image collections stand together, whoever calls which",
}
"""Modules of `common` that one house uses today, and why they stay."""


def python_files() -> list[Path]:
    own = [path for path in (ROOT / "pneumofed").rglob("*.py") if not any(part.is_symlink() for part in path.parents)]
    return sorted([path for house in HOUSES for path in (ROOT / house).rglob("*.py")] + own)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "pneumofed" else ("pneumofed", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


MODULES = {module_name(path): path for path in python_files()}


def house(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in HOUSES else "pneumofed"


@cache
def third_party(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules that import one another, by Tarjan's algorithm (1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_the_search_for_circles_finds_one() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [["a", "b", "c"]]


def test_no_circle_of_imports() -> None:
    graph = {name: {other for other in imported_modules(name) if other in MODULES and other != name} for name in MODULES}
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    for name in graph:  # `from package import module` names both; the package is a docstring
        graph[name] -= packages - {"pneumofed"}
    assert circles(graph) == []


@pytest.mark.parametrize("folder", HOUSES)
def test_a_house_imports_only_what_it_may(folder: str) -> None:
    wrong = {
        f"{name} -> {other}"
        for name in MODULES
        if house(name) == folder
        for other in imported_modules(name)
        if house(other) not in MAY_IMPORT[folder] and other not in ("pneumofed", f"pneumofed.{house(other)}")
        if name != HANDS_LABELS_OVER[0] or not HANDS_LABELS_OVER[1].startswith(other)
    }
    assert not wrong


def test_the_folders_are_imported_under_one_name() -> None:
    paths = [*MODULES.values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    named = re.compile(rf"^\s*(?:from|import)\b.*(?<![.\w])(?:{'|'.join(HOUSES)})\b", re.MULTILINE)
    paths = [path for path in paths if named.search(path.read_text(encoding="utf-8"))]  # to parse all of them takes ten seconds
    wrong = {str(path.relative_to(ROOT)): names for path in paths if (names := third_party(path) & set(HOUSES))}
    assert not wrong
    product = {name for name, path in MODULES.items() if "tests" in third_party(path)}
    assert not product


@pytest.mark.parametrize("dependency", sorted(DOORS))
def test_a_heavy_dependency_has_one_door(dependency: str) -> None:
    users = sorted(str(path.relative_to(ROOT)) for path in MODULES.values() if dependency in third_party(path))
    assert not [user for user in users if not user.startswith(DOORS[dependency])]


def public_names() -> dict[str, list[str]]:
    places = defaultdict(list)
    for name, path in MODULES.items():
        for node in tree(path).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(name)
    return places


def test_a_public_name_means_one_thing() -> None:
    twice = {name: places for name, places in public_names().items() if len(places) > 1 and name not in SAME_NAME}
    assert not twice
    assert all(len(public_names()[name]) > 1 for name in SAME_NAME), "the allow-list names what stands once"


def test_common_is_what_more_than_one_house_uses() -> None:
    users = defaultdict(set)
    for name in MODULES:
        for other in imported_modules(name):
            users[other].add(house(name))
    reached = {
        name: {one for user in _users_of(name) for one in users[user]} - {"common"}
        for name, path in MODULES.items()
        if house(name) == "common" and path.name != "__init__.py"
    }
    alone = {name: houses for name, houses in reached.items() if len(houses) < 2 and name not in STAYS_IN_COMMON}
    assert not alone


def _users_of(name: str) -> set[str]:
    """`name` and the modules of `common` that reach it."""
    return {other for other in MODULES if house(other) == "common" and name in import_closure(other)} | {name}


def test_the_app_bundle_is_the_closure_of_the_two_apps(tmp_path: Path) -> None:
    from pneumofed.common.ops.app_bundle import write_app

    written = {module_name_in(tmp_path, path) for path in write_app(tmp_path).rglob("*.py")}
    assert written == import_closure(*APPS.values())
    strangers = {name for name in written if house(name) in ("inference", "simulation") or ".cli." in f"{name}."}
    outside = tuple(
        f"pneumofed.server.{part}" for part in ("dashboard", "report", "export", "provisioning", "release", "tracking")
    )
    strangers |= {name for name in written if name.startswith(outside)}
    assert not strangers
    used = set().union(*(third_party(MODULES[name]) for name in written if name != "pneumofed"))
    assert not used & {"jinja2", "matplotlib", "typer", "rich", "fastapi", "sqlalchemy", "pynetdicom", "highdicom", "onnxruntime"}


def test_the_apps_bring_no_page_no_accountant_and_no_compiler_into_their_process() -> None:
    """Opacus costs a second and is loaded where privacy is accounted; torch's compiler costs as much, and nothing uses it."""
    modules = "{'jinja2', 'matplotlib', 'opacus', 'torch._dynamo', 'sympy'} & set(sys.modules)"
    code = f"import sys, pneumofed.client.app, pneumofed.server.app; print(*({modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.split()


def module_name_in(folder: Path, path: Path) -> str:
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_a_change_outside_the_apps_leaves_the_hash_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A copy of the package gives the installed hash; with every file outside the closure changed, the same; inside, another."""
    from pneumofed.common.ops import app_bundle

    folder = tmp_path / "pneumofed"
    for name, path in MODULES.items():
        target = folder.joinpath(*name.split(".")[1:])
        target = target / "__init__.py" if path.name == "__init__.py" else target.with_suffix(".py")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    installed = hash_bundle(build_bundle())
    closure = import_closure(*APPS.values())
    inside = package_folder() / "client" / "app.py"
    assert inside.is_file()
    monkeypatch.setattr(app_bundle, "package_folder", lambda: folder)
    for cached in (app_bundle.module_file, app_bundle.imported_modules):
        cached.cache_clear()
    try:
        assert hash_bundle(build_bundle()) == installed
        outside = [name for name in MODULES if name not in closure]
        assert len(outside) > 100
        for name in outside:
            copied = app_bundle.module_file(name)
            assert copied is not None
            copied.write_bytes(copied.read_bytes() + b"# another\n")
        (folder / "__init__.py").write_bytes((folder / "__init__.py").read_bytes() + b"# another\n")
        assert hash_bundle(build_bundle()) == installed
        app = folder / "client" / "app.py"
        app.write_bytes(app.read_bytes() + b"# another\n")
        assert hash_bundle(build_bundle()) != installed
    finally:
        for cached in (app_bundle.module_file, app_bundle.imported_modules):
            cached.cache_clear()


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def public_functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions at the top of a module and methods of its public classes, as a reader of the module uses them."""
    for node in tree(path).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from (
                one
                for one in node.body
                if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef) and not one.name.startswith("_")
            )


def arguments_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    spec = function.args
    every = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *(one for one in (spec.vararg, spec.kwarg) if one)]
    return [one.arg for one in every if one.arg not in ("self", "cls")]


def is_command(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Commands and routes: their arguments are documented where the framework reads it, in `Annotated`."""
    annotations = [one.annotation for one in [*function.args.args, *function.args.kwonlyargs] if one.annotation]
    calls = [
        one.func.attr for one in function.decorator_list if isinstance(one, ast.Call) and isinstance(one.func, ast.Attribute)
    ]
    return any("Annotated" in ast.dump(one) for one in annotations) or bool(
        {"command", "get", "post", "put", "delete"} & set(calls)
    )


def test_public_functions_of_two_or_more_arguments_document_them() -> None:
    found = [
        (f"{name}.{function.name}", "Args:" in (ast.get_docstring(function) or ""))
        for name, path in MODULES.items()
        for function in public_functions(path)
        if len(arguments_of(function)) >= 2 and not is_command(function)
    ]
    missing = sorted(name for name, documented in found if not documented)
    assert len(missing) <= 0.1 * len(found), f"{len(missing)} of {len(found)}: {missing}"


def test_documented_arguments_exist() -> None:
    wrong = []
    for name, path in MODULES.items():
        for function in functions(path):
            text = ast.get_docstring(function) or ""
            if "Args:" in text:
                block = text.partition("Args:\n")[2]
                for line in block.splitlines():
                    if line and not line.startswith("    "):
                        break
                    if line.startswith("    ") and not line.startswith("     ") and ":" in line:
                        names = [one.strip("* `") for one in line.partition(":")[0].split(",")]
                        wrong += [f"{name}.{function.name}: {one}" for one in names if one not in arguments_of(function)]
    assert not wrong


def test_every_file_says_what_it_is_about() -> None:
    files = [*MODULES.values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    silent = [path for path in files if (text := path.read_text(encoding="utf-8")) and not re.match(r'r?"""[^"]', text)]
    assert [path for path in silent if path.name != "__init__.py"] == []


def test_size_of_the_house() -> None:
    """Files are subjects: as many as there are, and of a length that one sitting takes."""
    lines = sorted(len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES.values() if path.name != "__init__.py")
    assert len(lines) <= 326
    assert 150 <= statistics.median(lines) <= 240
    assert lines[int(0.9 * len(lines))] < 350


def test_no_new_long_function() -> None:
    long = sorted(
        f"{name}.{function.name}" for name, path in MODULES.items() for function in functions(path) if _code_lines(function) > 40
    )
    assert long == LONG_FUNCTIONS


def _code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines without the docstring."""
    assert function.end_lineno is not None
    docstring = function.body[0] if ast.get_docstring(function) else None
    skipped = (docstring.end_lineno or 0) - docstring.lineno + 1 if docstring else 0
    return function.end_lineno - function.lineno + 1 - skipped


LONG_FUNCTIONS = [
    "pneumofed.cli.main.simulate_command",
    "pneumofed.cli.release.release",
    "pneumofed.client.cli.archive.add_dimse",
    "pneumofed.runs.simulate",
    "pneumofed.server.export.export._build",
    "pneumofed.server.export.graph.monai_metadata",
]
"""Longer than 40 lines without their docstring; the list may only get shorter."""
