"""Random predictions with what breaks metrics: ties, scores of exactly 0 and 1, one class only, single images, none."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from pneumofed.common.evaluation.predictions import Predictions

EXTREME = [0.0, 1.0, 0.5, 1e-12, 1.0 - 1e-12, 1 / 15, 0.2]
scores = st.one_of(st.sampled_from(EXTREME), st.floats(0.0, 1.0), st.integers(0, 8).map(lambda eighths: eighths / 8))


def of_scores(values: list[float], labels: list[int], patients: list[int] | None = None) -> Predictions:
    """Two-class predictions whose P(pneumonia) is, to rounding, `values`."""
    column = np.array(values, dtype=np.float64)
    names = tuple(map(str, patients if patients is not None else range(len(values))))
    return Predictions(np.stack([1.0 - column, column], axis=1), np.array(labels, dtype=np.int64), names)


@st.composite
def binary(draw: st.DrawFn, min_size: int = 0, max_size: int = 30) -> Predictions:
    """Two-class predictions, at times of one class only; patients have one to several images."""
    rows = draw(st.lists(st.tuples(scores, st.integers(0, 1), st.integers(0, 9)), min_size=min_size, max_size=max_size))
    return of_scores([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows])


@st.composite
def three_class(draw: st.DrawFn, min_size: int = 0, max_size: int = 30) -> Predictions:
    """Three-class predictions with many ties; classes may be missing."""
    weights = st.tuples(*[st.integers(0, 4)] * 3).filter(any)
    rows = draw(st.lists(st.tuples(weights, st.integers(0, 2), st.integers(0, 9)), min_size=min_size, max_size=max_size))
    table = np.array([row[0] for row in rows], dtype=np.float64).reshape(-1, 3)
    labels = np.array([row[1] for row in rows], dtype=np.int64)
    return Predictions(table / table.sum(axis=1, keepdims=True), labels, tuple(str(row[2]) for row in rows))


any_task = st.one_of(binary(), three_class())


def take(predictions: Predictions, index: np.ndarray) -> Predictions:
    """The images `index` of `predictions`, repeats allowed."""
    chosen = [int(i) for i in index]
    names = (tuple(ids[i] for i in chosen) for ids in (predictions.patients, predictions.images))
    return Predictions(predictions.probabilities[chosen], predictions.labels[chosen], *names)
