"""Records chained by SHA-256: each record's hash covers the one before, so that a change, a removal or a reordering shows.

A cut at the end shows only against a head (the hash of the last record) that was known before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

CHAIN_START = "0" * 64
"""What stands for the hash before the first record."""


def canonical(values: Any) -> bytes:
    """Writes `values` as JSON in one form only: sorted keys, no spaces, ASCII; NaN and infinity are refused."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def chain_hash(body: bytes, before: str = "") -> str:
    """Computes the SHA-256, in hexadecimal, of a record that follows the one of hash `before`.

    Args:
        body: the record's only bytes.
        before: the hash of the record before, where `body` does not name it itself.
    """
    return hashlib.sha256(before.encode() + body).hexdigest()


def first_broken(links: Iterable[tuple[bytes, str]]) -> int | None:
    """Finds the first of `links` (body, hash) whose hash is not that of its body after the hash before.

    Returns:
        Its position, from 0; None if all hashes are right.
    """
    before = CHAIN_START
    for position, (body, found) in enumerate(links):
        if found != chain_hash(body, before):
            return position
        before = found
    return None
