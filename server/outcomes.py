"""What training and evaluation of one round gave, whichever way the replies came."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from common.evaluation.statistics import Statistics
from common.messages import Evaluation, Failure, Update
from server.records import SecureSumRecord, SiteTraining

Evaluations = dict[str, tuple[Evaluation, Statistics]]
"""By site: what it said of itself, and its statistics."""


@dataclass
class Trained:
    """What the strategy aggregates, and what the history tells of it."""

    updates: list[Update]
    """Those of the sites; one alone, the mean over all sites, where they are summed in secret."""
    sites: dict[str, SiteTraining]
    """By site: what is known of its own training."""
    heads: dict[str, str]
    bytes_up: int
    left_out: Mapping[str, Failure]
    failures: Mapping[str, Failure]
    secure_sum: SecureSumRecord | None = None
    central_epsilon: float | None = None


@dataclass
class Judged:
    """The sites' validation statistics, pooled and, where they are known, each site's own."""

    pooled: Statistics
    evaluations: Evaluations
    failures: Mapping[str, Failure]
    secure_validation: SecureSumRecord | None = None
