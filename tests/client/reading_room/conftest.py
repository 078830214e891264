"""Fixtures of the reading room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from client.reading_room import passwords
from tests.client.reading_room.stage import Stage


@pytest.fixture(autouse=True)
def _cheap_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes that take no time; `test_passwords.py` tests the real ones."""
    monkeypatch.setattr(passwords, "LOG2_N", 4)
    monkeypatch.setattr(passwords, "_NOBODY", passwords.hash_password("nobody's"))


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    yield made
    made.room.close()
