"""Fixtures of the reading room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from pneumofed.inference.explain.focus import Focus
from pneumofed.inference.reading_room import file_judge, users
from tests.inference.reading_room.browser import Desk, launched, served
from tests.inference.reading_room.stage import Stage


@pytest.fixture(autouse=True)
def _cheap_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes that take no time; `test_passwords.py` tests the real ones."""
    monkeypatch.setattr(users, "SCRYPT_LOG2_N", 4)


@pytest.fixture(autouse=True)
def _quick_focus(monkeypatch: pytest.MonkeyPatch) -> None:
    """No search for lungs, which takes longer than all else; `test_watch.py` has the real one."""
    monkeypatch.setattr(file_judge, "quick_focus", lambda *_: Focus(0.0, 0.5, 0.0, 0.0, ()))


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    yield made
    made.room.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


@pytest.fixture
def desk(stage: Stage, chromium: Browser) -> Iterator[Desk]:
    with served(stage) as address:
        made = Desk(chromium, address)
        yield made
        made.context.close()
    assert made.complaints == []
