"""The policy that a new site folder begins with: `SitePolicy` in its defaults, with a word on each rule for who edits it."""

from __future__ import annotations

from pneumofed.common.ops.render import render


def default_policy() -> str:
    """The text of a new `policy.yaml`."""
    return render(__package__, "policy.yaml")
