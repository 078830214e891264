"""Pages and forms are files, and one module renders them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from jinja2 import TemplateNotFound, UndefinedError

from pneumofed.common.ops.render import render

ROOT = Path(__file__).resolve().parents[3]
PRODUCT = [
    path
    for package in ("client", "common", "inference", "server", "simulation")
    for path in sorted((ROOT / package).rglob("*.py"))
]
DOCUMENT = re.compile(r"<html|<!doctype|<body|^\[Unit\]|^\s*server \{|^services:\n", re.IGNORECASE | re.MULTILINE)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package with templates of its own, as it lies where it is installed."""
    folder = tmp_path / "fixture_package" / "templates"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    (folder / "page.html").write_text('{% extends "base.html" %}\n{% block title %}{{ title }}{% endblock %}\n')
    (folder / "form.conf").write_text("{% if on %}\nname {{ title | loud }};\n{% endif %}\nend\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "fixture_package"


def test_a_page_is_escaped_and_stands_in_the_shared_frame(package: str) -> None:
    page = render(package, "page.html", title="<b>&")
    assert "<title>&lt;b&gt;&amp;</title>" in page
    assert "--ink:" in page and page.startswith("<!DOCTYPE html>")


def test_a_form_is_taken_as_it_is_and_keeps_its_last_line(package: str) -> None:
    assert render(package, "form.conf", {"loud": str.upper}, on=True, title="<b>&") == "name <B>&;\nend\n"


def test_a_value_that_was_forgotten_is_an_error(package: str) -> None:
    with pytest.raises(UndefinedError, match="title"):
        render(package, "page.html")
    with pytest.raises(TemplateNotFound):
        render(package, "nothing.html")


def test_no_python_file_holds_a_page_or_makes_an_environment() -> None:
    pages, makers = [], []
    for path in PRODUCT:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
        imports = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imports |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        pages += [path.name for text in texts if DOCUMENT.search(text)]
        makers += [path.name for name in imports if name and name.partition(".")[0] in ("jinja2", "markupsafe")]
    assert not pages
    assert makers == ["render.py"]


def test_every_template_is_listed_for_the_wheel() -> None:
    listed = re.findall(r"^recursive-include pneumofed/(\S+/templates) \*$", (ROOT / "MANIFEST.in").read_text(), re.MULTILINE)
    found = {
        str(path.relative_to(ROOT))
        for package in ("client", "common", "inference", "server", "simulation")
        for path in (ROOT / package).rglob("templates")
    }
    assert found == set(listed)
