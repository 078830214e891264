"""Two models on the same images, against slow definitions and against resampling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumofed.common.errors import DataError
from pneumofed.common.evaluation.bootstrap import Bootstrap, bootstrap_difference, resample_patients
from pneumofed.common.evaluation.paired import paired_areas, paired_rates, sensitivity_and_specificity
from pneumofed.common.evaluation.predictions import Predictions
from tests.common.evaluation.draws import of_scores

SCORES = st.one_of(st.integers(0, 4).map(lambda quarter: quarter / 4), st.floats(0.0, 1.0))
ROWS = st.lists(st.tuples(SCORES, SCORES, st.integers(0, 1)), min_size=4, max_size=25).filter(
    lambda rows: 2 <= sum(row[2] for row in rows) <= len(rows) - 2
)


def pair(rows: list[tuple[float, float, int]], patients: list[int] | None = None) -> tuple[Predictions, Predictions]:
    labels = [row[2] for row in rows]
    return of_scores([row[0] for row in rows], labels, patients), of_scores([row[1] for row in rows], labels, patients)


def slow_delong(old: Predictions, new: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """Areas and covariance by the definition (DeLong 1988, equations 3 to 6), every pair of images compared."""
    sick = old.labels != 0
    kernel = [
        np.array([[1.0 if x > y else 0.5 if x == y else 0.0 for y in model.scores[~sick]] for x in model.scores[sick]])
        for model in (old, new)
    ]
    areas = np.array([pairs.mean() for pairs in kernel])
    v10, v01 = np.stack([pairs.mean(axis=1) for pairs in kernel]), np.stack([pairs.mean(axis=0) for pairs in kernel])
    return areas, np.cov(v10) / sick.sum() + np.cov(v01) / (~sick).sum()


def clustered(seed: int, patients: int, images: int) -> tuple[Predictions, Predictions]:
    """Two related models on `images` images a patient; half of the patients have pneumonia, and images of one are alike."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(patients) % 2, images)
    patient = np.repeat(np.arange(patients), images)
    shared = np.repeat(generator.normal(size=patients), images) + generator.normal(size=len(labels)) * 0.5 + 1.2 * labels
    scores = [1 / (1 + np.exp(-(shared + 0.6 * generator.normal(size=len(labels))))) for _ in range(2)]
    rows = list(zip(scores[0].tolist(), scores[1].tolist(), labels.tolist(), strict=True))
    return pair(rows, patient.tolist())


@settings(max_examples=25, deadline=None)
@given(ROWS)
def test_areas_and_covariance_are_those_of_the_definition(rows: list[tuple[float, float, int]]) -> None:
    old, new = pair(rows)
    areas, covariance = slow_delong(old, new)
    fast = paired_areas(old, new)
    np.testing.assert_allclose([fast.old, fast.new], areas, atol=1e-12)
    np.testing.assert_allclose([fast.var_old, fast.var_new, fast.covariance], covariance[[0, 1, 0], [0, 1, 1]], atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(ROWS)
def test_a_model_does_not_differ_from_itself(rows: list[tuple[float, float, int]]) -> None:
    old, _ = pair(rows)
    same = paired_areas(old, old)
    assert same.difference == 0.0
    assert same.variance == pytest.approx(0.0, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(ROWS)
def test_exchanging_the_models_turns_the_sign_alone(rows: list[tuple[float, float, int]]) -> None:
    old, new = pair(rows)
    there, back = paired_areas(old, new), paired_areas(new, old)
    assert there.difference == -back.difference
    assert there.variance == pytest.approx(back.variance, abs=1e-12)


def test_each_image_twice_tells_no_more_than_once() -> None:
    once = clustered(3, patients=60, images=1)
    twice = [
        of_scores(np.repeat(model.scores, 2).tolist(), np.repeat(model.labels, 2).tolist(), np.repeat(np.arange(60), 2).tolist())
        for model in once
    ]
    assert paired_areas(*twice).variance == pytest.approx(paired_areas(*once).variance, rel=1e-9)


def test_the_variance_by_patient_is_that_of_the_bootstrap_by_patient() -> None:
    ratios = []
    for seed in range(4):
        old, new = clustered(seed, patients=150, images=3)
        found = bootstrap_difference(new, old, Bootstrap(2000, 0.6827, seed=seed))  # one standard error to each side
        ratios.append(np.sqrt(paired_areas(old, new).variance) / ((found["high"] - found["low"]) / 2))
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.06)


def test_the_variance_of_the_change_in_sensitivity_is_that_of_the_bootstrap_by_patient() -> None:
    old, new = clustered(1, patients=300, images=3)
    sensitivity, specificity = sensitivity_and_specificity(old, new, (0.6, 0.7))
    for rates, sick in ((sensitivity, True), (specificity, False)):
        chosen = (old.labels != 0) == sick
        right = [(model.scores >= cut) == sick for model, cut in ((old, 0.6), (new, 0.7))]
        change = (right[1].astype(int) - right[0].astype(int))[chosen]
        assert (rates.gained, rates.lost, rates.images) == ((change > 0).sum(), (change < 0).sum(), chosen.sum())
        names, index = np.unique(np.array(old.patients)[chosen], return_inverse=True)
        sums, sizes = np.bincount(index, change), np.bincount(index)
        draws = next(resample_patients(len(names), Bootstrap(4000, seed=2), rows=4000))
        assert np.sqrt(rates.variance) == pytest.approx(((draws @ sums) / (draws @ sizes)).std(), rel=0.05)


def test_with_one_class_there_is_no_area() -> None:
    old = of_scores([0.1, 0.9], [1, 1])
    assert np.isnan(paired_areas(old, old).difference)


def test_other_images_are_refused() -> None:
    old, new = of_scores([0.1, 0.9], [0, 1], [1, 2]), of_scores([0.1, 0.9], [0, 1], [1, 3])
    with pytest.raises(DataError, match="same images"):
        paired_areas(old, new)


def test_of_one_patient_no_variance_is_known() -> None:
    right = np.array([True, True])
    assert np.isnan(paired_rates(right, right, np.array([0, 0])).variance)
