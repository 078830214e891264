"""What passes, what is refused, and how often a model that is worse by the margin slips through."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.optimize import minimize_scalar
from scipy.special import xlogy

from pneumofed.common.evaluation.comparison import (
    NonInferiority,
    Rates,
    area_bound,
    area_limit,
    compare_predictions,
    judge_areas,
    judge_rates,
    patients_needed,
    rate_bound,
    tango_limit,
)
from pneumofed.common.evaluation.paired import PairedAreas, PairedRates, effective_number, paired_areas, paired_rates
from pneumofed.server.release.gate import lower_ends
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
@pytest.mark.parametrize(("patients", "images"), [(30, 1), (150, 1), (60, 4), (100, None), (400, None)])
@pytest.mark.parametrize("discordant", [0.06, 0.15])
def test_a_sensitivity_lower_by_the_margin_is_released_at_most_at_the_stated_rate(
    patients: int, images: int | None, discordant: float
) -> None:
    """Images of one patient change together; without a number of images patients have as unequally many as in ChestX-ray14."""
    margin = 0.05
    generator = np.random.default_rng([patients, images or 0, int(100 * discordant)])
    passed = 0
    for _ in range(2000):
        sizes = drawn_sizes(generator, patients) if images is None else np.full(patients, images)
        change = generator.choice([1, -1, 0], patients, p=[(discordant - margin) / 2, (discordant + margin) / 2, 1 - discordant])
        change = np.repeat(change, sizes)
        rates = paired_rates(change <= 0, change >= 0, np.repeat(np.arange(patients), sizes))
        passed += rate_bound(rates, ALPHA) > -margin
    assert passed / 2000 <= ALPHA + 3 * np.sqrt(ALPHA * (1 - ALPHA) / 2000)


def drawn_sizes(generator: np.random.Generator, patients: int) -> np.ndarray:
    """Images of each patient: lognormal, 3.6 on average with a coefficient of variation of 1.9."""
    spread = np.log(1 + 1.9**2)
    drawn = generator.normal(np.log(3.6) - spread / 2, np.sqrt(spread), patients)
    return np.maximum(1, np.rint(np.exp(drawn))).astype(np.int64)


def test_losses_of_patients_with_many_images_pass_no_more_often_than_stated() -> None:
    """The new model loses all images of one patient in twenty, which is the margin."""
    generator, passed, above = np.random.default_rng(8), 0, 0
    for _ in range(300):
        sizes = drawn_sizes(generator, 100)
        patients, lost = np.repeat(np.arange(100), sizes), np.repeat(generator.random(100) < 0.05, sizes)
        rates = paired_rates(np.ones(len(lost), bool), ~lost, patients)
        passed += judge_rates(rates, 0.05, ALPHA).verdict is NonInferiority.NOT_WORSE
        found = np.repeat(generator.random(100) < 0.7, sizes)
        model = of_scores([*found.astype(float).tolist(), 0.0], [1] * len(found) + [0], [*patients.tolist(), 100])
        above += lower_ends(compare_predictions(model, model, (0.5, 0.5)))["sensitivity"][1] > 0.7
    assert passed <= 27  # 15 expected; a chance of 0.1 %
    assert above <= 17  # 7.5 expected; a chance of 0.1 %


def test_equally_many_images_count_as_patients_and_a_patient_with_most_of_them_leaves_little() -> None:
    assert effective_number(np.repeat(np.arange(37), 3)) == 37.0
    assert effective_number([0] * 100 + list(range(1, 101))) == pytest.approx(200**2 / (100**2 + 100))
    assert effective_number([]) == 0.0


def test_counts_of_former_versions_are_of_patients_and_more_than_these_are_refused() -> None:
    told = {"images": 9, "patients": 5, "old": 4, "new": 4, "gained": 0, "lost": 0, "variance": 0.0}
    assert Rates.model_validate(told).paired().effective_patients == 5.0
    for wrong in (6.0, 0.0):
        with pytest.raises(ValidationError, match="effective patients"):
            Rates.model_validate({**told, "effective_patients": wrong})
