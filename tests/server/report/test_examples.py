"""Pictures of hits and misses are of phantoms alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.server.report.figures import draw_examples
from pneumofed.server.report.read_run import read_run
from pneumofed.simulation.phantoms.phantom import write_phantoms
from tests.server.report.report_runs import RunMaker


@pytest.fixture
def maker(tmp_path: Path) -> RunMaker:
    """A finished run whose test set are the phantoms in its folder."""
    maker = RunMaker(tmp_path / "run").rounds(1).end("succeeded", sets=("test",), phantom=True)
    folder = maker.path / "phantoms"
    write_phantoms(folder, 12, 0)
    files = sorted(path for path in (folder / "test").rglob("*") if path.is_file())
    scores = np.linspace(0.05, 0.95, len(files))
    Predictions(
        np.stack([1 - scores, scores], axis=1),
        np.arange(len(files)) % 2,
        tuple(map(str, range(len(files)))),
        tuple(hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files),
    ).write_csv(maker.folder.predictions("test"))
    return maker


def test_hits_and_misses_of_phantoms_are_drawn(maker: RunMaker) -> None:
    (picture,) = draw_examples(read_run(maker.path))
    assert picture.name == "examples_test" and picture.png.startswith(b"\x89PNG")


@pytest.mark.parametrize("told", [False, None])
def test_no_image_is_drawn_of_a_run_that_is_not_of_phantoms(maker: RunMaker, told: bool | None) -> None:
    maker.folder.write_summary(maker.folder.read_summary().updated(phantom=told))
    assert draw_examples(read_run(maker.path)) == []


def test_no_image_is_drawn_without_the_mark_of_phantoms(maker: RunMaker) -> None:
    (maker.path / "phantoms" / "PHANTOM.txt").unlink()
    assert draw_examples(read_run(maker.path)) == []


def test_images_that_are_gone_leave_no_picture(maker: RunMaker) -> None:
    for path in (maker.path / "phantoms" / "test").rglob("*.jp*g"):
        path.unlink()
    assert draw_examples(read_run(maker.path)) == []
