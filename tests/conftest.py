"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # two threads on two busy cores wait for each other

ROOT = Path(__file__).resolve().parents[1]


def _data_dir(name: str, marker: str) -> Path:
    candidates = [Path(os.environ["PNEUMOFED_DATA"])] if "PNEUMOFED_DATA" in os.environ else []
    candidates.append(ROOT.parent / "shared" / "data")
    for candidate in candidates:
        if (candidate / name / marker).exists():
            return candidate / name
    pytest.skip(f"needs the real data: no {name}/{marker} under $PNEUMOFED_DATA or ../shared/data")


BEGIN_FIRST = (
    "tests/simulation/test_repeatability.py",
    "tests/simulation/test_runner.py",
    "tests/simulation/test_tracked.py",
    "tests/simulation/test_network_checks.py",
    "tests/pneumofed/cli/test_commands.py",
    "tests/pneumofed/test_docs.py",
    "tests/server/export/test_graph.py",
    "tests/test_installation.py",
)
"""Long files of few tests. A file is a process's work as a whole: one that begins last leaves the other processes idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.nodeid.partition("::")[0] not in BEGIN_FIRST)


@pytest.fixture(scope="session")
def kaggle_dir() -> Path:
    """Folder of the Kaggle pediatric chest X-ray set, or a skip that says what is missing."""
    return _data_dir("chest_xray", "train")


@pytest.fixture(scope="session")
def external_dir() -> Path:
    """Folder of the external set with its `labels.csv`, or a skip that says what is missing."""
    return _data_dir("external_covid_cxr", "labels.csv")
