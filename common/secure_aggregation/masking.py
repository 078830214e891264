"""Masked vectors of a secure sum, the sharing of the secrets behind the masks, and who shares with whom.

`SumVector` is one run of bytes in two parts: a long `body` of 32- or 64-bit integers and a short `tail` of 64-bit ones, for numbers that
need more room. All arithmetic is modulo 2^32 or 2^64, in which a uniform mask hides a number perfectly (Bonawitz et al. 2017, section 3).
The mask is the keystream of ChaCha20 (RFC 8439) under a key that is used once: as many bytes as the vector has, body first.

`split_secret` and `join_shares` are Shamir's secret sharing (1979): any `threshold` shares give the secret, fewer say nothing of it. Over
the integers modulo a prime above 2^256, so that a 32-byte key is one secret. Flower's shares, which are pycryptodome's over GF(2^128), are
as sound; they cut a key into three blocks and cost some hundred times as much, since Python has no carry-less product.

`neighbourhoods` and `threshold` say who shares masks with whom, and how many must stay: both computed by each site from what all sites
signed. Up to `ALL_PAIRS_UP_TO` sites everyone is everyone's neighbour (Bonawitz et al. 2017). Beyond, each has k neighbours, k/2 on either
side of a ring in random order (SecAgg+: Bell et al. 2020, section 3), so that costs grow with the logarithm of the number of sites. That
paper's k is for a coordinator that keeps to the protocol; ours, which is larger, also for one that tells two stories about who survived.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from pneumofed.common.config.experiment import SecureAggregationConfig
from pneumofed.common.errors import SecureSumError

CHUNK_BYTES = 1 << 20
"""Mask bytes in memory at once: they stay in the processor's cache, and 45 MB are never held a second time."""
_ZEROS = bytes(CHUNK_BYTES)
_ZERO_NONCE = bytes(16)  # counter and nonce: zero, since no key is used twice

Words = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class SumShape:
    """Sizes of a vector, the same at all parties: `body` integers of `bits` bits and `tail` integers of 64 bits."""

    body: int
    tail: int
    bits: int

    def zeros(self) -> SumVector:
        return SumVector(np.zeros(self.body, dtype=f"<u{self.bits // 8}"), np.zeros(self.tail, dtype="<u8"))


@dataclass(frozen=True)
class SumVector:
    """Unsigned integers modulo a power of two: `body` uint32 or uint64 [P], `tail` uint64 [T]. Negative ones are two's complements."""

    body: Words
    tail: Words

    @property
    def shape(self) -> SumShape:
        return SumShape(len(self.body), len(self.tail), 8 * self.body.itemsize)

    @property
    def nbytes(self) -> int:
        return int(self.body.nbytes + self.tail.nbytes)

    def add(self, other: SumVector) -> None:
        """Adds `other`, which has the same shape, in place."""
        for own, more in ((self.body, other.body), (self.tail, other.tail)):
            np.add(own, more, out=own)

    def add_mask(self, key: bytes, *, subtract: bool = False) -> None:
        """Adds the mask of `key` in place, or takes it away; one undoes the other.

        Args:
            key: 32 bytes, used for one vector only.
            subtract: take the mask away.
        """
        stream = Cipher(ChaCha20(key, _ZERO_NONCE), mode=None).encryptor()
        change = np.subtract if subtract else np.add
        buffer = bytearray(CHUNK_BYTES)
        for words in (self.body, self.tail):
            for chunk in _chunks(words):
                stream.update_into(memoryview(_ZEROS)[: chunk.nbytes], buffer)
                change(chunk, np.frombuffer(buffer, dtype=words.dtype, count=len(chunk)), out=chunk)


def _chunks(words: Words) -> Iterator[Words]:
    step = CHUNK_BYTES // words.itemsize
    return (words[start : start + step] for start in range(0, len(words), step))


SHARING_PRIME = 2**256 + 297
"""The smallest prime above 2^256 (the tests look)."""
SECRET_BYTES, SHARE_BYTES = 32, 33


def split_secret(secret: bytes, holders: Collection[int], threshold: int) -> dict[int, bytes]:
    """Computes a share of 33 bytes of the secret for each holder.

    Args:
        secret: 32 bytes.
        holders: distinct whole numbers above zero.
        threshold: how many shares give the secret; fewer say nothing of it.

    Raises:
        SecureSumError: `secret` has another length, or there are fewer holders than `threshold`.
    """
    if len(secret) != SECRET_BYTES:
        raise SecureSumError(f"a secret of {SECRET_BYTES} bytes is expected, got {len(secret)}")
    points = split_number(int.from_bytes(secret, "big"), holders, threshold, SHARING_PRIME)
    return {holder: value.to_bytes(SHARE_BYTES, "big") for holder, value in points.items()}


