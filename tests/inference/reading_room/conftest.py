"""Fixtures of the reading room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pneumofed.inference.explain.focus import Focus
from pneumofed.inference.reading_room import users, worker
from tests.inference.reading_room.stage import Stage


@pytest.fixture(autouse=True)
def _cheap_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes that take no time; `test_passwords.py` tests the real ones."""
    monkeypatch.setattr(users, "SCRYPT_LOG2_N", 4)
    monkeypatch.setattr(users, "_NOBODY", users.hash_password("nobody's"))


@pytest.fixture(autouse=True)
def _quick_focus(monkeypatch: pytest.MonkeyPatch) -> None:
    """No search for lungs, which takes longer than all else; `test_watch.py` has the real one."""
    monkeypatch.setattr(worker, "quick_focus", lambda *_: Focus(0.0, 0.5, 0.0, 0.0, ()))


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    yield made
    made.room.close()
