"""Statistics: a commutative monoid, the same for pooled images as for merged parts, and safe on the wire."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pneumofed.common.errors import DataError, MessageError
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.evaluation.statistics import FEDERATED_GRID, FIXED_POINT, MAX_IMAGES, MAX_SITE_IMAGES, ScoreGrid, Statistics
from tests.common.evaluation.draws import any_task, binary, of_scores, take, three_class

ONE_TASK = st.sampled_from([binary(), three_class()])
quick = settings(max_examples=25, deadline=None)


def federated(predictions: Predictions) -> Statistics:
    return Statistics.of(predictions, FEDERATED_GRID)


@quick
@given(ONE_TASK.flatmap(lambda task: st.tuples(task, task, task)))
def test_statistics_form_a_commutative_monoid(three: tuple[Predictions, Predictions, Predictions]) -> None:
    a, b, c = map(federated, three)
    zero = Statistics.zero(a.classes)
    assert (a + b) + c == a + (b + c)
    assert a + b == b + a
    assert a + zero == a == zero + a


@quick
@given(any_task, st.data())
def test_merged_sites_equal_their_pooled_images_bit_for_bit(predictions: Predictions, data: st.DataObject) -> None:
    site = np.array(data.draw(st.lists(st.integers(0, 4), min_size=len(predictions), max_size=len(predictions))), dtype=int)
    parts = [federated(take(predictions, np.flatnonzero(site == k))) for k in data.draw(st.permutations(range(5)))]
    assert reduce(add, parts) == federated(predictions)


@quick
@given(any_task)
def test_counts_are_those_of_the_images(predictions: Predictions) -> None:
    statistics = Statistics.of(predictions)
    assert statistics.n == len(predictions)
    assert statistics.n_positive == int((predictions.labels != 0).sum())
    assert statistics.histograms.shape[0] == (1 if predictions.classes == 2 else predictions.classes)
    total = statistics.calibration[:, 2].sum() / FIXED_POINT
    assert total == pytest.approx(predictions.scores.sum(), abs=1e-8)


def test_statistics_of_other_grids_or_classes_do_not_merge() -> None:
    two = federated(of_scores([0.25], [1]))
    for other in (
        Statistics.of(of_scores([0.25], [1])),
        Statistics.zero(3),
        Statistics.zero(2, ScoreGrid.uniform_in_logit(2048, 10)),
    ):
        with pytest.raises(DataError, match="grid"):
            two + other


def test_more_images_than_the_counters_hold_do_not_merge() -> None:
    many = Statistics.zero(2)
    many.confusion[0, 0] = MAX_IMAGES
    with pytest.raises(DataError):
        many + federated(of_scores([0.5], [1]))


@quick
@given(any_task)
def test_the_wire_gives_back_the_same_statistics(predictions: Predictions) -> None:
    statistics = federated(predictions)
    numbers = statistics.to_numbers()
    assert Statistics.from_numbers(numbers, predictions.classes) == statistics
    assert all(type(number) is int for value in numbers.values() for number in (value if isinstance(value, list) else [value]))


def test_the_wire_is_small_and_takes_the_federated_grid_alone() -> None:
    draw = np.random.default_rng(0)
    predictions = of_scores(draw.random(5000).tolist(), draw.integers(0, 2, 5000).tolist())
    index = federated(predictions).to_numbers()["index"]
    assert isinstance(index, list)
    assert len(index) < 2000
    with pytest.raises(DataError):
        Statistics.of(predictions).to_numbers()


@quick
@given(any_task, st.data())
def test_a_changed_count_is_refused(predictions: Predictions, data: st.DataObject) -> None:
    assume(len(predictions) > 0)
    statistics = federated(predictions)
    name = data.draw(st.sampled_from(["confusion", "histograms", "calibration"]))
    array = getattr(statistics, name)
    counts = array[:, :2] if name == "calibration" else array  # the third column is a sum, free within its bin
    cell = tuple(data.draw(st.integers(0, size - 1)) for size in counts.shape)
    counts[cell] += data.draw(st.integers(1, 3))
    with pytest.raises(MessageError):
        Statistics.from_numbers(statistics.to_numbers(), predictions.classes)


@pytest.mark.parametrize(
    ("name", "cell", "value"),
    [
        ("losses", 0, 10 * FIXED_POINT),
        ("losses", 1, 100 * FIXED_POINT),
        ("calibration", (0, 2), 5 * FIXED_POINT),
        ("calibration", (7, 2), 0),
        ("confusion", (0, 0), MAX_SITE_IMAGES + 1),
        ("confusion", (0, 0), 2**62),
    ],
)
def test_impossible_sums_are_refused(name: str, cell: Any, value: int) -> None:
    statistics = federated(of_scores([0.5, 0.5], [0, 1]))
    getattr(statistics, name)[cell] = value
    with pytest.raises(MessageError):
        Statistics.from_numbers(statistics.to_numbers(), 2)


@pytest.mark.parametrize(
    ("key", "wrong"),
    [("classes", 3), ("bins", 7), ("index", None), ("index", [1]), ("value", "many"), ("value", []), ("extra", 1)],
)
def test_numbers_of_a_wrong_form_are_refused(key: str, wrong: object) -> None:
    numbers = federated(of_scores([0.5, 0.75], [0, 1])).to_numbers()
    with pytest.raises(MessageError):
        Statistics.from_numbers({**numbers, key: wrong}, 2)


@pytest.mark.parametrize("key", ["index", "value"])
@pytest.mark.parametrize("wrong", [float("nan"), 1.0, True, -1, 0, 2**63, 10**9, "1", None])
def test_one_number_of_a_wrong_kind_is_refused(key: str, wrong: object) -> None:
    numbers = federated(of_scores([0.5, 0.75], [0, 1])).to_numbers()
    values = numbers[key]
    assert isinstance(values, list)
    with pytest.raises(MessageError):
        Statistics.from_numbers({**numbers, key: [values[0], wrong, *values[2:]]}, 2)


@pytest.mark.parametrize("key", ["classes", "bins", "index", "value"])
def test_a_missing_number_is_refused(key: str) -> None:
    numbers = federated(of_scores([0.5], [1])).to_numbers()
    del numbers[key]
    with pytest.raises(MessageError):
        Statistics.from_numbers(numbers, 2)
