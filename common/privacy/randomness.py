"""Uniform and normal numbers from a ChaCha20 keystream.

Torch's and numpy's generators will not do for noise: torch's takes 32 bits of a seed on the CPU, few enough to try them all and
subtract the noise, and the Mersenne Twister's state can be had from its output. A stream cipher cannot be told from random without
its 256-bit key, and on a CPU is no slower.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

KEY_BYTES = 32
_AT_ONCE = 1 << 18
"""Pairs of normals made at a time: 4 MB of keystream, which a core's cache holds."""


class RandomStream:
    """Numbers that are pure in the key and in the calls so far; without the key they cannot be told from random ones."""

    def __init__(self, key: bytes) -> None:
        """Takes a key of `KEY_BYTES` bytes that no other stream has.

        Raises:
            ValueError: it has another length.
        """
        self._key, self._calls = key, 0
        self._bytes(0)

    def uniform(self, count: int) -> np.ndarray:
        """float64 [count]: multiples of 2^-53, uniform in [0, 1)."""
        whole = np.frombuffer(self._bytes(8 * count), dtype="<u8") >> np.uint64(11)
        return whole * 2.0**-53

    def normal(self, count: int) -> torch.Tensor:
        """float64 [count] of mean 0 and deviation 1, by Box and Muller 1958.

        In double precision: the largest value is 8.6, beyond which lies 1e-17 of the normal distribution; single precision would cut
        it at 6.7 (2e-11), which over millions of weights is no longer small against delta.
        """
        return torch.cat(list(self._normal_pieces(count)))[:count] if count else torch.empty(0, dtype=torch.float64)

    def _normal_pieces(self, count: int) -> Iterator[torch.Tensor]:
        pairs = (count + 1) // 2
        for start in range(0, pairs, _AT_ONCE):
            uniform = torch.from_numpy(self.uniform(2 * min(_AT_ONCE, pairs - start))).view(2, -1)
            radius = torch.log1p(-uniform[0]).mul_(-2.0).sqrt_()
            angle = uniform[1].mul_(2.0 * math.pi)
            yield radius * angle.cos()
            yield radius.mul_(angle.sin())

    def _bytes(self, count: int) -> bytes:
        """A keystream of its own for each call: the nonce counts calls, so that no block counter can overflow (RFC 8439, 2.3)."""
        nonce = bytes(4) + self._calls.to_bytes(12, "little")
        self._calls += 1
        return Cipher(ChaCha20(self._key, nonce), mode=None).encryptor().update(bytes(count))
