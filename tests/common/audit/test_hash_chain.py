"""The chain finds what was changed, removed or moved, and reads what earlier versions wrote."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from pneumofed.common.audit.log import CHAIN_START, chain_hash, first_broken, read_entries

WRITTEN_BEFORE = (
    b'{"actor":"north","event":"started","facts":{"round":1},"hash":"HASH","previous":"' + b"0" * 64 + b'","sequence":1,'
    b'"time":"2026-11-28T12:00:00.000000Z"}\n'
)
"""A line as version 0.2.0 wrote it; its hash is that of the line without `hash`."""


def chain(bodies: list[bytes]) -> list[tuple[bytes, str]]:
    """The obviously right way: SHA-256 over the hash before, then the body."""
    links, before = [], "0" * 64
    for body in bodies:
        before = hashlib.sha256(before.encode() + body).hexdigest()
        links.append((body, before))
    return links


@given(st.lists(st.binary(), max_size=8))
def test_a_chain_as_it_was_written_is_whole(bodies: list[bytes]) -> None:
    assert first_broken(chain(bodies)) is None


@given(st.lists(st.binary(min_size=1), min_size=2, max_size=8, unique=True), st.data())
def test_what_was_changed_removed_or_moved_shows_at_its_place(bodies: list[bytes], data: st.DataObject) -> None:
    links = chain(bodies)
    place = data.draw(st.integers(0, len(links) - 2))
    assert first_broken([*links[:place], (b"another" + links[place][0], links[place][1]), *links[place + 1 :]]) == place
    assert first_broken([*links[:place], *links[place + 1 :]]) == place
    assert first_broken([*links[:place], links[place + 1], links[place], *links[place + 2 :]]) == place


def test_a_line_of_the_former_version_is_read(tmp_path: Path) -> None:
    body = WRITTEN_BEFORE.replace(b'"hash":"HASH",', b"").rstrip(b"\n")
    line = WRITTEN_BEFORE.replace(b"HASH", hashlib.sha256(body).hexdigest().encode())
    (tmp_path / "audit.jsonl").write_bytes(line)
    (entry,) = read_entries(tmp_path / "audit.jsonl")
    assert (entry.actor, entry.previous, entry.hash) == ("north", CHAIN_START, chain_hash(body))
