"""Small radiographs on disk for the tests of the data path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pneumofed.common.data.manifest import ImageRecord, Manifest


def write_image(path: Path, seed: int) -> Path:
    """A grey noise image at `path` whose content depends on `seed` alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 20), dtype=np.uint8)).save(path, format="png")
    return path


def write_table(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def make_site(tmp_path: Path) -> Callable[[int], Manifest]:
    """Makes a manifest of that many images, each of another patient, normal and pneumonia in turn."""

    def make(count: int) -> Manifest:
        files = [write_image(tmp_path / "images" / f"{number}.png", number) for number in range(count)]
        labels = ("normal", "pneumonia")
        return Manifest(tuple(ImageRecord(file, f"p{n}", labels[n % 2]) for n, file in enumerate(files)))

    return make
