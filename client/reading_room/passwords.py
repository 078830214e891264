"""Passwords as scrypt hashes (RFC 7914), and the back-off after wrong ones."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

LOG2_N, BLOCK, PARALLEL = 15, 8, 3
"""N = 2^15, r = 8, p = 3: one of OWASP's settings (Password Storage Cheat Sheet, scrypt); 32 MiB and about 0.2 s on one core."""
SHORTEST = 10
LONGEST_LOCK_SEC = 300.0
FREE_TRIES = 5
MOST_NAMES = 10_000


def hash_password(password: str) -> str:
    """`scrypt$15$8$3$SALT$HASH` with a salt of its own."""
    salt = secrets.token_bytes(16)
    digest = _scrypt(password, salt, LOG2_N, BLOCK, PARALLEL)
    return f"scrypt${LOG2_N}${BLOCK}${PARALLEL}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"


def is_password(password: str, known: str | None) -> bool:
    """Whether `known` is a hash of `password`. Takes as long where nothing is known, so that names cannot be found out."""
    _, log2_n, block, parallel, salt, digest = (known or _NOBODY).split("$")
    found = _scrypt(password, base64.b64decode(salt), int(log2_n), int(block), int(parallel))
    return hmac.compare_digest(found, base64.b64decode(digest)) and known is not None


def weakness(password: str, user: str) -> str | None:
    """Why the password is refused, as a sentence; None where it will do (NIST SP 800-63B-4, 3.1.1: length counts, not its signs)."""
    if len(password) < SHORTEST:
        return f"a password has at least {SHORTEST} characters"
    if len(set(password)) < 4 or (user.casefold() in password.casefold() and len(password) < len(user) + SHORTEST):
        return "the password is too easy to guess"
    return None


def _scrypt(password: str, salt: bytes, log2_n: int, block: int, parallel: int) -> bytes:
    n = 2**log2_n
    return hashlib.scrypt(
        password.encode("utf-8", errors="surrogatepass"), salt=salt, n=n, r=block, p=parallel, dklen=32, maxmem=256 * n * block
    )


_NOBODY = f"scrypt${LOG2_N}${BLOCK}${PARALLEL}${base64.b64encode(bytes(16)).decode()}${base64.b64encode(bytes(32)).decode()}"


@dataclass(frozen=True)
class _Record:
    wrong: int
    until: float


class BackOff:
    """Makes a name wait after wrong passwords: five are free, then 1 s, 2 s, 4 s, ... up to five minutes, known name or not.

    By name and not by address: behind a proxy all readers have one address.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._records: dict[str, _Record] = {}
        self._lock = threading.Lock()

    def wait_sec(self, name: str) -> float:
        """How long the name has to wait still; 0 if it may try."""
        with self._lock:
            record = self._records.get(name)
            return max(0.0, record.until - self._now()) if record else 0.0

    def wrong(self, name: str) -> None:
        """Counts a wrong password, before it is known to be wrong: tries at the same time count one by one."""
        with self._lock:
            record = self._records.pop(name, _Record(0, 0.0))
            wrong = record.wrong + 1
            delay = min(2.0 ** (wrong - FREE_TRIES), LONGEST_LOCK_SEC) if wrong >= FREE_TRIES else 0.0
            while len(self._records) >= MOST_NAMES:
                self._records.pop(next(iter(self._records)))  # who tried longest ago
            self._records[name] = _Record(min(wrong, 1000), self._now() + delay)

    def right(self, name: str) -> None:
        """Forgets the wrong passwords before a right one."""
        with self._lock:
            self._records.pop(name, None)
