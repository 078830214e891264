"""The policy: can be read, approves code, and leaves something that may run."""

from __future__ import annotations

from collections.abc import Iterator

from client.checks.finding import Finding
from client.folder import SiteFolder
from common.errors import ConfigError
from common.party_config import SitePolicy


def check(folder: SiteFolder) -> Iterator[Finding]:
    try:
        path, policy = folder.policy_file, folder.policy
    except ConfigError as error:
        yield Finding("policy", "policy", "problem", str(error), "mend policy.yaml; until then everything is refused")
        return
    if path.stat().st_mode & 0o022:
        yield Finding("policy", "policy", "problem", f"others can change {path.name}", f"chmod 600 {path}")
    yield check_code(folder, policy)
    yield check_privacy(policy)
    yield from check_limits(policy)


def check_code(folder: SiteFolder, policy: SitePolicy) -> Finding:
    from client.approval import INSTALLED, installed_hash

    if not policy.approved_apps:
        return Finding("policy", "code", "problem", "no app is approved", "pneumofed site approve --installed")
    installed = f", installed is {installed_hash(folder.work)[:12]}…" if INSTALLED in policy.approved_apps else ""
    return Finding("policy", "code", "ok", f"{len(policy.approved_apps)} approved{installed}")


def check_privacy(policy: SitePolicy) -> Finding:
    limits = [limit for limit in (policy.max_epsilon, policy.max_epsilon_per_study) if limit is not None]
    if not limits:
        return Finding("policy", "privacy", "ok", "no limit is set")
    remedy = "keep the site out of runs that are not differentially private, or set the limits to null"
    sentence = f"epsilon {min(limits):g} is the limit: every run that is not differentially private is refused"
    return Finding("policy", "privacy", "warning", sentence, remedy)


def check_limits(policy: SitePolicy) -> Iterator[Finding]:
    """Limits that let nothing run."""
    for name, nothing in (
        ("strategies", policy.strategies == []),
        ("models", policy.models == []),
        ("max_rounds_per_day", policy.max_rounds_per_day == 0),
        ("quiet_hours", any(len(set(hours.split("-"))) == 1 for hours in policy.quiet_hours)),
    ):
        if nothing:
            yield Finding(
                "policy", name, "problem", "as it is set, no round is ever trained here", f"change {name} in policy.yaml"
            )
