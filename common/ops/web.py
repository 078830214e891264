"""A page's server, sessions of browsers, and the checks and headers of their requests.

`serve_app` runs a page's server until a signal ends it. `Sessions` lives in memory: sessions end with the server, after their time, and
when their owner is signed out. `security_headers` go with every answer of a page; `is_foreign` recognises a change that another site's
page asks for.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

CSRF_HEADER = "x-csrf-token"
"""Carries the session's CSRF token, which no other site's page can read or send."""


def serve_app(app: Any, host: str, port: int, **settings: Any) -> None:
    """Serves until a signal comes. Neither addresses that are asked for nor the server's name are told to anybody.

    `uvicorn.run` takes a signal that comes while the server starts for a start that failed, with an exit code of its own.

    Args:
        app: of ASGI.
        host: address to listen on.
        port: to listen on.
        **settings: others of `uvicorn.Config`.

    Raises:
        KeyboardInterrupt: a signal came before the server was ready.
        SystemExit: it could not be started; its log has said why.
    """
    import uvicorn  # a page's checks are asked for by commands that serve none

    config = uvicorn.Config(app, host=host, port=port, log_level="warning", access_log=False, server_header=False, **settings)
    server = uvicorn.Server(config)
    try:
        server.run()
    except KeyboardInterrupt:
        if not server.started:
            raise
    else:
        if not server.started:
            raise SystemExit(1)


@dataclass(frozen=True)
class WebSession:
    """One session of a browser.

    Attributes:
        owner: whatever its page knows a visitor by.
        csrf: token that has to come with every change.
        until: when it ends in any case, on the clock of `Sessions`.
        last: when it was used last, on the same clock.
    """

    owner: str
    csrf: str
    until: float
    last: float


class Sessions:
    """Sessions by their identifiers, which nobody can guess: 256 random bits.

    Args:
        longest_sec: after so long a session ends in any case.
        idle_sec: after so long without a request it ends.
        most: the oldest ends when there are more.
        now: a clock that never goes back.
    """

    def __init__(
        self, longest_sec: float, idle_sec: float | None = None, most: int = 500, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.longest_sec, self.idle_sec = longest_sec, longest_sec if idle_sec is None else idle_sec
        self._most, self._now = most, now
        self._sessions: dict[str, WebSession] = {}
        self._lock = threading.Lock()

    def open(self, owner: str) -> str:
        """Opens a session of `owner`; returns its identifier."""
        identifier, now = secrets.token_urlsafe(32), self._now()
        with self._lock:
            while len(self._sessions) >= self._most:
                self._sessions.pop(next(iter(self._sessions)))  # the oldest
            self._sessions[identifier] = WebSession(owner, secrets.token_urlsafe(32), now + self.longest_sec, now)
        return identifier

    def find(self, identifier: str) -> WebSession | None:
        """Looks up a session and marks it as used now; None where it ended or never was."""
        now = self._now()
        with self._lock:
            session = self._sessions.get(identifier)
            if session is None:
                return None
            if session.until < now or session.last + self.idle_sec < now:
                del self._sessions[identifier]
                return None
            self._sessions[identifier] = replace(session, last=now)
            return session

    def close(self, identifier: str) -> None:
        """Ends the session, if it is one."""
        with self._lock:
            self._sessions.pop(identifier, None)

    def close_all(self, owner: str, but: str = "") -> None:
        """Ends the sessions of a visitor.

        Args:
            owner: whose.
            but: identifier of the session that stays, e.g. the one that changes its password; empty for none.
        """
        with self._lock:
            for identifier in [key for key, session in self._sessions.items() if session.owner == owner and key != but]:
                del self._sessions[identifier]


def security_headers(policy: Mapping[str, str] | None = None) -> dict[str, str]:
    """Builds headers under which a page loads only from its own server, runs no inline script, is shown in no frame and kept in no cache.

    Args:
        policy: further directives of the content security policy, e.g. {"img-src": "'self' blob:"}.
    """
    directives = {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self'",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        **(policy or {}),
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in directives.items()),
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-store",
    }


def is_foreign(headers: Mapping[str, str]) -> bool:
    """Checks whether a browser says that another site's page asks (Fetch Metadata, Sec-Fetch-Site). Programs say nothing and pass."""
    return headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none")
