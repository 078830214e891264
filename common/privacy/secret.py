"""The key of a round's noise and sampling: secret from everybody else, and repeatable where the noise is added.

A site, and a coordinator that adds noise, has a secret of 32 random bytes in its own folder. At a site a round's key is HMAC-
SHA256 of everything that the update depends on: the run, the round, the experiment, the weights that came, the site's training
data and the number type. So the same question gets the same answer bit for bit, which tells nothing new, and any other question
gets independent noise. Were the key pure in (run, round), a coordinator that asks a round twice with other weights would subtract
two answers and be rid of the noise; so would one that asks before and after a patient came.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from pathlib import Path

from common.data.atomic import drawn_once, write_file
from common.data.dataset import Dataset
from common.errors import ConfigError
from common.privacy.randomness import KEY_BYTES

KEY_FILE = "noise.key"


def own_secret(work_dir: Path) -> bytes:
    """This party's secret, made on first use with mode 0600. Back it up nowhere: a new one costs repeatability alone.

    Raises:
        ConfigError: the file has another length, or others may read it.
    """
    path = work_dir / KEY_FILE
    secret = drawn_once(path, lambda: secrets.token_bytes(KEY_BYTES))
    if len(secret) != KEY_BYTES or path.stat().st_mode & 0o077:
        raise ConfigError(
            f"{path}: expected {KEY_BYTES} bytes of mode 0600; remove it, and the next private round makes a new one"
        )
    return secret


def write_secret(path: Path, secret: bytes) -> None:
    """Writes `secret` to `path`, mode 0600."""
    write_file(path, secret)


def round_key(secret: bytes, parts: Iterable[str]) -> bytes:
    """32 bytes: HMAC-SHA256 of `parts`, told apart by their lengths, under `secret`."""
    return hmac.digest(secret, b"".join(f"{len(part.encode())}:{part}".encode() for part in parts), "sha256")


def fingerprint(data: Dataset) -> str:
    """SHA-256 over content, label and patient of each image, in order, and over what the images became."""
    digest = hashlib.sha256(str((data.pixels.shape, data.labels.tolist(), data.patients, data.digests)).encode())
    return digest.hexdigest()
