"""Who is whose neighbour, and how many must stay."""

from __future__ import annotations

import math

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


def test_up_to_a_hundred_sites_are_all_neighbours_and_more_are_not() -> None:
    assert ALL_PAIRS_UP_TO == 100
    assert all(neighbours_needed(sites, 0.67) == sites - 1 for sites in range(3, 101))
    assert neighbours_needed(101, 0.67) < 80
    assert neighbours_needed(1000, 0.67) < 400


@pytest.mark.parametrize("sites", [*range(17, 101), *range(101, 1000, 47), 1000])
def test_no_neighbourhood_is_open_to_two_stories(sites: int) -> None:
    """Of one site's k + 1 holders the colluding ones give both of its secrets and each other one gives one: t of both are 2t - (k + 1) of
    them at least. With up to a third of all sites up to a hundred, with a fifth beyond."""
    neighbours = neighbours_needed(sites, 0.67)
    colluding = sites // 3 if sites <= 100 else math.ceil(sites / 5)
    open_to_two = 2 * threshold(neighbours + 1, 0.67) - (neighbours + 1)
    assert sites * at_least(open_to_two, colluding, sites - 1, neighbours) <= 2.0**-40


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
