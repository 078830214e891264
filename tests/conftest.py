"""Fixtures shared by all tests, and what keeps their thousands quick."""

from __future__ import annotations

import gc
import io
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.testing
from PIL import Image

torch.set_num_threads(1)  # two threads on two busy cores wait for each other
gc.disable()  # until all is imported: the garbage collector would look through a million objects again and again
os.fsync = lambda fd: None  # what a test writes need not outlive the power: 3 ms a file, thousands of times
typer.testing._get_command = cache(typer.testing._get_command)  # built anew it takes 0.2 s a call

ROOT = Path(__file__).resolve().parents[1]
PLOTS = "pneumofed.common.evaluation.plots"


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


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn, for a test that looks at them; else they are built and rendered as a blank picture, 0.3 s sooner each."""
    plots = sys.modules[PLOTS]
    monkeypatch.setattr(plots, "_draw", plots.__dict__["_drawn"])


def _blank(figure: Any, kind: str, buffer: io.BytesIO) -> None:
    if kind == "svg":
        buffer.write(b'<svg xmlns="http://www.w3.org/2000/svg"/>')
    else:
        Image.new("L", (1, 1), 255).save(buffer, "PNG")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real federations first: theirs is the longest file, and no process waits for it at the end."""
    items.sort(key=lambda item: "e2e" not in item.path.parts)


def pytest_collection_finish() -> None:
    """From here on garbage is collected, and looked for only in what tests make; pictures are blank (see `drawn`)."""
    gc.freeze()
    gc.enable()
    plots: Any = sys.modules.get(PLOTS)
    if plots is not None:
        plots._drawn, plots._draw = plots._draw, _blank
