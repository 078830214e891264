"""Headers on every answer of a page, and how a change that a foreign page asks for is told."""

from __future__ import annotations

from collections.abc import Mapping

CSRF_HEADER = "x-csrf-token"
"""Carries the session's CSRF token, which no other site's page can read or send."""


def security_headers(policy: Mapping[str, str] | None = None) -> dict[str, str]:
    """Headers under which a page loads from its own server alone, runs no inline script, is shown in no frame and kept in no cache.

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
    """Whether a browser says that another page asks (Fetch Metadata, Sec-Fetch-Site). Programs say nothing and are let through."""
    return headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none")
