"""Calibration: finds the line that made the data, keeps every ranking and decision, and its interval covers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from pneumofed.common.model_bundle.calibration import Calibration, fit_calibration, pneumonia_score


def draw(n: int, slope: float, intercept: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = rng.normal(0.5, 2.0, n)
    return scores, (rng.random(n) < expit(slope * scores + intercept)).astype(np.float64)


def test_it_is_the_fit_of_logistic_regression() -> None:
    scores, labels = draw(800, 0.6, -0.8, seed=1)
    oracle = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(scores[:, None], labels)
    fit = fit_calibration(scores, 1 - labels, labels, "temperature_and_bias", fitted_on="draws")
    assert fit.slope == pytest.approx(oracle.coef_[0, 0], rel=1e-4)
    assert fit.intercept == pytest.approx(oracle.intercept_[0], rel=1e-3, abs=1e-4)
    assert (fit.images, fit.positives) == (800, int(labels.sum()))


def test_a_temperature_alone_has_the_least_log_loss_of_all_temperatures() -> None:
    scores, labels = draw(500, 0.5, 0.0, seed=2)
    fit = fit_calibration(scores, 1 - labels, labels, "temperature", fitted_on="draws")

    def loss(slope: float) -> float:
        return float(np.logaddexp(0, -slope * scores * (2 * labels - 1)).sum())

    assert fit.intercept == 0.0
    assert all(loss(fit.slope) <= loss(slope) + 1e-6 for slope in np.geomspace(0.05, 20, 200))


def test_bins_give_what_single_images_give() -> None:
    scores, labels = draw(400, 0.7, 0.4, seed=3)
    rounded = np.round(scores, 1)
    values = np.unique(rounded)
    normal, sick = (np.array([((rounded == value) & (labels == label)).sum() for value in values], float) for label in (0, 1))
    one = fit_calibration(rounded, 1 - labels, labels, "temperature_and_bias", fitted_on="")
    other = fit_calibration(values, normal, sick, "temperature_and_bias", fitted_on="")
    assert (one.slope, one.intercept) == pytest.approx((other.slope, other.intercept), rel=1e-5)


@pytest.mark.parametrize("method", ["temperature", "temperature_and_bias"])
def test_the_interval_covers_the_true_probability_in_95_of_100_draws(method: str) -> None:
    intercept = 0.5 if method == "temperature_and_bias" else 0.0
    places = np.array([-4.0, 0.0, 3.0])
    truth, covered = expit(0.6 * places + intercept), np.zeros(3)
    for seed in range(300):
        scores, labels = draw(250, 0.6, intercept, seed)
        low, high = fit_calibration(scores, 1 - labels, labels, method, fitted_on="").interval(places)  # type: ignore[arg-type]
        covered += (low <= truth) & (truth <= high)
    assert np.all(covered / 300 > 0.91)
    if method == "temperature_and_bias":
        assert np.all(covered / 300 < 0.99)


def test_the_interval_of_a_temperature_also_holds_the_fit_with_a_bias() -> None:
    scores, labels = draw(400, 0.6, 1.5, seed=6)
    narrow = fit_calibration(scores, 1 - labels, labels, "temperature_and_bias", fitted_on="")
    wide = fit_calibration(scores, 1 - labels, labels, "temperature", fitted_on="")
    places = np.linspace(-5, 5, 11)
    (low, high), (inner_low, inner_high) = wide.interval(places), narrow.interval(places)
    assert np.all(low <= inner_low) and np.all(inner_high <= high)
    assert np.all((low <= wide.probability(places)) & (wide.probability(places) <= high))


def test_images_of_one_patient_widen_the_interval() -> None:
    scores, labels = draw(250, 0.6, 0.2, seed=4)
    fits = [
        fit_calibration(scores, 1 - labels, labels, "temperature_and_bias", fitted_on="", design_effect=effect)
        for effect in (1.0, 4.0)
    ]
    widths = [np.subtract(*(logit(end) for end in reversed(fit.interval(1.0)))) for fit in fits]
    assert widths[1] == pytest.approx(2 * widths[0])


def test_too_few_images_of_a_class_are_not_fitted() -> None:
    scores, labels = draw(200, 0.6, 8.0, seed=5)
    fit = fit_calibration(scores, 1 - labels, labels, "temperature", fitted_on="few")
    assert fit.method == "none" and "too few" in fit.fitted_on
    assert fit.interval(np.array([0.3])) == (0.0, 1.0)


def test_separated_classes_stop_at_the_limit_and_stay_finite() -> None:
    scores = np.concatenate([np.full(30, -5.0), np.full(30, 5.0)])
    labels = np.repeat([0.0, 1.0], 30)
    fit = fit_calibration(scores, 1 - labels, labels, "temperature_and_bias", fitted_on="")
    low, high = fit.interval(np.array([-30.0, 0.0, 30.0]))
    assert np.all(np.isfinite([fit.slope, *fit.lines[0].covariance])) and np.all(low <= high)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.floats(-30, 30), min_size=3, max_size=3), min_size=1, max_size=8),
    st.floats(0.05, 5.0),
    st.floats(-3.0, 3.0),
    st.floats(0.01, 0.99),
)
def test_probabilities_sum_to_1_and_decisions_stay(
    rows: list[list[float]], slope: float, intercept: float, threshold: float
) -> None:
    logits = np.array(rows)
    fit = Calibration(method="temperature_and_bias", slope=slope, intercept=intercept)
    scores, found = pneumonia_score(logits), fit.class_probabilities(logits)
    np.testing.assert_allclose(found.sum(axis=1), 1.0)
    np.testing.assert_allclose(1.0 - found[:, 0], fit.probability(scores), atol=1e-12)
    clear = np.abs(scores - logit(threshold)) > 1e-6
    before, after = scores >= logit(threshold), fit.probability(scores) >= fit.move(threshold)
    assert np.array_equal(before[clear], after[clear])


def test_uncalibrated_it_is_the_softmax() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (20, 3))
    exponentials = np.exp(logits)
    np.testing.assert_allclose(Calibration().class_probabilities(logits), exponentials / exponentials.sum(axis=1, keepdims=True))
