"""Which sum a key, a mask or a signature belongs to: none of one sum is of any use in another."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Literal

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

Purpose = Literal["train", "evaluate"]
DOMAIN = b"pneumofed secure sum 1"
KEY_BYTES = 32


@dataclass(frozen=True)
class Session:
    """One secure sum of one round.

    Attributes:
        identifier: 32 hexadecimal digits, drawn anew for each: a repeated round is another sum.
        settings: hash of the experiment: sites that were told different ones, or one that is told another later, have no sum in common.
    """

    run: str
    round: int
    purpose: Purpose
    identifier: str
    settings: str

    @classmethod
    def begin(cls, run: str, round_number: int, purpose: Purpose, settings: str) -> Session:
        return cls(run, round_number, purpose, secrets.token_hex(16), settings)

    def bind(self, label: str, *parts: str | bytes) -> bytes:
        """Bytes that differ for any other session, label or parts: each piece is preceded by its length."""
        pieces = [DOMAIN, self.run, str(self.round), self.purpose, self.identifier, self.settings, label, *parts]
        encoded = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
        return b"".join(len(piece).to_bytes(8, "big") + piece for piece in encoded)

    def derive(self, secret: bytes, label: str, *parts: str | bytes) -> bytes:
        """A key of 32 bytes for this session, label and parts alone (HKDF-SHA256, RFC 5869)."""
        return HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=self.bind(label, *parts)).derive(secret)
