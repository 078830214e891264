"""The policy that a new site folder begins with: `SitePolicy` in its defaults, with a comment on each rule for whoever edits it."""

from __future__ import annotations

from pneumofed.common.ops.render import render


def default_policy() -> str:
    """Writes the text of a new `policy.yaml`."""
    return render(__package__, "policy.yaml")
