"""Score grids: every score has exactly one bin, and other scores are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumofed.common.errors import DataError
from pneumofed.common.evaluation.statistics import FEDERATED_GRID, LOGIT_BINS, LOGIT_LIMIT, ScoreGrid
from tests.common.evaluation.draws import scores


@settings(max_examples=40, deadline=None)
@given(st.lists(scores))
def test_a_score_lies_between_the_bounds_of_its_bin(values: list[float]) -> None:
    array = np.array(values)
    for grid in (FEDERATED_GRID, ScoreGrid.exact(array)):
        bins = grid.bin_of(array)
        assert np.all(grid.lower[bins] <= array)
        assert np.all(array <= grid.upper[bins])
        assert np.all((array < grid.upper[bins]) | (bins == len(grid) - 1) | (grid.lower[bins] == grid.upper[bins]))


@settings(max_examples=40, deadline=None)
@given(st.floats(-19.9, 19.9), st.floats(0.0, 1.0))
def test_logits_further_apart_than_a_bin_are_told_apart(logit: float, more: float) -> None:
    other = logit + 1.001 * 2 * LOGIT_LIMIT / LOGIT_BINS + more
    low, high = FEDERATED_GRID.bin_of(1.0 / (1.0 + np.exp(-np.array([logit, other]))))
    assert low < high or logit > LOGIT_LIMIT


def test_half_is_an_edge_of_the_federated_grid() -> None:
    assert 0.5 in FEDERATED_GRID.lower
    assert FEDERATED_GRID.lower[FEDERATED_GRID.first_positive(0.5)] == 0.5


@pytest.mark.parametrize("score", [0.2, 0.0, 1.0])
def test_an_exact_grid_refuses_scores_it_was_not_made_of(score: float) -> None:
    with pytest.raises(DataError):
        ScoreGrid.exact([0.1, 0.3]).bin_of(np.array([score]))


def test_grids_are_equal_by_their_bins() -> None:
    assert ScoreGrid.uniform_in_logit() == FEDERATED_GRID
    assert ScoreGrid.exact([0.3, 0.1, 0.3]) == ScoreGrid.exact([0.1, 0.3])
    assert ScoreGrid.exact([0.1]) != ScoreGrid.exact([0.2])
    assert ScoreGrid.uniform_in_logit(4, 2.0) != ScoreGrid.uniform_in_logit(4, 3.0)
