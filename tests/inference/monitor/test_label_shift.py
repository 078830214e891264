"""The share of pneumonia from scores: coverage of its interval, and silence where scores say nothing."""

from __future__ import annotations

import numpy as np
import pytest

from pneumofed.inference.monitor.two_sample import Separation, estimate_prevalence


def _scores(rng: np.random.Generator, n: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    labels = (rng.random(n) < share).astype(np.int64)
    return 1.0 / (1.0 + np.exp(-(rng.normal(0.0, 1.5, n) + np.where(labels == 1, 2.0, -2.0)))), labels


@pytest.mark.parametrize("share", [0.15, 0.5, 0.8])
def test_the_interval_holds_the_share_about_as_often_as_it_says(share: float) -> None:
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(400):
        separation = Separation.of(*_scores(rng, 200, 0.6))
        scores, _ = _scores(rng, 80, share)
        found = estimate_prevalence(float(scores.mean()), float(scores.var()), len(scores), separation)
        held += found is not None and found.low <= share <= found.high
    assert 0.92 <= held / 400 <= 0.98


def test_calibrated_probabilities_serve_where_labels_are_unknown() -> None:
    scores = np.random.default_rng(0).beta(0.5, 0.5, 4000)
    labels = (np.random.default_rng(1).random(4000) < scores).astype(np.int64)
    known, guessed = Separation.of(scores, labels), Separation.of(scores, None)
    assert guessed.pneumonia == pytest.approx(known.pneumonia, abs=0.02)
    assert guessed.normal == pytest.approx(known.normal, abs=0.02)


def test_nothing_is_said_by_a_score_that_does_not_tell_the_classes_apart() -> None:
    separation = Separation.of(np.full(100, 0.5), np.arange(100) % 2)
    assert estimate_prevalence(0.5, 0.0, 100, separation) is None
