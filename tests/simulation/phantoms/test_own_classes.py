"""Phantom sets of own classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pneumofed.common.data.sources.table import read_csv
from pneumofed.common.errors import ConfigError
from pneumofed.common.seeds import numpy_generator
from pneumofed.simulation.hospitals.sources import read_source
from pneumofed.simulation.phantoms.anatomy import CHILD_RANGES, draw_anatomy
from pneumofed.simulation.phantoms.image import draw_lungs, draw_opacity, is_phantom
from pneumofed.simulation.phantoms.own_classes import write_class_phantoms

CLASSES = ("normal", "pneumonia", "tuberculosis")


def test_each_set_has_each_class_and_is_read_as_a_hospitals_table_is(tmp_path: Path) -> None:
    write_class_phantoms(tmp_path / "set", CLASSES, 8, seed=3, size_px=64)
    assert is_phantom(tmp_path / "set" / "test")
    patients = []
    for place in (tmp_path / "set", tmp_path / "set" / "test", tmp_path / "set" / "external"):
        source = read_source(place, CLASSES)
        assert set(source.manifest.labels) == set(CLASSES)
        assert source.phantom
        assert all(record.path.is_file() for record in source.manifest.records)
        patients.append(set(source.manifest.patients))
    assert len(patients[0]) == 8
    assert not patients[0] & patients[1]
    assert set(read_csv(tmp_path / "set" / "labels.csv")[0].labels) == {"normal", "pneumonia"}, "a site maps its words first"
    before = {path: path.read_bytes() for path in (tmp_path / "set").rglob("*.*")}
    write_class_phantoms(tmp_path / "set", CLASSES, 8, seed=3, size_px=64)
    assert {path: path.read_bytes() for path in (tmp_path / "set").rglob("*.*")} == before


def test_what_cannot_be_drawn_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not of 'effusion'; give a set of images"):
        write_class_phantoms(tmp_path / "set", ("normal", "effusion"), 8, seed=3)
    with pytest.raises(ConfigError, match="at least 4 patients"):
        write_class_phantoms(tmp_path / "set", CLASSES, 3, seed=3)


def test_tuberculosis_is_drawn_in_the_upper_half_of_one_lung() -> None:
    for number in range(8):
        anatomy = draw_anatomy(CHILD_RANGES, numpy_generator(number, "anatomy"))
        opacity = draw_opacity(anatomy, "tuberculosis", 128, numpy_generator(number, "picture"))
        lungs = draw_lungs(anatomy, 128, numpy_generator(number, "picture"))
        rows = np.flatnonzero(lungs.max(axis=1) > 0.5)
        middle = (rows[0] + rows[-1]) // 2
        assert opacity.max() > 0.2
        assert opacity[:middle].sum() > 0.9 * opacity.sum()
        halves = sorted(half.sum() for half in np.array_split(opacity, 2, axis=1))
        assert halves[1] > 0.9 * opacity.sum()
