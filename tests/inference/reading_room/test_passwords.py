"""Passwords: hashed with a salt, the same work for every name, and weak ones refused."""

from __future__ import annotations

import hashlib

import pytest

from pneumofed.inference.reading_room import users
from pneumofed.inference.reading_room.users import MIN_PASSWORD_LENGTH, hash_password, is_password, weakness


def test_a_hash_knows_its_password_alone_and_never_repeats() -> None:
    first, second = hash_password("a long pass phrase"), hash_password("a long pass phrase")
    assert first != second
    assert is_password("a long pass phrase", first)
    assert not is_password("a long pass phrasE", first)
    assert not is_password("", first)


def test_an_unknown_name_costs_the_work_of_a_known_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real cost
    work: list[tuple[int, int, int]] = []
    real = hashlib.scrypt

    def count(password: bytes, *, n: int, r: int, p: int, **rest: object) -> bytes:
        work.append((n, r, p))
        return real(password, n=16, r=r, p=p, **{**rest, "maxmem": 2**25})  # type: ignore[arg-type]

    monkeypatch.setattr(hashlib, "scrypt", count)
    assert not is_password("x", None)
    hash_password("x")
    assert work == [(2**15, 8, 3)] * 2


def test_the_unknown_name_has_no_password_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    known = hash_password("known")
    monkeypatch.setattr(users, "_as_text", lambda salt, digest: known)
    assert is_password("known", known) and not is_password("known", None)


@pytest.mark.parametrize("password", ["", "x" * (MIN_PASSWORD_LENGTH - 1), "aaaaaaaaaaaaaaaa", "reader2026", "ababababab"])
def test_weak_passwords_are_refused(password: str) -> None:
    assert weakness(password, "reader")


@pytest.mark.parametrize("password", ["x1y2z3w4v5", "correct horse battery", "长长的一个密码短语真的", "reader reads many films"])
def test_long_ones_will_do(password: str) -> None:
    assert weakness(password, "reader") is None
