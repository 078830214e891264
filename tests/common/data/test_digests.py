"""SHA-256 of image files, with a memo that never says an old digest of a changed file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pneumofed.common.data import cache
from pneumofed.common.data.cache import load_digests
from pneumofed.common.data.manifest import Manifest
from pneumofed.common.errors import DataError, SkipReason


def _forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a known file was read again")

    monkeypatch.setattr(cache.hashlib, "file_digest", refuse)


@pytest.mark.parametrize("count", [1, 3, 200])
def test_digests_are_the_sha256_of_the_files(tmp_path: Path, count: int) -> None:
    files = [tmp_path / f"{n}" for n in range(count)]
    for number, file in enumerate(files):
        file.write_text(f"content {number}")
    expected = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert load_digests(files, tmp_path / "cache", workers=2) == expected


def test_a_known_file_is_not_read_again(
    make_site: Callable[[int], Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [record.path for record in make_site(4).records]
    first = load_digests(paths, tmp_path, 1)
    _forbid_reading(monkeypatch)
    assert load_digests(paths, tmp_path, 1) == first


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "image"
    file.write_bytes(b"old")
    before = load_digests([file], tmp_path, 1)
    file.write_bytes(b"new")
    os.utime(file, ns=(0, 12345))
    assert load_digests([file], tmp_path, 1) != before


def test_what_the_memo_knew_stays_when_other_files_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_text(file.name)
        load_digests([file], tmp_path / "cache", 1)
    _forbid_reading(monkeypatch)
    assert len(set(load_digests(files, tmp_path / "cache", 1))) == 2


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"a": 1}', b"\xff\xfe"])
def test_a_damaged_memo_is_made_again(tmp_path: Path, damage: bytes) -> None:
    file = tmp_path / "image"
    file.write_bytes(b"x")
    expected = load_digests([file], tmp_path, 1)
    (tmp_path / "digests.json").write_bytes(damage)
    assert load_digests([file], tmp_path, 1) == expected


def test_a_file_without_content_or_without_access_has_a_reason(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    files = [tmp_path / name for name in ("none", "empty/none", "empty", "pipe", "loop", "\0")] + [tmp_path]
    missing, unreadable = SkipReason.MISSING, SkipReason.UNREADABLE
    expected = [missing, missing, SkipReason.EMPTY, unreadable, unreadable, unreadable, unreadable]
    assert load_digests(files, tmp_path / "cache", 1) == expected


def test_a_cache_folder_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written"):
        load_digests([tmp_path / "file"], tmp_path / "file", 1)
