"""Tables, as they are read and as they are written: any CSV text that a spreadsheet writes, and CSV in which no cell is a formula.

Which characters the bytes are is decided by this rule, the first line that fits, and never by a guess, since a patient whose number is
decoded in two ways would be two patients:

1. a byte order mark: UTF-8 or UTF-16; without one, zeros in every other byte: UTF-16;
2. what is valid UTF-8 is UTF-8 (RFC 3629: other text passes for it by chance only where it is very short);
3. what else is beyond ASCII are pairs of bytes of GB 2312, and these can be neither Hangul, nor kana, nor Cyrillic: GB 18030, of which
   GBK and GB 2312 are parts;
4. these stand alone or in twos between ASCII, not all in twos, and mean the same letter in Windows-1252, Windows-1250 and ISO 8859-1, -2
   and -15, as the German ones do: Windows-1252;
5. anything else is refused, with the first row that it stands in.

Errors name the column and the row but never what is in it.

What is written for people gives back what was written. A spreadsheet runs a cell that begins with `=`, `+`, `-` or `@` (OWASP, "CSV
Injection"). Names, paths and labels come from files and readers, so such a cell gets an apostrophe in front, which the spreadsheet takes
as "this is text" and `restore_cell` takes away. A cell with control characters, or one that another separator would split so that a part
begins with such a sign, is written with escapes behind `'\\`. Numbers stay numbers.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from pneumofed.common.errors import CONTROLS, ConfigError, DataError

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


SEPARATORS = ",;\t"
_MOST_LEADING_ZEROS = 12
_SEP_LINE = re.compile(r"\"?sep=([^\s\w\"])\"?\r?\n?|\"?sep=(\t)\"?\r?\n?", re.IGNORECASE)
_BLANKS = "\ufeff\u200b\u200c\u200d\u2060\0"
_BEYOND_ASCII = re.compile(rb"[\x80-\xff]+")
_WESTERN = ("cp1252", "cp1250", "iso8859-1", "iso8859-2", "iso8859-15")
_SAME_LETTER = frozenset(
    byte
    for byte in range(0xC0, 0x100)
    if len({bytes([byte]).decode(encoding) for encoding in _WESTERN}) == 1 and bytes([byte]).decode("cp1252").isalpha()
)
_HANGUL_LEADS, _KANA_LEADS = range(0xB0, 0xC9), (0xA4, 0xA5)
FIRST_CYRILLIC = 0xC0
"""In Windows-1251 all letters of Russian but one lie from here on."""


def plain_text(text: str) -> str:
    """Returns an identifier or a word in one form: Unicode's NFKC, in which a full-width digit is the digit, without blanks around."""
    return unicodedata.normalize("NFKC", text).strip().strip(_BLANKS).strip()


def spelling_variants(text: str) -> Iterator[tuple[str, str]]:
    """Iterates over (change, text) of what a number may have been before a spreadsheet had it: these cut leading zeros and write `42.0`."""
    bare = text.strip("\"'` ")
    yield "without quotes", bare
    whole = re.sub(r"[.,]0+$", "", bare)
    yield "without the decimals", whole
    plural = "without the decimals and " if whole != bare else ""
    short = whole.lstrip("0")
    for word in (whole, short):
        for zeros in range(1, _MOST_LEADING_ZEROS):
            yield f"{plural}with {zeros} more leading zero{'s' * (zeros > 1)}", "0" * zeros + word
    yield f"{plural}without leading zeros", short
    yield "in capital letters", bare.upper()
    yield "in small letters", bare.lower()
    yield "without blanks and dashes", re.sub(r"[\s-]", "", bare)


def read_columns(table: Path) -> list[str]:
    """Reads the column names in the first row of the CSV file `table`: stripped and lower case.

    Raises:
        ConfigError: the file does not exist or cannot be opened.
        DataError: the file is empty, or no text that the rule above decides on.
    """
    for _, cells in _read_cells(table):
        return [plain_text(cell).lower() for cell in cells]
    raise DataError(f"{table} is empty; expected a CSV file whose first row names the columns")


def read_rows(table: Path, required: Sequence[str], *, own: bool = False) -> Iterator[tuple[int, dict[str, str]]]:
    """Iterates over (row number, cell by column) of each row of the CSV file `table` that is not blank.

    Rows count as a spreadsheet shows them: the header is row 1. Column names are stripped and lower case, cells are as they
    stand, cells missing at the end of a row are empty, and empty ones beyond the header are left out. Commas, semicolons and tabs
    are recognized as separators, and the line `sep=;` of Excel.

    Args:
        table: its characters are decided by the rule above.
        required: lower-case names of columns that must be there.
        own: it is in our own format, see `read_text`.

    Raises:
        ConfigError: the file does not exist or cannot be opened.
        DataError: a required column is missing or there twice, a row has more cells than the header, or it is no CSV text.
    """
    columns: list[str] = []
    for number, found in _read_cells(table, own=own):
        if number == 1:
            columns = [plain_text(cell).lower() for cell in found]
            check_columns(table, columns, required)
            continue
        cells = found
        while len(cells) > len(columns) and not cells[-1].strip():
            cells = cells[:-1]
        if len(cells) > len(columns):
            problem = f"{len(cells)} cells where the header names {len(columns)} columns; cells with separators need quotes"
            raise DataError(f"{table}, row {number}: {problem}")
        if any(cell.strip() for cell in cells):
            yield number, dict.fromkeys(columns, "") | dict(zip(columns, cells, strict=False))
    if not columns:
        read_columns(table)


