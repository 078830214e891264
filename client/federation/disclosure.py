"""What leaves a site beside its update, and what its policy makes of it.

    numbers of images          exact; with noise, where the policy names `count_noise`; under masks in secure aggregation
    the data report            as it is; `withhold: [data_report]` leaves only the numbers above
    metrics of training        as they are, in private training only those without data; `withhold: [training_metrics]` keeps them
    validation statistics      coarse, counted and of enough patients (`client.federation.evaluations`), or under masks; `withhold:
                               [validation_statistics]` sends those of no image
    those of the site's own model  by the same rules, or not at all: never in secure aggregation, which sums those of one model, and in
                               private training with `privacy.open_metrics` only
    suitability scores         of validation patients, in 64 bins, as validation statistics and by the same rules

Where the policy sets a limit of epsilon, what comes from the raw data without noise is withheld: the data report, metrics with data
whatever `privacy.open_metrics` says, and validation statistics, these two unless `open_statistics` lets them go. The numbers of
images are what differential privacy here treats as known; `count_noise` counts them too.

The time that an answer takes is seen by who waits for it; no policy hides that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pneumofed.client.federation.policy_decision import LIMITS
from pneumofed.client.federation.site_data import SiteData, class_number
from pneumofed.common.config.experiment import ExperimentConfig, Withheld
from pneumofed.common.config.parties import SitePolicy
from pneumofed.common.data.manifest import CLASSES
from pneumofed.common.wire.messages import Presence

OPEN_METRICS = ("steps", "learning_rate", "train_sec")
"""Metrics of a private round that leave without noise: the first two are the plan's own, seconds show how many units were drawn."""
SPENDING_METRICS = ("epsilon", "noise_multiplier")
COUNT_METRICS = ("steps", "images_per_sec")
"""Metrics from which the number of training images can be computed."""


@dataclass(frozen=True)
class Disclosure:
    """What of `site` may leave in a run. `train` is the number of training images that it states, 1 at least."""

    site: SiteData
    policy: SitePolicy
    train: int
    report: Mapping[str, Any]

    @classmethod
    def of(cls, site: SiteData, experiment: ExperimentConfig, policy: SitePolicy) -> Disclosure:
        """Selects what `policy` lets leave of what the experiment asks for.

        Args:
            site: the site's data.
            experiment: of the run.
            policy: the site's, as it stood when the message came.

        Raises:
            PolicyError, BudgetError: the ledger cannot be used, or has no budget for noised counts.
        """
        kept_back = withheld_of(policy, len(set(site.validation.patients)))
        withheld = {"withheld": sorted(kept_back)} if kept_back else {}
        if experiment.secure_aggregation.enabled:  # counts go under the masks, and the presence states none
            return cls(site, policy, max(1, len(site.train.labels)), withheld)
        counts = _counts(site, experiment, policy)
        report = {} if policy.count_noise or "data_report" in kept_back else dict(site.public_report)
        return cls(site, policy, counts["train"], {**report, **counts, **withheld})

    def presence(self, layout: str) -> Presence:
        """Who the site is, with the counts that may leave."""
        return Presence(self.site.name, layout, self.report)

    def metrics(self, training: Mapping[str, float]) -> dict[str, float]:
        """Selects those of `training` that may leave; what was spent on privacy always may."""
        metrics = dict(training)
        if self.withholds("training_metrics"):
            metrics = {name: value for name, value in metrics.items() if name in SPENDING_METRICS}
        if not shows_statistics(self.policy):
            metrics = {name: value for name, value in metrics.items() if name in (*SPENDING_METRICS, *OPEN_METRICS)}
        if self.policy.count_noise:
            metrics = {name: value for name, value in metrics.items() if name not in COUNT_METRICS}
        return metrics

    def withholds(self, kind: Withheld) -> bool:
        return kind in withheld_of(self.policy, len(set(self.site.validation.patients)))

    def shows_personal(self, experiment: ExperimentConfig) -> bool:
        """Whether statistics of the site's own model may leave, once they are counted as one more answer.

        That model is trained without noise, so that in a private run they tell of the training images what no epsilon is counted for, as
        the training loss does; `privacy.open_metrics` asks for both, and the policy has the last word on both.
        """
        return experiment.personal.is_on and self.shows_unnoised(experiment)

    def shows_unnoised(self, experiment: ExperimentConfig) -> bool:
        """Whether statistics of a model that the site trains without noise beside the run's may leave, once they are counted."""
        if experiment.secure_aggregation.enabled:
            return False
        noised = experiment.privacy.mechanism != "none"
        return not self.withholds("validation_statistics") and (experiment.privacy.open_metrics or not noised)


def is_limited(policy: SitePolicy) -> bool:
    """Whether the policy sets a limit of epsilon."""
    return any(getattr(policy, limit) is not None for limit in LIMITS)


def shows_statistics(policy: SitePolicy) -> bool:
    """Whether numbers that were counted on the data without noise may leave: not beside a limit of epsilon, unless the hospital says so."""
    return policy.open_statistics or not is_limited(policy)


def rule_against_statistics(policy: SitePolicy) -> str:
    """Names the key of policy.yaml by which no validation statistics leave, however many patients there are; empty where they may."""
    if "validation_statistics" in policy.withhold:
        return "withhold"
    return "" if shows_statistics(policy) else next(limit for limit in LIMITS if getattr(policy, limit) is not None)


def withheld_of(policy: SitePolicy, validation_patients: int) -> set[Withheld]:
    """Decides what is kept back whatever a run asks for.

    Args:
        policy: the site's.
        validation_patients: of the site now.
    """
    kept: set[Withheld] = set(policy.withhold)
    if is_limited(policy):
        kept.add("data_report")
    if validation_patients < policy.min_validation_patients or not shows_statistics(policy):
        kept.add("validation_statistics")
    return kept


def _counts(site: SiteData, experiment: ExperimentConfig, policy: SitePolicy) -> dict[str, Any]:
    """Training and validation images; with noise they come with the deviation and the classes, which cost nothing more."""
    exact = {"train": len(site.train.labels), "validation": len(site.validation.labels)}
    if not policy.count_noise:
        return exact
    from pneumofed.client.privacy.counts import noised_counts  # Opacus costs a second to import

    counts = [*site.class_counts(class_number(experiment)), exact["validation"]]
    *classes, validation = noised_counts(site, experiment, counts, policy)
    shares = dict(zip(CLASSES[experiment.task], classes, strict=True))
    return {"train": max(1, sum(classes)), "validation": validation, "classes": shares, "count_noise": policy.count_noise}
