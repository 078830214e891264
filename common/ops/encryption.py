"""Encryption of a stream under a passphrase, such that a change, a cut and a wrong passphrase are noticed.

    MAGIC, a line of JSON (salt, nonce prefix, cost), then chunks of `CHUNK` bytes, each with its tag

scrypt (RFC 7914) makes the key of the passphrase; each chunk is sealed by AES-256-GCM (NIST SP 800-38D) under the nonce
prefix || number || is-last, the STREAM construction of Hoang, Reyhanitabar, Rogaway and Vizar (2015, "Online authenticated-encryption and
its nonce-reuse misuse-resistance"). So a chunk that is changed, moved, repeated or missing is refused, and so is a stream that was cut.
Each chunk is checked before a byte of it is given out.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from pneumofed.common.errors import ConfigError

MAGIC, FORMAT = b"PNEUMOFED-BACKUP\n", 1
MIN_PASSPHRASE = 12
"""Characters; a generated one of six words has more."""
SCRYPT = {"n": 1 << 17, "r": 8, "p": 1}
"""Cost: 128 MiB and about half a second; the first of OWASP's recommended settings (Password Storage Cheat Sheet, scrypt)."""
CHUNK = 1 << 20
_TAG, _HEADER_LINE = 16, 4096


def check_passphrase(passphrase: str) -> str:
    """Returns `passphrase` if it is long enough.

    Raises:
        ConfigError: it is shorter than `MIN_PASSPHRASE`.
    """
    if len(passphrase) < MIN_PASSPHRASE:
        raise ConfigError(f"the passphrase has {len(passphrase)} characters; take {MIN_PASSPHRASE} or more, best of a generator")
    return passphrase


def _cipher(passphrase: str, salt: bytes) -> AESGCM:
    return AESGCM(Scrypt(salt, 32, **SCRYPT).derive(passphrase.encode()))


def _nonce(prefix: bytes, number: int, last: bool) -> bytes:
    return prefix + number.to_bytes(4, "big") + bytes([last])


@contextmanager
def sealed(file: BinaryIO, passphrase: str | None) -> Iterator[BinaryIO]:
    """Yields a file to write to, whose bytes are encrypted into `file`; the stream is whole when the block ends well.

    Args:
        file: takes the encrypted bytes.
        passphrase: None writes the bytes as they are.

    Raises:
        ConfigError: the passphrase is too short.
    """
    if passphrase is None:
        yield file
        return
    writer = _Sealing(file, check_passphrase(passphrase))
    yield cast(BinaryIO, writer)
    writer.finish()


class _Sealing:
    """Seals what is written, chunk by chunk."""

    def __init__(self, file: BinaryIO, passphrase: str) -> None:
        salt, self._prefix = secrets.token_bytes(16), secrets.token_bytes(7)
        head = json.dumps({"format": FORMAT, "salt": salt.hex(), "nonce": self._prefix.hex(), "scrypt": SCRYPT}).encode()
        self._file, self._head, self._cipher = file, MAGIC + head + b"\n", _cipher(passphrase, salt)
        self._waiting, self._number = bytearray(), 0
        file.write(self._head)

    def write(self, content: bytes) -> int:
        self._waiting += content
        while len(self._waiting) > CHUNK:
            self._seal(bytes(self._waiting[:CHUNK]), last=False)
            del self._waiting[:CHUNK]
        return len(content)

    def finish(self) -> None:
        self._seal(bytes(self._waiting), last=True)

    def _seal(self, chunk: bytes, last: bool) -> None:
        self._file.write(self._cipher.encrypt(_nonce(self._prefix, self._number, last), chunk, self._head))
        self._number += 1


class Unsealed:
    """Reads an encrypted stream, of which `MAGIC` was read already."""

    def __init__(self, file: BinaryIO, passphrase: str, damaged: ConfigError) -> None:
        """Begins to read.

        Args:
            file: stands behind `MAGIC`.
            passphrase: with which it was written.
            damaged: raised where the stream was changed or cut.

        Raises:
            ConfigError: `damaged`, or the passphrase is wrong.
            ValueError, LookupError, TypeError: the header is none.
        """
        line = file.readline(_HEADER_LINE)
        head = json.loads(line)
        if not isinstance(head, dict) or head.get("format") != FORMAT or head.get("scrypt") != SCRYPT:
            raise damaged
        self._head, self._prefix = MAGIC + line, bytes.fromhex(head["nonce"])
        self._cipher = _cipher(passphrase, bytes.fromhex(head["salt"]))
        self._file, self._damaged = file, damaged
        self._next, self._open, self._number, self._ended = file.read(CHUNK + _TAG), bytearray(), 0, False

    def read(self, size: int = -1) -> bytes:
        """Reads `size` bytes, fewer at the end; all where it is negative."""
        while not self._ended and (size < 0 or len(self._open) < size):
            self._chunk()
        given = bytes(self._open[:size] if size >= 0 else self._open)
        del self._open[: len(given)]
        return given

    def finish(self) -> None:
        """Reads to the end: what stands after the archive is checked too."""
        while not self._ended:
            self._chunk()

    def _chunk(self) -> None:
        chunk, self._next = self._next, self._file.read(CHUNK + _TAG)
        last = not self._next
        try:
            self._open += self._cipher.decrypt(_nonce(self._prefix, self._number, last), chunk, self._head)
        except InvalidTag:
            wrong = ConfigError("the passphrase is wrong, or the backup was altered; nothing is restored")
            raise (wrong if self._number == 0 and not self._is_cut(chunk) else self._damaged) from None
        self._number, self._ended = self._number + 1, last

    def _is_cut(self, chunk: bytes) -> bool:
        """Whether the one chunk that there is was not the last when it was written."""
        try:
            self._cipher.decrypt(_nonce(self._prefix, self._number, False), chunk, self._head)
        except InvalidTag:
            return False
        return True
