"""Updates in fewer bits: what comes out is what went in up to the stated rounding, and anything else is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pneumofed.common.config.choices import UpdatePrecision
from pneumofed.common.errors import MessageError
from pneumofed.common.wire.fields import BLOCK, LEVELS, decode_parameters, encode_parameters

PRECISIONS: tuple[UpdatePrecision, ...] = ("float32", "float16", "int8")


def vectors(seed: int, count: int, size: float) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    base = generator.standard_normal(count).astype(np.float32)
    return base, base + (size * generator.standard_normal(count)).astype(np.float32)


def there_and_back(parameters: np.ndarray, base: np.ndarray, precision: UpdatePrecision, seed: int = 0) -> np.ndarray:
    return decode_parameters(encode_parameters(parameters, base, precision, np.random.default_rng(seed)), base, precision)


@given(st.integers(0, 2**31), st.integers(1, 3 * BLOCK), st.floats(1e-6, 10.0))
def test_each_value_comes_back_within_one_step(seed: int, count: int, size: float) -> None:
    base, parameters = vectors(seed, count, size)
    difference = parameters - base
    np.testing.assert_array_equal(there_and_back(parameters, base, "float32"), parameters)
    for precision, step in (("float16", 2.0**-11 * np.abs(difference) + 2.0**-25), ("int8", np.abs(difference).max() / LEVELS)):
        came = there_and_back(parameters, base, precision)  # type: ignore[arg-type]
        assert came.dtype == np.float32
        assert (np.abs(came - parameters) <= 1.01 * step + 4e-7 * np.abs(parameters)).all()


def test_stochastic_rounding_is_right_on_average() -> None:
    base, parameters = np.zeros(BLOCK, np.float32), np.linspace(-1.0, 1.0, BLOCK, dtype=np.float32)
    mean = np.mean([there_and_back(parameters, base, "int8", seed) for seed in range(400)], axis=0)
    # one rounding has a deviation of at most half a step, 1 / 127 / 2; the mean of 400 has a twentieth of it
    assert np.abs(mean - parameters).max() < 5 * (1 / LEVELS / 2) / 20


def test_one_outlier_spoils_its_own_block_alone() -> None:
    base, parameters = vectors(0, 2 * BLOCK, 1e-3)
    parameters[0] += 100.0
    error = np.abs(there_and_back(parameters, base, "int8") - parameters)
    assert error[BLOCK:].max() < 1e-4 < error[:BLOCK].max()


def test_bytes_are_half_and_a_quarter() -> None:
    base, parameters = vectors(0, 100 * BLOCK, 1e-3)
    sizes = [sum(a.nbytes for a in encode_parameters(parameters, base, p, np.random.default_rng(0)).values()) for p in PRECISIONS]
    assert sizes[1] == sizes[0] / 2
    assert sizes[2] == pytest.approx(sizes[0] / 4, rel=0.005)


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_values_that_are_not_finite_never_leave(precision: UpdatePrecision) -> None:
    with pytest.raises(MessageError, match="not finite"):
        encode_parameters(np.array([np.nan], np.float32), np.zeros(1, np.float32), precision, np.random.default_rng(0))


def test_a_difference_beyond_float16_is_told() -> None:
    with pytest.raises(MessageError, match="65504"):
        encode_parameters(np.array([1e6], np.float32), np.zeros(1, np.float32), "float16", np.random.default_rng(0))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_another_precision_or_size_sends_is_refused(precision: UpdatePrecision) -> None:
    base, parameters = vectors(0, 10, 1e-3)
    for other in PRECISIONS:
        coded = encode_parameters(parameters, base, other, np.random.default_rng(0))
        if other != precision:
            with pytest.raises(MessageError, match="expected arrays"):
                decode_parameters(coded, base, precision)
        else:
            with pytest.raises(MessageError, match="expected arrays"):
                decode_parameters(coded, np.zeros(BLOCK + 11, np.float32), precision)