def join_shares(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Computes the secret from `threshold` of the shares.

    Args:
        shares: by holder, 33 bytes each; those beyond the threshold are not looked at.
        threshold: as it was split with.

    Raises:
        SecureSumError: too few shares, or they are not those of one 32-byte secret.
    """
    if len(shares) < threshold:
        raise SecureSumError(f"{len(shares)} shares of a secret, {threshold} are needed")
    chosen = {holder: int.from_bytes(shares[holder], "big") for holder in sorted(shares)[:threshold]}
    secret = join_numbers(chosen, SHARING_PRIME)
    if secret >= 2 ** (8 * SECRET_BYTES):
        raise SecureSumError("the shares are not those of one secret")
    return secret.to_bytes(SECRET_BYTES, "big")


def split_number(secret: int, holders: Collection[int], threshold: int, prime: int) -> dict[int, int]:
    """Computes the values at `holders` of a random polynomial of degree `threshold` - 1 whose value at zero is `secret`.

    Args:
        secret: in [0, prime).
        holders: distinct whole numbers, none of them 0 modulo `prime`.
        threshold: how many values determine the polynomial, at least 1.
        prime: all arithmetic is modulo it.

    Raises:
        SecureSumError: holders are not distinct, zero is among them, or there are fewer than `threshold`.
    """
    if len({holder % prime for holder in holders} - {0}) != len(holders) or not 1 <= threshold <= len(holders):
        raise SecureSumError(f"{len(holders)} distinct holders cannot have a threshold of {threshold}")
    coefficients = [secret, *(secrets.randbelow(prime) for _ in range(threshold - 1))]
    return {holder: _value(coefficients, holder, prime) for holder in holders}


def join_numbers(points: Mapping[int, int], prime: int) -> int:
    """Computes the value at zero of the polynomial through `points` (Lagrange).

    Args:
        points: values by holder, at least as many as the threshold they were split with.
        prime: as they were split with.
    """
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


LEAST_SITES = 3
"""Of two sites, each learns the other's update from the sum."""
ALL_PAIRS_UP_TO = 100
"""Among all pairs a threshold of more than two thirds withstands a third of the sites; a ring that did would be nearly all pairs."""
COLLUDING_SHARE, DROPPED_SHARE = 0.2, 0.2
"""Shares of the sites for which the number of neighbours is chosen where there are more than `ALL_PAIRS_UP_TO`."""
PRIVACY_BITS, LIVENESS_BITS = 40, 10
"""A sum falls apart into sums of fewer sites, or two secrets of a site are learnt, with probability 2^-40; it cannot be had, with 2^-10."""


def threshold(sites: int, fraction: float) -> int:
    """Computes how many sites must stay, at least three.

    Args:
        sites: how many there are.
        fraction: of the sites, rounded up.
    """
    return max(LEAST_SITES, math.ceil(round(fraction * sites, 9)))


def neighbourhoods(sites: Collection[str], cfg: SecureAggregationConfig, seed: bytes) -> dict[str, list[str]]:
    """Finds for each site the sites that hold shares of its secrets, sorted: its neighbours and itself.

    Symmetric. Pure in (set of sites, settings, seed).

    Args:
        sites: names of all sites in the sum.
        cfg: `neighbours` sets their number; None takes `neighbours_needed`.
        seed: orders the ring; should hold what no single party chose.
    """
    wanted = cfg.neighbours if cfg.neighbours is not None else neighbours_needed(len(sites), cfg.threshold)
    if wanted >= len(sites) - 1:
        return {site: sorted(sites) for site in sites}
    ring = sorted(sites, key=lambda site: hashlib.sha256(seed + site.encode()).digest())
    reach = range(-(wanted // 2), wanted // 2 + 1)
    return {site: sorted(ring[(place + step) % len(ring)] for step in reach) for place, site in enumerate(ring)}


@lru_cache(maxsize=64)
def neighbours_needed(sites: int, fraction: float) -> int:
    """Computes the smallest even number of neighbours that keeps to `PRIVACY_BITS` and `LIVENESS_BITS`; all others where none does.

    With `out` sites colluding or dropped, the others fall apart only where two runs of k/2 sites of the ring are all out. A coordinator
    that tells some holders of a site that it survived and the others that it dropped out gets one share of each of these, of its seed or
    of its mask key, and both of each colluding one: it has enough of both where `open_to_two` of the k + 1 holders collude.

    Args:
        sites: how many there are.
        fraction: of a neighbourhood that must stay, see `threshold`.
    """
    if sites <= ALL_PAIRS_UP_TO:
        return sites - 1
    colluding, dropped = math.ceil(COLLUDING_SHARE * sites), math.ceil(DROPPED_SHARE * sites)
    out = min(colluding + dropped, sites)
    for k in range(4, sites - 1, 2):
        stay = threshold(k + 1, fraction)
        open_to_two = 2 * stay - (k + 1)
        parted = math.comb(sites, 2) * math.comb(out, k) / math.comb(sites, k)
        learnt = sites * at_least(open_to_two, colluding, sites - 1, k)
        stuck = sites * at_least(k + 2 - stay, dropped, sites - 1, k)
        if max(parted, learnt) <= 2.0**-PRIVACY_BITS and stuck <= 2.0**-LIVENESS_BITS:
            return k
    return sites - 1


def at_least(count: int, marked: int, of: int, drawn: int) -> float:
    """Computes the probability of drawing `count` marked things or more (hypergeometric).

    Args:
        count: of marked things among those drawn.
        marked: how many of all are marked.
        of: how many there are in all.
        drawn: how many are drawn, without replacement.
    """
    ways = sum(math.comb(marked, m) * math.comb(of - marked, drawn - m) for m in range(count, min(marked, drawn) + 1))
    return ways / math.comb(of, drawn)
