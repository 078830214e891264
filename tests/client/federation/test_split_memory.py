"""Patients stay on their side of a site's split, whatever joins."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumofed.client.data.splits import split_by_patient
from pneumofed.client.federation.site_data import SPLIT_FILE, forget_split, split_site
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.data.manifest import DataReport
from pneumofed.common.errors import DataError

ROWS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 1)), min_size=1, max_size=40)


def dataset(rows: Sequence[tuple[int, int]]) -> Dataset:
    labels = np.array([label for _, label in rows], dtype=np.int64)
    names = tuple(f"p{number}" for number, _ in rows)
    return Dataset(np.zeros((len(rows), 2, 2), np.uint8), labels, names, names, DataReport())


def sides(rows: Sequence[tuple[int, int]], work: Path, seed: int = 0, fraction: float = 0.25) -> dict[str, bool]:
    data = dataset(rows)
    train, validation = split_site(data, fraction, seed, work)
    return {data.patients[row]: False for row in train} | {data.patients[row]: True for row in validation}


@settings(max_examples=12, deadline=None)
@given(ROWS, ROWS)
def test_whoever_joins_and_whatever_label_changes_nobody_moves(
    tmp_path_factory: pytest.TempPathFactory, first: list[tuple[int, int]], more: list[tuple[int, int]]
) -> None:
    work = tmp_path_factory.mktemp("work")
    before = sides(first, work)
    relabelled = [(number, 1 - label) for number, label in first]
    after = sides([*relabelled, *more], work)
    assert {patient: after[patient] for patient in before} == before


@settings(max_examples=12, deadline=None)
@given(ROWS, st.integers(0, 1000))
def test_the_first_split_is_the_one_without_a_memory(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int]], seed: int
) -> None:
    data = dataset(rows)
    for _ in range(2):
        found = split_site(data, 0.25, seed, tmp_path_factory.mktemp("work"))
        for side, expected in zip(found, split_by_patient(data.patients, data.labels.tolist(), 0.25, seed), strict=True):
            np.testing.assert_array_equal(side, expected)


def test_new_patients_fill_validation_up_to_its_share(tmp_path: Path) -> None:
    sides([(number, number % 2) for number in range(40)], tmp_path)
    grown = sides([(number, number % 2) for number in range(400)], tmp_path)
    assert 98 <= sum(grown.values()) <= 102


def test_another_split_is_another_memory(tmp_path: Path) -> None:
    rows = [(number, number % 2) for number in range(60)]
    assert sides(rows, tmp_path, seed=1) != sides(rows, tmp_path, seed=2)
    assert len(json.loads((tmp_path / SPLIT_FILE).read_text())) == 2


def test_who_withdrew_is_not_remembered(tmp_path: Path) -> None:
    sides([(1, 0), (2, 1), (3, 0)], tmp_path)
    forget_split(tmp_path, lambda patient: patient == "p2")
    assert "p2" not in (tmp_path / SPLIT_FILE).read_text()
    assert (tmp_path / SPLIT_FILE).stat().st_mode & 0o777 == 0o600


def test_a_damaged_memory_is_no_reason_to_deal_anew(tmp_path: Path) -> None:
    (tmp_path / SPLIT_FILE).write_text('{"0 0.25": {"p1"')
    with pytest.raises(DataError, match="damaged"):
        sides([(1, 0)], tmp_path)
