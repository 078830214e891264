"""Keyed pseudonyms of patients, examinations and images.

A pseudonym is HMAC-SHA256 (RFC 2104) of the identifier with a key of the hospital's own, which stays in `data/pseudonym.key`. The
same identifier gives the same pseudonym at each call, so that a patient's images stay together whatever way they came; without
the key nobody can try out which identifier a pseudonym belongs to, which a plain hash would allow.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from pneumofed.common.data.tables import plain_text
from pneumofed.common.errors import ConfigError
from pneumofed.common.files import drawn_once

KEY_FILE = "pseudonym.key"
_KEY_BYTES = 32


@dataclass(frozen=True)
class Pseudonyms:
    """Pseudonyms under one key. Blanks around an identifier do not count, since archives pad their texts, nor how Unicode spells it."""

    key: bytes = field(repr=False)

    def patient(self, patient_id: str) -> str:
        """Computes `P` and 24 hexadecimal digits for a Patient ID (0010,0020)."""
        return "P" + self._digest("patient", patient_id).hex()[:24]

    @staticmethod
    def is_pseudonym(text: str) -> bool:
        """Checks whether `text` has the form of a patient's pseudonym."""
        return re.fullmatch(r"P[0-9a-f]{24}", text) is not None

    def accession(self, number: str) -> str:
        """Computes `A` and 15 hexadecimal digits for an Accession Number (0008,0050), which has 16 characters (PS3.5, 6.2: SH)."""
        return "A" + self._digest("accession", number).hex()[:15]

    def uid(self, uid: str) -> str:
        """Computes a unique identifier below 2.25, made of a UUID (PS3.5, B.2) of version 8, which is free to fill (RFC 9562, 5.8)."""
        bits = int.from_bytes(self._digest("uid", uid)[:16], "big")
        bits = bits & ~(0xF << 76) & ~(0x3 << 62) | (0x8 << 76) | (0x2 << 62)
        return f"2.25.{uuid.UUID(int=bits).int}"

    def _digest(self, kind: str, text: str) -> bytes:
        """`kind` keeps a number that is both a patient's and an examination's from giving both the same pseudonym."""
        text = kind + "\0" + plain_text(text)
        return hmac.new(self.key, text.encode(errors="surrogateescape"), hashlib.sha256).digest()


def load_pseudonyms(folder: Path) -> Pseudonyms:
    """Loads the site's pseudonyms, with the key in `folder`, which is drawn at the first call.

    Raises:
        ConfigError: the key cannot be read or written, is damaged, or others may read it.
    """
    path = folder / KEY_FILE
    try:
        text = drawn_once(path, lambda: f"{secrets.token_hex(_KEY_BYTES)}\n".encode()).decode("ascii").strip()
        mode = path.stat().st_mode & 0o777
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read or written ({type(error).__name__}); check its owner and permissions") from None
    if mode & 0o077:
        raise ConfigError(f"{path} may be read by others (mode {mode:o}), who could then undo pseudonyms; run: chmod 600 {path}")
    return Pseudonyms(_read_key(path, text))


def _read_key(path: Path, text: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise ConfigError(
            f"{path} is damaged: expected {2 * _KEY_BYTES} hexadecimal digits. Restore it from a backup; with a new key the images "
            "that are there already would count as those of other patients"
        )
    return key
