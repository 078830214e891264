"""What leaves a site beside its update, and what its policy makes of it.

    numbers of images          exact; with noise, where the policy names `count_noise`; under masks in secure aggregation
    the data report            as it is; `withhold: [data_report]` leaves only the numbers above
    metrics of training        as they are, in private training only those without data; `withhold: [training_metrics]` keeps them
    validation statistics      as they are, or under masks; `withhold: [validation_statistics]` sends those of no image

The time that an answer takes is seen by who waits for it; no policy hides that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pneumofed.client.federation.site_data import SiteData, class_number
from pneumofed.common.config.experiment import ExperimentConfig, Withheld
from pneumofed.common.config.parties import SitePolicy
from pneumofed.common.data.manifest import CLASSES
from pneumofed.common.wire.messages import Presence

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
        withheld = {"withheld": sorted(policy.withhold)} if policy.withhold else {}
        if experiment.secure_aggregation.enabled:  # counts go under the masks, and the presence states none
            return cls(site, policy, max(1, len(site.train.labels)), withheld)
        counts = _counts(site, experiment, policy)
        report = {} if policy.count_noise or "data_report" in policy.withhold else dict(site.public_report)
        return cls(site, policy, counts["train"], {**report, **counts, **withheld})

    def presence(self, layout: str) -> Presence:
        """Who the site is, with the counts that may leave."""
        return Presence(self.site.name, layout, self.report)

    def metrics(self, training: Mapping[str, float]) -> dict[str, float]:
        """Selects those of `training` that may leave; what was spent on privacy always may."""
        metrics = dict(training)
        if self.withholds("training_metrics"):
            metrics = {name: value for name, value in metrics.items() if name in ("epsilon", "noise_multiplier")}
        if self.policy.count_noise:
            metrics = {name: value for name, value in metrics.items() if name not in COUNT_METRICS}
        return metrics

    def withholds(self, kind: Withheld) -> bool:
        return kind in self.policy.withhold


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
