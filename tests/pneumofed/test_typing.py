"""The types that a user of the API gets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "pneumofed" / "py.typed").is_file()
    assert "pneumofed/py.typed" in (ROOT / "MANIFEST.in").read_text()


@pytest.mark.slow
def test_a_users_script_passes_a_strict_check_and_its_mistakes_are_found(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", str(tmp_path)]
    checked = subprocess.run([*command, "tests/pneumofed/user_script.py"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert checked.returncode == 0, checked.stdout
