"""The hospital's policy against what a run asks. Each rule is one small function; the first that is broken refuses.

    before any data is read    strategies, models, require_secure_aggregation, the run's own epsilon, unit and delta; for work in a
                               round also quiet_hours; for training max_rounds_per_day
    before training            min_patients, once the data is known; the epsilon that remains (see `client.privacy.spending`)

The hashes of approved code are no rule of this module, which is part of the bundle that they judge: see `client.gate`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, time, timedelta
from pathlib import Path
from typing import Literal

from common.config import ExperimentConfig
from common.config_reader import build_config, read_yaml
from common.data.atomic import atomic_write, exclusive
from common.errors import ConfigError, PolicyError
from common.party_config import SitePolicy

Work = Literal["query", "train", "evaluate"]
"""Roll call, training, evaluation."""
Clock = Callable[[], datetime]
"""Tells the local time of day."""
DAY = timedelta(hours=24)


def local_now() -> datetime:
    """The time of the site's own clock, with its zone."""
    return datetime.now().astimezone()


def read_policy(path: Path) -> SitePolicy:
    """The policy in `path`.

    Raises:
        ConfigError: it is missing or wrong.
    """
    return build_config(SitePolicy, read_yaml(path), path.name)


def require_policy(path: Path) -> SitePolicy:
    """The policy in `path`, without which nothing may run.

    Raises:
        PolicyError: it cannot be read, so everything is refused.
    """
    try:
        return read_policy(path)
    except ConfigError as error:
        raise PolicyError("policy", f"the policy cannot be read, so nothing may run: {error}") from error


def check_run(policy: SitePolicy, experiment: ExperimentConfig, work: Work, work_dir: Path, now: Clock = local_now) -> None:
    """Refuses what can be refused without the data; a training round that passes is counted.

    Raises:
        PolicyError: names the rule.
    """
    check_strategy(policy, experiment)
    check_model(policy, experiment)
    check_epsilon(policy, experiment)
    check_secure_aggregation(policy, experiment)
    if work != "query":  # a site that is busy now may still be counted on later in the run
        check_quiet_hours(policy, now())
    if work == "train":
        count_round(policy, work_dir, now())


def check_strategy(policy: SitePolicy, experiment: ExperimentConfig) -> None:
    name = experiment.strategy.name
    if policy.strategies is not None and name not in policy.strategies:
        raise PolicyError("strategies", f"the run uses {name}; allowed are {', '.join(policy.strategies) or 'none'}")


def check_model(policy: SitePolicy, experiment: ExperimentConfig) -> None:
    name = experiment.model.name
    if policy.models is not None and name not in policy.models:
        raise PolicyError("models", f"the run trains {name}; allowed are {', '.join(policy.models) or 'none'}")


def check_epsilon(policy: SitePolicy, experiment: ExperimentConfig) -> None:
    """Refuses what the experiment alone shows to exceed the privacy limits; the ledger refuses what comes on top of earlier runs.

    Raises:
        PolicyError: the run is not private where a limit is set, its target is above a limit, it protects less than the hospital
            asks for, or plans with a larger delta. A run that names its noise in place of a target is judged by the ledger.
    """
    privacy = experiment.privacy
    for rule in ("max_epsilon", "max_epsilon_per_study"):
        limit = getattr(policy, rule)
        if limit is None:
            continue
        if privacy.mechanism == "none":
            raise PolicyError(rule, f"the run is not differentially private; the limit is epsilon {limit:g}")
        if privacy.noise_multiplier is None and privacy.target_epsilon > limit:
            raise PolicyError(rule, f"the run plans epsilon {privacy.target_epsilon:g}; the limit is {limit:g}")
    if privacy.mechanism == "none":
        return
    if policy.min_unit == "patient" and privacy.unit == "image":
        raise PolicyError("min_unit", "the run protects single images; the policy asks for patients")
    if policy.max_delta is not None and privacy.delta is not None and privacy.delta > policy.max_delta:
        raise PolicyError("max_delta", f"the run plans with delta {privacy.delta:g}; at most {policy.max_delta:g} is allowed")


def check_secure_aggregation(policy: SitePolicy, experiment: ExperimentConfig) -> None:
    if policy.require_secure_aggregation and not experiment.secure_aggregation.enabled:
        raise PolicyError("require_secure_aggregation", "the run does not use secure aggregation")


def check_quiet_hours(policy: SitePolicy, now: datetime) -> None:
    for hours in policy.quiet_hours:
        if _within(now.time(), hours):
            raise PolicyError("quiet_hours", f"it is {now:%H:%M} here, within the quiet hours {hours}")


def check_patients(policy: SitePolicy, patients: int) -> None:
    """Refuses a site's part where its training set holds too few patients."""
    if patients < policy.min_patients:
        raise PolicyError("min_patients", f"{patients} training patients, at least {policy.min_patients} are needed")


def count_round(policy: SitePolicy, work_dir: Path, now: datetime) -> None:
    """Counts a training round before it begins: one that crashes counts, none goes uncounted.

    Raises:
        PolicyError: `max_rounds_per_day` were begun in the last 24 hours, or the count cannot be read.
    """
    work_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with exclusive(work_dir):
        begun = rounds_within_a_day(work_dir, now)
        if len(begun) >= policy.max_rounds_per_day:
            raise PolicyError(
                "max_rounds_per_day", f"{len(begun)} rounds in the last 24 hours, the limit is {policy.max_rounds_per_day}"
            )
        with atomic_write(_count_file(work_dir)) as file:
            file.write(json.dumps([*begun, now.timestamp()]).encode())


def rounds_within_a_day(work_dir: Path, now: datetime) -> list[float]:
    """When the training rounds of the last 24 hours began; those that lie in the future, after the clock was set back, count too.

    Raises:
        PolicyError: the count cannot be read.
    """
    path = _count_file(work_dir)
    try:
        begun = [float(value) for value in json.loads(path.read_bytes())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise PolicyError(
            "max_rounds_per_day", f"{path} cannot be read, so rounds cannot be counted; remove it to count anew"
        ) from error
    return [moment for moment in begun if moment > (now - DAY).timestamp()]


def _count_file(work_dir: Path) -> Path:
    return work_dir / "rounds.json"


def _within(now: time, hours: str) -> bool:
    """Whether `now` lies in `hours` (HH:MM-HH:MM, the end not included); the same time twice is the whole day."""
    start, end = (time.fromisoformat(part) for part in hours.split("-"))
    if start < end:
        return start <= now < end
    return now >= start or now < end
