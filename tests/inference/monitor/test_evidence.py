"""Bets on ranks: p-values are uniform without change, and gains come in the direction of one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import kstest

from pneumofed.inference.monitor.e_processes import (
    FIRST_DAY_SHARE,
    YEAR_DAYS,
    accumulate,
    bet_on_events,
    bet_on_ranks,
    change_day,
    conformal_p_values,
    direction_of,
)


@pytest.mark.parametrize("levels", [None, 4])
def test_p_values_of_exchangeable_values_are_independent_and_uniform(levels: int | None) -> None:
    rng = np.random.default_rng(3)
    found = []
    for _ in range(150):
        values = rng.standard_normal(40) if levels is None else rng.integers(levels, size=40).astype(np.float64)
        found.append(conformal_p_values(values[:15], values[15:], rng))
    p_values = np.stack(found)
    assert kstest(p_values.ravel(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(p_values[:, 0], p_values[:, -1])[0, 1]) < 0.3


def test_a_value_above_all_others_has_a_p_value_next_to_one() -> None:
    p_values = conformal_p_values(np.arange(99.0), np.array([1000.0, -1.0]), np.random.default_rng(0))
    assert p_values[0] > 0.99
    assert p_values[1] < 0.01


def test_each_bet_on_ranks_is_a_density() -> None:
    for gambler in range(bet_on_ranks(np.array([0.5])).shape[1]):
        area = quad(lambda p, g=gambler: float(np.exp(bet_on_ranks(np.array([p]))[0, g])), 0.0, 1.0, points=[0.5], limit=200)[0]
        assert area == pytest.approx(1.0, abs=1e-6)


def test_gamblers_gain_in_their_own_direction() -> None:
    places = {"higher": 0.95, "lower": 0.05, "wider": [0.02, 0.98], "narrower": 0.5}
    for direction, place in places.items():
        bets = bet_on_ranks(np.atleast_1d(np.asarray(place, np.float64))).sum(axis=0)
        gaining = {direction_of(int(gambler)) for gambler in np.flatnonzero(bets > 0)}
        assert direction in gaining


@settings(deadline=None)
@given(at_most=st.floats(0.02, 0.98), share=st.floats(0.0, 1.0))
def test_a_bet_on_events_is_never_better_than_fair_while_the_promise_holds(at_most: float, share: float) -> None:
    chance = at_most * share
    bets = np.exp(bet_on_events(np.array([True, False]), np.full(2, at_most)))
    assert np.all(chance * bets[0] + (1.0 - chance) * bets[1] <= 1.0 + 1e-9)


def test_the_mixture_is_the_mean_over_gamblers_and_days_of_beginning() -> None:
    rng = np.random.default_rng(1)
    days = np.array([3, 3, 5, 6, 6, 9])
    log_bets = rng.normal(0.0, 0.5, (len(days), 2))
    expected = np.zeros(len(days))
    for start in range(3, 3 + YEAR_DAYS):
        share = FIRST_DAY_SHARE if start == 3 else (1.0 - FIRST_DAY_SHARE) / (YEAR_DAYS - 1)
        expected += share * np.exp(np.cumsum(log_bets * (days >= start)[:, None], axis=0)).mean(axis=1)
    np.testing.assert_allclose(np.exp(accumulate(log_bets, days).log_wealth), expected, rtol=1e-9)


def test_a_limit_of_ten_is_ever_reached_in_at_most_a_tenth_of_quiet_years() -> None:
    rng = np.random.default_rng(5)
    days = np.arange(300) // 20
    reached = sum(
        accumulate(
            bet_on_ranks(conformal_p_values(rng.standard_normal(50), rng.standard_normal(300), rng)), days
        ).log_wealth.max()
        >= np.log(10.0)
        for _ in range(200)
    )
    assert reached <= 32  # 20 expected at the most; more than 32 has a chance of 0.3 %


def test_a_late_change_is_found_and_dated() -> None:
    rng = np.random.default_rng(6)
    stream = np.concatenate([rng.standard_normal(1000), rng.standard_normal(100) + 1.0])
    days = np.arange(len(stream)) // 10
    log_bets = bet_on_ranks(conformal_p_values(rng.standard_normal(200), stream, rng))
    course = accumulate(log_bets, days)
    assert course.log_wealth[999] < np.log(100.0) < course.log_wealth[-1]
    leader = int(course.leader[-1])
    assert direction_of(leader) == "higher"
    assert 97 <= change_day(log_bets[:, leader], days) <= 103
