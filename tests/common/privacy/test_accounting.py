"""Epsilon against closed forms and an independent accountant, and the noise that a target needs."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from pneumofed.client.privacy.plan import SitePlan
from pneumofed.common.errors import ConfigError
from pneumofed.common.privacy.accounting import NOISE_TOLERANCE, AccountantName, Mechanism, epsilon, noise_for
from tests.tiny import tiny_experiment

TOLERANCE, MESH = 0.01, 1.0e-3
"""How far below the independent accountant's epsilon, an upper bound itself, ours may lie: as a share of it, and by its own mesh."""

mechanisms = st.builds(
    Mechanism,
    sampling_rate=st.one_of(st.just(1.0), st.floats(0.001, 0.999)),
    noise_multiplier=st.floats(0.6, 30.0),
    steps=st.integers(1, 400),
)
deltas = st.floats(1e-6, 1e-2)
GROUP: dict[str, Any] = {"model": {"norm": "group"}, "loss": {"logit_adjustment": False}}


def exact_gaussian_epsilon(noise: float, steps: int, delta: float) -> float:
    """Balle and Wang 2018, theorem 8: so many Gaussian mechanisms are one with noise / sqrt(steps)."""
    mu = math.sqrt(steps) / noise

    def excess(value: float) -> float:
        return float(norm.cdf(mu / 2 - value / mu) - math.exp(value) * norm.cdf(-mu / 2 - value / mu)) - delta

    return float(brentq(excess, 0.0, 500.0)) if excess(0.0) > 0 else 0.0


@settings(deadline=None, max_examples=30)
@given(noise=st.floats(0.7, 50.0), steps=st.integers(1, 60), delta=deltas)
def test_epsilon_of_the_plain_gaussian_is_the_exact_one_or_a_little_more(noise: float, steps: int, delta: float) -> None:
    exact = exact_gaussian_epsilon(noise, steps, delta)
    assert exact <= epsilon([Mechanism(1.0, noise, steps)], delta, "prv") <= 1.0001 * exact + 1e-6
    assert exact <= epsilon([Mechanism(1.0, noise, steps)], delta, "rdp")


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@settings(deadline=None, max_examples=10)
@given(schedule=st.lists(mechanisms, min_size=1, max_size=4), delta=deltas)
def test_epsilon_is_not_below_that_of_an_independent_accountant(
    accountant: AccountantName, schedule: list[Mechanism], delta: float
) -> None:
    ours, expected = epsilon(schedule, delta, accountant), independent_epsilon(schedule, delta)
    if ours < expected * (1.0 - TOLERANCE) - MESH:  # many steps on a coarse mesh cost the independent one more than a mesh width
        expected = independent_epsilon(schedule, delta, MESH / 10.0)
    assume(math.isfinite(expected))  # between 710 and 745 it divides by a denormal exp(-epsilon) and answers with infinity
    assert ours >= expected * (1.0 - TOLERANCE) - MESH


def independent_epsilon(schedule: list[Mechanism], delta: float, mesh: float = MESH) -> float:
    """By privacy loss distributions of `dp-accounting`, worse of both directions of add-or-remove-one."""
    dp = pytest.importorskip("dp_accounting", reason="the independent accountant is not installed")
    from dp_accounting import pld

    accountant = pld.PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=mesh)
    for mechanism in schedule:
        event = dp.PoissonSampledDpEvent(mechanism.sampling_rate, dp.GaussianDpEvent(mechanism.noise_multiplier))
        accountant.compose(event, mechanism.steps)
    return float(accountant.get_epsilon(delta))


@settings(deadline=None, max_examples=20)
@given(schedule=st.lists(mechanisms, min_size=2, max_size=4), delta=deltas, data=st.data())
def test_epsilon_knows_no_order_and_grows_with_each_mechanism(
    schedule: list[Mechanism], delta: float, data: st.DataObject
) -> None:
    whole = epsilon(schedule, delta, "rdp")
    assert epsilon(data.draw(st.permutations(schedule)), delta, "rdp") == whole
    assert epsilon(schedule[:-1], delta, "rdp") <= whole


def test_steps_in_parts_cost_what_they_cost_together() -> None:
    parts = [Mechanism(0.1, 1.2, 5)] * 12
    assert epsilon(parts, 1e-3, "prv") == epsilon([Mechanism(0.1, 1.2, 60)], 1e-3, "prv")


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_nothing_costs_nothing_and_no_noise_costs_everything(accountant: AccountantName) -> None:
    assert epsilon([], 1e-3, accountant) == 0.0
    assert epsilon([Mechanism(0.5, 0.0, 0)], 1e-3, accountant) == 0.0
    assert epsilon([Mechanism(0.5, 1.0, 3), Mechanism(0.001, 0.0, 1)], 1e-3, accountant) == math.inf


