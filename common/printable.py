"""Text of others on its way to a terminal or a log: what would command the terminal, or hide what stands there, is shown as an escape.

A name, an error or a file's path may come from the other side of a connection, or from a disk that somebody else wrote. A terminal obeys
control characters (ECMA-48), and the bidirectional overrides of Unicode show a text in another order than it has (CVE-2021-42574).
"""

from __future__ import annotations

import logging
import re

CONTROLS = "\\x00-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069"
"""Inside a regular expression's brackets: C0 and C1 control characters, and what steers the direction or the lines of a text (Unicode
15, annex 9, table 4; U+2028 and U+2029 end a line)."""
_UNPRINTABLE = re.compile(f"(?![\n\t])[{CONTROLS}\\ud800-\\udfff]")
_UNPRINTABLE_IN_LINE = re.compile(f"[{CONTROLS}\\ud800-\\udfff]")


def printable(text: str) -> str:
    """Replaces what a terminal would obey by its escape, such as `\\x1b`; newlines and tabs stay, and so does every letter."""
    return _UNPRINTABLE.sub(_escape, text)


def printable_line(text: str) -> str:
    """As `printable`, with newlines and tabs replaced too: what stands for one name must not look like two lines."""
    return _UNPRINTABLE_IN_LINE.sub(_escape, text)


class PrintableFormatter(logging.Formatter):
    """Formats the lines of a log so that whoever reads it at a terminal sees what was written and nothing else happens."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _escape(found: re.Match[str]) -> str:
    return found.group().encode("unicode_escape", "surrogatepass").decode("ascii")
