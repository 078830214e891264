"""The monitor's store: read by day and arrival, patients recognised and not named."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from pneumofed.common.errors import DataError
from pneumofed.inference.monitor.store import MonitorStore, Observation

DAY = date(2026, 3, 2).toordinal()
SEEN = Observation(
    DAY, "Maker Model", "DOE^JANE", "pneumonia", 0.75, np.array([0.5, 0.25], np.float32), np.array([1.0, 2.0, 3.0])
)


def test_what_was_written_is_read_by_day_and_arrival(tmp_path: Path) -> None:
    store = MonitorStore(tmp_path / "monitor")
    later = store.append("bundle", replace(SEEN, day=DAY + 1, verdict="cannot judge", probability=None, patient=None))
    first = store.append("bundle", SEEN)
    store.append("other bundle", SEEN)
    store.append_reading(first, "normal", DAY)
    found = store.read("bundle")
    assert found.days.tolist() == [DAY, DAY + 1]
    assert found.statistics[0].tolist() == [0.5, 0.25]
    assert found.embedding[1].tolist() == [1.0, 2.0, 3.0]
    assert found.refused.tolist() == [False, True]
    assert found.corrected.tolist() == [True, False]
    assert found.read_order.tolist() == [0, -1]
    assert found.expected_errors[0] == pytest.approx(0.25)
    assert found.probabilities[0] == 0.75
    assert np.isnan([found.probabilities[1], found.expected_errors[1]]).all()
    assert first != later
    assert store.bundles() == [("bundle", 2), ("other bundle", 1)]


def test_the_number_that_earlier_versions_kept_of_a_refused_image_is_not_read(tmp_path: Path) -> None:
    store = MonitorStore(tmp_path)
    store.append("bundle", replace(SEEN, verdict="cannot judge"))
    found = store.read("bundle")
    assert found.refused.tolist() == [True]
    assert np.isnan([found.probabilities[0], found.expected_errors[0]]).all()


def test_a_patient_is_recognised_and_not_named(tmp_path: Path) -> None:
    store = MonitorStore(tmp_path)
    for patient in ("DOE^JANE", "DOE^JANE", "ROE^RICHARD", None, None):
        store.append("bundle", replace(SEEN, patient=patient))
    units = store.read("bundle").units.tolist()
    assert units[0] == units[1]
    assert len(set(units)) == 4
    assert not any(b"DOE" in path.read_bytes() for path in tmp_path.iterdir())
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.iterdir())


def test_another_site_gives_the_same_patient_another_word(tmp_path: Path) -> None:
    words = []
    for name in ("a", "b"):
        MonitorStore(tmp_path / name).append("bundle", SEEN)
        words.append(MonitorStore(tmp_path / name).read("bundle").units[0])
    assert words[0] != words[1]


@pytest.mark.parametrize("statement", ["UPDATE judged SET probability = 0", "DELETE FROM judged", "DELETE FROM readings"])
def test_the_file_itself_refuses_to_be_changed(tmp_path: Path, statement: str) -> None:
    store = MonitorStore(tmp_path)
    store.append_reading(store.append("bundle", SEEN), "pneumonia", DAY)
    with sqlite3.connect(store.path) as connection, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(statement)


def test_the_first_reading_is_kept_and_one_of_no_image_refused(tmp_path: Path) -> None:
    store = MonitorStore(tmp_path)
    image = store.append("bundle", SEEN)
    store.append_reading(image, "pneumonia", DAY)
    store.append_reading(image, "normal", DAY)
    assert store.read("bundle").corrected.tolist() == [False]
    with pytest.raises(DataError):
        store.append_reading(99, "normal", DAY)


def test_a_damaged_file_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "judged.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(DataError, match="restore it"):
        MonitorStore(tmp_path).read("bundle")


def test_an_empty_store_holds_nothing(tmp_path: Path) -> None:
    assert len(MonitorStore(tmp_path / "none").read("bundle")) == 0
