"""Who may see the page, and who may stop a run.

A visitor shows a token, of which this side knows only the SHA-256: the coordinator's (`keys/page-token.sha256`), which may do
everything, or an auditor's (`coordinator.yaml`), which may read. A browser changes it for a cookie; each change that is asked for with
the cookie also needs the session's CSRF token in a header, which no other site's page can read or send.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pneumofed.common.errors import ConfigError
from pneumofed.common.files import write_file
from pneumofed.common.ops.web import Sessions
from pneumofed.server.operations.settings import CoordinatorFolder

SESSION_SEC = 12 * 3600.0
MAX_SESSIONS = 500
Role = Literal["coordinator", "auditor"]


@dataclass(frozen=True)
class Visitor:
    """Somebody who showed a token."""

    name: str
    role: Role
    csrf: str | None = None
    """Of a browser's session; None for a program that sends its token with each request, which no browser does by itself."""


class Access:
    """Tokens and sessions. `known` gives the visitors by the SHA-256 of their tokens, anew at each request, so that a token that is
    taken away ends its sessions too."""

    def __init__(self, known: Callable[[], Mapping[str, Visitor]]) -> None:
        self._known = known
        self._sessions = Sessions(SESSION_SEC, most=MAX_SESSIONS)

    def by_token(self, token: str) -> Visitor | None:
        """Finds the visitor who owns the token; None where nobody does."""
        return self._find(digest_of(token))

    def by_session(self, identifier: str) -> Visitor | None:
        """Finds the visitor of an open session, with its CSRF token; None where there is none or its token is void by now."""
        session = self._sessions.find(identifier)
        visitor = self._find(session.owner) if session else None
        return Visitor(visitor.name, visitor.role, session.csrf) if session and visitor else None

    def open_session(self, token: str) -> str | None:
        """Opens a session of the token's owner and returns its identifier; None where nobody owns it."""
        digest = digest_of(token)
        return None if self._find(digest) is None else self._sessions.open(digest)

    def close_session(self, identifier: str) -> None:
        """Ends the session; an unknown one is ignored."""
        self._sessions.close(identifier)

    def _find(self, digest: str) -> Visitor | None:
        """Compares with all, in a time that reveals nothing."""
        found = None
        for known, visitor in self._known().items():
            if hmac.compare_digest(known, digest):
                found = visitor
        return found


def digest_of(token: str) -> str:
    """Computes the SHA-256 of a token, in hex."""
    return hashlib.sha256(token.encode("utf-8", errors="replace")).hexdigest()


def token_file(folder: CoordinatorFolder) -> Path:
    """Finds where the SHA-256 of the coordinator's token lies."""
    return folder.path / "keys" / "page-token.sha256"


def make_token(folder: CoordinatorFolder) -> str:
    """Makes a new token of the coordinator, which is shown only here; the old one is void from now on."""
    token = secrets.token_urlsafe(32)
    path = token_file(folder)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    write_file(path, digest_of(token).encode())
    return token


def read_visitors(folder: CoordinatorFolder) -> dict[str, Visitor]:
    """Reads the coordinator and the auditors by the SHA-256 of their tokens; nobody where the settings cannot be read."""
    try:
        auditors = folder.settings().auditors
    except ConfigError:
        auditors = []
    visitors = {auditor.token_sha256: Visitor(auditor.name, "auditor") for auditor in auditors}
    try:
        own = token_file(folder).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return visitors
    return {**visitors, own: Visitor("coordinator", "coordinator")} if re.fullmatch(r"[0-9a-f]{64}", own) else visitors
