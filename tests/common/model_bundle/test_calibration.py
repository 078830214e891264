"""Calibration: finds the line that made the data, keeps every ranking and decision, and its interval covers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from pneumofed.common.model_bundle.calibration import (
    Calibration,
    class_scores,
    fit_calibration,
    fit_class_lines,
    pneumonia_score,
)


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
    for seed in range(120):
        scores, labels = draw(250, 0.6, intercept, seed)
        low, high = fit_calibration(scores, 1 - labels, labels, method, fitted_on="").interval(places)  # type: ignore[arg-type]
        covered += (low <= truth) & (truth <= high)
    assert np.all(covered / 120 > 0.90)  # 0.95 less two and a half standard errors
    if method == "temperature_and_bias":
        assert np.all(covered / 120 < 0.995)


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


def drawn_classes(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax is the truth, and labels that it drew, of four classes of which one is rare."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0.0, 1.5, (n, 4)) + np.array([1.0, 0.5, 0.0, -1.5])
    truth = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return logits, (rng.random((n, 1)) > truth.cumsum(axis=1)).sum(axis=1)


def class_fit(logits: np.ndarray, labels: np.ndarray) -> Calibration:
    sick = (labels != 0).astype(np.float64)
    fit = fit_calibration(pneumonia_score(logits), 1 - sick, sick, "temperature", fitted_on="draws")
    own = [(labels == k).astype(np.float64) for k in range(1, 4)]
    views = [(score, 1 - is_k, is_k) for score, is_k in zip(class_scores(logits).T, own, strict=True)]
    return fit.model_copy(update={"class_lines": fit_class_lines(views, "temperature")})


def log_loss(fit: Calibration, logits: np.ndarray, labels: np.ndarray) -> float:
    return float(-np.log(fit.class_probabilities(logits)[np.arange(len(labels)), labels]).mean())


def test_class_lines_take_back_what_a_network_is_too_sure_of() -> None:
    truth, labels = drawn_classes(4000, seed=5)
    fit = class_fit(3.0 * truth, labels)
    fresh, fresh_labels = drawn_classes(4000, seed=6)
    best = log_loss(Calibration(), fresh, fresh_labels)
    before = log_loss(fit.model_copy(update={"class_lines": ()}), 3.0 * fresh, fresh_labels)
    after = log_loss(fit, 3.0 * fresh, fresh_labels)
    assert best < after < best + 0.03 < before
    assert [line.positives for line in fit.class_lines] == [int((labels == k).sum()) for k in (1, 2, 3)]


def test_class_lines_move_neither_the_decision_nor_the_sum() -> None:
    truth, labels = drawn_classes(500, seed=7)
    fit = class_fit(3.0 * truth, labels)
    found = fit.class_probabilities(3.0 * truth)
    np.testing.assert_allclose(found.sum(axis=1), 1.0)
    np.testing.assert_allclose(1.0 - found[:, 0], fit.probability(pneumonia_score(3.0 * truth)), atol=1e-12)


def test_a_rare_class_keeps_the_networks_own_probability_and_two_classes_are_written_as_before() -> None:
    few = np.array([0.0] * 40 + [1.0] * 9)
    (line,) = fit_class_lines([(np.linspace(-3, 3, 49), 1 - few, few)], "temperature")
    assert (line.slope, line.intercept, line.positives) == (1.0, 0.0, 0)
    assert "class_lines" not in Calibration().model_dump() and "class_lines" not in Calibration().model_dump_json()
    truth, labels = drawn_classes(200, seed=8)
    fit = class_fit(truth, labels)
    assert Calibration.model_validate_json(fit.model_dump_json()) == fit


def test_class_scores_are_the_logits_of_the_softmax() -> None:
    truth, _ = drawn_classes(50, seed=9)
    softmax = np.exp(truth) / np.exp(truth).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(class_scores(truth), logit(softmax[:, 1:]))
