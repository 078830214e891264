"""Predictions: what they refuse, and that a CSV gives them back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pneumofed.common.errors import DataError
from pneumofed.common.evaluation.predictions import Predictions
from tests.common.evaluation.draws import any_task, of_scores

GOOD: dict[str, Any] = {
    "probabilities": np.array([[0.25, 0.75], [1.0, 0.0]]),
    "labels": np.array([1, 0]),
    "patients": ("a", "b"),
    "images": ("x", "y"),
}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(any_task)
def test_csv_gives_back_every_bit(tmp_path: Path, predictions: Predictions) -> None:
    predictions.write_csv(tmp_path / "p.csv")
    back = Predictions.read_csv(tmp_path / "p.csv")
    np.testing.assert_array_equal(back.probabilities, predictions.probabilities)
    np.testing.assert_array_equal(back.labels, predictions.labels)
    assert (back.patients, back.images, back.classes) == (predictions.patients, predictions.images, predictions.classes)


def test_csv_keeps_ids_with_commas_and_quotes(tmp_path: Path) -> None:
    Predictions(**{**GOOD, "patients": ('a,"b"\n', "ä")}).write_csv(tmp_path / "p.csv")
    assert Predictions.read_csv(tmp_path / "p.csv").patients == ('a,"b"\n', "ä")


@pytest.mark.parametrize(
    "text", ["", "a,b,c\n", "image,patient,label,probability_0,probability_1\nx,a,1,0.5\n", "image,patient,label,probability_0\n"]
)
def test_a_csv_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(DataError):
        Predictions.read_csv(tmp_path / "p.csv")


@pytest.mark.parametrize(
    "change",
    [
        {"probabilities": np.array([[0.25, 0.75]])},
        {"probabilities": np.array([[1.0], [1.0]])},
        {"probabilities": np.array([[0.5, 0.75], [1.0, 0.0]])},
        {"probabilities": np.array([[-0.25, 1.25], [1.0, 0.0]])},
        {"probabilities": np.array([[np.nan, 0.5], [1.0, 0.0]])},
        {"labels": np.array([1, 2])},
        {"labels": np.array([-1, 0])},
        {"labels": np.array([[1], [0]])},
        {"patients": ("a",)},
        {"images": ("x", "y", "z")},
    ],
)
def test_wrong_shapes_and_values_are_refused(change: dict[str, Any]) -> None:
    Predictions(**GOOD)
    with pytest.raises(DataError):
        Predictions(**{**GOOD, **change})


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.floats(-700, 700), min_size=3, max_size=3), min_size=1, max_size=5))
def test_softmax_does_not_care_for_a_shift(logits: list[list[float]]) -> None:
    labels, patients = np.zeros(len(logits)), ("p",) * len(logits)
    one = Predictions.from_logits(logits, labels, patients)
    other = Predictions.from_logits(np.array(logits) + 1e3, labels, patients)
    np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-10)


def test_confident_logits_stay_apart() -> None:
    logits = np.array([[20.0, -10.0], [20.0, -9.0], [-9.0, 20.0], [-10.0, 20.0]], dtype=np.float32)
    scores = Predictions.from_logits(logits, [0, 0, 1, 1], ("a", "b", "c", "d")).scores
    assert np.all(np.diff(scores) > 0)


def test_the_first_view_is_pneumonia_of_any_kind() -> None:
    table = np.array([[0.5, 0.25, 0.25], [0.0, 0.5, 0.5]])
    scores, positive = Predictions(table, np.array([0, 2]), ("a", "b")).views
    np.testing.assert_array_equal(scores, [[0.5, 1.0], [0.25, 0.5], [0.25, 0.5]])
    np.testing.assert_array_equal(positive, [[False, True], [False, False], [False, True]])
    assert of_scores([0.25], [1]).views[0].shape == (1, 1)
