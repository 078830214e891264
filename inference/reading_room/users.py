"""Who may use the room: readers with passwords, programs with tokens.

`Users` keeps them in the room's database, passwords as scrypt hashes (RFC 7914) and tokens as SHA-256. `weakness` refuses weak passwords,
and `BackOff` makes a name wait after wrong ones.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Engine, delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import sessionmaker

from pneumofed.common.errors import ConfigError
from pneumofed.inference.reading_room.cases import ApiToken, User
from pneumofed.inference.reading_room.schema import Role

VALID_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

SCRYPT_LOG2_N, SCRYPT_BLOCK, SCRYPT_PARALLEL = 15, 8, 3
"""N = 2^15, r = 8, p = 3: one of OWASP's settings (Password Storage Cheat Sheet, scrypt); 32 MiB and about 0.2 s on one core."""
MIN_PASSWORD_LENGTH = 10
LONGEST_LOCK_SEC = 300.0
FREE_TRIES = 5
MAX_BACKED_OFF_NAMES = 10_000


class Users:
    """Users and tokens in the room's database."""

    def __init__(self, engine: Engine) -> None:
        self._session = sessionmaker(engine, expire_on_commit=False).begin

    def add(self, name: str, role: Role, password: str) -> None:
        """Adds a user.

        Args:
            name: letters, digits, `.`, `_` and `-`, 64 at most.
            role: what the user may do.
            password: kept only as its scrypt hash.

        Raises:
            ConfigError: the name is none or taken, or the password too weak.
        """
        _check_name(name)
        user = User(name=name, role=role, password=_hash(password, name), added=datetime.now(UTC))
        try:
            with self._session() as session:
                session.add(user)
        except IntegrityError:
            raise ConfigError(f"user {name} exists; change the password with `pneumofed reading-room user password`") from None

    def set_password(self, name: str, password: str) -> None:
        """Gives a user another password.

        Args:
            name: of the user.
            password: the new one, kept only as its scrypt hash.

        Raises:
            ConfigError: there is no such user, or the password is too weak.
        """
        hashed = _hash(password, name)
        with self._session() as session:
            user = session.get(User, name)
            if user is None:
                raise ConfigError(f"no user {name}; `pneumofed reading-room user list` shows them")
            user.password = hashed

    def remove(self, name: str) -> bool:
        """Takes a user away, whose sessions end with it; what was found under the name stays. False if there was none."""
        with self._session() as session:
            user = session.get(User, name)
            if user is not None:
                session.delete(user)
            return user is not None

    def find(self, name: str) -> User | None:
        with self._session() as session:
            return session.get(User, name)

    def all(self) -> Sequence[User]:
        with self._session() as session:
            return session.scalars(select(User).order_by(User.name)).all()

    def sign_in(self, name: str, password: str) -> User | None:
        """Checks a name and a password; takes as long for a name that does not exist.

        Args:
            name: of the user.
            password: as it was typed.

        Returns:
            The user, with the time of this login; None where one of the two is wrong.
        """
        user = self.find(name)
        if not is_password(password, user.password if user else None) or user is None:
            return None
        with self._session() as session:
            found = session.get(User, name)
            if found is not None:
                found.last_login = datetime.now(UTC)
            return found

    def add_token(self, name: str) -> str:
        """Makes a new token for a program; it is shown only here.

        Raises:
            ConfigError: the name is none or taken.
        """
        _check_name(name)
        token = secrets.token_urlsafe(32)
        try:
            with self._session() as session:
                session.add(ApiToken(name=name, sha256=_digest(token), added=datetime.now(UTC)))
        except IntegrityError:
            raise ConfigError(f"token {name} exists; remove it first") from None
        return token

    def remove_token(self, name: str) -> bool:
        """Makes a token void. False if there was none of the name."""
        with self._session() as session:
            return bool(session.scalars(delete(ApiToken).where(ApiToken.name == name).returning(ApiToken.name)).all())

    def tokens(self) -> Sequence[ApiToken]:
        with self._session() as session:
            return session.scalars(select(ApiToken).order_by(ApiToken.name)).all()

    def owner_of(self, token: str) -> str | None:
        """Finds the name of the program whose token this is, by its hash, so the time that it takes shows nothing of other tokens."""
        with self._session() as session:
            return session.scalar(select(ApiToken.name).where(ApiToken.sha256 == _digest(token)))


