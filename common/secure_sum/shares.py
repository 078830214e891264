"""Shamir's secret sharing (1979): any `threshold` shares give the secret, fewer say nothing of it.

Over the integers modulo a prime above 2^256, so that a 32-byte key is one secret. Flower's shares, which are pycryptodome's over
GF(2^128), are as sound; they cut a key into three blocks and cost some hundred times as much, since Python has no carry-less product.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from functools import lru_cache

from common.errors import SecureSumError

PRIME = 2**256 + 297
"""The smallest prime above 2^256 (the tests look)."""
SECRET_BYTES, SHARE_BYTES = 32, 33


def split_secret(secret: bytes, holders: Collection[int], threshold: int) -> dict[int, bytes]:
    """A share of 33 bytes of the 32-byte `secret` for each of `holders`, which are whole numbers above zero.

    Raises:
        SecureSumError: `secret` has another length, or there are fewer holders than `threshold`.
    """
    if len(secret) != SECRET_BYTES:
        raise SecureSumError(f"a secret of {SECRET_BYTES} bytes is expected, got {len(secret)}")
    points = split_number(int.from_bytes(secret, "big"), holders, threshold, PRIME)
    return {holder: value.to_bytes(SHARE_BYTES, "big") for holder, value in points.items()}


def join_shares(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret, from `threshold` of `shares`.

    Raises:
        SecureSumError: too few shares, or they are not those of one 32-byte secret.
    """
    if len(shares) < threshold:
        raise SecureSumError(f"{len(shares)} shares of a secret, {threshold} are needed")
    chosen = {holder: int.from_bytes(shares[holder], "big") for holder in sorted(shares)[:threshold]}
    secret = join_numbers(chosen, PRIME)
    if secret >= 2 ** (8 * SECRET_BYTES):
        raise SecureSumError("the shares are not those of one secret")
    return secret.to_bytes(SECRET_BYTES, "big")


def split_number(secret: int, holders: Collection[int], threshold: int, prime: int) -> dict[int, int]:
    """Values at `holders` of a random polynomial of degree `threshold` - 1 whose value at zero is `secret`.

    Raises:
        SecureSumError: holders are not distinct, zero is among them, or there are fewer than `threshold`.
    """
    if len({holder % prime for holder in holders} - {0}) != len(holders) or not 1 <= threshold <= len(holders):
        raise SecureSumError(f"{len(holders)} distinct holders cannot have a threshold of {threshold}")
    coefficients = [secret, *(secrets.randbelow(prime) for _ in range(threshold - 1))]
    return {holder: _value(coefficients, holder, prime) for holder in holders}


def join_numbers(points: Mapping[int, int], prime: int) -> int:
    """The value at zero of the polynomial through `points` (Lagrange)."""
    weights = _weights(tuple(points), prime)
    return sum(weight * value for weight, value in zip(weights, points.values(), strict=True)) % prime


def _value(coefficients: list[int], place: int, prime: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):  # Horner
        value = (value * place + coefficient) % prime
    return value


@lru_cache(maxsize=256)
def _weights(places: tuple[int, ...], prime: int) -> tuple[int, ...]:
    """Of each value in the sum; the same for all secrets whose shares have these holders."""
    weights = []
    for place in places:
        above, below = 1, 1
        for other in places:
            if other != place:
                above, below = above * other % prime, below * (other - place) % prime
        weights.append(above * pow(below, -1, prime) % prime)
    return tuple(weights)