def describe_columns(columns: Sequence[str], known: Iterable[str]) -> str:
    """Says in an error which columns a table has, unless its first row may be no header but a patient's.

    Args:
        columns: as `read_columns` gives them.
        known: lower-case names; a first row that has one of them is a header.

    Returns:
        The end of a sentence.
    """
    if set(columns).isdisjoint(known):
        return "its first row names no known column; is the header missing?"
    return f"the columns there are: {', '.join(filter(None, columns))}"


def check_columns(table: Path, columns: Sequence[str], required: Sequence[str], known: Iterable[str] = ()) -> None:
    """Refuses a table that lacks a column or has it twice.

    Args:
        table: the CSV file, which the error names.
        columns: the columns that it has, as `read_columns` gives them.
        required: lower-case names of columns that must be there exactly once.
        known: other lower-case names by which a header can be told, see `describe_columns`.

    Raises:
        DataError: one of `required` is missing or there more than once.
    """
    for name in required:
        if name not in columns:
            raise DataError(f"{table}: column '{name}' is missing; {describe_columns(columns, {*required, *known})}")
        if columns.count(name) > 1:
            raise DataError(f"{table}: column '{name}' is there {columns.count(name)} times; keep one")


def find_encoding(content: bytes, name: str) -> str:
    """Decides by the module's rule what the bytes of a table are.

    Args:
        content: the whole file.
        name: of the file, for the error.

    Returns:
        A codec; each decodes `content` or most of it.

    Raises:
        DataError: the rule decides on none; the text names the first row that it fails in.
    """
    for mark, codec in ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")):
        if content.startswith(mark):
            return codec
    start = content[:4096]
    for offset, codec in ((1, "utf-16-le"), (0, "utf-16-be")):
        if len(start) > 3 and start[offset::2].count(0) > 0.4 * len(start[offset::2]):
            return codec
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        runs = _BEYOND_ASCII.findall(content)
        if _are_gb2312(runs):
            return "gb18030"
        if all(len(run) < 3 and _SAME_LETTER.issuperset(run) for run in runs) and any(len(run) == 1 for run in runs):
            return "cp1252"
        row = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name}, row {row}: its characters are no UTF-8 and nothing else for certain; save it as 'CSV UTF-8' in the spreadsheet"
        ) from None
    return "utf-8"


def _are_gb2312(runs: Sequence[bytes]) -> bool:
    """Whether all bytes beyond ASCII are pairs of GB 2312 and, together, of no other writing that has such pairs."""
    joined = b"".join(runs)
    leads = joined[::2]
    if any(len(run) % 2 for run in runs) or any(byte < 0xA1 for byte in joined) or any(lead in _KANA_LEADS for lead in leads):
        return False
    if all(lead in _HANGUL_LEADS for lead in leads) or min(joined) >= FIRST_CYRILLIC:
        return False
    try:
        joined.decode("gb2312")
    except UnicodeDecodeError:
        return False
    return True


def decode_table(content: bytes, name: str) -> str:
    """Decodes a table by the module's rule, without its byte order mark.

    Args:
        content: the whole file.
        name: of the file, for the error.

    Raises:
        DataError: no rule says what its bytes mean, or they are damaged.
    """
    encoding = find_encoding(content, name)
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        row = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}, row {row}: damaged {error.encoding}; save it as 'CSV UTF-8' in the spreadsheet") from None


def read_text(table: Path, *, own: bool = False) -> str:
    """Reads a table as text, without a byte order mark.

    Args:
        table: the file.
        own: it is in our own format, UTF-8, in which names of files may hold any bytes (PEP 383).

    Raises:
        ConfigError: the file does not exist or cannot be opened.
        DataError: no rule says what its bytes mean.
    """
    try:
        content = table.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"table {table} does not exist") from None
    except OSError as error:
        raise ConfigError(f"table {table} cannot be opened: {error.strerror}") from None
    if own and not content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-8", errors="surrogateescape").removeprefix("\ufeff")
    return decode_table(content, str(table))


def parse_cells(text: str, name: str, *, own: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Iterates over (row number from 1, cells) of CSV text; Excel's `sep=` line is no row.

    Args:
        text: of the table.
        name: of the file, for the error.
        own: it is in our own format, in which blanks after a separator belong to the cell.

    Raises:
        DataError: it is no CSV text.
    """
    lines = io.StringIO(text, newline="")
    first = lines.readline()
    separator = max(SEPARATORS, key=first.count)
    if stated := _SEP_LINE.fullmatch(first):
        separator = stated[1] or stated[2]
    else:
        lines.seek(0)
    reader = csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=not own)
    row = 0
    try:
        for row, cells in enumerate(reader, start=1):
            yield row, [restore_cell(cell) for cell in cells]
    except csv.Error as error:
        raise DataError(
            f"{name}, row {row + 1}: no well-formed CSV ({error}); a cell with a quote needs quotes around it"
        ) from None


def _read_cells(table: Path, *, own: bool = False) -> Iterator[tuple[int, list[str]]]:
    yield from parse_cells(read_text(table, own=own), str(table), own=own)
