"""The architecture page and its picture say what the code is."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
PAGES = (PAGE, ROOT / "README.md", ROOT / "CONTRIBUTING.md")
DRAW_ANEW = "docs/architecture.md is behind the code: run `.venv/bin/python docs/draw_architecture.py` and look at the picture"
BLOCK = re.compile(r"^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    """The script that draws the picture."""
    spec = importlib.util.spec_from_file_location("draw_architecture", ROOT / "docs" / "draw_architecture.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_shows_the_folders_and_imports_of_the_code(drawing: ModuleType) -> None:
    """Exactly, but for the numbers of imports, which may be off by a tenth, so that not every commit draws it anew."""
    recorded, now = json.loads(drawing.FACTS.read_text(encoding="utf-8")), drawing.read_facts()
    assert recorded["folders"] == now["folders"], DRAW_ANEW
    assert recorded["imports"].keys() == now["imports"].keys(), DRAW_ANEW
    far = {arrow for arrow, count in now["imports"].items() if abs(recorded["imports"][arrow] - count) > max(3, 0.1 * count)}
    assert not far, DRAW_ANEW


def test_the_picture_was_drawn_from_what_is_recorded(drawing: ModuleType) -> None:
    with Image.open(drawing.PICTURE) as picture:
        assert json.loads(picture.info["Description"]) == json.loads(drawing.FACTS.read_text(encoding="utf-8")), DRAW_ANEW


def test_every_import_between_houses_has_a_place_in_the_picture(drawing: ModuleType, tmp_path: Path) -> None:
    drawing.draw(drawing.read_facts(), tmp_path / "picture.png")


def test_the_page_lists_every_folder_once(drawing: ModuleType) -> None:
    own = drawing.OWN_FILES
    folders = {
        f"{house}/" if folder == own else f"{house}/{folder}/"
        for house, found in drawing.read_facts()["folders"].items()
        for folder in found
    }
    rows = re.findall(r"^\| `([a-z_/]+/)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(folders)


def test_every_call_on_the_page_is_in_the_code() -> None:
    """A line of a call tree is `path  name, name  what it does`, the columns two or more spaces apart."""
    lines = [line for block in BLOCK.findall(PAGE.read_text(encoding="utf-8")) for line in block.splitlines()]
    assert len(lines) > 30
    wrong = []
    for line in lines:
        path, names = line.split(maxsplit=1)
        wrong += [f"{path}: {name}" for name in re.split(r"\s{2,}", names)[0].split(", ") if name not in _definitions(path)]
    assert not wrong


FOLDERS = {"pneumofed", "client", "common", "inference", "server", "simulation", "tests", "configs", "benchmarks", "docs"}
"""Of the repository; `runs/` and the like appear in a checkout when it is used."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_on_a_page_exists(page: Path) -> None:
    """In code marks, whatever begins with a folder of the repository; and where the page's own links lead."""
    text = page.read_text(encoding="utf-8")
    named = {path for path in re.findall(r"`([a-z_]+/[\w./-]*)`", text) if path.split("/")[0] in FOLDERS}
    links = {link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link}
    missing = sorted(path for path in named if not (ROOT / path).exists())
    missing += sorted(link for link in links if not (page.parent / link).exists())
    assert not missing


def test_the_names_of_the_three_changes_are_in_the_code() -> None:
    text = PAGE.read_text(encoding="utf-8").partition("## Three changes")[2].partition("## ")[0]
    files = set(re.findall(r"`([a-z_]+/[\w/]+\.py)`", text))
    known = set().union(*(_definitions(path) for path in files))
    known |= (
        {Path(path).stem for path in files}
        | _definitions("common/data/sources/table.py")
        | _definitions("common/data/manifest.py")
    )
    named = set(re.findall(r"`([A-Za-z_]{4,})`", text)) - {"fedhalf"}
    assert len(named) > 20
    assert not sorted(named - known)


@cache
def _definitions(path: str) -> set[str]:
    """Names at the top of a module, and its classes' methods as `Class.method`."""
    found = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{one.name}" for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)}
        targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets if isinstance(node, ast.Assign) else []
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found
