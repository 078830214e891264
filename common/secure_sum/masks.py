"""Vectors of integers and the masks that hide them.

A vector is one run of bytes in two parts: a long `body` of 32- or 64-bit integers and a short `tail` of 64-bit ones, for numbers that
need more room. All arithmetic is modulo 2^32 or 2^64, in which a uniform mask hides a number perfectly (Bonawitz et al. 2017, section 3).
The mask is the keystream of ChaCha20 (RFC 8439) under a key that is used once: as many bytes as the vector has, body first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

CHUNK_BYTES = 1 << 20
"""Mask bytes in memory at once: they stay in the processor's cache, and 45 MB are never held a second time."""
_ZEROS = bytes(CHUNK_BYTES)
_NONCE = bytes(16)  # counter and nonce: zero, since no key is used twice

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
        """Adds the mask of `key` (32 bytes) in place, or takes it away; one undoes the other."""
        stream = Cipher(ChaCha20(key, _NONCE), mode=None).encryptor()
        change = np.subtract if subtract else np.add
        buffer = bytearray(CHUNK_BYTES)
        for words in (self.body, self.tail):
            for chunk in _chunks(words):
                stream.update_into(memoryview(_ZEROS)[: chunk.nbytes], buffer)
                change(chunk, np.frombuffer(buffer, dtype=words.dtype, count=len(chunk)), out=chunk)


def _chunks(words: Words) -> Iterator[Words]:
    step = CHUNK_BYTES // words.itemsize
    return (words[start : start + step] for start in range(0, len(words), step))
