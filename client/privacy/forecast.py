"""What a run would spend at a site, round by round, on top of what was spent; counts nothing."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from pneumofed.client.federation.policy import only
from pneumofed.client.federation.policy_decision import LIMITS, ArrivalFacts, RunRequest, TrainingData, decide
from pneumofed.client.federation.site_data import SiteData, load_site
from pneumofed.client.privacy.entries import DataUnits, LedgerEntry, level_of, total_epsilon
from pneumofed.client.privacy.ledger import check_entry, judged_delta
from pneumofed.client.privacy.plan import SitePlan, count_units
from pneumofed.client.privacy.spending import open_ledger, round_entry
from pneumofed.common.config.experiment import ExperimentConfig, PrivacyUnit
from pneumofed.common.config.parties import SiteConfig, SitePolicy
from pneumofed.common.errors import PolicyError

CURVE_POINTS = 24
"""Points of the curve, at most: each is a composition of its own."""
PRIVACY_KEYS = (*LIMITS, "max_delta", "min_unit", "min_patients_private")
"""Keys of the policy that limit what private training may reveal."""


@dataclass(frozen=True)
class Forecast:
    """A run's numbers at one site and its epsilon after some of its rounds; the first point is round 0."""

    study: str
    unit: PrivacyUnit
    sampling_rate: float
    steps_per_round: int
    noise_multiplier: float
    delta: float
    rounds: tuple[int, ...]
    alone: tuple[float, ...]
    """Of the run by itself, for its own unit at its own delta."""
    together: tuple[float, ...]
    """Of all that was spent on the data, for one unit of `level` at `judged_delta`: what the limit is about."""
    level: PrivacyUnit
    judged_delta: float
    limit: float | None
    refused_from: int | None
    """The first round that the site would refuse."""
    refusal: str | None

    def sentences(self) -> list[str]:
        """The forecast for people."""
        last, unit = self.rounds[-1], self.unit
        numbers = f"each round draws {100 * self.sampling_rate:.3g} % of the {unit}s {self.steps_per_round} times"
        limit = "no limit is set" if self.limit is None else f"the limit is {self.limit:g}"
        so_far = f"epsilon {self.together[0]:.3g} before it and {self.together[-1]:.3g} after it"
        found = [
            f"{self.study}: {last} rounds; {numbers}, noise {self.noise_multiplier:.4g}",
            f"the run alone: epsilon {self.alone[-1]:.3g} of one {unit} at delta {self.delta:.2g}",
            f"all runs on this data: {so_far}, of one {self.level} at delta {self.judged_delta:.2g}; {limit}",
        ]
        if self.refused_from is None:
            return [*found, "all rounds are within the policy"]
        return [*found, f"round {self.refused_from} would be refused: {self.refusal}"]


def forecast(config: SiteConfig, experiment: ExperimentConfig, policy: SitePolicy) -> Forecast:
    """Computes what the run would spend on the site's present data.

    Args:
        config: the site's own.
        experiment: of the run.
        policy: the site's; only its limits of privacy are judged here.

    Raises:
        ConfigError: the experiment is not private, or the site has too few patients for it.
        DataError: the data cannot be used.
        PolicyError: the ledger cannot be read.
    """
    site = load_site(config, experiment)
    plan = SitePlan.of(experiment, count_units(site.train.patients, experiment.privacy.unit), site.patients)
    units = DataUnits.of(site)
    earlier, entry = open_ledger(config).earlier(units), round_entry("planned", 1, experiment, units, plan)
    rounds = sorted({round(number) for number in np.linspace(0, plan.rounds, min(plan.rounds, CURVE_POINTS) + 1)})
    delta, level = judged_delta([*earlier, entry], policy, site.patients), level_of([*earlier, entry], policy.min_unit)
    refused_from, refusal = _first_refusal(earlier, entry, site, policy, experiment)
    return Forecast(
        experiment.name,
        plan.unit,
        plan.sampling_rate,
        plan.steps_per_round,
        plan.noise_multiplier,
        plan.delta,
        tuple(rounds),
        tuple(plan.epsilon_after(number) for number in rounds),
        tuple(total_epsilon([*earlier, *[entry] * number], delta, level) for number in rounds),
        level,
        delta,
        policy.max_epsilon,
        refused_from,
        refusal,
    )


def _first_refusal(
    earlier: Sequence[LedgerEntry], entry: LedgerEntry, site: SiteData, policy: SitePolicy, experiment: ExperimentConfig
) -> tuple[int | None, str | None]:
    """The first round that is refused, and why; later rounds cost more, so that halving finds it."""

    request = RunRequest.of(experiment, "train", entry.run, 1)
    rules, rounds, trained = (
        only(policy, *PRIVACY_KEYS),
        experiment.rounds,
        TrainingData(len(set(site.train.patients)), site.patients),
    )
    for facts in (ArrivalFacts(datetime.min), trained):  # no rule of these asks for the time
        decision = decide(rules, request, facts)
        if not decision.permit:
            return 1, decision.reason

    def reason(number: int) -> str | None:
        try:
            check_entry([*earlier, *[entry] * (number - 1)], entry, policy, site.patients)
        except PolicyError as error:
            return str(error)
        return None

    first = 1 + bisect_left(range(1, rounds + 1), True, key=lambda number: reason(number) is not None)
    return (first, reason(first)) if first <= rounds else (None, None)
