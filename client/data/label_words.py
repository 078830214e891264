"""The site's own words for labels at an import, and the words that it has not mapped yet.

Words come from `label_words` in site.yaml and from `--label` of the command, which wins. A row of a table with a word that is neither
mapped nor known leaves its image out; `write_unknown_words` lists such rows in `unknown_labels.csv` beside the manifest, by their number
alone, since a table may name images after people. A word is said only where several rows have it: the column may be the wrong one, and hold
names. Neither that file nor a word of it leaves the site.
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
from pneumofed.common.errors import DataError, counted
from pneumofed.common.files import atomic_write

UNKNOWN_LABELS = "unknown_labels.csv"
"""Beside the manifest: the rows of the last import whose label nobody mapped."""
MIN_ROWS = 5
"""A word that fewer rows have is not said: it may be a patient's name in a column that was taken for the labels."""
MOST_SHOWN = 8
"""Words in the sentence; the file has all."""
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
        One sentence with each word that `MIN_ROWS` rows have and its number of rows, for the site's own people; None where every word is
        known.

    Raises:
        DataError: the file cannot be written.
    """
    rows = list(_unknown_rows(table, words, label_column))
    counts = Counter(word for _, word in rows)
    file = site.data / UNKNOWN_LABELS
    try:
        if not rows:
            file.unlink(missing_ok=True)
            return None
        text = io.StringIO(newline="")
        writer = TableWriter(text)
        writer.write(("row", "word"))
        writer.write_all((row, word if counts[word] >= MIN_ROWS else "") for row, word in rows)
        site.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        with atomic_write(file) as target:
            target.write(text.getvalue().encode("utf-8", errors="surrogateescape"))
    except OSError as error:
        raise DataError(f"{file} cannot be written: {error.strerror}; check the folder's owner and permissions") from None
    return _sentence(counts, file)


def _unknown_rows(table: Path, words: LabelWords, label_column: str | None) -> Iterator[tuple[int, str]]:
    """Row number and word."""
    present = read_columns(table)
    label = plain_text(label_column).lower() if label_column else find_column(present, _LABELS)
    if label is None:
        return
    for number, row in read_rows(table, [label]):
        word = plain_text(row[label])
        if word and not words.knows(words.read(word)):
            yield number, word


def _sentence(counts: Counter[str], file: Path) -> str:
    common = [(word, count) for word, count in counts.most_common(MOST_SHOWN) if count >= MIN_ROWS]
    said = [f"'{word}' ({count})" for word, count in common]
    if others := len(counts) - len(common):
        said.append(f"{others} {'other ' if said else ''}{'word' if others == 1 else 'words'}")
    return (
        f"{counted(counts.total(), 'row')} with a label that no word is known for left out: {', '.join(said)}. {file} has their numbers in "
        f"the table. Say what they mean with --label '{common[0][0] if common else 'WORD'}=LABEL' or label_words in site.yaml, and give "
        "the command again"
    )
