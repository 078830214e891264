"""A registry on SQLite, and where a server can be had the same tests on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pneumofed.server.runs.registry import Registry, default_url, open_registry_database


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    found = Registry(open_registry_database(default_url(tmp_path)))
    yield found
    found.close()