@pytest.mark.parametrize("schedule", [[Mechanism(0.9, 0.02, 5000)], [Mechanism(0.9, 1e-3, 10**9)], [Mechanism(0.01, 2e-3, 1)]])
def test_where_the_numerical_composition_cannot_be_had_renyi_bounds(schedule: list[Mechanism]) -> None:
    assert epsilon(schedule, 1e-5, "prv") == epsilon(schedule, 1e-5, "rdp") > 1000.0


@pytest.mark.parametrize(
    "values", [(0.0, 1.0, 1), (1.1, 1.0, 1), (0.5, -1.0, 1), (0.5, math.nan, 1), (0.5, math.inf, 1), (0.5, 1.0, -1)]
)
def test_a_mechanism_that_cannot_be_is_refused(values: tuple[float, float, int]) -> None:
    with pytest.raises(ConfigError):
        Mechanism(*values)


@settings(deadline=None, max_examples=4)
@given(
    target=st.floats(0.3, 10.0),
    delta=st.floats(1e-5, 1e-2),
    rate=st.floats(0.01, 1.0),
    steps=st.integers(1, 300),
    accountant=st.sampled_from(["prv", "rdp"]),
)
def test_the_noise_keeps_to_the_target_and_a_little_less_does_not(
    target: float, delta: float, rate: float, steps: int, accountant: AccountantName
) -> None:
    noise = noise_for(target, delta, (rate, steps), accountant)
    assert epsilon([Mechanism(rate, noise, steps)], delta, accountant) <= target
    less = (noise - 2.0e-4) / (1.0 + 2 * NOISE_TOLERANCE)
    assert less < 0.02 or epsilon([Mechanism(rate, less, steps)], delta, accountant) > target


def test_what_was_spent_before_asks_for_more_noise() -> None:
    before = (Mechanism(0.2, 1.5, 50),)
    alone, after = noise_for(4.0, 1e-3, (0.2, 50), "prv"), noise_for(4.0, 1e-3, (0.2, 50), "prv", before)
    assert after > alone
    assert epsilon([*before, Mechanism(0.2, after, 50)], 1e-3, "prv") <= 4.0
    with pytest.raises(ConfigError, match="spent already"):
        noise_for(0.5, 1e-3, (0.2, 50), "prv", before)


@pytest.mark.parametrize("left", [1.001, 1.1])
def test_where_next_to_all_is_spent_the_noise_is_still_the_smallest(left: float) -> None:
    before, planned = (Mechanism(0.2, 1.5, 50),), (0.01, 5)
    target = left * epsilon(before, 1e-3, "rdp")
    noise = noise_for(target, 1e-3, planned, "rdp", before)
    less = (noise - 2.0e-4) / (1.0 + 2 * NOISE_TOLERANCE)
    found = [epsilon([*before, Mechanism(planned[0], one, planned[1])], 1e-3, "rdp") for one in (noise, less)]
    assert found[0] <= target < found[1]


def private(**values: object) -> SitePlan:
    privacy = {"mechanism": "dp_sgd", "expected_batch_size": 64, **values}
    return SitePlan.of(tiny_experiment(rounds=10, **GROUP, privacy=privacy), units=500, patients=400)


def test_all_planned_rounds_together_spend_the_target_and_no_more() -> None:
    plan = private(target_epsilon=3.0)
    assert 2.97 < plan.epsilon_after(10) <= 3.0
    assert plan.epsilon_after(9) < plan.epsilon_after(10) < plan.epsilon_after(11)
    assert plan.round_mechanism() == Mechanism(64 / 500, plan.noise_multiplier, 8)
    assert plan.delta == 1e-3


def test_a_given_noise_takes_the_place_of_the_target() -> None:
    assert private(noise_multiplier=0.9, delta=1e-4).round_mechanism().noise_multiplier == 0.9


def test_a_small_site_draws_everyone_in_each_step() -> None:
    plan = SitePlan.of(tiny_experiment(**GROUP, privacy={"mechanism": "dp_sgd"}), units=40, patients=40)
    assert plan.sampling_rate == 1.0
    assert plan.steps_per_round == 1


def test_a_run_that_is_not_private_has_no_plan() -> None:
    with pytest.raises(ConfigError):
        SitePlan.of(tiny_experiment(), units=40, patients=40)
