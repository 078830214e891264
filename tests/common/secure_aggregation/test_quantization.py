"""The sum of encoded updates is the weighted mean to the stated bound, and cannot overflow."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumofed.common.config.experiment import SecureAggregationConfig
from pneumofed.common.errors import SecureSumError
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.evaluation.statistics import FEDERATED_GRID, Statistics
from pneumofed.common.model_bundle.pooled_scores import MOST_PATIENTS, SCORE_BINS, count_scores
from pneumofed.common.secure_aggregation.masking import SumVector, threshold
from pneumofed.common.secure_aggregation.quantization import (
    TrainingSums,
    UpdateCodec,
    decode_scores,
    encode_scores,
    largest_share,
)
from pneumofed.common.wire.messages import ModelArrays

LENGTHS = st.floats(0.01, 30.0)


def codec(sites: int, **changes: object) -> UpdateCodec:
    cfg = SecureAggregationConfig.model_validate({"enabled": True, "clip_norm": 10.0, "max_examples": 1000, **changes})
    return UpdateCodec(cfg, parameters=40, statistics=6, classes=2, sites=sites)


def difference(seed: int, length: float) -> ModelArrays:
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(40)
    parameters = (values / np.linalg.norm(values) * length).astype(np.float32)
    return ModelArrays(parameters, (generator.standard_normal(6) * 10).astype(np.float32))


def sums(images: int) -> TrainingSums:
    return TrainingSums(images, 2 * images, images, 0.7 * images, (images // 3, images - images // 3))


def total(chosen: UpdateCodec, parts: list[tuple[ModelArrays, TrainingSums]]) -> SumVector:
    result = chosen.shape.zeros()
    for arrays, counts in parts:
        result.add(chosen.encode(arrays, counts))
    return result


@settings(max_examples=60, deadline=None)
@given(
    sites=st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 1000), LENGTHS), min_size=1, max_size=12),
    bits=st.sampled_from([32, 64]),
)
def test_the_mean_is_the_weighted_mean_to_the_stated_bound(sites: list[tuple[int, int, float]], bits: int) -> None:
    chosen = codec(len(sites), bits=bits)
    parts = [(difference(seed, length), sums(images)) for seed, images, length in sites]
    mean = chosen.decode(total(chosen, parts))
    images = np.array([chosen.weight(images) for _, images, _ in sites], float)
    norms = np.array([max(np.linalg.norm(arrays.parameters.astype(float)), 1e-9) for arrays, _ in parts])
    shrink = np.minimum(1.0, 10.0 / norms)
    stack = np.stack([arrays.parameters.astype(float) for arrays, _ in parts])
    wanted = (images * shrink) @ stack / images.sum()
    rounding = 1e-6 * (1 + np.abs(wanted).max())  # the mean is float32
    assert np.abs(mean.arrays.parameters - wanted).max() <= chosen.error_bound(int(images.sum())) + rounding
    statistics = images @ np.stack([arrays.statistics.astype(float) for arrays, _ in parts]) / images.sum()
    assert np.abs(mean.arrays.statistics - statistics).max() <= 2**-17 * len(sites) / images.sum() + 1e-5
    assert mean.weight == images.sum()
    assert mean.sums.images == sum(images for _, images, _ in sites)
    assert mean.sums.loss == pytest.approx(0.7 * mean.sums.images, abs=len(sites) * 1e-6)
    assert mean.clipped == (shrink < 1).sum()


def test_statistics_behind_the_updates_are_the_sum_of_all_and_change_nothing_of_the_mean() -> None:
    plain = codec(3)
    both, generator = replace(plain, judged=True), np.random.default_rng(0)
    parts, found, result = [(difference(seed, 3.0), sums(10 + seed)) for seed in range(3)], [], both.shape.zeros()
    for arrays, counts in parts:
        scores, labels = generator.random(20), generator.integers(0, 2, 20)
        predictions = Predictions(np.stack([1 - scores, scores], axis=1), labels, tuple(map(str, range(20))))
        found.append(Statistics.of(predictions, FEDERATED_GRID))
        result.add(both.encode(arrays, counts, found[-1]))
    mean, alone = both.decode(result), plain.decode(total(plain, parts))
    np.testing.assert_array_equal(mean.arrays.parameters, alone.arrays.parameters)
    assert (mean.sums, mean.clipped, mean.weight) == (alone.sums, alone.clipped, alone.weight)
    np.testing.assert_array_equal(both.decode_judged(result).flat(), sum(one.flat() for one in found))
    result.tail[plain.shape.tail] = np.uint64(2**64 - 1)
    with pytest.raises(SecureSumError, match="statistics contradict"):
        both.decode_judged(result)


def test_the_largest_updates_of_all_sites_do_not_overflow() -> None:
    chosen = codec(7)
    spike = np.zeros(40, np.float32)
    spike[3] = -1e6
    parts = [(ModelArrays(spike, np.full(6, 1e9, np.float32)), sums(1000))] * 7
    mean = chosen.decode(total(chosen, parts))
    assert mean.arrays.parameters[3] == pytest.approx(-10.0, rel=1e-6)
    assert mean.clipped == 7


@given(
    images=st.lists(st.integers(1, 100_000), min_size=3, max_size=40),
    share=st.floats(0.05, 1.0),
    threshold_=st.sampled_from([0.51, 0.67, 0.8, 1.0]),
    most=st.integers(1, 65536),
)
def test_no_site_is_more_than_the_largest_share_whoever_drops_out(
    images: list[int], share: float, threshold_: float, most: int
) -> None:
    chosen = codec(len(images), largest_weight=share, threshold=threshold_, max_examples=most)
    stay = threshold(len(images), threshold_)
    weights = sorted(chosen.weight(count) for count in images)
    worst = weights[-1] / (weights[-1] + sum(weights[: stay - 1]))  # the others that stay are those that count least
    assert worst <= largest_share(chosen.cfg, len(images)) + 1e-12
    assert largest_share(chosen.cfg, len(images)) <= max(share, 1 / stay) + 1e-12


def test_an_update_that_rounding_takes_away_never_enters_a_sum() -> None:
    for lost in (difference(0, 1e-8), ModelArrays(np.zeros(40, np.float32), np.zeros(6, np.float32))):
        with pytest.raises(SecureSumError, match="rounding leaves"):
            codec(3).encode(lost, sums(10))


def test_values_that_are_no_numbers_never_enter_a_sum() -> None:
    bad = difference(0, 1.0)
    bad.parameters[2] = np.nan
    with pytest.raises(SecureSumError, match="not finite"):
        codec(3).encode(bad, sums(10))


def test_a_mask_left_in_a_sum_is_noticed() -> None:
    chosen = codec(3)
    result = total(chosen, [(difference(seed, 1.0), sums(100)) for seed in range(3)])
    result.add_mask(bytes(32))
    with pytest.raises(SecureSumError):
        chosen.decode(result)


def test_a_mask_left_in_the_body_alone_is_noticed() -> None:
    chosen = codec(3)
    result = total(chosen, [(difference(seed, 1.0), sums(100)) for seed in range(3)])
    SumVector(result.body, result.tail[:0]).add_mask(bytes(32))
    with pytest.raises(SecureSumError, match="longer than the clipping norm"):
        chosen.decode(result)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=5), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_the_sum_of_score_counts_is_that_of_all_patients_exactly(patients: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores = [generator.standard_normal((3, count)) * 50 for count in patients]
    vectors = [encode_scores(count_scores(of_site)) for of_site in scores]
    added = vectors[0]
    for vector in vectors[1:]:
        added.add(vector)
    assert (decode_scores(added, len(patients)) == count_scores(np.concatenate(scores, axis=1))).all()


def test_sums_that_no_patients_have_are_refused() -> None:
    good = np.zeros((3, SCORE_BINS), np.int64)
    good[:, 4] = 7
    negative, uneven, many, nobody = good.copy(), good.copy(), good.copy(), np.zeros_like(good)
    negative[0, :2] = 1, -1
    uneven[1, 5] = 1
    many[:, 4] = 2 * MOST_PATIENTS + 1
    for counts in (negative, uneven, many, nobody):
        with pytest.raises(SecureSumError, match="contradict"):
            decode_scores(encode_scores(counts), 2)