def _hash(password: str, user: str) -> str:
    problem = weakness(password, user)
    if problem:
        raise ConfigError(problem)
    return hash_password(password)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", errors="replace")).hexdigest()


def _check_name(name: str) -> None:
    if not VALID_NAME.fullmatch(name):
        raise ConfigError("a name has letters, digits, '.', '_' and '-', the first a letter or digit, 64 at most")


def hash_password(password: str) -> str:
    """Hashes a password with a salt of its own, as `scrypt$15$8$3$SALT$HASH`."""
    salt = secrets.token_bytes(16)
    return _as_text(salt, _scrypt(password, salt, SCRYPT_LOG2_N, SCRYPT_BLOCK, SCRYPT_PARALLEL))


def is_password(password: str, known: str | None) -> bool:
    """Checks whether `known` is a hash of `password`. Takes as long where nothing is known, so that names cannot be found out.

    Args:
        password: as it was typed.
        known: of `hash_password`; None for a name that does not exist.
    """
    _, log2_n, block, parallel, salt, digest = (known or _as_text(bytes(16), bytes(32))).split("$")  # the second fits no password
    found = _scrypt(password, base64.b64decode(salt), int(log2_n), int(block), int(parallel))
    return hmac.compare_digest(found, base64.b64decode(digest)) and known is not None


def weakness(password: str, user: str) -> str | None:
    """Explains why the password is refused; None where it will do (NIST SP 800-63B-4, 3.1.1: length counts, not its signs).

    Args:
        password: the new one.
        user: name; a password that holds it needs `MIN_PASSWORD_LENGTH` characters beside it.
    """
    if len(password) < MIN_PASSWORD_LENGTH:
        return f"a password has at least {MIN_PASSWORD_LENGTH} characters"
    if len(set(password)) < 4 or (user.casefold() in password.casefold() and len(password) < len(user) + MIN_PASSWORD_LENGTH):
        return "the password is too easy to guess"
    return None


def _as_text(salt: bytes, digest: bytes) -> str:
    return f"scrypt${SCRYPT_LOG2_N}${SCRYPT_BLOCK}${SCRYPT_PARALLEL}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"


def _scrypt(password: str, salt: bytes, log2_n: int, block: int, parallel: int) -> bytes:
    n = 2**log2_n
    return hashlib.scrypt(
        password.encode("utf-8", errors="surrogatepass"), salt=salt, n=n, r=block, p=parallel, dklen=32, maxmem=256 * n * block
    )


@dataclass(frozen=True)
class _Tries:
    wrong: int
    until: float


class BackOff:
    """Makes a name wait after wrong passwords: five are free, then 1 s, 2 s, 4 s, ... up to five minutes, known name or not.

    By name and not by address: behind a proxy all readers have one address.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._records: dict[str, _Tries] = {}
        self._lock = threading.Lock()

    def wait_sec(self, name: str) -> float:
        """Returns how many seconds the name still has to wait; 0 if it may try."""
        with self._lock:
            record = self._records.get(name)
            return max(0.0, record.until - self._now()) if record else 0.0

    def wrong(self, name: str) -> None:
        """Counts a wrong password, before it is known to be wrong: tries at the same time count one by one."""
        with self._lock:
            record = self._records.pop(name, _Tries(0, 0.0))
            wrong = record.wrong + 1
            delay = min(2.0 ** (wrong - FREE_TRIES), LONGEST_LOCK_SEC) if wrong >= FREE_TRIES else 0.0
            while len(self._records) >= MAX_BACKED_OFF_NAMES:
                self._records.pop(next(iter(self._records)))  # who tried longest ago
            self._records[name] = _Tries(min(wrong, 1000), self._now() + delay)

    def right(self, name: str) -> None:
        """Forgets the wrong passwords before a right one."""
        with self._lock:
            self._records.pop(name, None)
