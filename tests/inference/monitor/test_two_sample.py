"""Two-sample tests against their oracles: level, power, Holm's step-down, the stability index."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from pneumofed.common.evaluation.similarity import stability_index
from pneumofed.inference.monitor.two_sample import (
    bin_counts,
    compare_rows,
    compare_values,
    decile_edges,
    holm,
    median_distance,
)


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("size", [8, 40])
def test_p_values_of_single_quantities_are_those_of_the_exact_test(shift: float, size: int) -> None:
    rng = np.random.default_rng(size)
    a, b = rng.standard_normal(200), rng.standard_normal(size) + shift
    assert compare_values(a, b) == pytest.approx(ks_2samp(a, b, method="exact").pvalue, rel=0.25, abs=0.02)


def test_the_kernel_test_holds_its_level_and_sees_what_no_single_axis_shows() -> None:
    rng = np.random.default_rng(0)

    def rows(n: int, correlation: float) -> np.ndarray:
        z = rng.standard_normal((n, 2))
        return np.stack([z[:, 0], correlation * z[:, 0] + np.sqrt(1 - correlation**2) * z[:, 1]], axis=1)

    width = median_distance(rows(100, 0.0))
    quiet = [compare_rows(rows(40, 0.0), rows(15, 0.0), width, rng) for _ in range(100)]
    assert np.mean(np.array(quiet) <= 0.2) <= 0.33  # above it has a chance of 0.1 %
    assert compare_rows(rows(150, 0.0), rows(80, 0.95), width, rng) < 0.01


@settings(deadline=None)
@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8))
def test_holm_is_the_step_down_procedure(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for level in (0.01, 0.05, 0.3):
        order = np.argsort(p_values, kind="stable")
        rejected: set[int] = set()
        for step, index in enumerate(order):
            if p_values[index] * (len(order) - step) > level:
                break
            rejected.add(int(index))
        assert set(np.flatnonzero(adjusted <= level).tolist()) == rejected


def test_deciles_hold_equal_parts_and_the_stability_index_of_no_change_is_zero() -> None:
    values = np.arange(100.0)
    counts = bin_counts(values, decile_edges(values))
    assert counts.tolist() == [10] * 10
    assert stability_index(counts, 3 * counts) == 0.0
    assert stability_index(counts, counts * np.arange(10)) > 0.25
