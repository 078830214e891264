"""The policy: can be read, approves code, and leaves something that may run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from typing import get_args

from client.checks.finding import Finding
from client.folder import SiteFolder
from client.policy import only
from client.policy_decision import LIMITS, Arrival, Facts, Request, RoundsBegun, decide
from common.config import ExperimentConfig
from common.config_types import ModelName, StrategyName
from common.errors import ConfigError
from common.party_config import SitePolicy

MIDNIGHT = datetime(2000, 1, 1)
"""Any day's."""


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
    decision = decide(only(policy, *LIMITS), usual_request(), Arrival(MIDNIGHT))
    if decision.permit:
        return Finding("policy", "privacy", "ok", "no limit is set")
    limits = [limit for limit in (policy.max_epsilon, policy.max_epsilon_per_study) if limit is not None]
    remedy = "keep the site out of runs that are not differentially private, or set the limits to null"
    sentence = f"epsilon {min(limits):g} is the limit: every run that is not differentially private is refused"
    return Finding("policy", "privacy", "warning", sentence, remedy)


def check_limits(policy: SitePolicy) -> Iterator[Finding]:
    """Limits that let nothing run, whatever the run and the time."""
    for name, every in EVERY.items():
        alone = only(policy, name)
        if not any(decide(alone, request, facts).permit for request, facts in every()):
            yield Finding(
                "policy", name, "problem", "as it is set, no round is ever trained here", f"change {name} in policy.yaml"
            )


def usual_request() -> Request:
    """A training round of the default experiment, which is not private."""
    return Request.of(ExperimentConfig(), "train", "preflight", 1)


EVERY: dict[str, Callable[[], Iterable[tuple[Request, Facts]]]] = {
    "strategies": lambda: [(replace(usual_request(), strategy=name), Arrival(MIDNIGHT)) for name in get_args(StrategyName)],
    "models": lambda: [(replace(usual_request(), model=name), Arrival(MIDNIGHT)) for name in get_args(ModelName)],
    "max_rounds_per_day": lambda: [(usual_request(), RoundsBegun(0))],
    "quiet_hours": lambda: [(usual_request(), Arrival(MIDNIGHT + timedelta(minutes=minute))) for minute in range(24 * 60)],
}
"""For a key of the policy, all that a run could ask and a site could be in, as far as this key looks at it."""
