"""Noise and sampling that nobody without the key can predict: a keystream's numbers, and the key of each round.

`RandomStream` draws uniform and normal numbers from a ChaCha20 keystream. Torch's and numpy's generators will not do for noise: torch's
takes 32 bits of a seed on the CPU, few enough to try them all and subtract the noise, and the Mersenne Twister's state can be had from its
output. A stream cipher cannot be distinguished from random without its 256-bit key, and on a CPU is no slower.

`round_key` derives the key of a round: secret from everybody else, and repeatable where the noise is added. A site, and a coordinator that
adds noise, has a secret of 32 random bytes in its own folder (`own_secret`). At a site a round's key is HMAC-SHA256 of everything that the
update depends on: the run, the round, the experiment, the weights that came, the site's training data as decoded and the number type;
the noise of a step also depends on the very sum that it hides (`tensors_tag`). So the same question gets the same answer bit for bit,
which reveals nothing new, and any other question gets independent noise. Were the key pure in (run, round), a coordinator that asks a
round twice with other weights would subtract two answers and be rid of the noise; so would one that asks before and after a patient came.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.poly1305 import Poly1305

from pneumofed.common.data.dataset import Dataset
from pneumofed.common.errors import ConfigError
from pneumofed.common.files import drawn_once, write_file

if TYPE_CHECKING:
    import torch

KEY_BYTES = 32
_PAIRS_AT_ONCE = 1 << 18
"""Pairs of normals made at a time: 4 MB of keystream, which a core's cache holds."""
_IMAGES_AT_ONCE = 256
"""Images that are hashed at a time: 13 MB at 224 pixels."""


class RandomStream:
    """Numbers that are pure in the key and in the calls so far; without the key they cannot be distinguished from random ones."""

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
        import torch  # who only draws whole numbers, or writes a secret, must not wait for it

        return torch.cat(list(self._normal_pieces(count)))[:count] if count else torch.empty(0, dtype=torch.float64)

    def _normal_pieces(self, count: int) -> Iterator[torch.Tensor]:
        import torch

        pairs = (count + 1) // 2
        for start in range(0, pairs, _PAIRS_AT_ONCE):
            uniform = torch.from_numpy(self.uniform(2 * min(_PAIRS_AT_ONCE, pairs - start))).view(2, -1)
            radius = torch.log1p(-uniform[0]).mul_(-2.0).sqrt_()
            angle = uniform[1].mul_(2.0 * math.pi)
            yield radius * angle.cos()
            yield radius.mul_(angle.sin())

    def _bytes(self, count: int) -> bytes:
        """A keystream of its own for each call: the nonce counts calls, so that no block counter can overflow (RFC 8439, 2.3)."""
        nonce = bytes(4) + self._calls.to_bytes(12, "little")
        self._calls += 1
        return Cipher(ChaCha20(self._key, nonce), mode=None).encryptor().update(bytes(count))


NOISE_KEY_FILE = "noise.key"


def own_secret(work_dir: Path, file: str = NOISE_KEY_FILE) -> bytes:
    """This party's secret, made on first use with mode 0600. Back it up nowhere: noise under a new one is paid for anew.

    Args:
        work_dir: the party's own folder.
        file: name of the secret; each use has its own.

    Raises:
        ConfigError: the file has another length, or others may read it.
    """
    path = work_dir / file
    secret = drawn_once(path, lambda: secrets.token_bytes(KEY_BYTES))
    if len(secret) != KEY_BYTES or path.stat().st_mode & 0o077:
        raise ConfigError(f"{path}: expected {KEY_BYTES} bytes of mode 0600; remove it, and a new one is made when it is needed")
    return secret


def write_secret(path: Path, secret: bytes) -> None:
    """Writes a secret with mode 0600.

    Args:
        path: of the file, replaced if it is there.
        secret: `KEY_BYTES` random bytes.
    """
    write_file(path, secret)


def round_key(secret: bytes, parts: Iterable[str]) -> bytes:
    """Derives a round's key: HMAC-SHA256 of `parts`, separated by their lengths, under `secret`.

    Args:
        secret: the party's own, see `own_secret`.
        parts: everything that the answer depends on; any change of one gives an independent key.

    Returns:
        `KEY_BYTES` bytes for `RandomStream`.
    """
    return hmac.digest(secret, b"".join(f"{len(part.encode())}:{part}".encode() for part in parts), "sha256")


def tensors_tag(key: bytes, tensors: Iterable[torch.Tensor]) -> str:
    """Computes a tag of numbers, hexadecimal, which differs as soon as a bit of them does: Poly1305 (RFC 8439, section 2.5).

    Several times as fast as SHA-256. Two messages of 100 MB have the same tag with probability 2^-80 at most, for who does not know
    the key.

    Args:
        key: `KEY_BYTES` secret bytes.
        tensors: of any number type and device; their shapes are not in the tag.
    """
    import torch

    tag = Poly1305(key)
    for tensor in tensors:
        rows = tensor.detach().permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor.detach()  # no copy of channels-last weights
        tag.update(rows.contiguous().flatten().cpu().view(torch.uint8).numpy().data)
    return tag.finalize().hex()


def data_fingerprint(data: Dataset) -> str:
    """SHA-256 over what each image became, its label, its patient and the file that it came from, in order.

    Pixels are hashed and not only the files: another version of a decoder makes other pixels of the same file, whose update must not
    share its noise with the former's. A few hundred images are hashed at a time, so that they need not fit in memory.
    """
    digest = hashlib.sha256(
        repr((data.pixels.shape, data.pixels.dtype.str, data.labels.tolist(), data.patients, data.digests)).encode()
    )
    for start in range(0, len(data.pixels), _IMAGES_AT_ONCE):
        digest.update(np.ascontiguousarray(data.pixels[start : start + _IMAGES_AT_ONCE]).data)
    if data.clinical is not None:  # an update depends on them too
        digest.update(b"clinical" + np.ascontiguousarray(data.clinical).tobytes())
    return digest.hexdigest()
