"""docs/governance.md keeps its word: its promises stand on the pages that it quotes, and every test that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECTION = re.compile(r"^## (.+?)$\n\nOn the page \[([\w./-]+)\]\(", re.MULTILINE)
ROW = re.compile(r"^\| (?!promise \|)(.+?) \| (`tests/.+`) \|$", re.MULTILINE)


def promises() -> list[tuple[str, str, list[str]]]:
    """(page, promise, tests) of every row of the tables."""
    text = (ROOT / "docs" / "governance.md").read_text()
    sections = list(SECTION.finditer(text))
    ends = [section.start() for section in sections[1:]] + [len(text)]
    return [
        (section[2], row[1], re.findall(r"`([^`]+)`", row[2]))
        for section, end in zip(sections, ends, strict=True)
        for row in ROW.finditer(text, section.end(), end)
    ]


def plain(text: str) -> str:
    """The words of a page on one line, without comment signs of its code blocks."""
    return " ".join(re.sub(r"^\s*#(?= )", " ", text, flags=re.MULTILINE).split())


def test_every_row_of_every_table_is_read() -> None:
    rows = (ROOT / "docs" / "governance.md").read_text().count("\n| ")
    tables = len({page for page, _, _ in promises()})
    assert tables == 3 and len(promises()) == rows - tables >= 50


@pytest.mark.parametrize(("page", "promise"), [(page, promise) for page, promise, _ in promises()])
def test_a_promise_stands_on_its_page_as_it_is_quoted(page: str, promise: str) -> None:
    assert promise in plain((ROOT / page).read_text())


@pytest.mark.parametrize("named", sorted({test for _, _, tests in promises() for test in tests}))
def test_a_test_that_is_named_exists(named: str) -> None:
    file, _, name = named.partition("::")
    defined = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert name in defined


def test_a_name_that_is_missing_would_be_noticed() -> None:
    with pytest.raises(AssertionError):
        test_a_test_that_is_named_exists("tests/test_governance.py::test_of_nothing")
    with pytest.raises(FileNotFoundError):
        test_a_test_that_is_named_exists("tests/test_nowhere.py::test_of_nothing")
