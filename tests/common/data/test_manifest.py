"""Manifests: read as they were written, movable with their folder, for their owner alone."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumofed.common.config.classes import NAMED_TASKS, class_index
from pneumofed.common.data.manifest import (
    LABELS,
    ImageRecord,
    Manifest,
    read_age,
    read_label,
    read_manifest,
    write_manifest,
)
from pneumofed.common.data.tables import plain_text
from pneumofed.common.errors import ConfigError, DataError
from tests.common.data.conftest import write_table

WORDS = (
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8)
    .map(plain_text)
    .filter(bool)
)
NAMES = st.text(st.characters(exclude_characters="\0/", codec="utf-8"), min_size=1, max_size=8).filter(
    lambda name: name.strip() and name not in (".", "..")
)
RECORDS = st.builds(
    ImageRecord,
    path=st.builds(lambda folder, name: Path("/data") / folder / name, NAMES, NAMES),
    patient=WORDS,
    label=st.sampled_from(LABELS),
    view=st.none() | WORDS,
    sex=st.sampled_from([None, "M", "F"]),
    age_years=st.none() | st.floats(0.001, 120),
    manufacturer=st.none() | WORDS,
)


@settings(max_examples=30, deadline=None)
@given(st.lists(RECORDS, max_size=3))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, records: list[ImageRecord]) -> None:
    file = tmp_path_factory.getbasetemp() / "manifest.csv"
    manifest = Manifest(tuple(records))
    write_manifest(manifest, file)
    assert read_manifest(file) == manifest


def test_a_folder_with_its_manifest_can_be_moved(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    write_manifest(Manifest((ImageRecord(old / "images" / "1.png", "p", "normal"),)), old / "manifest.csv")
    old.rename(new)
    assert read_manifest(new / "manifest.csv").records[0].path == new / "images" / "1.png"


def test_a_manifest_is_for_its_owner_alone(tmp_path: Path) -> None:
    write_manifest(Manifest(()), tmp_path / "manifest.csv")
    assert stat.S_IMODE((tmp_path / "manifest.csv").stat().st_mode) == 0o600


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_tables_of_a_spreadsheet_are_read(tmp_path: Path, separator: str) -> None:
    lines = [["Path", " PATIENT", "label", "note", "Age"], ["a,b;c.png", "7", "PNEUMONIA", "", "63"], ["", "", "", "", ""]]
    text = "\r\n".join(separator.join(f'"{cell}"' for cell in line) for line in lines)
    (tmp_path / "m.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_manifest(tmp_path / "m.csv").records == (ImageRecord(tmp_path / "a,b;c.png", "7", "pneumonia", age_years=63.0),)


@pytest.mark.parametrize(
    ("row", "column"),
    [(",DOE", "path"), ("DOE.png, ", "patient"), ("DOE.png,DOE,normal,,,old", "age"), (",".join(["DOE"] * 9), "")],
)
def test_a_bad_row_is_named_by_its_number_and_never_by_its_content(tmp_path: Path, row: str, column: str) -> None:
    table = write_table(tmp_path / "m.csv", "path,patient,label,view,sex,age", "1.png,1,normal", row)
    with pytest.raises(DataError, match=rf"row 3.*{column}") as caught:
        read_manifest(table)
    assert "DOE" not in str(caught.value)


@pytest.mark.parametrize("missing", ["path", "patient", "label"])
def test_a_missing_column_is_named(tmp_path: Path, missing: str) -> None:
    table = write_table(tmp_path / "m.csv", ",".join({"path", "patient", "label"} - {missing}))
    with pytest.raises(DataError, match=f"column '{missing}' is missing"):
        read_manifest(table)


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'label' is there 2 times"):
        read_manifest(write_table(tmp_path / "m.csv", "path,patient,label,Label"))


def test_a_table_that_does_not_exist_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_manifest(tmp_path / "none.csv")


def test_an_empty_table_says_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "m.csv").touch()
    with pytest.raises(DataError, match="is empty"):
        read_manifest(tmp_path / "m.csv")


def test_labels_are_read_in_any_case_and_by_known_synonyms() -> None:
    assert [read_label(text) for text in ("NORMAL", " Pneumonia", "bacteria", "Virus")] == [
        "normal",
        "pneumonia",
        "bacterial",
        "viral",
    ]


def test_each_label_has_its_class_or_none() -> None:
    assert [class_index(label, "binary") for label in (*LABELS, "banana")] == [0, 1, 1, 1, None]
    assert [class_index(label, "three_class") for label in (*LABELS, "banana")] == [0, None, 1, 2, None]
    assert all(classes[0] == "normal" for classes in NAMED_TASKS.values())


def test_ages_are_read_as_numbers_and_as_dicom_age_strings() -> None:
    assert [read_age(text) for text in ("63", "63.5", "063Y", "018M", "", "old", "-3")] == [63, 63.5, 63, 1.5, None, None, None]
