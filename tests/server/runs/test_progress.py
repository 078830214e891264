"""Which round's weights are kept as the best, and when a later round takes their place."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pneumofed.server.runs.folder import best_round, standard_error
from pneumofed.server.runs.records import Metrics, RoundRecord


def lines(*areas: float, positives: int = 50, negatives: int = 50) -> list[RoundRecord]:
    found = [Metrics(n=positives + negatives, n_positive=positives, auroc=area) for area in areas]
    return [RoundRecord(round=number, validation=metrics) for number, metrics in enumerate(found, 1)]


def test_the_standard_error_is_that_of_hanley_and_mcneil() -> None:
    """Their example: an area of 0.893 over 51 abnormal and 58 normal images has a standard error of 0.032."""
    assert standard_error(lines(0.893, positives=51, negatives=58)[0]) == pytest.approx(0.032, abs=6e-4)
    assert standard_error(lines(1.0)[0]) == 0.0
    assert standard_error(RoundRecord(round=1, validation=Metrics(auroc=0.9))) == 0.0


def test_among_rounds_that_validation_cannot_tell_apart_the_latest_is_kept() -> None:
    assert best_round(lines(0.70, 0.95, 0.94, 0.80)) == 3
    assert best_round(lines(0.70, 0.95, 0.94, 0.80, positives=10_000, negatives=10_000)) == 2
    assert best_round([]) == 0


def test_rounds_without_a_validation_auroc_are_kept_only_where_there_is_no_other() -> None:
    nothing = RoundRecord(round=3, validation=Metrics(auroc=None))
    assert best_round([*lines(0.7, 0.9), nothing]) == 2
    assert best_round([nothing.updated(round=1), nothing.updated(round=2)]) == 2


@given(st.lists(st.floats(0.5, 1.0), min_size=1, max_size=12), st.integers(1, 200), st.integers(1, 200))
def test_a_round_is_given_up_only_for_the_newest(areas: list[float], positives: int, negatives: int) -> None:
    """So that the model of the kept round, written when it was the newest, is there at any time."""
    history = lines(*areas, positives=positives, negatives=negatives)
    kept = [best_round(history[:count]) for count in range(1, len(history) + 1)]
    assert all(now in (before, count + 2) for count, (before, now) in enumerate(pairwise(kept)))
