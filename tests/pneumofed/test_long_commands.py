"""A command that goes over many files or pictures says how far it is, and never twice the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pneumofed.cli.main import app
from pneumofed.common.ops import progress
from pneumofed.common.ops.progress import Progress
from tests.client.site_folder import make_site
from tests.model_bundles import make_bundle

Shown = dict[str, list[tuple[float, float | None]]]
"""Of each step, what was shown as done, of how many."""


class _Kept(Progress):
    def __init__(self) -> None:
        self.shown: Shown = defaultdict(list)

    def show(self, step: str, done: float = 0, total: float | None = None, note: str = "") -> None:
        self.shown[step].append((done, total))


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> Shown:
    kept = _Kept()

    @contextmanager
    def opened(**_: bool) -> Iterator[Progress]:
        yield kept

    monkeypatch.setattr(progress, "open_progress", opened)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return kept.shown


def _counted(total: int, first: int = 1) -> Sequence[tuple[float, float | None]]:
    return [(done, total) for done in range(first, total + 1)]


def test_headers_files_and_images_of_a_site_are_counted_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, archive = make_site(tmp_path / "site"), tmp_path / "archive"
    drawn = _run(monkeypatch, "phantom", archive, "--patients", "4", "--size", "64", "--format", "dicom")
    assert drawn == {f"patients of '{split}' drawn": _counted(n) for split, n in (("train", 4), ("test", 3), ("external", 3))}
    files = len(list((archive / "dicom" / "train").iterdir()))
    command = ("site", "data", "add", "dicom", archive / "dicom" / "train", "--labels", archive / "labels.csv", "--site", site)
    assert _run(monkeypatch, *command) == {"headers read": _counted(files)}
    check = ("site", "data", "check", "--size", "32", "--site", site)
    assert _run(monkeypatch, *check)["images decoded"] == _counted(files)
    assert "images decoded" not in _run(monkeypatch, *check)  # they are in the cache


def test_volumes_are_counted_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, archive = make_site(tmp_path / "site"), tmp_path / "archive"
    drawn = _run(monkeypatch, "phantom", archive, "--patients", "3", "--ct", "dicom", "--size", "32", "--slices", "8")
    assert drawn == {f"patients of '{split}' drawn": _counted(3) for split in ("train", "test", "external")}
    series = sorted(file.parent for file in (archive / "train").rglob("*.dcm"))
    names = dict.fromkeys(one.relative_to(archive / "train").as_posix() for one in series)
    labels = tmp_path / "labels.csv"
    labels.write_text("filename,label\n" + "".join(f"{name},normal\n" for name in names))
    command = ("site", "data", "add", "dicom", archive / "train", "--ct", "--labels", labels, "--site", site)
    assert _run(monkeypatch, *command) == {"headers read": _counted(3)}
    assert _run(monkeypatch, "site", "data", "check", "--ct", "--site", site) == {"volumes read": _counted(3)}


def test_pictures_and_passes_of_pretraining_are_counted_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ("--images", "5", "--epochs", "2", "--image-size", "32", "--model", "small_cnn")
    shown = _run(monkeypatch, "pretrain", "--out", tmp_path / "weights.pt", *sizes)
    assert shown == {"pictures drawn": _counted(5), "training": [(0, 2), (1, 2)]}


def test_images_that_a_monitor_takes_in_are_counted_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _run(monkeypatch, "phantom", tmp_path / "set", "--patients", "3", "--size", "64")
    images = len(list((tmp_path / "set" / "train").rglob("*.jpeg")))
    make_bundle(tmp_path / "bundle")
    command = ("monitor", "add", tmp_path / "set" / "train", "--bundle", tmp_path / "bundle", "--folder", tmp_path / "monitor")
    assert _run(monkeypatch, *command) == {"images judged": _counted(images)}
