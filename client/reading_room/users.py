"""Who may use the room: readers with passwords, programs with tokens."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime

from sqlalchemy import Engine, delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import sessionmaker

from client.reading_room.passwords import hash_password, is_password, weakness
from client.reading_room.schema import Role
from client.reading_room.tables import ApiToken, User
from common.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Users:
    """Users and tokens in the room's database."""

    def __init__(self, engine: Engine) -> None:
        self._session = sessionmaker(engine, expire_on_commit=False).begin

    def add(self, name: str, role: Role, password: str) -> None:
        """Adds a user.

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
        """The user whose name and password these are."""
        user = self.find(name)
        if not is_password(password, user.password if user else None) or user is None:
            return None
        with self._session() as session:
            found = session.get(User, name)
            if found is not None:
                found.last_login = datetime.now(UTC)
            return found

    def add_token(self, name: str) -> str:
        """A new token for a program, told here alone.

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
        """Name of the program whose token this is. It is looked for by its hash, so the time tells nothing of others."""
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
    if not NAME.fullmatch(name):
        raise ConfigError("a name has letters, digits, '.', '_' and '-', the first a letter or digit, 64 at most")
