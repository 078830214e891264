"""The bound against the paper's own numbers, and against mechanisms whose epsilon is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pneumofed.common.data.dataset import Dataset
from pneumofed.common.data.manifest import DataReport
from pneumofed.common.errors import ConfigError
from pneumofed.simulation.attacks.canaries import Guesses, audit, epsilon_lower_bound, guess, make_canaries, p_value, toss


def _data(patients: int, size_px: int = 32) -> Dataset:
    generator = np.random.default_rng(0)
    names = tuple(f"p{number // 2}" for number in range(2 * patients))
    pixels = generator.integers(0, 256, (2 * patients, size_px, size_px), dtype=np.uint8)
    labels = generator.integers(0, 2, 2 * patients)
    return Dataset(pixels, labels, names, tuple(map(str, range(2 * patients))), DataReport())


@pytest.mark.parametrize(
    ("guesses", "delta", "published"),
    [(Guesses(1000, 100, 75), 1e-4, 0.673), (Guesses(100_000, 1510, 1439), 1e-5, 2.675)],
)
def test_the_bound_is_the_one_that_the_paper_prints(guesses: Guesses, delta: float, published: float) -> None:
    """Steinke et al. 2023, appendix D and section 7 (rounded there, then cut)."""
    assert epsilon_lower_bound(guesses, delta) == pytest.approx(published, abs=1e-3)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0, 4.0])
def test_randomised_response_breaks_its_bound_in_at_most_one_run_in_twenty(epsilon: float) -> None:
    """m guesses, each right with e^eps / (1 + e^eps): (eps, 0)-private, and the worst case of the theorem."""
    generator, canaries, runs = np.random.default_rng(7), 200, 600
    right = generator.binomial(canaries, 1.0 / (1.0 + np.exp(-epsilon)), runs)
    values, counts = np.unique(right, return_counts=True)
    breaks = [epsilon_lower_bound(Guesses(canaries, canaries, int(value)), 0.0) > epsilon for value in values]
    broken = int(counts[breaks].sum())
    assert stats.binom.sf(broken - 1, runs, 0.05) > 1e-3


def test_many_canaries_bring_the_bound_close_to_the_truth() -> None:
    generator, epsilon, canaries = np.random.default_rng(8), 2.0, 20_000
    right = int(generator.binomial(canaries, 1.0 / (1.0 + np.exp(-epsilon))))
    assert 0.95 * epsilon < epsilon_lower_bound(Guesses(canaries, canaries, right), 0.0) < epsilon


def test_the_whole_audit_keeps_its_confidence_under_the_gaussian_mechanism() -> None:
    """Scores of the Gaussian mechanism of sensitivity 1; its epsilon at delta is exact (Balle and Wang 2018, theorem 8)."""
    deviation, delta, canaries, runs = 1.0, 1e-3, 100, 200

    def delta_of(epsilon: float) -> float:
        a, b = 0.5 / deviation, epsilon * deviation
        return float(stats.norm.cdf(a - b) - np.exp(epsilon) * stats.norm.cdf(-a - b))

    epsilons = np.linspace(0.0, 10.0, 2001)
    truth = next(epsilon for epsilon in epsilons if delta_of(epsilon) <= delta)
    generator, broken = np.random.default_rng(9), 0
    for run in range(runs):
        included = toss(canaries, run)
        scores = included + deviation * generator.standard_normal(canaries)
        broken += audit(scores, included, delta).epsilon > truth
    assert stats.binom.sf(broken - 1, runs, 0.05) > 1e-3


def test_a_model_that_tells_all_gives_a_large_bound_and_one_that_tells_nothing_gives_none() -> None:
    included = toss(200, 0)
    assert audit(included.astype(np.float64), included, 1e-5).epsilon > 3.0
    nothing = [audit(np.random.default_rng(seed).random(200), toss(200, seed), 1e-5).epsilon for seed in range(40)]
    assert sum(bound > 0.0 for bound in nothing) <= 6


@given(st.integers(1, 60), st.integers(0, 60), st.floats(0.0, 5.0), st.floats(0.0, 0.01))
@settings(max_examples=60, deadline=None)
def test_p_values_grow_with_epsilon_and_delta_and_shrink_with_right_guesses(
    made: int, right: int, epsilon: float, delta: float
) -> None:
    right = min(right, made)
    found = p_value(Guesses(60, made, right), epsilon, delta)
    assert 0.0 <= found <= 1.0
    assert p_value(Guesses(60, made, right), epsilon, 2 * delta) >= found
    assert p_value(Guesses(60, made, right), epsilon + 0.5, 0.0) >= p_value(Guesses(60, made, right), epsilon, 0.0)
    if right < made:
        assert p_value(Guesses(60, made, right + 1), epsilon, 0.0) <= p_value(Guesses(60, made, right), epsilon, 0.0)


def test_no_canary_and_no_guess_rule_nothing_out() -> None:
    assert epsilon_lower_bound(Guesses(0, 0, 0), 1e-5) == 0.0
    assert epsilon_lower_bound(Guesses(10, 0, 0), 1e-5) == 0.0
    with pytest.raises(ValueError, match="right <= made"):
        Guesses(10, 5, 6)


def test_guesses_are_the_two_ends_of_the_ranking() -> None:
    scores, included = np.array([3.0, 1.0, 2.0, 0.0]), np.array([True, False, False, True])
    assert guess(scores, included, 2) == Guesses(4, 2, 1)
    assert guess(scores, included, 4) == Guesses(4, 4, 2)


def test_mislabelled_canaries_are_other_patients_images_under_a_wrong_class() -> None:
    data = _data(20)
    canaries = make_canaries(data, "mislabelled", "binary", 15, seed=0)
    assert len(set(canaries.patients)) == len(canaries) == 15
    for row in range(15):
        source = next(i for i in range(len(data)) if np.array_equal(data.pixels[i], canaries.pixels[row]))
        assert data.labels[source] != canaries.labels[row]


def test_patterns_are_unlike_each_other_and_drawn_from_the_seed() -> None:
    first, again, other = (make_canaries(_data(20), "pattern", "binary", 15, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.pixels, again.pixels)
    assert not np.array_equal(first.pixels, other.pixels)
    assert len({pixels.tobytes() for pixels in first.pixels}) == 15


def test_more_canaries_than_patients_are_refused() -> None:
    with pytest.raises(ConfigError, match="canaries need as many patients"):
        make_canaries(_data(3), "pattern", "binary", 4, seed=0)


def test_joined_data_holds_both_parts_in_order() -> None:
    first, second = _data(2), _data(3)
    joined = Dataset.join([first, second])
    assert joined.patients == first.patients + second.patients
    assert np.array_equal(joined.pixels[4:], second.pixels)
