"""Summaries that sites share: merged as the pooled images would be, and naming the site that moved."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumofed.common.errors import DataError, MessageError
from pneumofed.inference.monitor.share import MIN_COUNT, Grid, Summary, compare_sites
from pneumofed.inference.monitor.streams import EMBEDDING
from tests.inference.monitor import drawn
from tests.inference.monitor.drawn import draw_arrivals, draw_reference, one_after_another

REFERENCE = draw_reference()
GRID = Grid.of(REFERENCE)


def summarise(patients: int, seed: int = 1, brighter: float = 0.0) -> Summary:
    return Summary.of(draw_arrivals(REFERENCE, patients, seed, brighter=brighter), REFERENCE, GRID)


@settings(max_examples=15, deadline=None)
@given(first=st.integers(1, 80), second=st.integers(1, 80), third=st.integers(1, 80))
def test_what_is_merged_is_what_the_pooled_images_give(first: int, second: int, third: int) -> None:
    parts = [draw_arrivals(REFERENCE, n, seed) for seed, n in enumerate((first, second, third), 10)]
    a, b, c = (Summary.of(part, REFERENCE, GRID) for part in parts)
    pooled = Summary.of(one_after_another(*parts), REFERENCE, GRID)
    assert a + b + c == pooled == c + (b + a)
    assert compare_sites({"site": a + b + c}, REFERENCE) == compare_sites({"site": pooled}, REFERENCE)


def test_the_site_that_moved_is_named_and_the_other_is_not() -> None:
    sites = {"quiet": summarise(200), "moved": summarise(200, 2, brighter=1.0)}
    found = {drift.site: drift for drift in compare_sites({name: of.for_release() for name, of in sites.items()}, REFERENCE, 12)}
    assert found["quiet"].moved(0.05) == []
    assert found["moved"].moved(0.05) == ["mean"]
    assert found["moved"].rank["mean"] > 0.6


def test_a_move_of_the_embedding_is_seen_through_its_kernel_mean() -> None:
    found = draw_arrivals(REFERENCE, 200)
    moved = type(found)(**{**vars(found), "embedding": found.embedding + 2.0 * np.eye(found.embedding.shape[1])[5]})
    drift = compare_sites({"site": Summary.of(moved, REFERENCE, GRID)}, REFERENCE)[0]
    assert EMBEDDING in drift.moved(0.05)


def test_quiet_sites_are_named_no_more_often_than_promised() -> None:
    named = sum(
        bool(compare_sites({"site": summarise(80, seed).for_release()}, REFERENCE)[0].moved(0.2)) for seed in range(100, 180)
    )
    assert named <= 28  # 16 expected at the most; more than 28 has a chance of 0.1 %


def test_small_sites_that_withhold_many_counts_are_named_no_more_often_than_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn, "NAMES", tuple(f"statistic {i}" for i in range(16)))
    least = []
    for seed in range(4):
        reference = draw_reference(250, seed)
        grid = Grid.of(reference)
        for site in range(100):
            found = draw_arrivals(reference, 62, 1000 * seed + site)
            told = Summary.of(found.take(np.flatnonzero(~found.refused)[:55]), reference, grid).for_release()
            least.append(min(compare_sites({"site": told}, reference)[0].p_values.values()))
    # a chance of 0.1 % at the most
    assert np.sum(np.array(least) <= 0.05) <= 35
    assert np.sum(np.array(least) <= 0.05 / 12) <= 7


def test_small_counts_are_withheld_and_their_sum_is_told() -> None:
    whole = summarise(60)
    told = whole.for_release()
    assert not np.any((told.histograms > 0) & (told.histograms < MIN_COUNT))
    assert np.array_equal(told.histograms.sum(axis=1) + told.withheld, whole.histograms.sum(axis=1))
    assert np.any(told.withheld > 0)
    with pytest.raises(DataError, match="share a longer time"):
        summarise(30).for_release()


def test_a_summary_comes_back_from_the_wire_as_it_was() -> None:
    told = summarise(90).for_release()
    assert Summary.from_numbers(json.loads(json.dumps(told.to_numbers())), GRID) == told


@pytest.mark.parametrize(
    "broken",
    [
        {"bundle": "another"},
        {"histograms": [[1]]},
        {"withheld": "none"},
        {"tallies": [90, 90, 0, 0, 5]},
        {"kernel": [2**40] * 64},
        {"sums": [-1, 0]},
        {"withheld": [1] * len(GRID.quantities)},
        {"expected_corrections": 1.5},
        {"extra": 1},
    ],
)
def test_a_summary_that_contradicts_itself_is_refused(broken: dict[str, object]) -> None:
    with pytest.raises(MessageError):
        Summary.from_numbers({**summarise(90).to_numbers(), **broken}, GRID)


def test_summaries_of_two_bundles_do_not_merge() -> None:
    other = draw_reference(seed=9)
    with pytest.raises(DataError, match="one bundle"):
        summarise(60) + Summary.of(draw_arrivals(other, 60), other, Grid.of(other))
