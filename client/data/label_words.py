"""The site's own words for labels at an import, and the words that it has not mapped yet.

Words come from `label_words` in site.yaml and from `--label` of the command, which wins. A row of a table with a word that is neither
mapped nor known leaves its image out; `write_unknown_words` lists such rows in `unknown_labels.csv` beside the manifest, for the person who
knows what they mean. Neither that file nor a word of it leaves the site.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from pneumofed.client.site.folder import SiteFolder
from pneumofed.common.data.label_words import LabelWords
from pneumofed.common.data.sources.table import find_column
from pneumofed.common.data.tables import TableWriter, plain_text, read_columns, read_rows
from pneumofed.common.errors import DataError
from pneumofed.common.files import atomic_write

UNKNOWN_LABELS = "unknown_labels.csv"
"""Beside the manifest: the rows of the last import whose label nobody mapped. It names images, so it stays at its site."""
MOST_SHOWN = 8
"""Words in the sentence; the file has all."""
_NAMES = (
    "path",
    "filename",
    "file",
    "filepath",
    "imagepath",
    "image",
    "imageid",
    "imageindex",
    "sopinstanceuid",
    "accessionnumber",
)
_LABELS = ("label", "class", "diagnosis")


def words_at_site(site: SiteFolder, pairs: Mapping[str, str]) -> LabelWords:
    """Returns the words by which an import at `site` reads labels: those of its site.yaml, and over them `pairs`.

    Args:
        site: its folder.
        pairs: label by the site's word, of `--label`.

    Raises:
        ConfigError: a label is none that a class may be called, or one word has two.
    """
    return LabelWords.of(site.config.label_words, "site.yaml, label_words") | LabelWords.of(pairs, "--label")


def write_unknown_words(site: SiteFolder, table: Path, words: LabelWords, label_column: str | None = None) -> str | None:
    """Lists the rows of an import's table whose word `words` do not know, in `UNKNOWN_LABELS`; without such a row the file is removed.

    Args:
        site: its folder.
        table: the CSV file with the labels, which the import has read.
        words: by which it read them.
        label_column: the column of the labels; None to find it by its usual names.

    Returns:
        One sentence with each word and its number of rows, for the site's own people; None where every word is known.

    Raises:
        DataError: the file cannot be written.
    """
    rows = list(_unknown_rows(table, words, label_column))
    file = site.data / UNKNOWN_LABELS
    try:
        if not rows:
            file.unlink(missing_ok=True)
            return None
        text = io.StringIO(newline="")
        writer = TableWriter(text)
        writer.write(("row", "image", "word"))
        writer.write_all(rows)
        site.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        with atomic_write(file) as target:
            target.write(text.getvalue().encode("utf-8", errors="surrogateescape"))
    except OSError as error:
        raise DataError(f"{file} cannot be written: {error.strerror}; check the folder's owner and permissions") from None
    return _sentence(Counter(word for _, _, word in rows), file)


def _unknown_rows(table: Path, words: LabelWords, label_column: str | None) -> Iterator[tuple[int, str, str]]:
    """Row number, name of the image or examination, and word."""
    present = read_columns(table)
    label = plain_text(label_column).lower() if label_column else find_column(present, _LABELS)
    name = find_column(present, _NAMES)
    if label is None:
        return
    for number, row in read_rows(table, [label]):
        word = plain_text(row[label])
        if word and not words.knows(words.read(word)):
            yield number, row.get(name, "") if name else "", word


def _sentence(counts: Counter[str], file: Path) -> str:
    shown = ", ".join(f"'{word}' ({count})" for word, count in counts.most_common(MOST_SHOWN))
    more = f" and {len(counts) - MOST_SHOWN} more words" if len(counts) > MOST_SHOWN else ""
    first = counts.most_common(1)[0][0]
    return (
        f"{counts.total()} rows have a label that no word is known for, and are left out: {shown}{more}. {file} names each. Say what they "
        f"mean with --label '{first}=LABEL' or label_words in site.yaml, and give the command again"
    )
