"""What passes, what is refused, and how often a model that is worse by the margin slips through."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import xlogy

from pneumofed.common.evaluation.comparison import (
    NonInferiority,
    area_bound,
    area_limit,
    judge_areas,
    judge_rates,
    patients_needed,
    rate_bound,
    tango_limit,
)
from pneumofed.common.evaluation.paired import PairedAreas, PairedRates, paired_areas, paired_rates
from tests.common.evaluation.draws import of_scores

ALPHA, Z = 0.05, 1.6448536269514722


def perfect(sick: int, well: int) -> PairedAreas:
    model = of_scores([0.9] * sick + [0.1] * well, [1] * sick + [0] * well)
    return paired_areas(model, model)


def unchanged(images: int) -> PairedRates:
    right = np.ones(images, dtype=bool)
    return paired_rates(right, right, np.arange(images))


def test_two_faultless_models_on_few_images_prove_nothing() -> None:
    outcome = judge_areas(perfect(5, 5), (5, 5), 0.02, ALPHA)
    assert outcome.verdict is NonInferiority.TOO_FEW
    assert judge_rates(unchanged(20), 0.02, ALPHA).verdict is NonInferiority.TOO_FEW


def test_the_number_of_patients_that_is_told_suffices_and_fewer_do_not() -> None:
    outcome = judge_areas(perfect(5, 5), (5, 5), 0.02, ALPHA)
    needed = patients_needed(outcome, (5, 5), ALPHA)
    assert needed is not None
    assert needed[0] == needed[1]
    assert judge_areas(perfect(*needed), needed, 0.02, ALPHA).verdict is NonInferiority.NOT_WORSE
    fewer = (needed[0] - 1, needed[1] - 1)
    assert judge_areas(perfect(*fewer), fewer, 0.02, ALPHA).verdict is NonInferiority.TOO_FEW


def test_without_a_change_the_score_limit_is_the_one_known_in_closed_form() -> None:
    for n in (1, 20, 500):
        assert tango_limit(0, 0, n, Z) == pytest.approx(-(Z**2) / (n + Z**2), abs=1e-9)


@pytest.mark.parametrize(("gained", "lost", "n"), [(0, 1, 44), (5, 9, 80), (12, 0, 60)])
def test_at_the_score_limit_the_score_statistic_is_z(gained: int, lost: int, n: int) -> None:
    """With the most likely share of losses, given the difference, found by search rather than by formula."""
    delta = tango_limit(gained, lost, n, Z)

    def against(q: float) -> float:
        return -(xlogy(gained, q + delta) + xlogy(lost, q) + xlogy(n - gained - lost, 1 - 2 * q - delta))

    lost_share = minimize_scalar(
        against, bounds=(max(0.0, -delta), (1 - delta) / 2), method="bounded", options={"xatol": 1e-10}
    ).x
    statistic = (gained - lost - n * delta) / np.sqrt(n * (2 * lost_share + delta * (1 - delta)))
    assert statistic == pytest.approx(Z, rel=1e-3)


def test_the_limits_of_an_area_solve_their_equation() -> None:
    for area in (0.7, 0.95, 1.0):
        low, high = (area_limit(area, 30, 20, Z, upper=upper) for upper in (False, True))
        assert 0.0 < low <= area <= high <= 1.0
        variance = low * (1 - low) * (1 + 24 * ((1 - low) / (2 - low) + low / (1 + low))) / 600
        assert abs(area - low) == pytest.approx(Z * np.sqrt(variance), abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 200))
def test_the_bound_of_a_share_lies_below_what_was_seen_and_rises_with_more_patients(gained: int, lost: int, same: int) -> None:
    images = max(gained + lost + same, 1)
    change = np.zeros(images)
    change[:gained], change[gained : gained + lost] = 1, -1
    rates = paired_rates(change <= 0, change >= 0, np.arange(images))
    assert -1.0 <= rate_bound(rates, ALPHA) <= rates.difference
    assert rate_bound(rates, ALPHA) <= rate_bound(rates, ALPHA, factor=3.0) + 1e-9


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 40), st.integers(3, 40))
def test_the_bound_of_an_area_lies_below_what_was_seen_and_rises_with_more_patients(seed: int, sick: int, well: int) -> None:
    areas = drawn_areas(np.random.default_rng(seed), sick, well, 1.5, 1.5)
    patients = (sick, well)
    assert -1.0 <= area_bound(areas, patients, ALPHA) <= areas.difference
    assert area_bound(areas, patients, ALPHA) <= area_bound(areas, patients, ALPHA, factor=3.0) + 1e-9


def test_a_model_that_is_much_worse_is_called_so_and_no_number_of_cases_is_promised() -> None:
    areas = drawn_areas(np.random.default_rng(0), 200, 200, 2.0, 0.2)
    outcome = judge_areas(areas, (200, 200), 0.02, ALPHA)
    assert (outcome.verdict, patients_needed(outcome, (200, 200), ALPHA)) == (NonInferiority.WORSE, None)


def test_a_set_of_one_class_is_refused_with_the_number_of_patients_to_plan_for() -> None:
    model = of_scores([0.9] * 7, [1] * 7)
    outcome = judge_areas(paired_areas(model, model), (7, 0), 0.05, ALPHA)
    assert outcome.verdict is NonInferiority.TOO_FEW
    needed = patients_needed(outcome, (7, 0), ALPHA)
    assert needed is not None
    assert 50 < needed[1] < 1000


def test_an_equal_model_passes_on_enough_cases() -> None:
    passed = [
        judge_areas(drawn_areas(np.random.default_rng(seed), 400, 400, 2.5, 2.5), (400, 400), 0.02, ALPHA).verdict
        for seed in range(20)
    ]
    assert passed.count(NonInferiority.NOT_WORSE) >= 17


def drawn_areas(generator: np.random.Generator, sick: int, well: int, old: float, new: float, shared: float = 0.8) -> PairedAreas:
    """Two models with normal scores, correlated by `shared`, whose classes lie `old` and `new` standard deviations apart."""
    labels = np.array([1] * sick + [0] * well)
    common = np.sqrt(shared) * generator.normal(size=len(labels))
    scores = [
        1 / (1 + np.exp(-(common + np.sqrt(1 - shared) * generator.normal(size=len(labels)) + gap * labels)))
        for gap in (old, new)
    ]
    return paired_areas(*(of_scores(values.tolist(), labels.tolist()) for values in scores))


@pytest.mark.slow
@pytest.mark.parametrize(("sick", "well"), [(12, 12), (40, 15), (200, 100)])
@pytest.mark.parametrize("area", [0.9, 0.98])
def test_a_model_worse_by_the_margin_is_released_at_most_at_the_stated_rate(sick: int, well: int, area: float) -> None:
    """On the border of the hypothesis, where the error of the first kind is largest; 2000 draws."""
    from statistics import NormalDist

    margin, normal = 0.05, NormalDist()
    gaps = [np.sqrt(2) * normal.inv_cdf(value) for value in (area, area - margin)]
    generator = np.random.default_rng([sick, well, int(100 * area)])
    passed = sum(area_bound(drawn_areas(generator, sick, well, *gaps), (sick, well), ALPHA) > -margin for _ in range(2000))
    assert passed / 2000 <= ALPHA + 3 * np.sqrt(ALPHA * (1 - ALPHA) / 2000)


@pytest.mark.slow
@pytest.mark.parametrize(("patients", "images"), [(30, 1), (150, 1), (60, 4)])
@pytest.mark.parametrize("discordant", [0.06, 0.15])
def test_a_sensitivity_lower_by_the_margin_is_released_at_most_at_the_stated_rate(
    patients: int, images: int, discordant: float
) -> None:
    """Images of one patient change together."""
    margin = 0.05
    generator = np.random.default_rng([patients, images, int(100 * discordant)])
    passed = 0
    for _ in range(2000):
        change = generator.choice([1, -1, 0], patients, p=[(discordant - margin) / 2, (discordant + margin) / 2, 1 - discordant])
        change = np.repeat(change, images)
        rates = paired_rates(change <= 0, change >= 0, np.repeat(np.arange(patients), images))
        passed += rate_bound(rates, ALPHA) > -margin
    assert passed / 2000 <= ALPHA + 3 * np.sqrt(ALPHA * (1 - ALPHA) / 2000)
