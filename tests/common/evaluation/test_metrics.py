"""Metrics equal scikit-learn's wherever they are defined, and are NaN where they are not."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from pneumofed.common.evaluation.metrics import metrics, precision_recall_curve, reliability, roc_curve, without_nan
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.evaluation.statistics import FEDERATED_GRID, Statistics
from tests.common.evaluation.draws import any_task, binary, of_scores, scores, three_class

quick = settings(max_examples=25, deadline=None)
BOTH_CLASSES = ("auroc", "average_precision", "balanced_accuracy", "mcc")
OF_CALLS: dict[str, Callable[..., float]] = {
    "accuracy": sk.accuracy_score,
    "balanced_accuracy": sk.balanced_accuracy_score,
    "sensitivity": sk.recall_score,
    "precision": lambda true, called: sk.precision_score(true, called, zero_division=np.nan),
    "f1": sk.f1_score,
    "mcc": sk.matthews_corrcoef,
    "specificity": lambda true, called: sk.recall_score(true, called, pos_label=0),
}
OF_SCORES: dict[str, Callable[..., float]] = {
    "auroc": sk.roc_auc_score,
    "average_precision": sk.average_precision_score,
    "brier": sk.brier_score_loss,
    "log_loss": lambda true, score: sk.log_loss(true, np.stack([1 - score, score], axis=1), labels=[0, 1]),
}
TOLERANCE = {"brier": 2e-10, "log_loss": 2e-10}  # these are kept in fixed point


def exact(predictions: Predictions, threshold: float = 0.5) -> dict[str, float]:
    return metrics(Statistics.of(predictions), threshold)


@quick
@given(any_task.filter(len), scores)
def test_metrics_of_calls_equal_scikit_learn(predictions: Predictions, threshold: float) -> None:
    true, called = predictions.labels != 0, predictions.scores >= threshold
    ours = exact(predictions, threshold)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = {name: function(true, called) for name, function in OF_CALLS.items()}
    for name, value in theirs.items():
        assert math.isnan(ours[name]) or ours[name] == pytest.approx(value, abs=1e-12), name
    tn, fp, fn, tp = sk.confusion_matrix(true, called, labels=[False, True]).ravel()
    assert (ours["tn"], ours["fp"], ours["fn"], ours["tp"]) == (tn, fp, fn, tp)


@quick
@given(any_task.filter(len))
def test_metrics_of_scores_equal_scikit_learn(predictions: Predictions) -> None:
    true = predictions.labels != 0
    ours = exact(predictions)
    for name, function in OF_SCORES.items():
        if name not in BOTH_CLASSES or true.min() != true.max():
            assert ours[name] == pytest.approx(function(true, predictions.scores), abs=TOLERANCE.get(name, 1e-12)), name


@quick
@given(any_task)
def test_a_metric_is_undefined_exactly_where_it_has_no_meaning(predictions: Predictions) -> None:
    ours = exact(predictions)
    positives, negatives, called = ours["n_positive"], ours["n"] - ours["n_positive"], ours["tp"] + ours["fp"]
    undefined = {
        **dict.fromkeys(BOTH_CLASSES, not positives or not negatives),
        **dict.fromkeys(("accuracy", "brier", "ece", "log_loss"), not ours["n"]),
        **dict.fromkeys(("sensitivity", "f1"), not positives),
        "specificity": not negatives,
        "precision": not called,
    }
    assert {name: math.isnan(ours[name]) for name in undefined} == undefined


@quick
@given(three_class(min_size=1))
def test_three_classes_equal_scikit_learn(predictions: Predictions) -> None:
    ours = exact(predictions)
    predicted = predictions.probabilities.argmax(axis=1)
    assert ours["accuracy_three_class"] == pytest.approx(sk.accuracy_score(predictions.labels, predicted))
    confusion = sk.confusion_matrix(predictions.labels, predicted, labels=range(3))
    np.testing.assert_array_equal(Statistics.of(predictions).confusion, confusion)
    counts = np.bincount(predictions.labels, minlength=3)
    for k in np.flatnonzero(counts):
        found = sk.recall_score(predictions.labels == k, predicted == k)
        assert ours[f"sensitivity_class_{k}"] == pytest.approx(found)
        if counts[k] < len(predictions):
            spared = sk.recall_score(predictions.labels != k, predicted != k)
            assert ours[f"specificity_class_{k}"] == pytest.approx(spared)
    if np.all(counts > 0):
        assert ours["sensitivity_macro"] == pytest.approx(sk.balanced_accuracy_score(predictions.labels, predicted))
        theirs = sk.roc_auc_score(predictions.labels, predictions.probabilities, multi_class="ovr", average=None)
        assert [ours[f"auroc_class_{k}"] for k in range(3)] == pytest.approx(theirs, abs=1e-12)
        assert ours["auroc_macro"] == pytest.approx(np.mean(theirs), abs=1e-12)
    else:
        assert math.isnan(ours["auroc_macro"])
        assert math.isnan(ours["sensitivity_macro"])


@quick
@given(binary(min_size=1))
def test_calibration_error_is_the_gap_of_each_bin(predictions: Predictions) -> None:
    score, true = predictions.scores, predictions.labels != 0
    bins = np.minimum(np.floor(score * 15).astype(int), 14)
    gaps = [abs(score[bins == k].mean() - true[bins == k].mean()) * np.mean(bins == k) for k in np.unique(bins)]
    assert exact(predictions)["ece"] == pytest.approx(sum(gaps), abs=1e-9)
    curve = reliability(Statistics.of(predictions))
    assert curve.count.sum() == len(predictions)
    np.testing.assert_array_equal(np.isnan(curve.frequency), curve.count == 0)
    for k in np.unique(bins):
        assert curve.frequency[k] == pytest.approx(true[bins == k].mean())
        assert curve.score[k] == pytest.approx(score[bins == k].mean(), abs=1e-9)


@quick
@given(binary(min_size=2).filter(lambda p: 0 < p.labels.sum() < len(p)))
def test_curves_equal_scikit_learn(predictions: Predictions) -> None:
    statistics = Statistics.of(predictions)
    false, true, _ = sk.roc_curve(predictions.labels, predictions.scores, drop_intermediate=False)
    np.testing.assert_allclose(roc_curve(statistics), (false, true), atol=1e-12)
    precision, recall, _ = sk.precision_recall_curve(predictions.labels, predictions.scores)
    np.testing.assert_allclose(precision_recall_curve(statistics), (recall[-2::-1], precision[-2::-1]), atol=1e-12)


@quick
@given(any_task)
def test_the_federated_grid_is_within_its_bound(predictions: Predictions) -> None:
    statistics = Statistics.of(predictions, FEDERATED_GRID)
    ours, truth = metrics(statistics, 0.5), exact(predictions)
    negatives, positives = statistics.histograms[0]
    pairs = 2 * int(positives.sum()) * int(negatives.sum())
    bound = (negatives * positives).sum() / pairs if pairs else 0.0
    for name, value in truth.items():
        if name == "auroc":
            assert abs(ours[name] - value) <= bound + 1e-12 or not pairs
        elif not name.startswith(("auroc", "average_precision")):
            assert ours[name] == pytest.approx(value, abs=0, nan_ok=True), name


def test_the_bound_of_the_federated_grid_is_reached() -> None:
    close = of_scores([0.3, 0.3 + 1e-6], [0, 1])
    assert exact(close)["auroc"] == 1.0
    assert metrics(Statistics.of(close, FEDERATED_GRID), 0.5)["auroc"] == 0.5


def test_many_images_cost_the_federated_grid_little() -> None:
    draw = np.random.default_rng(1)
    labels = draw.integers(0, 2, 20_000)
    logits = np.stack([np.zeros(20_000), draw.normal(3.0 * labels - 1.5, 2.0)], axis=1)
    predictions = Predictions.from_logits(logits, labels, tuple(map(str, range(20_000))))
    ours, truth = metrics(Statistics.of(predictions, FEDERATED_GRID), 0.5), exact(predictions)
    assert ours["auroc"] == pytest.approx(truth["auroc"], abs=1e-4)
    assert ours["average_precision"] == pytest.approx(truth["average_precision"], abs=1e-3)


@quick
@given(st.lists(st.floats()))
def test_json_takes_what_is_left_without_nan(values: list[float]) -> None:
    cleaned = without_nan({"a": values, "b": {"c": tuple(values)}, "n": 1, "s": "x", "t": True})
    expected = [value if math.isfinite(value) else None for value in values]
    assert json.loads(json.dumps(cleaned, allow_nan=False)) == {"a": expected, "b": {"c": expected}, "n": 1, "s": "x", "t": True}
