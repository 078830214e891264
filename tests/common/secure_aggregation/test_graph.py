"""Who is whose neighbour, and how many must stay."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumofed.common.config.experiment import SecureAggregationConfig
from pneumofed.common.secure_aggregation.masking import ALL_PAIRS_UP_TO, at_least, neighbourhoods, neighbours_needed, threshold


def names(count: int) -> list[str]:
    return [f"site-{number:03d}" for number in range(count)]


@settings(max_examples=50, deadline=None)
@given(sites=st.integers(3, 60), neighbours=st.sampled_from([None, 4, 8, 20]), seed=st.binary(max_size=8))
def test_neighbours_are_mutual_and_all_have_as_many(sites: int, neighbours: int | None, seed: bytes) -> None:
    cfg = SecureAggregationConfig(neighbours=neighbours)
    found = neighbourhoods(names(sites), cfg, seed)
    wanted = min(sites - 1, neighbours or neighbours_needed(sites, cfg.threshold))
    for site, holders in found.items():
        assert site in holders and len(set(holders)) == len(holders) >= min(wanted + 1, sites)
        assert all(site in found[other] for other in holders)
    assert found == neighbourhoods(names(sites)[::-1], cfg, seed)


def test_up_to_sixteen_sites_are_all_neighbours_and_more_are_not() -> None:
    assert neighbours_needed(ALL_PAIRS_UP_TO, 0.67) == ALL_PAIRS_UP_TO - 1
    assert neighbours_needed(30, 0.67) < 29
    assert neighbours_needed(1000, 0.67) < 250


def test_another_seed_gives_another_graph() -> None:
    cfg = SecureAggregationConfig(neighbours=4)
    assert neighbourhoods(names(30), cfg, b"a") != neighbourhoods(names(30), cfg, b"b")


@pytest.mark.parametrize(("sites", "least"), [(2, 3), (3, 3), (4, 3), (6, 5), (9, 7), (10, 7), (30, 21), (100, 67)])
def test_the_default_threshold_is_more_than_two_thirds(sites: int, least: int) -> None:
    assert threshold(sites, SecureAggregationConfig().threshold) == least
    assert sites < 4 or 3 * least > 2 * sites


def test_the_tail_of_drawing_without_replacement_is_that_of_many_draws() -> None:
    drawn = np.random.default_rng(0).hypergeometric(6, 23, 10, 200_000)
    for count in (1, 3, 5):
        assert at_least(count, 6, 29, 10) == pytest.approx((drawn >= count).mean(), abs=0.005)
    assert at_least(0, 6, 29, 10) == 1.0
    assert at_least(7, 6, 29, 10) == 0.0
