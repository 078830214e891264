"""Every table that is written for people: CSV in which no cell is a formula, and which gives back what was written.

A spreadsheet runs a cell that begins with `=`, `+`, `-` or `@` (OWASP, "CSV Injection"). Names, paths and labels come from files and
readers, so such a cell gets an apostrophe in front, which the spreadsheet takes as "this is text" and `restore_cell` takes away. A cell
with control characters, or one that another separator would split so that a part begins with such a sign, is written with escapes behind
`'\\`. Numbers stay numbers.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from pneumofed.common.printable import CONTROLS

_FORMULA = r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]"
"""The full-width forms count too: spreadsheets in East Asian languages take them as the signs."""
_STARTS_FORMULA = re.compile(_FORMULA)
_IS_QUOTED = re.compile(rf"'(?:['\\]|{_FORMULA})")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_ESCAPED = re.compile(rf"[{CONTROLS}\\]|(?<=[,;|])\s*[=+\-@\uff1d\uff0b\uff0d\uff20]")
_HIDDEN = re.compile(rf"[{CONTROLS}]|[,;|]{_FORMULA}")
_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|\\)")


class TextSink(Protocol):
    """Takes text, as a file does."""

    def write(self, text: str, /) -> object: ...


class TableWriter:
    """Writes the rows of a CSV table, each cell neutralised; open a file for it with `newline=""`."""

    def __init__(self, file: TextSink) -> None:
        self._writer = csv.writer(file)

    def write(self, cells: Iterable[Any]) -> None:
        """Writes one row; None is an empty cell, a number is written as it is."""
        self._writer.writerow([neutralize_cell(cell) if isinstance(cell, str) else _plain(cell) for cell in cells])

    def write_all(self, rows: Iterable[Iterable[Any]]) -> None:
        """Writes `rows`, one after the other."""
        for row in rows:
            self.write(row)


def read_table(file: Iterable[str], delimiter: str = ",") -> Iterator[list[str]]:
    """Iterates over the rows of a table, each cell as it was before it was neutralised.

    Args:
        file: the lines; a table that somebody else wrote is read as it stands, but for cells that begin as neutralised ones do.
        delimiter: between cells.

    Raises:
        csv.Error: it is no well-formed CSV.
    """
    for row in csv.reader(file, delimiter=delimiter, strict=True):
        yield [restore_cell(cell) for cell in row]


def neutralize_cell(text: str) -> str:
    """Writes `text` so that a spreadsheet shows it and does nothing; most texts, and numbers, stay as they are."""
    if _NUMBER.fullmatch(text):
        return text
    if _HIDDEN.search(text):
        return "'\\" + _ESCAPED.sub(lambda found: "".join(map(_escape, found.group())), text)
    return f"'{text}" if _STARTS_FORMULA.match(text) or _IS_QUOTED.match(text) else text


def restore_cell(cell: str) -> str:
    """Returns the text that `neutralize_cell` was given."""
    if cell.startswith("'\\"):
        return _ESCAPE.sub(lambda found: chr(int(found[1] or found[2] or "5c", 16)), cell[2:])
    return cell[1:] if _IS_QUOTED.match(cell) else cell


def _escape(character: str) -> str:
    code = ord(character)
    return "\\\\" if character == "\\" else f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _plain(cell: Any) -> Any:
    if cell is None or isinstance(cell, bool | int | float):
        return cell
    return neutralize_cell(str(cell))
