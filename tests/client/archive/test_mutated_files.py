"""Damaged files of every kind, through the ways by which a hospital's files come in: counted, named, never a crash."""

from __future__ import annotations

from pathlib import Path

from benchmarks.mutated_files import MUTATIONS, add_all, make_files, open_all


def test_damaged_files_neither_crash_nor_hang_nor_go_uncounted(tmp_path: Path) -> None:
    files = make_files(tmp_path, 200, seed=7)
    tally = open_all(files, limit_sec=20)
    assert not tally.bad
    assert tally.outcomes["read_image"].total() == 200
    assert tally.outcomes["arrival"].total() == tally.outcomes["header"].total() == 100
    assert len(tally.outcomes["read_image"]) > 3
    for report in add_all(tmp_path).values():
        assert report["exit"] == 0
        assert report["all counted"]
        assert "HOSPITAL-4711" not in str(report)


def test_files_that_escape_are_seen(tmp_path: Path) -> None:
    missing = tmp_path / "gone.dcm"
    assert open_all([missing], limit_sec=20).bad == ["gone.dcm arrival: escaped: builtins.FileNotFoundError"]


def test_damage_is_pure_in_the_seed_and_of_every_kind(tmp_path: Path) -> None:
    first, second, other = (make_files(tmp_path / name, 40, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
    assert [file.read_bytes() for file in first] != [file.read_bytes() for file in other]
    assert {mutation.__name__ for mutation in MUTATIONS} == {file.stem.split("_", 1)[1] for file in first}
