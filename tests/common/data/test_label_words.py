"""A site's own words for labels."""

from __future__ import annotations

from pathlib import Path

import pytest

from pneumofed.common.data.label_words import LabelWords
from pneumofed.common.data.manifest import ImageRecord, Manifest
from pneumofed.common.data.sources.dicom import read_labels
from pneumofed.common.data.sources.table import read_csv
from pneumofed.common.errors import ConfigError, SkipReason
from tests.common.data.conftest import write_table


def test_a_word_is_read_in_any_case_and_an_unknown_one_is_never_guessed() -> None:
    words = LabelWords.of({"TB": "tuberculosis", "结核": "tuberculosis", "clear": "No finding"}, "site.yaml")
    assert [words.read(text) for text in (" tb ", "结核", "Clear", "bacteria", "Tuberculosis", "TBC")] == [
        *("tuberculosis", "tuberculosis", "normal", "bacterial", "tuberculosis", "tbc")
    ]
    assert [words.knows(label) for label in ("tuberculosis", "viral", "tbc", "")] == [True, True, False, False]
    assert words.labels == ("normal", "pneumonia", "bacterial", "viral", "tuberculosis")


def test_words_of_a_command_win_over_those_of_the_site() -> None:
    site, command = LabelWords.of({"x": "viral", "y": "normal"}, "site"), LabelWords.of({"X": "bacterial"}, "--label")
    assert [(site | command).read(word) for word in ("x", "y")] == ["bacterial", "normal"]


@pytest.mark.parametrize(
    ("pairs", "sentence"),
    [
        ({"lobar": "bacteral"}, "'lobar' is mapped to 'bacteral'; did you mean 'bacterial'"),
        ({"TB": "two words"}, "expected a word of lower case letters"),
        ({"TB": "unsure"}, "has a meaning of its own"),
        ({" ": "viral"}, "a word is empty"),
        ({"TB": "tuberculosis", "tb": "viral"}, "'tb' is mapped to 'tuberculosis' and to 'viral'"),
    ],
)
def test_words_that_contradict_or_are_slips_are_refused(pairs: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        LabelWords.of(pairs, "--label")
    assert sentence in str(refused.value)


def test_a_manifest_written_by_hand_is_read_by_the_sites_words() -> None:
    records = tuple(ImageRecord(Path(f"{k}.png"), str(k), label) for k, label in enumerate(("tb", "normal", "other")))
    found = LabelWords.of({"TB": "tuberculosis"}, "site.yaml").apply(Manifest(records))
    assert found.labels == ("tuberculosis", "normal", "other")
    assert found.patients == ("0", "1", "2")


def test_both_kinds_of_tables_are_read_by_the_sites_words(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", "path,patient,label", "1.png,7,TB", "2.png,8,TBC", "3.png,9,normal")
    manifest, report = read_csv(table, label_map={"TB": "tuberculosis"})
    assert manifest.labels == ("tuberculosis", "normal")
    assert report.skipped == {SkipReason.UNKNOWN_LABEL: 1}
    labels = write_table(tmp_path / "l.csv", "AccessionNumber,label", "A1,TB", "A2,TBC")
    found = read_labels(labels, LabelWords.of({"TB": "tuberculosis"}, "--label"))["accession"]
    assert found == {"A1": "tuberculosis", "A2": "tbc"}
