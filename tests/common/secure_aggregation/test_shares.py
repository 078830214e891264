"""Shamir's shares: any `threshold` give the secret, fewer say nothing of it."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from pneumofed.common.errors import SecureSumError
from pneumofed.common.secure_aggregation.masking import SHARING_PRIME, join_numbers, join_shares, split_number, split_secret


@settings(max_examples=50, deadline=None)
@given(
    secret=st.binary(min_size=32, max_size=32), holders=st.sets(st.integers(1, 10_000), min_size=1, max_size=40), data=st.data()
)
def test_any_threshold_of_the_shares_give_the_secret(secret: bytes, holders: set[int], data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, len(holders)))
    shares = split_secret(secret, holders, threshold)
    kept = data.draw(st.permutations(sorted(holders)))[:threshold]
    assert join_shares({holder: shares[holder] for holder in kept}, threshold) == secret


def test_fewer_shares_are_uniform_whatever_the_secret_is() -> None:
    """On a field of seven numbers, where all outcomes can be counted: two shares of a threshold of three."""
    prime, draws = 7, 49 * 60
    for secret in (0, 3):
        seen: Counter[tuple[int, int]] = Counter()
        for _ in range(draws):
            points = split_number(secret, (1, 2, 5), 3, prime)
            seen[points[1], points[5]] += 1
        assert len(seen) == prime**2
        assert chisquare(list(seen.values())).pvalue > 1e-6


def test_with_fewer_shares_each_secret_is_as_likely_as_any_other() -> None:
    """For each pair of shares there is exactly one polynomial to each secret of the field."""
    prime, points = 11, {1: 4, 2: 9}
    others = {join_numbers({**points, 3: value}, prime) for value in range(prime)}
    assert others == set(range(prime))


def test_every_choice_of_holders_agrees() -> None:
    shares = split_secret(bytes(range(32)), range(1, 7), 4)
    found = {join_shares({holder: shares[holder] for holder in chosen}, 4) for chosen in combinations(shares, 4)}
    assert found == {bytes(range(32))}


def test_too_few_shares_are_refused() -> None:
    shares = split_secret(bytes(32), (1, 2, 3), 3)
    with pytest.raises(SecureSumError, match="2 shares of a secret, 3 are needed"):
        join_shares({1: shares[1], 2: shares[2]}, 3)


@pytest.mark.parametrize(
    ("holders", "threshold"), [((0, 1), 1), ((1, 1), 2), ((1, 2), 3), ((1, SHARING_PRIME + 1), 1), ((1, 2), 0)]
)
def test_holders_that_would_give_the_secret_away_are_refused(holders: tuple[int, ...], threshold: int) -> None:
    with pytest.raises(SecureSumError):
        split_number(1, holders, threshold, SHARING_PRIME)


def test_the_modulus_is_prime() -> None:
    """Miller and Rabin, with more bases than any composite number of this size is known to pass."""
    odd, twos = SHARING_PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 66):
        values = [pow(base, odd * 2**power, SHARING_PRIME) for power in range(twos)]
        assert values[0] == 1 or SHARING_PRIME - 1 in values
