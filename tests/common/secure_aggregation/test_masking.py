"""Masks: what one party adds the other takes away, and a masked vector says nothing."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumofed.common.secure_aggregation.masking import CHUNK_BYTES, SumShape, SumVector
from tests.common.secure_aggregation.randomness import looks_random

KEY = bytes(range(32))


def vector(shape: SumShape, seed: int) -> SumVector:
    generator = np.random.default_rng(seed)
    empty = shape.zeros()
    return SumVector(*(generator.integers(0, 2**31, len(part)).astype(part.dtype) for part in (empty.body, empty.tail)))


@settings(max_examples=30, deadline=None)
@given(body=st.integers(0, 50), tail=st.integers(0, 50), bits=st.sampled_from([32, 64]), seed=st.integers(0, 99))
def test_adding_and_subtracting_a_mask_gives_the_vector_back(body: int, tail: int, bits: int, seed: int) -> None:
    shape = SumShape(body, tail, bits)
    masked, plain = vector(shape, seed), vector(shape, seed)
    masked.add_mask(KEY)
    assert body + tail < 4 or not np.array_equal(np.r_[masked.body, masked.tail], np.r_[plain.body, plain.tail])
    masked.add_mask(KEY, subtract=True)
    np.testing.assert_array_equal(masked.body, plain.body)
    np.testing.assert_array_equal(masked.tail, plain.tail)


def test_the_mask_is_the_keystream_of_chacha20_over_all_chunks() -> None:
    shape = SumShape(CHUNK_BYTES // 4 * 2 + 12345, 1000, 32)
    masked = shape.zeros()
    masked.add_mask(KEY)
    stream = Cipher(ChaCha20(KEY, bytes(16)), mode=None).encryptor().update(bytes(masked.nbytes))
    assert masked.body.tobytes() + masked.tail.tobytes() == stream


@pytest.mark.parametrize("bits", [32, 64])
def test_masks_of_a_ring_of_sites_cancel(bits: int) -> None:
    shape = SumShape(1000, 10, bits)
    parts = [vector(shape, seed) for seed in range(3)]
    total, plain = shape.zeros(), shape.zeros()
    for part in parts:
        plain.add(part)
    for first, second in ((0, 1), (1, 2), (0, 2)):
        key = bytes([first, second]) * 16
        parts[first].add_mask(key)
        parts[second].add_mask(key, subtract=True)
    for part in parts:
        total.add(part)
    np.testing.assert_array_equal(total.body, plain.body)
    np.testing.assert_array_equal(total.tail, plain.tail)


def test_a_masked_vector_of_zeros_looks_random() -> None:
    masked = SumShape(100_000, 0, 32).zeros()
    masked.add_mask(KEY)
    assert looks_random(masked.body.tobytes())
    assert not looks_random(np.arange(100_000, dtype=np.uint32).tobytes())
