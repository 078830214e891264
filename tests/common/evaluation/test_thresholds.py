"""Thresholds: as good as the best that there is, in the middle of a gap, and honest where there is nothing to choose."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumofed.common.config.choices import ThresholdPolicyName
from pneumofed.common.evaluation.metrics import ChosenThreshold, choose_threshold, metrics
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.evaluation.statistics import FEDERATED_GRID, Statistics
from tests.common.evaluation.draws import binary, of_scores

POLICIES: tuple[ThresholdPolicyName, ...] = get_args(ThresholdPolicyName)
both_classes = binary(min_size=2).filter(lambda p: 0 < p.labels.sum() < len(p))
quick = settings(max_examples=30, deadline=None)


def rates(predictions: Predictions, threshold: float) -> tuple[float, float]:
    called = predictions.scores >= threshold
    return float(called[predictions.labels == 1].mean()), float(1.0 - called[predictions.labels == 0].mean())


def all_rates(predictions: Predictions) -> list[tuple[float, float]]:
    return [rates(predictions, threshold) for threshold in [*np.unique(predictions.scores), 2.0]]


@quick
@given(both_classes)
def test_youden_reaches_the_best_of_all_thresholds(predictions: Predictions) -> None:
    chosen = choose_threshold(Statistics.of(predictions), "youden")
    best = max(sum(pair) for pair in all_rates(predictions))
    if chosen.reason_of_fallback:
        assert best <= 1.0 + 1e-12
    else:
        assert sum(rates(predictions, chosen.value)) == pytest.approx(best, abs=1e-12)


@quick
@given(both_classes, st.sampled_from([0.5, 0.8, 0.95]))
def test_the_target_is_held_at_the_least_cost(predictions: Predictions, target: float) -> None:
    statistics, every = Statistics.of(predictions), all_rates(predictions)
    sensitivity, specificity = rates(predictions, choose_threshold(statistics, "sensitivity", target).value)
    assert (specificity, sensitivity) == max((spec, sens) for sens, spec in every if sens >= target)
    sensitivity, specificity = rates(predictions, choose_threshold(statistics, "specificity", target).value)
    assert (sensitivity, specificity) == max((sens, spec) for sens, spec in every if spec >= target)


@quick
@given(both_classes, st.sampled_from(POLICIES), st.booleans())
def test_reported_rates_are_those_at_the_threshold(
    predictions: Predictions, policy: ThresholdPolicyName, federated: bool
) -> None:
    statistics = Statistics.of(predictions, FEDERATED_GRID if federated else None)
    chosen = choose_threshold(statistics, policy)
    at = metrics(statistics, chosen.value)
    assert (chosen.sensitivity, chosen.specificity) == (at["sensitivity"], at["specificity"])
    assert (chosen.sensitivity, chosen.specificity) == pytest.approx(rates(predictions, chosen.value), abs=1e-12)


@quick
@given(both_classes, st.sampled_from(["youden", "sensitivity", "specificity"]))
def test_the_threshold_is_the_middle_of_a_gap(predictions: Predictions, policy: ThresholdPolicyName) -> None:
    chosen = choose_threshold(Statistics.of(predictions), policy)
    gaps = pairwise([0.0, *np.unique(predictions.scores), 1.0])
    middles = [max((low + high) / 2, math.nextafter(low, 2.0)) for low, high in gaps]  # of neighbouring floats the upper one
    assert chosen.reason_of_fallback or chosen.value in [0.0, *middles]


def test_youden_prefers_the_widest_of_equal_gaps() -> None:
    chosen = choose_threshold(Statistics.of(of_scores([0.1, 0.2, 0.3, 0.9], [0, 1, 0, 1])), "youden")
    assert chosen.value == pytest.approx(0.6)
    assert (chosen.sensitivity, chosen.specificity) == (0.5, 1.0)


def test_youden_prefers_sensitivity_among_equally_wide_gaps() -> None:
    chosen = choose_threshold(Statistics.of(of_scores([0.25, 0.5, 0.75, 1.0], [0, 1, 0, 1])), "youden")
    assert (chosen.value, chosen.sensitivity) == (0.375, 1.0)


def test_a_perfect_score_that_may_not_be_called_stays_under_the_threshold() -> None:
    predictions = of_scores([1.0, 1.0, 0.5], [0, 1, 1])
    for grid in (None, FEDERATED_GRID):
        chosen = choose_threshold(Statistics.of(predictions, grid), "specificity", 0.9)
        assert 1.0 < chosen.value < 1.0 + 1e-12
        assert rates(predictions, chosen.value) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("predictions", "reason"),
    [(of_scores([], []), "images"), (of_scores([0.9], [0]), "pneumonia"), (of_scores([0.9], [1]), "normal")],
)
@pytest.mark.parametrize("policy", ["youden", "sensitivity", "specificity"])
def test_without_both_classes_it_is_half_and_says_so(predictions: Predictions, reason: str, policy: ThresholdPolicyName) -> None:
    chosen = choose_threshold(Statistics.of(predictions), policy)
    assert chosen.value == 0.5
    assert reason in str(chosen.reason_of_fallback)


def test_youden_no_better_than_chance_is_half_and_says_so() -> None:
    chosen = choose_threshold(Statistics.of(of_scores([0.9, 0.1], [0, 1])), "youden")
    assert chosen == ChosenThreshold(0.5, "youden", "no threshold is better than chance on validation", 0.0, 0.0)


@quick
@given(binary())
def test_half_is_half(predictions: Predictions) -> None:
    chosen = choose_threshold(Statistics.of(predictions), "half")
    assert (chosen.value, chosen.policy, chosen.reason_of_fallback) == (0.5, "half", None)
