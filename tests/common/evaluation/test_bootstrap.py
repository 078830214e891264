"""The bootstrap equals the plain one with the same draws, and draws patients, not images."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from scipy.special import expit
from scipy.stats import binomtest

from pneumofed.common.errors import DataError
from pneumofed.common.evaluation import bootstrap as module
from pneumofed.common.evaluation.bootstrap import (
    Bootstrap,
    bootstrap,
    bootstrap_difference,
    bootstrap_differences,
    resample_patients,
)
from pneumofed.common.evaluation.metrics import metrics
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.evaluation.statistics import Statistics
from tests.common.evaluation.draws import any_task, binary, of_scores, take

few = Bootstrap(resamples=20, confidence=0.8, seed=3)
quick = settings(max_examples=25, deadline=None)


def plain_resamples(predictions: Predictions, settings_: Bootstrap) -> list[Predictions]:
    """The resamples one by one: for each draw of a patient all images of that patient."""
    patients = sorted(set(predictions.patients))
    images = [np.flatnonzero(np.array(predictions.patients) == patient) for patient in patients]
    draws = np.concatenate(list(resample_patients(len(patients), settings_, 1000)))
    return [take(predictions, np.concatenate([np.tile(i, count) for i, count in zip(images, row, strict=True)])) for row in draws]


def resample(n: int, seed: int) -> Predictions:
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 2, n)
    return of_scores(
        (draw.random(n) * 0.7 + 0.3 * labels).round(2).tolist(), labels.tolist(), draw.integers(0, n // 2, n).tolist()
    )


@quick
@given(any_task.filter(len))
def test_intervals_equal_the_plain_bootstrap_with_the_same_draws(predictions: Predictions) -> None:
    fast = bootstrap(predictions, 0.4, few)
    plain = [metrics(Statistics.of(one), 0.4) for one in plain_resamples(predictions, few)]
    value = metrics(Statistics.of(predictions), 0.4)
    for name, interval in fast.items():
        resampled = np.array([one[name] for one in plain])
        resampled = resampled[~np.isnan(resampled)]
        assert interval["value"] == pytest.approx(value[name], abs=1e-12, nan_ok=True)
        assert interval["resamples"] == len(resampled)
        low, high = np.quantile(resampled, [0.1, 0.9]) if len(resampled) else (math.nan, math.nan)
        if name == "ece":
            assert math.isnan(interval["low"]) or interval["low"] <= interval["value"] <= interval["high"]
        elif high - low > 1e-12:  # else the number of patients decides, see below
            assert (interval["low"], interval["high"]) == pytest.approx((low, high), abs=1e-9, nan_ok=True), name
        elif not math.isnan(interval["low"]):
            assert interval["low"] <= interval["value"] <= interval["high"], name
            assert interval["low"] < interval["high"], name


@pytest.mark.parametrize("images_each", [1, 3])
def test_shares_that_are_the_same_in_every_resample_get_the_exact_interval_of_their_patients(images_each: int) -> None:
    labels = [0] * 7 + [1] * 4
    rows = [(0.9 if label else 0.1, label, patient) for patient, label in enumerate(labels) for _ in range(images_each)]
    scores, truth, patients = (list(column) for column in zip(*rows, strict=True))
    right = bootstrap(of_scores(scores, truth, patients), 0.5, Bootstrap(200))
    wrong = bootstrap(of_scores(scores, [1 - label for label in truth], patients), 0.5, Bootstrap(200))
    trials = {"sensitivity": (4, 7), "specificity": (7, 4), "accuracy": (11, 11), "precision": (4, 4), "auroc": (4, 4)}
    for name, (of_right, of_wrong) in trials.items():
        exact = binomtest(of_right, of_right).proportion_ci(0.95, "exact")
        assert (right[name]["low"], right[name]["high"]) == pytest.approx((exact.low, exact.high)), name
        exact = binomtest(0, of_wrong).proportion_ci(0.95, "exact")
        assert (wrong[name]["low"], wrong[name]["high"]) == pytest.approx((exact.low, exact.high)), name
    assert right["balanced_accuracy"]["low"] == pytest.approx((right["sensitivity"]["low"] + right["specificity"]["low"]) / 2)
    assert math.isnan(right["f1"]["low"]) and math.isnan(right["mcc"]["low"])  # no rule is known for them


def test_a_perfect_share_is_less_sure_where_one_patient_has_most_images() -> None:
    low = []
    for patients in (list(range(20)), [0] * 60 + list(range(20))):
        found = of_scores([0.9] * len(patients) + [0.1] * 20, [1] * len(patients) + [0] * 20, patients + list(range(20, 40)))
        low.append(bootstrap(found, 0.5, Bootstrap(50))["sensitivity"]["low"])
    assert low[1] < low[0] - 0.2


def test_an_area_of_one_rests_on_pairs_of_different_patients() -> None:
    """Three patients with an image of each class make one pair of different patients and no more."""
    found = bootstrap(of_scores([0.1, 0.9] * 3, [0, 1] * 3, [0, 0, 1, 1, 2, 2]), 0.5, Bootstrap(100))["auroc"]
    assert found["low"] == pytest.approx(0.025)


def test_each_resample_draws_as_many_patients_as_there_are() -> None:
    draws = np.concatenate(list(resample_patients(7, Bootstrap(4000), 1000)))
    assert draws.shape == (4000, 7)
    assert np.all(draws.sum(axis=1) == 7)
    np.testing.assert_allclose(draws.mean(axis=0), 1.0, atol=5 * math.sqrt(6 / 7 / 4000))
    np.testing.assert_allclose(draws.var(axis=0), 6 / 7, rtol=0.15)


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_draws_do_not_depend_on_how_many_are_held_at_once(rows: int) -> None:
    once = np.concatenate(list(resample_patients(11, few, few.resamples)))
    np.testing.assert_array_equal(np.concatenate(list(resample_patients(11, few, rows))), once)


def test_intervals_do_not_depend_on_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions = resample(60, 0)
    at_once = bootstrap(predictions, 0.5, few)
    monkeypatch.setattr(module, "CELLS_AT_ONCE", 100)
    assert bootstrap(predictions, 0.5, few) == at_once


def test_the_seed_alone_decides() -> None:
    predictions = resample(60, 0)
    assert bootstrap(predictions, 0.5, few) == bootstrap(predictions, 0.5, few)
    assert bootstrap(predictions, 0.5, few)["auroc"] != bootstrap(predictions, 0.5, Bootstrap(20, 0.8, 4))["auroc"]


def test_copies_of_images_do_not_narrow_the_interval() -> None:
    once = resample(100, 1)
    copied = take(once, np.tile(np.arange(100), 10))
    as_patients = Predictions(copied.probabilities, copied.labels, tuple(map(str, range(1000))))
    widths = []
    for predictions in (once, copied, as_patients):
        interval = bootstrap(predictions, 0.5, Bootstrap(400))["auroc"]
        widths.append(interval["high"] - interval["low"])
    assert widths[1] == pytest.approx(widths[0])
    assert widths[2] < widths[0] / 2


def test_resamples_of_one_class_are_left_out_and_counted() -> None:
    interval = bootstrap(of_scores([0.2, 0.8], [0, 1]), 0.5, Bootstrap(1000))["auroc"]
    assert 400 < interval["resamples"] < 600
    assert (interval["low"], interval["high"]) == pytest.approx((0.025, 1.0))  # all of them have 1: one pair of patients


@quick
@given(binary())
def test_undefined_metrics_have_no_interval_and_raise_nothing(predictions: Predictions) -> None:
    for interval in bootstrap(predictions, 0.5, few).values():
        assert math.isnan(interval["low"]) == math.isnan(interval["high"])
        assert interval["resamples"] or math.isnan(interval["low"])
        assert math.isnan(interval["low"]) or interval["low"] < interval["high"]


def test_no_resamples_give_the_value_alone() -> None:
    interval = bootstrap(resample(30, 0), 0.5, Bootstrap(resamples=0))["auroc"]
    assert interval["value"] > 0.5
    assert math.isnan(interval["low"])
    assert interval["resamples"] == 0


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    truth, covered = 0.7602499389065233, 0  # P(Z > -1 / sqrt(2)) for two normal distributions one deviation apart
    for seed in range(100):
        draw = np.random.default_rng(seed)
        labels = np.arange(100) % 2
        score = 1.0 / (1.0 + np.exp(-draw.normal(labels, 1.0)))
        interval = bootstrap(of_scores(score.tolist(), labels.tolist()), 0.5, Bootstrap(100, 0.9, seed))["auroc"]
        covered += interval["low"] <= truth <= interval["high"]
    assert 80 <= covered <= 98  # 90 expected, give or take three standard deviations of 3, less what few resamples cost


@pytest.mark.parametrize(("shift", "slope"), [(0.0, 1.0), (0.3, 1.0), (0.5, 1.3), (1.0, 1.5)])
@pytest.mark.parametrize("images", [100, 400])
def test_the_interval_of_the_calibration_error_covers_the_truth_although_chance_makes_the_error_larger(
    images: int, shift: float, slope: float
) -> None:
    """Probabilities whose log odds are `slope` times the true ones and `shift` too large; 0 and 1 is a calibrated model."""

    def draw(n: int, seed: int) -> Predictions:
        generator = np.random.default_rng(seed)
        odds = generator.normal(0.0, 2.0, n)
        labels = generator.random(n) < expit(odds)
        return of_scores(expit(slope * odds + shift).tolist(), labels.astype(int).tolist())

    truth = metrics(Statistics.of(draw(400_000, 99)), 0.5)["ece"]
    found = [bootstrap(draw(images, seed), 0.5, Bootstrap(100, 0.95, seed))["ece"] for seed in range(60)]
    assert np.mean([one["value"] for one in found]) > truth
    assert all(one["low"] <= one["value"] <= one["high"] for one in found)
    covered = sum(one["low"] - 0.002 <= truth <= one["high"] for one in found)
    assert covered >= 47  # 0.9 expected; fewer comes in one of 500 such draws


def test_the_interval_of_the_calibration_error_is_that_of_a_share_where_all_scores_are_one() -> None:
    """Of 100 images at 0.51, 0.5 in truth with pneumonia, the error may be as small as 0 by luck; its interval is not."""
    found = []
    for seed in range(60):
        labels = (np.random.default_rng(seed).random(100) < 0.5).astype(int)
        found.append(bootstrap(of_scores([0.51] * 100, labels.tolist()), 0.5, Bootstrap(200))["ece"])
    assert min(one["value"] for one in found) < 0.011
    assert min(one["high"] for one in found) > 0.07, "two standard errors of a share of 100 are 0.1"
    assert sum(one["low"] <= 0.01 <= one["high"] for one in found) >= 51


@quick
@given(binary(min_size=1))
def test_a_model_does_not_differ_from_itself(predictions: Predictions) -> None:
    interval = bootstrap_difference(predictions, predictions, few)
    assert interval["resamples"] == 0 or (interval["low"], interval["high"]) == (0.0, 0.0)


def test_the_difference_equals_the_plain_paired_bootstrap() -> None:
    first = resample(80, 1)
    second = Predictions(resample(80, 2).probabilities, first.labels, first.patients)
    interval = bootstrap_difference(first, second, few)
    pairs = zip(plain_resamples(first, few), plain_resamples(second, few), strict=True)
    differences = [metrics(Statistics.of(a), 0.5)["auroc"] - metrics(Statistics.of(b), 0.5)["auroc"] for a, b in pairs]
    assert (interval["low"], interval["high"]) == pytest.approx(tuple(np.quantile(differences, [0.1, 0.9])), abs=1e-12)
    assert interval["value"] == bootstrap(first, 0.5, few)["auroc"]["value"] - bootstrap(second, 0.5, few)["auroc"]["value"]
    backwards = bootstrap_difference(second, first, few)
    assert (backwards["low"], backwards["high"]) == pytest.approx((-interval["high"], -interval["low"]), abs=1e-12)


def test_models_of_other_images_are_not_compared() -> None:
    first = resample(10, 1)
    for other in (take(first, np.arange(10)[::-1]), resample(10, 2), take(first, np.arange(9))):
        with pytest.raises(DataError):
            bootstrap_difference(first, other, few)


def test_of_twenty_equal_models_none_is_called_better_more_often_than_stated() -> None:
    """The best of them on the very set is among them."""
    generator, called = np.random.default_rng(4), 0
    labels = np.repeat([0, 1], [60, 100])
    for run in range(60):
        common = generator.normal(size=160)
        drawn = 0.9 * common + 0.45 * generator.normal(size=(21, 160)) + 1.9 * labels
        shared, *alone = (of_scores((1 / (1 + np.exp(-one))).tolist(), labels.tolist()) for one in drawn)
        others = {f"hospital {number}": one for number, one in enumerate(alone)}
        found = bootstrap_differences(shared, others, Bootstrap(200, seed=run))
        called += any(one["high"] < 0.0 for one in found.values())
    assert called <= 3  # 5 %


def test_of_one_other_model_the_interval_is_nearly_that_of_percentiles_and_a_model_does_not_differ_from_itself() -> None:
    generator, labels = np.random.default_rng(1), np.repeat([0, 1], 100)
    first, second = (of_scores((1 / (1 + np.exp(-generator.normal(size=200) - labels))).tolist(), labels.tolist()) for _ in "ab")
    alone, plain = bootstrap_differences(first, {"b": second})["b"], bootstrap_difference(first, second)
    assert alone["value"] == plain["value"]
    assert (alone["low"], alone["high"]) == pytest.approx((plain["low"], plain["high"]), abs=0.01)
    same = bootstrap_differences(first, {"itself": first})["itself"]
    assert (same["low"], same["value"], same["high"]) == (0.0, 0.0, 0.0)
    assert bootstrap_differences(first, {}) == {}
