"""The fixtures of the earlier version, unpacked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.former.opened import unpack


@pytest.fixture
def former(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all fixtures, in which the test runs. Nothing trains on a graphics card, which has other last bits."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(unpack(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All fixtures, once for the tests that only read."""
    return unpack(tmp_path_factory.mktemp("former"))


@pytest.fixture
def shared(unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all fixtures, in which the test runs and which it leaves as it is."""
    monkeypatch.chdir(unpacked)
    return unpacked
