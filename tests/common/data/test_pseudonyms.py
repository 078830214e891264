"""Pseudonyms: one for each identifier and key, and never the identifier itself."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pneumofed.common.data.tables import plain_text
from pneumofed.common.errors import ConfigError
from pneumofed.common.imaging.dicom_header import KEY_FILE, Pseudonyms, load_pseudonyms

keys = st.binary(min_size=32, max_size=32)
identifiers = st.text(min_size=1, max_size=64).filter(lambda text: text.strip(" \0\t\r\n"))


def _all(pseudonyms: Pseudonyms, text: str) -> list[str]:
    return [pseudonyms.patient(text), pseudonyms.accession(text), pseudonyms.uid(text)]


@given(keys, identifiers)
def test_the_same_identifier_has_the_same_pseudonym_and_never_itself(key: bytes, text: str) -> None:
    first, second = _all(Pseudonyms(key), text), _all(Pseudonyms(key), f" {text}\0")
    assert first == second
    assert text not in first
    assert len(set(first)) == 3


@given(keys, keys, identifiers)
def test_another_key_gives_other_pseudonyms(one: bytes, other: bytes, text: str) -> None:
    if one != other:
        assert not set(_all(Pseudonyms(one), text)) & set(_all(Pseudonyms(other), text))


@given(keys, st.lists(identifiers, min_size=2, max_size=20, unique_by=plain_text))
def test_different_identifiers_stay_different(key: bytes, texts: list[str]) -> None:
    pseudonyms = Pseudonyms(key)
    assert len({name for text in texts for name in _all(pseudonyms, text)}) == 3 * len(texts)


@given(keys, identifiers)
def test_pseudonyms_have_the_form_that_their_tags_ask_for(key: bytes, text: str) -> None:
    patient, accession, uid = _all(Pseudonyms(key), text)
    assert len(patient) <= 64
    assert len(accession) == 16
    assert uid.startswith("2.25.")
    assert len(uid) <= 64
    assert uuid.UUID(int=int(uid[5:])).version == 8
    assert uuid.UUID(int=int(uid[5:])).variant == uuid.RFC_4122


def test_the_key_is_drawn_once_and_readable_by_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    first = load_pseudonyms(folder)
    assert load_pseudonyms(folder) == first
    assert load_pseudonyms(tmp_path / "other") != first
    assert (folder / KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    assert first.key.hex() not in repr(first)


@pytest.mark.parametrize("content", ["", "abc", "x" * 64, "ab" * 31])
def test_a_damaged_key_is_refused_and_never_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / KEY_FILE).write_text(content)
    (tmp_path / KEY_FILE).chmod(0o600)
    with pytest.raises(ConfigError, match="is damaged"):
        load_pseudonyms(tmp_path)
    assert (tmp_path / KEY_FILE).read_text() == content


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    load_pseudonyms(tmp_path)
    (tmp_path / KEY_FILE).chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_pseudonyms(tmp_path)
