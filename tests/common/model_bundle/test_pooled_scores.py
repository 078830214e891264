"""Limits of the suitability check from counts that hospitals send: what the guarantee says, by draws, and what a message may hold."""

from typing import Any

import numpy as np
import pytest

from pneumofed.common.errors import MessageError
from pneumofed.common.model_bundle.pooled_scores import (
    SCORE_BINS,
    SCORE_EDGES,
    HospitalReference,
    count_scores,
    pack_counts,
    unpack_counts,
)
from pneumofed.common.model_bundle.suitability import SUITABILITY_TESTS, Suitability, fit_suitability, score_images

TESTS = len(SUITABILITY_TESTS)


@pytest.fixture(scope="module")
def central() -> Suitability:
    rng = np.random.default_rng(0)
    images = rng.random((60, 16, 16)).astype(np.float32)
    return fit_suitability(images, rng.normal(size=(60, 8)).astype(np.float32), np.zeros((60, 1), np.float32))


def reference(central: Suitability, *sites: np.ndarray) -> HospitalReference:
    by_site = {f"h{number}": pack_counts(count_scores(scores)) for number, scores in enumerate(sites)}
    return HospitalReference(round=1, suitability=central, sites=by_site)


def test_counts_of_sites_add_up_to_the_limits_of_the_pool(central: Suitability) -> None:
    scores = np.random.default_rng(1).gamma(2.0, 3.0, (TESTS, 400))
    apart = reference(central, scores[:, :90], scores[:, 90:]).pooled()
    np.testing.assert_array_equal(apart.calibration.array, reference(central, scores).pooled().calibration.array)


@pytest.mark.parametrize("patients", [150, 700, 4001])
def test_new_patients_of_the_pool_are_refused_no_more_often_than_promised(central: Suitability, patients: int) -> None:
    """Scores of hospitals far from the central set; draws of the calibration patients and of new ones."""
    rng, rates = np.random.default_rng(2), []
    for _ in range(60):
        drawn, new = (np.exp(rng.normal(3.0, 1.0, (TESTS, count))) for count in (patients, 2000))
        limits = reference(central, drawn).pooled().limits
        assert np.isfinite(limits).all()
        rates.append(((new > limits[:, None]).any(axis=0)).mean())
    assert np.mean(rates) <= central.refusal_rate + 3 * np.std(rates) / np.sqrt(len(rates))
    assert np.mean(rates) > 0  # the check still refuses


def test_the_share_that_is_said_bounds_the_share_that_is_refused(central: Suitability) -> None:
    near, far = (np.random.default_rng(seed).gamma(2.0, scale, (TESTS, 300)) for seed, scale in ((3, 1.0), (4, 4.0)))
    kept = reference(central, near, far)
    limits = kept.pooled().limits
    said = kept.most_refused(limits)
    for site, scores in (("h0", near), ("h1", far)):
        assert (scores > limits[:, None]).any(axis=0).sum() <= said[site] <= 300
    assert sum(said.values()) <= central.refusal_rate * 601


def test_few_patients_are_not_enough_for_a_limit(central: Suitability) -> None:
    assert not reference(central, np.ones((TESTS, 149))).is_enough
    assert reference(central, np.ones((TESTS, 75)), np.ones((TESTS, 75))).is_enough


def test_no_number_and_the_largest_fall_into_the_bin_without_an_end() -> None:
    counts = count_scores(np.array([[np.nan, np.inf, 1e9]] * TESTS))
    assert counts[:, -1].tolist() == [3] * TESTS
    assert len(SCORE_EDGES) == SCORE_BINS
    assert (np.diff(SCORE_EDGES) > 0).all()


@pytest.mark.parametrize("spoil", ["name", "bins", "negative", "sum", "type"])
def test_counts_that_are_none_are_refused(spoil: str) -> None:
    numbers = pack_counts(count_scores(np.ones((TESTS, 5))))
    first = SUITABILITY_TESTS[0]
    unpack_counts(numbers, 5)
    row = list(numbers[first])
    spoilt: dict[str, dict[str, Any]] = {
        "name": {**numbers, "other": row},
        "bins": {**numbers, first: row[1:]},
        "negative": {**numbers, first: [-1, 1, *row[2:]]},
        "sum": {**numbers, first: [1, *row[1:]]},
        "type": {**numbers, first: [float(one) for one in row]},
    }
    with pytest.raises(MessageError):
        unpack_counts(spoilt[spoil], 5)


def test_scores_are_those_that_the_limits_are_compared_with(central: Suitability) -> None:
    rng = np.random.default_rng(0)
    images = rng.random((60, 16, 16)).astype(np.float32)
    scores = score_images(central, images, rng.normal(size=(60, 8)).astype(np.float32))
    for row, kept in zip(scores, central.calibration.array, strict=True):
        assert np.isin(kept.astype(np.float32), row.astype(np.float32)).all()
