"""The split into training and validation: by patient, in any order of rows, in proportion."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pneumofed.client.data.splits import split_by_patient
from pneumofed.common.config.classes import class_index
from pneumofed.common.data.sources.public_sets import read_kaggle

ROWS = st.lists(st.tuples(st.sampled_from([f"p{n}" for n in range(9)]), st.integers(0, 2)), min_size=1, max_size=24)
FRACTIONS = st.floats(0.0, 0.49)
SEEDS = st.integers(0, 2**31 - 1)


def _split(rows: list[tuple[str, int]], fraction: float, seed: int) -> tuple[set[str], set[str]]:
    patients, labels = zip(*rows, strict=True)
    train, validation = split_by_patient(patients, labels, fraction, seed)
    return {patients[i] for i in train}, {patients[i] for i in validation}


@given(ROWS, FRACTIONS, SEEDS)
def test_every_image_is_on_one_side_and_every_patient_too(rows: list[tuple[str, int]], fraction: float, seed: int) -> None:
    patients, labels = zip(*rows, strict=True)
    train, validation = split_by_patient(patients, labels, fraction, seed)
    assert train.dtype == validation.dtype == np.int64
    assert sorted([*train, *validation]) == list(range(len(rows)))
    assert len(train) > 0
    assert not {patients[i] for i in train} & {patients[i] for i in validation}


@given(ROWS, FRACTIONS, SEEDS, st.randoms())
def test_patients_fall_to_the_same_side_in_any_order_of_rows(
    rows: list[tuple[str, int]], fraction: float, seed: int, random: st.DataObject
) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert _split(rows, fraction, seed) == _split(shuffled, fraction, seed)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=3).filter(any), FRACTIONS, SEEDS)
def test_each_class_is_split_in_proportion(sizes: list[int], fraction: float, seed: int) -> None:
    rows = [(f"{label}-{n}", label) for label, size in enumerate(sizes) for n in range(size)]
    validation = Counter(int(patient[0]) for patient in _split(rows, fraction, seed)[1])
    exact = [fraction * size for size in sizes]
    tiny = validation.total() == 1
    for label, size in enumerate(sizes):
        assert validation[label] >= min(math.floor(exact[label] - 1e-9), size - 1)
        assert validation[label] <= max(math.ceil(exact[label] + 1e-9), int(tiny))
        assert validation[label] < size or size == 0


def test_the_share_of_a_rare_class_is_right_on_average_over_small_sites() -> None:
    rows = [(f"normal{n}", 0) for n in range(4)] + [(f"sick{n}", 1) for n in range(30)]
    taken = [sum(patient.startswith("normal") for patient in _split(rows, 0.1, seed)[1]) for seed in range(1000)]
    assert abs(np.mean(taken) - 0.4) < 5 * math.sqrt(0.4 * 0.6 / 1000)


def test_each_patient_is_as_likely_to_be_drawn_as_another() -> None:
    rows = [(f"p{n}", 0) for n in range(10)]
    drawn = Counter(patient for seed in range(1000) for patient in _split(rows, 0.2, seed)[1])
    assert max(abs(drawn[f"p{n}"] - 200) for n in range(10)) < 5 * math.sqrt(1000 * 0.2 * 0.8)


def test_the_seed_decides_the_draw() -> None:
    rows = [(f"p{n}", n % 2) for n in range(100)]
    assert _split(rows, 0.1, 1) == _split(rows, 0.1, 1) != _split(rows, 0.1, 2)


@pytest.mark.parametrize(
    ("rows", "validation_patients"),
    [
        ([("a", 0)], 0),
        ([("a", 0)] * 5, 0),
        ([("a", 0), ("b", 1)], 0),
        ([("a", 0), ("b", 0)], 1),
        ([("a", 0), ("b", 0), ("c", 1)], 1),
    ],
)
def test_tiny_sites_keep_a_patient_of_each_class_for_training(rows: list[tuple[str, int]], validation_patients: int) -> None:
    for seed in range(20):
        train, validation = _split(rows, 0.1, seed)
        assert len(validation) == validation_patients
        assert {label for patient, label in rows if patient in train} == {label for _, label in rows}


def test_no_patients_give_two_empty_sides() -> None:
    assert [len(side) for side in split_by_patient([], [], 0.1, 0)] == [0, 0]


def test_a_patient_with_two_classes_counts_as_the_rarer() -> None:
    rows = [("both", 0), ("both", 1), *((f"p{n}", 0) for n in range(50)), ("sick", 1)]
    sides = [_split(rows, 0.1, seed) for seed in range(200)]
    assert any("both" in validation for _, validation in sides)
    assert not any({"both", "sick"} <= validation for _, validation in sides)


def test_a_patient_who_joins_moves_few_others() -> None:
    rows = [(f"p{n}", n % 2) for n in range(400)]
    before, after = _split(rows, 0.2, 0)[1], _split([*rows, ("new", 0)], 0.2, 0)[1]
    assert len(before ^ after) <= 6


@pytest.mark.parametrize(("labels", "fraction"), [([0], 0.1), ([0, 1], 1.0), ([0, 1], -0.1)])
def test_arguments_that_do_not_fit_are_refused(labels: list[int], fraction: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        split_by_patient(["a", "b"], labels, fraction, 0)


def test_the_kaggle_set_is_split_without_a_patient_on_both_sides(kaggle_dir: Path) -> None:
    manifest, _ = read_kaggle(kaggle_dir)
    labels = [class_index(label, "three_class") or 0 for label in manifest.labels]
    train, validation = split_by_patient(manifest.patients, labels, 0.1, 0)
    assert not {manifest.patients[i] for i in train} & {manifest.patients[i] for i in validation}
    for label in range(3):
        share = sum(labels[i] == label for i in validation) / labels.count(label)
        assert 0.06 < share < 0.14
