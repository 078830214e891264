"""The hospital's policy: read once for each message, and enforced on it. What it decides is in `client.federation.policy_decision`.

    before any data is read    strategies, models, require_secure_aggregation and the terms of its sums (`client.federation.sum_terms`,
                               in each step), the run's own epsilon, unit, delta and share of validation; for work in a round also
                               quiet_hours; for training the epsilon that remains (see `client.privacy.ledger`) and
                               max_rounds_per_day
    before training            min_patients and min_patients_private, once the data is known; the epsilon of the round, which the ledger
                               counts
    before an evaluation       min_validation_patients, max_evaluations_per_day and max_evaluations_per_data, which
                               `client.federation.evaluations` counts

Whoever answers a message reads the policy with `policy_of` and hands it down, so that an edit in between gives no mixed answer.
The hashes of approved code are no rule of this module, which is part of the bundle that they judge: see `client.site.code_gate`, which
reads the policy for itself before the app that answers is even unpacked.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import get_args

from pneumofed.client.federation.policy_decision import RoundsBegun, RunRequest, decide
from pneumofed.common.audit.log import canonical
from pneumofed.common.config.parties import SiteConfig, SitePolicy, SurveyField
from pneumofed.common.config.reader import build_config, read_yaml
from pneumofed.common.errors import ConfigError, PolicyError
from pneumofed.common.files import StateFile

Clock = Callable[[], datetime]
"""Returns the local time of day."""
DAY = timedelta(hours=24)
UNRESTRICTED = SitePolicy().model_copy(
    update={
        **dict.fromkeys(("min_patients", "min_patients_private", "min_validation_patients", "min_validation_share"), 0),
        **dict.fromkeys(("max_rounds_per_day", "max_evaluations_per_day", "max_evaluations_per_data"), sys.maxsize),
        "max_validation_share": 1.0,
        **dict.fromkeys(("train_alone", "share_own_model"), True),
        "survey": list(get_args(SurveyField)),
        "max_delta": 1.0,
        "score_bins": 2048,
        "min_sum_threshold": 0.0,
        "min_sites_in_sum": 0,
        "max_weight_in_sum": 1.0,
        "max_sum_step": math.inf,
        "min_neighbours": 0,
    }
)
"""Refuses nothing and withholds nothing: of a site without a policy file, as in simulation. No file can say `min_patients: 0`."""


def local_now() -> datetime:
    """The time of the site's own clock, with its zone."""
    return datetime.now().astimezone()


def read_policy(path: Path) -> SitePolicy:
    """Reads the policy in `path`.

    Raises:
        ConfigError: it is missing or wrong.
    """
    return build_config(SitePolicy, read_yaml(path), path.name)


def require_policy(path: Path) -> SitePolicy:
    """Reads the policy in `path`, without which nothing may run.

    Raises:
        PolicyError: it cannot be read, so everything is refused.
    """
    try:
        return read_policy(path)
    except ConfigError as error:
        raise PolicyError("policy", f"the policy cannot be read, so nothing may run: {error}") from error


def policy_of(config: SiteConfig) -> SitePolicy:
    """Reads the site's policy; where site.yaml names none, as in simulation, it is one that refuses nothing. To be called once a message.

    Raises:
        PolicyError: it cannot be read, so everything is refused.
    """
    return require_policy(Path(config.policy)) if config.policy else UNRESTRICTED


def hash_policy(policy: SitePolicy) -> str:
    """Computes the SHA-256 of a policy, independent of how its file was written: the audit log shows by it whether the policy changed."""
    return hashlib.sha256(canonical(policy.model_dump(mode="json"))).hexdigest()


def only(policy: SitePolicy, *keys: str) -> SitePolicy:
    """Returns the policy with these keys as they are set, and nothing restricted by any other: what they refuse by themselves.

    Args:
        policy: the hospital's.
        keys: of policy.yaml.
    """
    return UNRESTRICTED.model_copy(update={key: getattr(policy, key) for key in keys})


def count_round(policy: SitePolicy, request: RunRequest, work_dir: Path, now: datetime) -> None:
    """Counts a training round before it begins: one that crashes counts, none goes uncounted.

    Args:
        policy: the hospital's.
        request: the round that is asked for.
        work_dir: the site's own folder, which keeps the count.
        now: the local time.

    Raises:
        PolicyError: `max_rounds_per_day` were begun in the last 24 hours, or the count cannot be read.
    """
    file = _count_file(work_dir)
    with file.locked() as counted:
        begun = _within_a_day(counted, now)
        decide(policy, request, RoundsBegun(len(begun))).enforce()
        file.write([*begun, now.timestamp()])


def count_lost_rounds(work_dir: Path, rounds: int, now: datetime) -> None:
    """Counts training rounds that may have begun and were not counted here, as after a restore.

    Args:
        work_dir: the site's own folder, which keeps the count.
        rounds: how many.
        now: the local time.

    Raises:
        PolicyError: the count cannot be read.
        OSError: it cannot be written.
    """
    file = _count_file(work_dir)
    with file.locked() as counted:
        file.write([*_within_a_day(counted, now), *[now.timestamp()] * rounds])


def _within_a_day(begun: list[float], now: datetime) -> list[float]:
    """Rounds of the last 24 hours; those that lie in the future, after the clock was set back, count too."""
    return [moment for moment in begun if moment > (now - DAY).timestamp()]


def _count_file(work_dir: Path) -> StateFile[list[float]]:
    return StateFile(
        work_dir / "rounds.json",
        kind="the count of training rounds",
        parse=lambda content: [float(value) for value in json.loads(content)],
        missing=[],
        remedy="so rounds cannot be counted; remove it to count anew",
        refuse=lambda problem: PolicyError("max_rounds_per_day", problem),
    )
