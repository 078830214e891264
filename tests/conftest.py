"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # two threads on two busy cores wait for each other
gc.disable()  # until all is imported: the garbage collector would look through a million objects again and again

ROOT = Path(__file__).resolve().parents[1]


def _data_dir(name: str, marker: str) -> Path:
    candidates = [Path(os.environ["PNEUMOFED_DATA"])] if "PNEUMOFED_DATA" in os.environ else []
    candidates.append(ROOT.parent / "shared" / "data")
    for candidate in candidates:
        if (candidate / name / marker).exists():
            return candidate / name
    pytest.skip(f"needs the real data: no {name}/{marker} under $PNEUMOFED_DATA or ../shared/data")


@pytest.fixture(scope="session")
def kaggle_dir() -> Path:
    """Folder of the Kaggle pediatric chest X-ray set, or a skip that says what is missing."""
    return _data_dir("chest_xray", "train")


@pytest.fixture(scope="session")
def external_dir() -> Path:
    """Folder of the external set with its `labels.csv`, or a skip that says what is missing."""
    return _data_dir("external_covid_cxr", "labels.csv")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real federations first: theirs is the longest file, and no process waits for it at the end."""
    items.sort(key=lambda item: "e2e" not in item.path.parts)


def pytest_collection_finish() -> None:
    """From here on garbage is collected, and looked for only in what tests make."""
    gc.freeze()
    gc.enable()
